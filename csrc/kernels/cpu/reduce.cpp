// SPDX-License-Identifier: Apache-2.0
// Picks the instruction set once and walks the bias row by row.
#include "kernels/reduce.h"

#include <algorithm>

#include "core/error.h"
#include "kernels/cpu/reduce_variants.h"

namespace tp_native::kernels {
namespace {

struct Variant {
  ReduceSegment run;
  const char* isa;
};

Variant pick() {
  if (const auto run = avx512_reduce()) return {run, "avx512"};
  if (const auto run = avx2_reduce()) return {run, "avx2"};
  return {&reduce_generic, "generic"};
}

const Variant& variant() {
  static const Variant kVariant = pick();
  return kVariant;
}

}  // namespace

const char* reduce_isa() { return variant().isa; }

bool can_reduce(DType dtype, ReduceOp) { return is_floating(dtype); }

void reduce(const Reduction& r) {
  Segment segment{r.sources, r.src, r.targets, r.dst, 0, r.count, nullptr};
  if (!r.bias || r.columns == 0) return variant().run(r.dtype, r.op, segment);
  const auto width = static_cast<int64_t>(item_bytes(r.dtype));
  for (int64_t done = 0; done < r.count; done += segment.count) {
    const int64_t column = (r.first + done) % r.columns;
    segment.offset = done;
    segment.count = std::min(r.count - done, r.columns - column);
    segment.bias = static_cast<const char*>(r.bias) + column * width;
    variant().run(r.dtype, r.op, segment);
  }
}

}  // namespace tp_native::kernels
