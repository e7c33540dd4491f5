// SPDX-License-Identifier: Apache-2.0
// TSan: no processes.
// Rows of logits: the same bits from every variant, and close to the formulas in long double.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/cpu/reduce_variants.h"
#include "kernels/cross_entropy.h"
#include "kernels/element.h"

using namespace tp_native;           // NOLINT
using namespace tp_native::kernels;  // NOLINT

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr int64_t kWidths[] = {1, 2, 15, 31, 32, 33, 64, 65, 100, 1024, 5003};

std::vector<const Variant*> variants() {
  std::vector<const Variant*> all{&kGeneric};
  if (avx2_variant()) all.push_back(avx2_variant());
  if (avx512_variant()) all.push_back(avx512_variant());
  return all;
}

template <class T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<double> = DType::kFloat64;
template <>
constexpr DType kDType<Float16> = DType::kFloat16;
template <>
constexpr DType kDType<BFloat16> = DType::kBFloat16;

/// Of the sums and of e^x: some units of what T is computed in.
template <class T>
constexpr double kUnit = std::numeric_limits<Value<T>>::epsilon();

template <class T>
std::vector<T> random_row(int64_t columns, double scale, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<double> normal;
  std::vector<T> row;
  for (int64_t c = 0; c < columns; ++c) {
    row.push_back(rounded<T>(static_cast<Value<T>>(scale * normal(rng))));
  }
  return row;
}

bool is_same_bits(double a, double b) {
  return std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b);
}

bool is_close(long double found, long double right, long double tolerance) {
  return std::abs(found - right) <= tolerance;
}

template <class T>
void check_statistics() {
  for (const int64_t columns : kWidths) {
    for (const double scale : {0.0, 0.1, 3.0, 200.0}) {  // equal, flat, usual, most e^x vanish
      const auto row = random_row<T>(columns, scale, static_cast<unsigned>(columns));
      long double max = -kInf;
      for (const T x : row) max = std::max<long double>(max, widen(x));
      long double exp_sum = 0;
      long double shifted_sum = 0;
      for (const T x : row) {
        exp_sum += std::exp(widen(x) - max);
        shifted_sum += widen(x) - max;
      }
      const auto right = logit_statistics(kDType<T>, row.data(), columns, true);
      CHECK(static_cast<long double>(right.max) == max);
      // 32 chains; shifted, each rounding is of a partial sum
      const double steps = 4 + static_cast<double>(columns) / 32;
      CHECK(is_close(right.exp_sum, exp_sum, steps * kUnit<T> * exp_sum));
      CHECK(is_close(right.shifted_sum, shifted_sum, steps * kUnit<T> * (1 - shifted_sum)));
      for (const Variant* const variant : variants()) {
        LogitStatistics found;
        variant->logit_statistics(kDType<T>, row.data(), columns, true, found);
        CHECK(is_same_bits(found.max, right.max) && is_same_bits(found.exp_sum, right.exp_sum));
        CHECK(is_same_bits(found.shifted_sum, right.shifted_sum));
        LogitStatistics without;
        variant->logit_statistics(kDType<T>, row.data(), columns, false, without);
        CHECK(is_same_bits(without.exp_sum, right.exp_sum));
        CHECK_EQ(without.shifted_sum, 0.0);
      }
    }
  }
}

template <class T>
void check_gradient() {
  for (const int64_t columns : kWidths) {
    const auto row = random_row<T>(columns, 3, static_cast<unsigned>(columns));
    const auto found = logit_statistics(kDType<T>, row.data(), columns, false);
    const int64_t hit = columns / 2;
    const LogitGradient g{.max = found.max,
                          .exp_sum = found.exp_sum,
                          .weight = -1.5,
                          .smoothing = 0.01,
                          .hit = hit,
                          .hit_weight = 0.75};
    const T guard = rounded<T>(static_cast<Value<T>>(7));
    std::vector<T> right(static_cast<size_t>(columns) + 1, guard);
    logit_gradient(kDType<T>, row.data(), columns, g, right.data());
    for (int64_t c = 0; c < columns; ++c) {
      const long double share = std::exp(widen(row[c]) - static_cast<long double>(g.max));
      const long double exact = g.weight * (share / g.exp_sum - g.smoothing) - (c == hit) * 0.75;
      const double rounding = std::max<double>(kUnit<T>, sizeof(T) == 2 ? 0x1p-8 : 0);
      CHECK(is_close(widen(right[c]), exact, 8 * kUnit<T> + rounding * std::abs(exact)));
    }
    CHECK(std::memcmp(&right.back(), &guard, sizeof(T)) == 0);  // in bounds
    for (const Variant* const variant : variants()) {
      std::vector<T> out(static_cast<size_t>(columns) + 1, guard);
      variant->logit_gradient(kDType<T>, row.data(), columns, g, out.data());
      out[hit] = right[hit];
      CHECK(std::memcmp(out.data(), right.data(), out.size() * sizeof(T)) == 0);
    }
  }
}

