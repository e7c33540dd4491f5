// SPDX-License-Identifier: Apache-2.0
// The vector loops, shared by the x86 variants. Included inside an anonymous namespace of a file
// that defines `Lanes`, so that no symbol compiled for one instruction set can be picked for
// another. For the same reason nothing here calls an inline function from outside, std:: included.

using Register = Lanes::Register;

template <class T>
struct Vec {
  typedef T type __attribute__((vector_size(sizeof(Register))));
};

/// What T is computed in.
template <class T>
struct Computed {
  using type = T;
};
template <>
struct Computed<BFloat16> {
  using type = float;
};
template <>
struct Computed<Float16> {
  using type = float;
};
template <>
struct Computed<Bool> {
  using type = uint8_t;
};

template <class T>
constexpr int kBlock = sizeof(T) == 1 ? 64 : 32;  // elements

template <class T>
constexpr bool kIsInteger = static_cast<T>(0.5) == 0;

/// A block of T as it lies in memory.
template <class T>
struct Packed {
  static constexpr int kParts = kBlock<T> * sizeof(T) / sizeof(Register);
  Register part[kParts];
};

/// A block to compute with. Those of 16-bit types are in the order that widening them leaves.
template <class V>
struct Wide {
  static constexpr int kParts = kBlock<V> * sizeof(V) / sizeof(Register);
  typename Vec<V>::type part[kParts];
};

template <class T>
using WideOf = Wide<typename Computed<T>::type>;

/// f(0), ..., f(kCount - 1), unrolled at every level of optimisation: blocks stay in registers.
template <int kCount, int kFirst = 0, class F>
[[gnu::always_inline]] inline void each(const F& f) {
  if constexpr (kFirst < kCount) {
    f(kFirst);
    each<kCount, kFirst + 1>(f);
  }
}

/// The block at `from`, or its first `left` elements and zeros.
template <bool kWhole, class T>
inline Packed<T> fetch(const T* from, int64_t left) {
  Packed<T> x;
  each<Packed<T>::kParts>([&](int k) {
    const int64_t skipped = k * static_cast<int64_t>(sizeof(Register));
    const char* const at = reinterpret_cast<const char*>(from) + skipped;
    if constexpr (kWhole) {
      x.part[k] = Lanes::load(at);
    } else {
      const int64_t bytes = left * static_cast<int64_t>(sizeof(T)) - skipped;
      x.part[k] = bytes > 0 ? Lanes::load(at, bytes) : Register{};
    }
  });
  return x;
}

template <bool kWhole, class T>
inline void put(T* to, const Packed<T>& x, int64_t left) {
  each<Packed<T>::kParts>([&](int k) {
    const int64_t skipped = k * static_cast<int64_t>(sizeof(Register));
    char* const at = reinterpret_cast<char*>(to) + skipped;
    if constexpr (kWhole) {
      Lanes::store(at, x.part[k]);
    } else {
      const int64_t bytes = left * static_cast<int64_t>(sizeof(T)) - skipped;
      if (bytes > 0) Lanes::store(at, x.part[k], bytes);
    }
  });
}

template <class T>
[[gnu::always_inline]] inline WideOf<T> widen(const Packed<T>& x) {
  WideOf<T> wide;
  if constexpr (sizeof(T) == sizeof(typename Computed<T>::type)) {
    each<wide.kParts>([&](int k) { wide.part[k] = (decltype(wide.part[k] + 0))x.part[k]; });
  } else {
    Lanes::widen(T{}, x.part, wide.part);
  }
  return wide;
}

template <bool kWhole, class T>
[[gnu::always_inline]] inline WideOf<T> fetch_wide(const T* from, int64_t left) {
  if constexpr (kWhole && __is_same(T, Float16)) {
    WideOf<T> wide;
    Lanes::load(from, wide.part);
    return wide;
  } else {
    return widen(fetch<kWhole>(from, left));
  }
}

/// One NaN for all: which payload an addition keeps is the compiler's choice of operands.
template <class V>
inline void unify_nan(Wide<V>& x) {
  if (Lanes::has_nan(x.part)) [[unlikely]] {
    each<Wide<V>::kParts>([&](int k) {
      const typename Vec<V>::type nan =
          typename Vec<V>::type{} + static_cast<V>(__builtin_nanf(""));
      x.part[k] = x.part[k] != x.part[k] ? nan : x.part[k];
    });
  }
}

/// Rounded to T.
template <class T>
[[gnu::always_inline]] inline Packed<T> narrow(WideOf<T> wide) {
  using V = typename Computed<T>::type;
  if constexpr (!kIsInteger<V>) unify_nan(wide);
  if constexpr (__is_same(T, Bool)) {
    each<wide.kParts>([&](int k) {
      wide.part[k] = wide.part[k] > V{1} ? typename Vec<V>::type{} + V{1} : wide.part[k];
    });
  }
  Packed<T> x;
  if constexpr (sizeof(T) == sizeof(V)) {
    each<Packed<T>::kParts>([&](int k) { x.part[k] = (Register)wide.part[k]; });
  } else {
    Lanes::narrow(T{}, wide.part, x.part);
  }
  return x;
}

template <class V>
inline V plus(V a, V b) {
  return a + b;
}
// signed overflow wraps, as unsigned does
inline Vec<int8_t>::type plus(Vec<int8_t>::type a, Vec<int8_t>::type b) {
  return (Vec<int8_t>::type)((Vec<uint8_t>::type)a + (Vec<uint8_t>::type)b);
}
inline Vec<int16_t>::type plus(Vec<int16_t>::type a, Vec<int16_t>::type b) {
  return (Vec<int16_t>::type)((Vec<uint16_t>::type)a + (Vec<uint16_t>::type)b);
}
inline Vec<int32_t>::type plus(Vec<int32_t>::type a, Vec<int32_t>::type b) {
  return (Vec<int32_t>::type)((Vec<uint32_t>::type)a + (Vec<uint32_t>::type)b);
}
inline Vec<int64_t>::type plus(Vec<int64_t>::type a, Vec<int64_t>::type b) {
  return (Vec<int64_t>::type)((Vec<uint64_t>::type)a + (Vec<uint64_t>::type)b);
}

