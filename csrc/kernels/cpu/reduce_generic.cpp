// SPDX-License-Identifier: Apache-2.0
// Every dtype and operation in plain C++; also the reference of the SIMD variants.
#include <concepts>
#include <limits>

#include "core/error.h"
#include "kernels/cpu/reduce_variants.h"
#include "kernels/element.h"
#include "kernels/row_norm.h"

namespace tp_native::kernels {
namespace {

template <ReduceOp kOp, class T>
void run(const Segment& s) {
  for (int64_t i = s.offset; i < s.offset + s.count; ++i) {
    auto acc = widen(static_cast<const T*>(s.src[0])[i]);
    for (int r = 1; r < s.sources; ++r) {
      acc = combine<kOp>(acc, widen(static_cast<const T*>(s.src[r])[i]));
    }
    if constexpr (kOp == ReduceOp::kAvg) acc /= static_cast<decltype(acc)>(s.sources);
    if (s.bias) acc = plus(acc, widen(static_cast<const T*>(s.bias)[i - s.offset]));
    T out = rounded<T>(acc);
    if (s.residual) {
      const T* const residual = static_cast<const T*>(s.residual);
      out = rounded<T>(plus(widen(out), widen(residual[i])));
    }
    for (int d = 0; d < s.targets; ++d) static_cast<T*>(s.dst[d])[i] = out;
  }
}

template <class T>
void run(ReduceOp op, const Segment& segment) {
  switch (op) {
    case ReduceOp::kSum:
      return run<ReduceOp::kSum, T>(segment);
    case ReduceOp::kMax:
      return run<ReduceOp::kMax, T>(segment);
    case ReduceOp::kMin:
      return run<ReduceOp::kMin, T>(segment);
    case ReduceOp::kAvg:
      if constexpr (!std::integral<Value<T>>) return run<ReduceOp::kAvg, T>(segment);
      fail("reduce: avg needs a floating dtype");
  }
}

void reduce_any(DType dtype, ReduceOp op, const Segment& segment) {
  switch (dtype) {
    case DType::kFloat32:
      return run<float>(op, segment);
    case DType::kFloat64:
      return run<double>(op, segment);
    case DType::kFloat16:
      return run<Float16>(op, segment);
    case DType::kBFloat16:
      return run<BFloat16>(op, segment);
    case DType::kInt32:
      return run<int32_t>(op, segment);
    case DType::kInt64:
      return run<int64_t>(op, segment);
    case DType::kInt16:
      return run<int16_t>(op, segment);
    case DType::kInt8:
      return run<int8_t>(op, segment);
    case DType::kUInt8:
      return run<uint8_t>(op, segment);
    case DType::kBool:
      return run<Bool>(op, segment);
  }
}

template <class T>
void rms_norm_rows(const RowReduction& r) {
  using V = Value<T>;
  const T* const weight = static_cast<const T*>(r.norm_weight);
  for (int64_t row = 0; row < r.rows; ++row) {
    const int64_t begin = row * r.columns;
    // without `hidden`, h lies where the result will
    void* const* const hidden = r.hidden ? r.hidden : r.normed;
    run<ReduceOp::kSum, T>(
        {r.sources, r.src, r.hidden ? r.targets : 1, hidden, begin, r.columns, r.bias, r.residual});
    const T* const h = static_cast<const T*>(hidden[0]) + begin;
    V sums[kPartialSums] = {};
    for (int64_t c = 0; c < r.columns; ++c) {
      V& sum = sums[c % kPartialSums];
      sum = plus_square(sum, widen(h[c]));
    }
    const V scale = rms_scale(sums, r.columns, r.eps);
    for (int64_t c = 0; c < r.columns; ++c) {
      const T out = normalised(h[c], scale, weight[c]);
      for (int d = 0; d < r.targets; ++d) static_cast<T*>(r.normed[d])[begin + c] = out;
    }
  }
}

void rms_norm_any(const RowReduction& r) {
  switch (r.dtype) {
    case DType::kFloat32:
      return rms_norm_rows<float>(r);
    case DType::kFloat64:
      return rms_norm_rows<double>(r);
    case DType::kFloat16:
      return rms_norm_rows<Float16>(r);
    default:
      return rms_norm_rows<BFloat16>(r);
  }
}

template <class V>
V sum_of(V (&sums)[kPartialSums]) {
  for (int half = kPartialSums / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

#include "kernels/cpu/exponential.h"

template <class T, bool kHasShifted>
void logit_statistics_of(const T* row, int64_t columns, LogitStatistics& out) {
  using V = Value<T>;
  constexpr V kNone = -std::numeric_limits<V>::infinity();
  V max = kNone;
  for (int64_t c = 0; c < columns; ++c) {
    const V x = widen(row[c]);
    max = x > max ? x : max;
  }
  max = max + V{0};
  const V shift = max == kNone ? V{0} : max;
  V sums[kPartialSums] = {};
  V shifted[kPartialSums] = {};
  for (int64_t c = 0; c < columns; ++c) {
    const V below = widen(row[c]) - shift;
    sums[c % kPartialSums] += exponential<V>(below);
    if constexpr (kHasShifted) shifted[c % kPartialSums] += below;
  }
  out = {max, sum_of(sums), sum_of(shifted)};
}

template <class T>
void logit_gradient_of(const T* row, int64_t columns, const LogitGradient& g, T* out) {
  using V = Value<T>;
  const V max = static_cast<V>(g.max);
  const V scale = static_cast<V>(g.weight / g.exp_sum);
  const V offset = static_cast<V>(g.weight * g.smoothing);
  for (int64_t c = 0; c < columns; ++c) {
    const V e = exponential<V>(widen(row[c]) - max);
    out[c] = rounded<T>(e * scale - offset);
  }
}

#include "kernels/cpu/cross_entropy_any.h"

}  // namespace

float total_of(float (&sums)[kPartialSums]) { return sum_of(sums); }
double total_of(double (&sums)[kPartialSums]) { return sum_of(sums); }
float rms_scale(float (&sums)[kPartialSums], int64_t columns, double eps) {
  return inverse_rms(sum_of(sums), columns, eps);
}
double rms_scale(double (&sums)[kPartialSums], int64_t columns, double eps) {
  return inverse_rms(sum_of(sums), columns, eps);
}

const Variant kGeneric{"generic", &reduce_any, &rms_norm_any, &logit_statistics_any,
                       &logit_gradient_any};

}  // namespace tp_native::kernels