template <class T>
void check_no_values() {
  const T none = rounded<T>(-std::numeric_limits<Value<T>>::infinity());
  for (const int64_t columns : kWidths) {
    std::vector<T> row(static_cast<size_t>(columns), none);
    for (const Variant* const variant : variants()) {
      LogitStatistics found;
      variant->logit_statistics(kDType<T>, row.data(), columns, true, found);
      CHECK(found.max == -kInf && found.exp_sum == 0 && found.shifted_sum == -kInf);
    }
    row.back() = rounded<T>(static_cast<Value<T>>(-300));  // one value among them, below all limits
    for (const Variant* const variant : variants()) {
      LogitStatistics found;
      variant->logit_statistics(kDType<T>, row.data(), columns, false, found);
      CHECK(found.max == -300 && found.exp_sum == 1);
      std::vector<T> out(row.size());
      variant->logit_gradient(kDType<T>, row.data(), columns, {.max = -300}, out.data());
      for (int64_t c = 0; c < columns; ++c) CHECK_EQ(widen(out[c]), Value<T>(c == columns - 1));
    }
    row.front() = rounded<T>(std::numeric_limits<Value<T>>::quiet_NaN());
    for (const Variant* const variant : variants()) {
      LogitStatistics found;
      variant->logit_statistics(kDType<T>, row.data(), columns, true, found);
      CHECK(std::isnan(found.exp_sum) && std::isnan(found.shifted_sum));
    }
  }
}

}  // namespace

TEST(statistics_are_the_formulas_with_the_same_bits_from_every_variant) {
  check_statistics<float>();
  check_statistics<double>();
  check_statistics<Float16>();
  check_statistics<BFloat16>();
}

TEST(gradients_are_the_formulas_with_the_same_bits_from_every_variant) {
  check_gradient<float>();
  check_gradient<double>();
  check_gradient<Float16>();
  check_gradient<BFloat16>();
}

TEST(rows_of_minus_infinity_count_nothing_and_a_nan_stays) {
  check_no_values<float>();
  check_no_values<double>();
  check_no_values<Float16>();
  check_no_values<BFloat16>();
}

TEST(nothing_is_lost_where_all_logits_are_large) {
  const std::vector<float> row = {10000, 9999, 9998};
  const auto found = logit_statistics(DType::kFloat32, row.data(), 3, true);
  CHECK(found.max == 10000 && found.shifted_sum == -3);
  CHECK(is_close(found.exp_sum, 1 + std::exp(-1.0L) + std::exp(-2.0L), 2e-7));
}

TEST(parts_combine_to_the_whole_row) {
  const auto row = random_row<double>(100, 3, 1);
  const auto whole = logit_statistics(DType::kFloat64, row.data(), 100, true);
  const std::vector<std::vector<int64_t>> cuts = {{100}, {50, 50}, {1, 0, 98, 1}, {0, 0, 100}};
  for (const auto& cut : cuts) {
    std::vector<LogitStatistics> parts;
    const double* at = row.data();
    for (const int64_t n : cut) {
      parts.push_back(logit_statistics(DType::kFloat64, at, n, true));
      at += n;
    }
    const auto found = combined(parts, cut);
    CHECK_EQ(found.max, whole.max);
    CHECK(is_close(found.exp_sum, whole.exp_sum, 1e-13 * whole.exp_sum));
    CHECK(is_close(found.shifted_sum, whole.shifted_sum, 1e-13 * std::abs(whole.shifted_sum)));
  }
}

TEST(a_part_of_minus_infinity_leaves_the_others_as_they_are) {
  const double none[] = {-kInf, -kInf};
  const double some[] = {-5, -6};
  const auto left = logit_statistics(DType::kFloat64, none, 2, true);
  const auto right = logit_statistics(DType::kFloat64, some, 2, true);
  const LogitStatistics parts[] = {left, right, left};
  const int64_t columns[] = {2, 2, 2};
  const auto found = combined(parts, columns);
  CHECK(found.max == -5 && is_same_bits(found.exp_sum, right.exp_sum));
  CHECK_EQ(found.shifted_sum, -kInf);
  const LogitStatistics nothing[] = {left, left};
  const auto empty = combined(nothing, std::span(columns).first(2));
  CHECK(empty.max == -kInf && empty.exp_sum == 0 && shift_of(empty.max) == 0);
}

int main() { return check::run_all(); }
