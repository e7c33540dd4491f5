// SPDX-License-Identifier: Apache-2.0
// Rows of logits on the instruction set that runs here, and what a row needs once.
#include "kernels/cross_entropy.h"

#include <cmath>

#include "core/error.h"
#include "kernels/cpu/reduce_variants.h"
#include "kernels/element.h"

namespace tp_native::kernels {
namespace {

#include "kernels/cpu/exponential.h"

void check_floating(DType dtype) {
  TPN_CHECK(is_floating(dtype), "cross entropy of ", name(dtype), ": expected a floating dtype");
}

template <class F>
decltype(auto) with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Float16{});
    default:
      return f(BFloat16{});
  }
}

}  // namespace

double shift_of(double max) { return std::isinf(max) && max < 0 ? 0 : max; }

double logit_value(DType dtype, const void* row, int64_t column) {
  return with_type(dtype, [&](auto type) -> double {
    return widen(static_cast<const decltype(type)*>(row)[column]);
  });
}

LogitStatistics logit_statistics(DType dtype, const void* row, int64_t columns,
                                 bool has_shifted_sum) {
  check_floating(dtype);
  LogitStatistics found;
  variant().logit_statistics(dtype, row, columns, has_shifted_sum, found);
  return found;
}

LogitStatistics combined(std::span<const LogitStatistics> ranks, std::span<const int64_t> columns) {
  LogitStatistics whole;
  for (const LogitStatistics& part : ranks) {
    if (part.max > whole.max) whole.max = part.max;
  }
  const double shift = shift_of(whole.max);
  for (size_t r = 0; r < ranks.size(); ++r) {
    const LogitStatistics& part = ranks[r];
    if (columns[r] == 0) continue;
    const double step = shift_of(part.max) - shift;
    // all columns -infinity: their sum is 0, or NaN, and relative to nothing
    whole.exp_sum += std::isinf(part.max) ? part.exp_sum : part.exp_sum * std::exp(step);
    whole.shifted_sum += part.shifted_sum + static_cast<double>(columns[r]) * step;
  }
  return whole;
}

void logit_gradient(DType dtype, const void* row, int64_t columns, const LogitGradient& g,
                    void* out) {
  check_floating(dtype);
  variant().logit_gradient(dtype, row, columns, g, out);
  if (g.hit < 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using V = Value<T>;
    const V x = widen(static_cast<const T*>(row)[g.hit]);
    const V e = exponential<V>(x - static_cast<V>(g.max));
    const V share = e * static_cast<V>(g.weight / g.exp_sum);
    static_cast<T*>(out)[g.hit] =
        rounded<T>(share - static_cast<V>(g.weight * g.smoothing + g.hit_weight));
  });
}

}  // namespace tp_native::kernels
