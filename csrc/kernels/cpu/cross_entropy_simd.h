// SPDX-License-Identifier: Apache-2.0
// Rows of logits, shared by the x86 variants. Included after rms_norm_simd.h, on the same
// terms.
#include "kernels/cpu/exponential.h"

template <class V>
using BitsOf = typename Vec<typename ExponentialOf<V>::Bits>::type;

/// The last columns % kPartialSums logits; returns how many.
template <class T, class V>
inline int64_t fetch_tail(const T* row, int64_t columns, V (&tail)[kPartialSums]) {
  const int64_t left = columns % kPartialSums;
  if (left > 0) spread<T>(fetch_wide<false>(row + (columns - left), left), tail);
  return left;
}

template <class T, bool kHasShifted>
void logit_statistics_of(const T* row, int64_t columns, LogitStatistics& out) {
  using V = typename Computed<T>::type;
  static_assert(kBlock<T> == kPartialSums);
  constexpr V kNone = -static_cast<V>(__builtin_inff());
  V tail[kPartialSums];
  const int64_t left = fetch_tail(row, columns, tail);
  const int64_t whole = columns - left;

  WideOf<T> top;
  each<WideOf<T>::kParts>([&](int k) { top.part[k] = typename Vec<V>::type{} + kNone; });
  for (int64_t c = 0; c < whole; c += kBlock<T>) {
    const WideOf<T> x = fetch_wide<true>(row + c, kBlock<T>);
    each<WideOf<T>::kParts>(
        [&](int k) { top.part[k] = x.part[k] > top.part[k] ? x.part[k] : top.part[k]; });
  }
  V ordered[kPartialSums];
  spread<T>(top, ordered);
  V max = kNone;
  for (const V x : ordered) max = x > max ? x : max;
  for (int64_t k = 0; k < left; ++k) max = tail[k] > max ? tail[k] : max;
  max = max + V{0};  // one of the two zeros, whatever came first
  const V shift = max == kNone ? V{0} : max;

  WideOf<T> sums{};
  WideOf<T> shifted{};
  for (int64_t c = 0; c < whole; c += kBlock<T>) {
    const WideOf<T> x = fetch_wide<true>(row + c, kBlock<T>);
    each<WideOf<T>::kParts>([&](int k) {
      const typename Vec<V>::type below = x.part[k] - shift;
      sums.part[k] = sums.part[k] + exponential<V, BitsOf<V>>(below);
      if constexpr (kHasShifted) shifted.part[k] = shifted.part[k] + below;
    });
  }
  out.max = max;
  spread<T>(sums, ordered);
  for (int64_t k = 0; k < left; ++k) {
    ordered[k] += exponential<V>(tail[k] - shift);
  }
  out.exp_sum = total_of(ordered);
  if constexpr (kHasShifted) {
    spread<T>(shifted, ordered);
    for (int64_t k = 0; k < left; ++k) ordered[k] += tail[k] - shift;
    out.shifted_sum = total_of(ordered);
  }
}

template <class T, bool kWhole>
[[gnu::always_inline]] inline void put_logit_gradient(const T* row, typename Computed<T>::type max,
                                                      typename Computed<T>::type scale,
                                                      typename Computed<T>::type offset, T* out,
                                                      int64_t left) {
  using V = typename Computed<T>::type;
  WideOf<T> x = fetch_wide<kWhole>(row, left);
  each<WideOf<T>::kParts>(
      [&](int k) { x.part[k] = exponential<V, BitsOf<V>>(x.part[k] - max) * scale - offset; });
  put<kWhole>(out, narrow<T>(x), left);
}

template <class T>
void logit_gradient_of(const T* row, int64_t columns, const LogitGradient& g, T* out) {
  using V = typename Computed<T>::type;
  const V max = static_cast<V>(g.max);
  const V scale = static_cast<V>(g.weight / g.exp_sum);
  const V offset = static_cast<V>(g.weight * g.smoothing);
  const int64_t left = columns % kBlock<T>;
  const int64_t whole = columns - left;
  for (int64_t c = 0; c < whole; c += kBlock<T>) {
    put_logit_gradient<T, true>(row + c, max, scale, offset, out + c, kBlock<T>);
  }
  if (left > 0) put_logit_gradient<T, false>(row + whole, max, scale, offset, out + whole, left);
}

#include "kernels/cpu/cross_entropy_any.h"
