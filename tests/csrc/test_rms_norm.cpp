// SPDX-License-Identifier: Apache-2.0
// TSan: no processes.
// RMSNorm in the reduction: the bits of the three steps done apart, on every variant, and close to
// the formula in long double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/reduce_variants.h"
#include "kernels/reduce.h"

using namespace tp_native;           // NOLINT
using namespace tp_native::kernels;  // NOLINT

namespace {

std::vector<const Variant*> variants() {
  std::vector<const Variant*> all{&kGeneric};
  if (avx2_variant()) all.push_back(avx2_variant());
  if (avx512_variant()) all.push_back(avx512_variant());
  return all;
}

template <class T>
struct Type;
template <>
struct Type<float> {
  static constexpr DType kDType = DType::kFloat32;
  using Value = float;
};
template <>
struct Type<double> {
  static constexpr DType kDType = DType::kFloat64;
  using Value = double;
};
template <>
struct Type<Float16> {
  static constexpr DType kDType = DType::kFloat16;
  using Value = float;
};
template <>
struct Type<BFloat16> {
  static constexpr DType kDType = DType::kBFloat16;
  using Value = float;
};

float value(float x) { return x; }
double value(double x) { return x; }
float value(Float16 x) { return to_float(x); }
float value(BFloat16 x) { return to_float(x); }

template <class T, class V>
T stored(V x) {
  if constexpr (std::is_same_v<T, Float16>) {
    return to_float16(x);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16(x);
  } else {
    return x;
  }
}

template <class T>
using Values = std::vector<T>;

template <class T>
bool is_equal(const Values<T>& a, const Values<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
Values<T> random_values(int64_t count, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0, 2);
  Values<T> values;
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(stored<T>(static_cast<typename Type<T>::Value>(normal(rng))));
  }
  return values;
}

struct Shape {
  int sources;
  int64_t rows;
  int64_t columns;
  bool has_bias;
  bool has_residual;
};

template <class T>
struct Inputs {
  explicit Inputs(const Shape& shape) : shape(shape) {
    for (int r = 0; r < shape.sources; ++r) {
      src.push_back(random_values<T>(count(), static_cast<unsigned>(r)));
    }
    bias = random_values<T>(shape.columns, 100);
    residual = random_values<T>(count(), 101);
    weight = random_values<T>(shape.columns, 102);
  }
  int64_t count() const { return shape.rows * shape.columns; }

  Shape shape;
  std::vector<Values<T>> src;
  Values<T> bias;
  Values<T> residual;
  Values<T> weight;
};

template <class T>
struct Outputs {
  Values<T> hidden;
  Values<T> normed;
};

constexpr double kEps = 1e-5;

/// Step by step, each result stored in T, as separate operators do it.
template <class T>
Outputs<T> apart(const Inputs<T>& in) {
  using V = typename Type<T>::Value;
  Outputs<T> out;
  const int64_t columns = in.shape.columns;
  for (int64_t i = 0; i < in.count(); ++i) {
    V sum = value(in.src[0][i]);
    for (int r = 1; r < in.shape.sources; ++r) sum += value(in.src[r][i]);
    if (in.shape.has_bias) sum += value(in.bias[i % columns]);
    T h = stored<T>(sum);
    if (in.shape.has_residual) h = stored<T>(value(h) + value(in.residual[i]));
    out.hidden.push_back(h);
  }
  for (int64_t row = 0; row < in.shape.rows; ++row) {
    V partial[32] = {};
    for (int64_t c = 0; c < columns; ++c) {
      const V h = value(out.hidden[row * columns + c]);
      partial[c % 32] += h * h;
    }
    for (int k = 16; k > 0; k /= 2) {
      for (int j = 0; j < k; ++j) partial[j] += partial[j + k];
    }
    const V scale = 1 / std::sqrt(partial[0] / static_cast<V>(columns) + static_cast<V>(kEps));
    for (int64_t c = 0; c < columns; ++c) {
      const T scaled = stored<T>(value(out.hidden[row * columns + c]) * scale);
      out.normed.push_back(stored<T>(value(scaled) * value(in.weight[c])));
    }
  }
  return out;
}

/// `targets` copies of both results; with `in_place`, normed[d] is the source d (or the residual).
template <class T>
void check_variant(const Variant& variant, const Inputs<T>& in, const Outputs<T>& right,
                   int targets, bool keeps_hidden, bool in_place) {
  auto src = in.src;
  auto residual = in.residual;
  std::vector<Values<T>> normed(targets, Values<T>(in.count() + 1));
  std::vector<Values<T>> hidden(targets, Values<T>(in.count() + 1));
  std::vector<const void*> from;
  std::vector<void*> to;
  std::vector<void*> keep;
  for (auto& values : src) from.push_back(values.data());
  for (int d = 0; d < targets; ++d) {
    const bool is_source = in_place && d < in.shape.sources;
    to.push_back(is_source ? src[d].data() : normed[d].data());
    const bool is_residual = in_place && d == 0;
    keep.push_back(is_residual ? residual.data() : hidden[d].data());
  }
  RowReduction r{Type<T>::kDType, in.shape.sources, from.data(), targets, to.data()};
  r.hidden = keeps_hidden ? keep.data() : nullptr;
  r.rows = in.shape.rows;
  r.columns = in.shape.columns;
  r.bias = in.shape.has_bias ? in.bias.data() : nullptr;
  r.residual = in.shape.has_residual ? residual.data() : nullptr;
  r.norm_weight = in.weight.data();
  r.eps = kEps;
  variant.reduce_rms_norm(r);
  const auto bytes = static_cast<size_t>(in.count()) * sizeof(T);
  for (int d = 0; d < targets; ++d) {
    CHECK(std::memcmp(to[d], right.normed.data(), bytes) == 0);
    if (keeps_hidden) CHECK(std::memcmp(keep[d], right.hidden.data(), bytes) == 0);
    CHECK(value(normed[d].back()) == 0 && value(hidden[d].back()) == 0);  // in bounds
  }
}

