// SPDX-License-Identifier: Apache-2.0
// The RMSNorm of rows just reduced, shared by the x86 variants. Included after reduce_simd.h, on
// the same terms.

/// Adds the squares of a block; of the zeros beyond a tail too, which changes nothing.
template <class T>
inline void add_squares(WideOf<T>& sums, const Packed<T>& h) {
  const WideOf<T> x = widen(h);
  each<WideOf<T>::kParts>([&](int k) { sums.part[k] = sums.part[k] + x.part[k] * x.part[k]; });
}

/// The partial sums in the order of the columns.
template <class T, class V>
inline void spread(const WideOf<T>& sums, V (&ordered)[kPartialSums]) {
  constexpr int kLanes = sizeof(Register) / sizeof(V);
  for (int k = 0; k < kPartialSums; ++k) {
    const int part = k / kLanes;
    const int lane = k % kLanes;
    const int column = __is_same(T, BFloat16) ? part / 2 * 2 * kLanes + 2 * lane + part % 2 : k;
    ordered[column] = sums.part[part][lane];
  }
}

template <class T, bool kWhole>
[[gnu::always_inline]] inline void normalise(const RowReduction& r, const T* h, int64_t begin,
                                             int64_t c, typename Computed<T>::type scale,
                                             int64_t left) {
  auto x = fetch_wide<kWhole>(h + c, left);
  each<decltype(x)::kParts>([&](int k) { x.part[k] = x.part[k] * scale; });
  x = widen(narrow<T>(x));
  const auto weight = fetch_wide<kWhole>(static_cast<const T*>(r.norm_weight) + c, left);
  each<decltype(x)::kParts>([&](int k) { x.part[k] = x.part[k] * weight.part[k]; });
  put_all<kWhole>(r.targets, r.normed, begin + c, narrow<T>(x), left);
}

template <class T>
void rms_norm_rows(const RowReduction& r) {
  using V = typename Computed<T>::type;
  static_assert(kBlock<T> == kPartialSums);
  // without `hidden`, h lies where the result will
  void* const* const hidden = r.hidden ? r.hidden : r.normed;
  const int targets = r.hidden ? r.targets : 1;
  const int64_t whole = r.columns / kBlock<T> * kBlock<T>;
  const int64_t left = r.columns - whole;
  for (int64_t row = 0; row < r.rows; ++row) {
    const int64_t begin = row * r.columns;
    const Segment s{r.sources, r.src, targets, hidden, begin, r.columns, r.bias, r.residual};
    WideOf<T> sums{};
    for (int64_t i = begin; i < begin + whole; i += kBlock<T>) {
      const Packed<T> x = reduced<T, ReduceOp::kSum, 0, true>(s, i, kBlock<T>);
      put_all<true>(targets, hidden, i, x, kBlock<T>);
      add_squares(sums, x);
    }
    if (left > 0) {
      const Packed<T> x = reduced<T, ReduceOp::kSum, 0, false>(s, begin + whole, left);
      put_all<false>(targets, hidden, begin + whole, x, left);
      add_squares(sums, x);
    }
    V ordered[kPartialSums];
    spread<T>(sums, ordered);
    const V scale = rms_scale(ordered, r.columns, r.eps);
    const T* const h = static_cast<const T*>(hidden[0]) + begin;
    for (int64_t c = 0; c < whole; c += kBlock<T>) {
      normalise<T, true>(r, h, begin, c, scale, kBlock<T>);
    }
    if (left > 0) normalise<T, false>(r, h, begin, whole, scale, left);
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
