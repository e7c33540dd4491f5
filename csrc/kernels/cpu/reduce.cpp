// SPDX-License-Identifier: Apache-2.0
// Picks the instruction set once and walks the bias row by row.
#include "kernels/reduce.h"

#include <algorithm>

#include "core/error.h"
#include "kernels/cpu/reduce_variants.h"

namespace tp_native::kernels {

const Variant& variant() {
  static const Variant& kVariant = []() -> const Variant& {
    if (const Variant* const avx512 = avx512_variant()) return *avx512;
    if (const Variant* const avx2 = avx2_variant()) return *avx2;
    return kGeneric;
  }();
  return kVariant;
}

const char* reduce_isa() { return variant().isa; }

bool can_reduce(DType dtype, ReduceOp op) {
  if (dtype > DType::kBool || op > ReduceOp::kAvg) return false;
  return op != ReduceOp::kAvg || is_floating(dtype);
}

void reduce(const Reduction& r) {
  TPN_CHECK(can_reduce(r.dtype, r.op), "reduce: ", name(r.dtype), " has no ", name(r.op));
  Segment segment{r.sources, r.src, r.targets, r.dst, 0, r.count, nullptr, nullptr};
  const auto width = static_cast<int64_t>(item_bytes(r.dtype));
  if (r.residual) segment.residual = static_cast<const char*>(r.residual) + r.first * width;
  if (!r.bias || r.columns == 0) return variant().reduce(r.dtype, r.op, segment);
  for (int64_t done = 0; done < r.count; done += segment.count) {
    const int64_t column = (r.first + done) % r.columns;
    segment.offset = done;
    segment.count = std::min(r.count - done, r.columns - column);
    segment.bias = static_cast<const char*>(r.bias) + column * width;
    variant().reduce(r.dtype, r.op, segment);
  }
}

void reduce_rms_norm(const RowReduction& r) {
  TPN_CHECK(r.dtype <= DType::kBFloat16, "reduce_rms_norm: ", name(r.dtype),
            " is not supported: expected a floating dtype");
  if (r.targets == 0 || r.columns == 0) return;
  variant().reduce_rms_norm(r);
}

}  // namespace tp_native::kernels