template <class T>
void check_all_variants() {
  for (const int sources : {1, 2, 3, 4, 8, 16}) {
    for (const int64_t columns : {1, 2, 15, 31, 32, 33, 64, 65, 100, 1024, 1031}) {
      for (const int flags : {0, 1, 2, 3}) {
        const Inputs<T> in(
            {sources, columns > 1000 ? 2 : 3, columns, (flags & 1) != 0, (flags & 2) != 0});
        const Outputs<T> right = apart(in);
        for (const Variant* const variant : variants()) {
          for (int targets = 1; targets <= 4; ++targets) {
            check_variant(*variant, in, right, targets, targets % 2 == 0, false);
            check_variant(*variant, in, right, targets, targets % 2 == 1, true);
          }
        }
      }
    }
  }
}

template <class T>
void check_formula(double tolerance) {
  const Inputs<T> in({3, 4, 4099, true, true});
  const Outputs<T> out = apart(in);
  for (int64_t row = 0; row < in.shape.rows; ++row) {
    const T* const h = out.hidden.data() + row * in.shape.columns;
    long double squares = 0;
    for (int64_t c = 0; c < in.shape.columns; ++c) {
      squares += static_cast<long double>(value(h[c])) * value(h[c]);
    }
    const long double root = std::sqrt(squares / in.shape.columns + kEps);
    for (int64_t c = 0; c < in.shape.columns; ++c) {
      const long double exact = value(h[c]) / root * value(in.weight[c]);
      const long double error = value(out.normed[row * in.shape.columns + c]) - exact;
      CHECK(std::abs(error) <= tolerance * std::abs(exact) + 1e-7);
    }
  }
}

template <class T>
void check_split() {
  const Inputs<T> in({2, 5, 77, true, true});
  const Outputs<T> right = apart(in);
  for (int64_t cut = 0; cut <= in.shape.rows; ++cut) {
    Outputs<T> out{Values<T>(in.count()), Values<T>(in.count())};
    const auto reduce_rows = [&](int64_t first, int64_t last) {
      const int64_t begin = first * in.shape.columns;
      const void* const src[] = {in.src[0].data() + begin, in.src[1].data() + begin};
      void* const normed[] = {out.normed.data() + begin};
      void* const hidden[] = {out.hidden.data() + begin};
      reduce_rms_norm({Type<T>::kDType, 2, src, 1, normed, hidden, last - first, in.shape.columns,
                       in.bias.data(), in.residual.data() + begin, in.weight.data(), kEps});
    };
    reduce_rows(0, cut);
    reduce_rows(cut, in.shape.rows);
    CHECK(is_equal(out.normed, right.normed) && is_equal(out.hidden, right.hidden));
  }
}

}  // namespace

TEST(every_variant_gives_the_bits_of_separate_steps_float32) { check_all_variants<float>(); }
TEST(every_variant_gives_the_bits_of_separate_steps_float64) { check_all_variants<double>(); }
TEST(every_variant_gives_the_bits_of_separate_steps_float16) { check_all_variants<Float16>(); }
TEST(every_variant_gives_the_bits_of_separate_steps_bfloat16) { check_all_variants<BFloat16>(); }

// two roundings to the dtype, and of float32 sums of 32 chains
TEST(the_formula_holds_within_the_dtypes_rounding) {
  check_formula<float>(1e-5);
  check_formula<double>(1e-13);
  check_formula<Float16>(2 * 0x1p-11 + 1e-5);
  check_formula<BFloat16>(2 * 0x1p-8 + 1e-4);
}

TEST(any_split_of_the_rows_gives_the_same_bits) {
  check_split<float>();
  check_split<double>();
  check_split<Float16>();
  check_split<BFloat16>();
}

TEST(a_nan_stays_in_its_row_and_zero_rows_stay_zero) {
  for (const Variant* const variant : variants()) {
    constexpr int64_t kColumns = 50;
    Values<float> x(3 * kColumns, 0.0f);
    x[kColumns + 7] = -NAN;
    const Values<float> weight(kColumns, 2.0f);
    Values<float> out(3 * kColumns, 5.0f);
    const void* const src[] = {x.data()};
    void* const normed[] = {out.data()};
    variant->reduce_rms_norm({DType::kFloat32, 1, src, 1, normed, nullptr, 3, kColumns, nullptr,
                              nullptr, weight.data(), kEps});
    for (int64_t i = 0; i < 3 * kColumns; ++i) {
      if (i / kColumns == 1) {
        CHECK(std::isnan(out[i]) && !std::signbit(out[i]));
      } else {
        CHECK_EQ(out[i], 0.0f);
      }
    }
  }
}

int main() { return check::run_all(); }