/// The first of equal values stays, so that of zeros the lowest rank's sign; a NaN wins, first or
/// not.
template <ReduceOp kOp, class T>
[[gnu::always_inline]] inline void combine(WideOf<T>& acc, const WideOf<T>& x) {
  each<WideOf<T>::kParts>([&](int k) {
    const auto a = acc.part[k];
    const auto b = x.part[k];
    if constexpr (__is_same(T, Bool)) {  // true is any byte but 0
      acc.part[k] = (kOp == ReduceOp::kMin ? b < a : b > a) ? b : a;
    } else if constexpr (kOp == ReduceOp::kMax) {
      acc.part[k] = ((b > a) | (b != b)) ? b : a;
    } else if constexpr (kOp == ReduceOp::kMin) {
      acc.part[k] = ((b < a) | (b != b)) ? b : a;
    } else {
      acc.part[k] = plus(a, b);
    }
  });
}

/// Blocks [i, i + left) of all sources with bias and residual; kSources = 0: any number.
template <class T, ReduceOp kOp, int kSources, bool kWhole>
[[gnu::always_inline]] inline Packed<T> reduced(const Segment& s, int64_t i, int64_t left) {
  const auto at = [&](const void* base, int64_t index) {
    return fetch_wide<kWhole>(static_cast<const T*>(base) + index, left);
  };
  auto acc = at(s.src[0], i);
  const int sources = kSources ? kSources : s.sources;
  for (int r = 1; r < sources; ++r) combine<kOp, T>(acc, at(s.src[r], i));
  if constexpr (kOp == ReduceOp::kAvg) {
    const auto size = static_cast<typename Computed<T>::type>(s.sources);
    each<decltype(acc)::kParts>([&](int k) { acc.part[k] = acc.part[k] / size; });
  }
  if (s.bias) combine<ReduceOp::kSum, T>(acc, at(s.bias, i - s.offset));
  Packed<T> out = narrow<T>(acc);
  if (s.residual) {
    acc = widen(out);
    combine<ReduceOp::kSum, T>(acc, at(s.residual, i));
    out = narrow<T>(acc);
  }
  return out;
}

/// The same block into all targets.
template <bool kWhole, class T>
[[gnu::always_inline]] inline void put_all(int targets, void* const* dst, int64_t i,
                                           const Packed<T>& x, int64_t left) {
  for (int d = 0; d < targets; ++d) put<kWhole>(static_cast<T*>(dst[d]) + i, x, left);
}

template <class T, ReduceOp kOp, int kSources, bool kWhole>
[[gnu::always_inline]] inline void step(const Segment& s, int64_t i, int64_t left) {
  put_all<kWhole>(s.targets, s.dst, i, reduced<T, kOp, kSources, kWhole>(s, i, left), left);
}

template <class T, ReduceOp kOp, int kSources>
void run(const Segment& s) {
  const int64_t end = s.offset + s.count;
  int64_t i = s.offset;
  for (; i + kBlock<T> <= end; i += kBlock<T>) step<T, kOp, kSources, true>(s, i, kBlock<T>);
  if (i < end) step<T, kOp, 0, false>(s, i, end - i);
}

template <class T>
void sum(const Segment& s) {
  switch (s.sources) {
    case 2:
      return run<T, ReduceOp::kSum, 2>(s);
    case 3:
      return run<T, ReduceOp::kSum, 3>(s);
    case 4:
      return run<T, ReduceOp::kSum, 4>(s);
    default:
      return run<T, ReduceOp::kSum, 0>(s);
  }
}

template <class T>
void reduce_floats(ReduceOp op, const Segment& s) {
  switch (op) {
    case ReduceOp::kSum:
      return sum<T>(s);
    case ReduceOp::kMax:
      return run<T, ReduceOp::kMax, 0>(s);
    case ReduceOp::kMin:
      return run<T, ReduceOp::kMin, 0>(s);
    case ReduceOp::kAvg:
      return run<T, ReduceOp::kAvg, 0>(s);
  }
}

template <class T>
void reduce_integers(ReduceOp op, const Segment& s) {
  switch (op) {
    case ReduceOp::kMax:
      return run<T, ReduceOp::kMax, 0>(s);
    case ReduceOp::kMin:
      return run<T, ReduceOp::kMin, 0>(s);
    default:
      return run<T, ReduceOp::kSum, 0>(s);
  }
}

void reduce_any(DType dtype, ReduceOp op, const Segment& segment) {
  switch (dtype) {
    case DType::kFloat32:
      return reduce_floats<float>(op, segment);
    case DType::kFloat64:
      return reduce_floats<double>(op, segment);
    case DType::kFloat16:
      return reduce_floats<Float16>(op, segment);
    case DType::kBFloat16:
      return reduce_floats<BFloat16>(op, segment);
    case DType::kInt32:
      return reduce_integers<int32_t>(op, segment);
    case DType::kInt64:
      return reduce_integers<int64_t>(op, segment);
    case DType::kInt16:
      return reduce_integers<int16_t>(op, segment);
    case DType::kInt8:
      return reduce_integers<int8_t>(op, segment);
    case DType::kUInt8:
      return reduce_integers<uint8_t>(op, segment);
    case DType::kBool:
      return reduce_integers<Bool>(op, segment);
  }
}
