// SPDX-License-Identifier: Apache-2.0
// The vector loop, shared by the x86 variants. Included inside an anonymous namespace of a file
// that defines `Lanes`, so that no symbol compiled for one instruction set can be picked for
// another.

/// Sums one vector at element `i` of every source and stores it to every target.
template <class T, int kSources>
inline void step(const Segment& s, const T* bias, int64_t i) {
  auto acc = Lanes::load(static_cast<const T*>(s.src[0]) + i);
  const int sources = kSources ? kSources : s.sources;
  for (int r = 1; r < sources; ++r) {
    acc = Lanes::add(acc, Lanes::load(static_cast<const T*>(s.src[r]) + i));
  }
  if (bias) acc = Lanes::add(acc, Lanes::load(bias));
  for (int d = 0; d < s.targets; ++d) Lanes::store(static_cast<T*>(s.dst[d]) + i, acc);
}

/// The last elements go through one padded vector: the same instructions as the body.
template <class T>
inline void tail(const Segment& s, const T* bias, int64_t i, int64_t left) {
  constexpr int kWidth = Lanes::width<T>;
  T zero[kWidth] = {};
  T padded[kWidth] = {};
  auto fill = [&](const T* from) {
    for (int64_t k = 0; k < left; ++k) padded[k] = from[k];
  };
  fill(static_cast<const T*>(s.src[0]) + i);
  auto acc = Lanes::load(padded);
  for (int r = 1; r < s.sources; ++r) {
    fill(static_cast<const T*>(s.src[r]) + i);
    acc = Lanes::add(acc, Lanes::load(padded));
  }
  if (bias) {
    fill(bias);
    acc = Lanes::add(acc, Lanes::load(padded));
  }
  Lanes::store(zero, acc);
  for (int d = 0; d < s.targets; ++d) {
    for (int64_t k = 0; k < left; ++k) (static_cast<T*>(s.dst[d]) + i)[k] = zero[k];
  }
}

template <class T, int kSources>
void sum(const Segment& s) {
  constexpr int kWidth = Lanes::width<T>;
  const T* bias = static_cast<const T*>(s.bias);
  const int64_t end = s.offset + s.count;
  int64_t i = s.offset;
  for (; i + kWidth <= end; i += kWidth) {
    step<T, kSources>(s, bias ? bias + (i - s.offset) : nullptr, i);
  }
  if (i < end) tail<T>(s, bias ? bias + (i - s.offset) : nullptr, i, end - i);
}

template <class T>
void sum(const Segment& s) {
  switch (s.sources) {
    case 2:
      return sum<T, 2>(s);
    case 3:
      return sum<T, 3>(s);
    case 4:
      return sum<T, 4>(s);
    default:
      return sum<T, 0>(s);
  }
}

void sum_any(DType dtype, ReduceOp op, const Segment& segment) {
  if (op != ReduceOp::kSum) return reduce_generic(dtype, op, segment);
  switch (dtype) {
    case DType::kFloat32:
      return sum<float>(segment);
    case DType::kFloat64:
      return sum<double>(segment);
    case DType::kFloat16:
      return sum<Float16>(segment);
    case DType::kBFloat16:
      return sum<BFloat16>(segment);
    default:
      return reduce_generic(dtype, op, segment);
  }
}
