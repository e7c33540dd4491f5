// SPDX-License-Identifier: Apache-2.0
// The reduction kernels against a scalar oracle that shares no code with them, bit by bit: every
// variant that this CPU runs, all dtypes and operations, counts around the block, any alignment.
// TSan: no processes.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/reduce_variants.h"
#include "kernels/reduce.h"

using namespace tp_native;           // NOLINT
using namespace tp_native::kernels;  // NOLINT

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16,
                             DType::kInt32,   DType::kInt64,   DType::kUInt8,   DType::kInt8,
                             DType::kInt16,   DType::kBool};
constexpr ReduceOp kOps[] = {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin, ReduceOp::kAvg};

std::vector<const Variant*> variants() {
  std::vector<const Variant*> all{&kGeneric};
  if (avx2_variant()) all.push_back(avx2_variant());
  if (avx512_variant()) all.push_back(avx512_variant());
  return all;
}

using Bytes = std::vector<char>;

template <class T>
T at(const Bytes& bytes, int64_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

template <class T>
void append(Bytes& bytes, T value) {
  const auto* const from = reinterpret_cast<const char*>(&value);
  bytes.insert(bytes.end(), from, from + sizeof(T));
}

double decode(DType dtype, const Bytes& bytes, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return at<float>(bytes, i);
    case DType::kFloat64:
      return at<double>(bytes, i);
    case DType::kFloat16:
      return to_float(at<Float16>(bytes, i));
    default:
      return to_float(at<BFloat16>(bytes, i));
  }
}

/// The nearest value with `digits` bits after the leading one, ties to even.
double rounded_to(double x, int digits, int least_exponent, double largest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), least_exponent) - digits);
  const double y = std::nearbyint(x / unit) * unit;
  return std::abs(y) > largest ? std::copysign(HUGE_VAL, x) : y;
}

double rounded_to(DType dtype, double x) {
  switch (dtype) {
    case DType::kFloat64:
      return x;
    case DType::kFloat16:
      return rounded_to(x, 10, -14, 65504);
    case DType::kBFloat16:
      return rounded_to(x, 7, -126, 0x1.fep127);
    default:
      return static_cast<float>(x);
  }
}

/// x rounded; a NaN is the positive quiet one without payload.
void encode(DType dtype, double x, Bytes& to) {
  const double y = std::isnan(x) ? std::numeric_limits<double>::quiet_NaN() : rounded_to(dtype, x);
  if (dtype == DType::kFloat64) return append(to, y);
  const auto bits = std::bit_cast<uint32_t>(static_cast<float>(y));
  if (dtype == DType::kFloat32) return append(to, bits);
  if (dtype == DType::kBFloat16) return append(to, static_cast<uint16_t>(bits >> 16));
  const auto sign = static_cast<uint16_t>(std::signbit(y) ? 0x8000 : 0);
  const double magnitude = std::abs(y);
  if (std::isnan(y)) return append(to, uint16_t{0x7e00});
  if (std::isinf(y)) return append(to, static_cast<uint16_t>(sign | 0x7c00));
  // values of one sign are as many steps from zero as their bits say
  const int exponent = magnitude == 0 ? -14 : std::max(std::ilogb(magnitude), -14);
  const auto steps = static_cast<int>(std::ldexp(magnitude, 10 - exponent));
  append(to, static_cast<uint16_t>(sign | ((exponent + 14) * 0x400 + steps)));
}

/// A third ordinary values, a third any bits, a third values that are treated apart.
Bytes random_values(DType dtype, int64_t count, unsigned seed) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<double> normal(0, 3);
  const double special[] = {0.0,      -0.0,  1.0,     -1.0,   HUGE_VAL, -HUGE_VAL, NAN,   -NAN,
                            0x1p-149, 6e-08, -2e-310, 6.5e04, 3.38e38,  -3.38e38,  1e-40, -6e-5};
  Bytes bytes;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bits = rng();
    const auto kind = bits % 3;
    if (kind == 0 || !is_floating(dtype)) {
      const auto* const from = reinterpret_cast<const char*>(&bits);
      bytes.insert(bytes.end(), from + 2, from + 2 + std::min<size_t>(item_bytes(dtype), 6));
      if (item_bytes(dtype) == 8) append(bytes, static_cast<uint16_t>(rng()));
      if (dtype == DType::kBool)
        bytes.back() = static_cast<char>(kind == 0 ? bits >> 16 : kind - 1);
    } else {
      encode(dtype, kind == 1 ? normal(rng) : special[(bits >> 8) % 16], bytes);
    }
  }
  return bytes;
}

double combined(DType dtype, ReduceOp op, double acc, double x) {
  if (op == ReduceOp::kMax || op == ReduceOp::kMin) {
    if (std::isnan(acc) || std::isnan(x)) return NAN;
    return (op == ReduceOp::kMax ? x > acc : x < acc) ? x : acc;  // the first of equal zeros
  }
  return dtype == DType::kFloat64 ? acc + x : static_cast<float>(acc + x);
}

void expect_float(DType dtype, ReduceOp op, const std::vector<Bytes>& src, const Bytes* bias,
                  const Bytes* residual, int64_t i, Bytes& out) {
  double acc = decode(dtype, src[0], i);
  for (size_t r = 1; r < src.size(); ++r) acc = combined(dtype, op, acc, decode(dtype, src[r], i));
  if (op == ReduceOp::kAvg) acc /= static_cast<double>(src.size());
  if (dtype != DType::kFloat64) acc = static_cast<float>(acc);
  if (bias) acc = combined(dtype, ReduceOp::kSum, acc, decode(dtype, *bias, i));
  Bytes stored;
  encode(dtype, acc, stored);
  if (!residual) {
    out.insert(out.end(), stored.begin(), stored.end());
    return;
  }
  acc = combined(dtype, ReduceOp::kSum, decode(dtype, stored, 0), decode(dtype, *residual, i));
  encode(dtype, acc, out);
}

int64_t integer_at(DType dtype, const Bytes& bytes, int64_t i) {
  switch (dtype) {
    case DType::kInt64:
      return at<int64_t>(bytes, i);
    case DType::kInt32:
      return at<int32_t>(bytes, i);
    case DType::kInt16:
      return at<int16_t>(bytes, i);
    case DType::kInt8:
      return at<int8_t>(bytes, i);
    case DType::kUInt8:
      return at<uint8_t>(bytes, i);
    default:
      return at<uint8_t>(bytes, i) != 0;
  }
}

/// In 64 bits, of which the lower ones are kept.
void expect_integer(DType dtype, ReduceOp op, const std::vector<Bytes>& src, const Bytes* bias,
                    const Bytes* residual, int64_t i, Bytes& out) {
  int64_t acc = integer_at(dtype, src[0], i);
  const auto add = [&](int64_t x) {
    acc = dtype == DType::kBool
              ? acc | x
              : static_cast<int64_t>(static_cast<uint64_t>(acc) + static_cast<uint64_t>(x));
  };
  for (size_t r = 1; r < src.size(); ++r) {
    const int64_t x = integer_at(dtype, src[r], i);
    if (op == ReduceOp::kSum) add(x);
    if (op == ReduceOp::kMax) acc = std::max(acc, x);
    if (op == ReduceOp::kMin) acc = std::min(acc, x);
  }
  if (bias) add(integer_at(dtype, *bias, i));
  if (residual) add(integer_at(dtype, *residual, i));
  if (item_bytes(dtype) == 8) return append(out, acc);
  if (item_bytes(dtype) == 4) return append(out, static_cast<uint32_t>(acc));
  if (item_bytes(dtype) == 2) return append(out, static_cast<uint16_t>(acc));
  append(out, static_cast<uint8_t>(acc));
}

/// What the reduction of whole buffers gives; every element stands for itself.
Bytes expected(DType dtype, ReduceOp op, const std::vector<Bytes>& src, const Bytes* bias,
               const Bytes* residual, int64_t count) {
  Bytes out;
  for (int64_t i = 0; i < count; ++i) {
    (is_floating(dtype) ? expect_float : expect_integer)(dtype, op, src, bias, residual, i, out);
  }
  return out;
}

bool is_reducible(const Variant& variant, DType dtype, ReduceOp op, int sources, bool with_bias,
                  bool with_residual) {
  constexpr int64_t kCount = 160;
  const auto width = static_cast<int64_t>(item_bytes(dtype));
  std::vector<Bytes> src;
  for (int r = 0; r < sources; ++r) {
    src.push_back(random_values(dtype, kCount, static_cast<unsigned>(r + 1)));
  }
  const Bytes bias = random_values(dtype, kCount, 99);
  const Bytes residual = random_values(dtype, kCount, 98);
  const Bytes right = expected(dtype, op, src, with_bias ? &bias : nullptr,
                               with_residual ? &residual : nullptr, kCount);
  for (const int64_t count : {0, 1, 3, 8, 15, 31, 32, 33, 63, 64, 65, 96, 127, 130}) {
    for (const int64_t shift : {0, 1, 29}) {
      const int targets = static_cast<int>(count + shift) % 4 + 1;
      // the first target is the last source: reading comes before writing
      std::vector<Bytes> dst(static_cast<size_t>(targets), Bytes(src[0].size(), '\x55'));
      dst[0] = src.back();
      std::vector<const void*> from;
      std::vector<void*> to;
      for (const Bytes& bytes : src) from.push_back(bytes.data());
      for (Bytes& bytes : dst) to.push_back(bytes.data());
      from.back() = to[0];
      variant.reduce(dtype, op,
                     {sources, from.data(), targets, to.data(), shift, count,
                      with_bias ? bias.data() + shift * width : nullptr,
                      with_residual ? residual.data() : nullptr});
      const Bytes untouched(src[0].size(), '\x55');
      for (int d = 0; d < targets; ++d) {
        Bytes whole = d == 0 ? src.back() : untouched;
        std::copy_n(right.begin() + shift * width, count * width, whole.begin() + shift * width);
        if (dst[static_cast<size_t>(d)] != whole) {
          std::printf("%s %s %s: sources %d count %d shift %d target %d of %d\n", variant.isa,
                      name(dtype), name(op), sources, static_cast<int>(count),
                      static_cast<int>(shift), d, targets);
          return false;
        }
      }
    }
  }
  return true;
}

}  // namespace

TEST(every_variant_gives_the_bits_of_the_oracle_and_stays_in_bounds) {
  for (const Variant* const variant : variants()) {
    for (const DType dtype : kDTypes) {
      for (const ReduceOp op : kOps) {
        if (!can_reduce(dtype, op)) continue;
        for (int sources = 1; sources <= 16; ++sources) {
          for (const bool with_bias : {false, true}) {
            CHECK(is_reducible(*variant, dtype, op, sources, with_bias, sources % 3 == 1));
          }
        }
      }
    }
  }
}

TEST(everything_can_be_reduced_but_the_avg_of_integers_and_bool) {
  for (const DType dtype : kDTypes) {
    for (const ReduceOp op : kOps) {
      const bool is_integer = dtype > DType::kBFloat16;
      CHECK_EQ(can_reduce(dtype, op), !(is_integer && op == ReduceOp::kAvg));
    }
  }
  CHECK(!can_reduce(static_cast<DType>(10), ReduceOp::kSum));
  CHECK(!can_reduce(DType::kFloat32, static_cast<ReduceOp>(4)));
}

TEST(integers_wrap_and_bool_comes_out_as_zero_or_one) {
  const auto pair = [](DType dtype, ReduceOp op, auto a, auto b) {
    const void* const src[] = {&a, &b};
    decltype(a) out{};
    void* const dst[] = {&out};
    reduce({dtype, op, 2, src, 1, dst, 1});
    return out;
  };
  CHECK_EQ(pair(DType::kInt32, ReduceOp::kSum, int32_t{INT32_MAX}, int32_t{1}), INT32_MIN);
  CHECK_EQ(pair(DType::kInt64, ReduceOp::kSum, int64_t{INT64_MIN}, int64_t{-1}), INT64_MAX);
  CHECK_EQ(int{pair(DType::kUInt8, ReduceOp::kSum, uint8_t{250}, uint8_t{10})}, 4);
  CHECK_EQ(int{pair(DType::kUInt8, ReduceOp::kMax, uint8_t{250}, uint8_t{10})}, 250);
  CHECK_EQ(int{pair(DType::kInt8, ReduceOp::kMax, int8_t{-6}, int8_t{10})}, 10);
  CHECK_EQ(int{pair(DType::kBool, ReduceOp::kSum, uint8_t{4}, uint8_t{2})}, 1);
  CHECK_EQ(int{pair(DType::kBool, ReduceOp::kMin, uint8_t{4}, uint8_t{2})}, 1);
  CHECK_EQ(int{pair(DType::kBool, ReduceOp::kMin, uint8_t{4}, uint8_t{0})}, 0);
}

TEST(the_bias_repeats_every_row_wherever_a_slice_begins) {
  constexpr int64_t kColumns = 37;
  constexpr int64_t kCount = 5 * kColumns;
  std::vector<float> zeros(kCount, 0.0f);
  std::vector<float> bias(kColumns);
  for (int64_t i = 0; i < kColumns; ++i) bias[i] = static_cast<float>(i);
  for (const int64_t first : {0, 1, 36, 37, 100}) {
    std::vector<float> out(kCount, -1.0f);
    const void* const src[] = {zeros.data() + first, zeros.data() + first};
    void* const dst[] = {out.data() + first};
    reduce({DType::kFloat32, ReduceOp::kSum, 2, src, 1, dst, kCount - first, bias.data(), kColumns,
            first});
    for (int64_t i = 0; i < kCount; ++i) {
      CHECK_EQ(out[i], i < first ? -1.0f : static_cast<float>(i % kColumns));
    }
  }
}

TEST(a_residual_joins_after_rounding_where_the_slice_begins) {
  // 256 + 1 rounds to 256 in bfloat16, and then + 1 to 256 again; in one rounding it is 258
  const BFloat16 one = to_bfloat16(1.0f);
  const std::vector<BFloat16> a(70, to_bfloat16(256.0f));
  const std::vector<BFloat16> b(70, one);
  std::vector<BFloat16> residual(75, to_bfloat16(1024.0f));
  std::fill(residual.begin() + 5, residual.end(), one);
  std::vector<BFloat16> out(70);
  const void* const src[] = {a.data(), b.data()};
  void* const dst[] = {out.data()};
  for (const bool with_bias : {false, true}) {
    const std::vector<BFloat16> bias(7, to_bfloat16(0.0f));
    reduce({DType::kBFloat16, ReduceOp::kSum, 2, src, 1, dst, 70, with_bias ? bias.data() : nullptr,
            7, 5, residual.data()});
    for (const BFloat16 x : out) CHECK_EQ(to_float(x), 256.0f);
  }
}

TEST(a_target_may_be_a_source_and_all_targets_get_the_result) {
  std::vector<float> a(100, 1.0f);
  std::vector<float> b(100, 2.0f);
  void* const both[] = {a.data(), b.data()};
  reduce({DType::kFloat32, ReduceOp::kSum, 2, both, 2, both, 100, nullptr, 0, 0});
  for (int i = 0; i < 100; ++i) CHECK(a[i] == 3.0f && b[i] == 3.0f);
}

TEST(max_min_and_avg) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> a{1, 5, -2, nan};
  const std::vector<float> b{4, 2, -6, 1};
  const void* const src[] = {a.data(), b.data()};
  const auto run = [&](ReduceOp op) {
    std::vector<float> out(4);
    void* const dst[] = {out.data()};
    reduce({DType::kFloat32, op, 2, src, 1, dst, 4, nullptr, 0, 0});
    return out;
  };
  const auto max = run(ReduceOp::kMax);
  CHECK(max[0] == 4 && max[1] == 5 && max[2] == -2 && std::isnan(max[3]));
  const auto min = run(ReduceOp::kMin);
  CHECK(min[0] == 1 && min[1] == 2 && min[2] == -6 && std::isnan(min[3]));
  const auto avg = run(ReduceOp::kAvg);
  CHECK(avg[0] == 2.5f && avg[1] == 3.5f && avg[2] == -4.0f);
}

TEST(sixteen_bit_conversions_are_exact_both_ways) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = Float16{static_cast<uint16_t>(bits)};
    const auto brain = BFloat16{static_cast<uint16_t>(bits)};
    if (!std::isnan(to_float(half))) CHECK_EQ(to_float16(to_float(half)).bits, half.bits);
    if (!std::isnan(to_float(brain))) CHECK_EQ(to_bfloat16(to_float(brain)).bits, brain.bits);
  }
}

TEST(rounding_to_sixteen_bits_takes_the_nearest_and_ties_to_even) {
  std::mt19937 rng(7);
  const auto is_nearest = [](double x, double rounded, double below, double above, bool is_even) {
    const double error = std::abs(rounded - x);
    if (error < std::abs(below - x) && error < std::abs(above - x)) return true;
    return error <= std::abs(below - x) && error <= std::abs(above - x) && is_even;
  };
  for (int i = 0; i < 400000; ++i) {
    const float x =
        std::bit_cast<float>(static_cast<uint32_t>(rng()) & 0x7fffffffu);  // sign is mirrored
    if (!std::isfinite(x)) continue;
    const BFloat16 brain = to_bfloat16(x);
    if (brain.bits < 0x7f7f && brain.bits > 0) {
      CHECK(is_nearest(
          x, to_float(brain), to_float(BFloat16{static_cast<uint16_t>(brain.bits - 1)}),
          to_float(BFloat16{static_cast<uint16_t>(brain.bits + 1)}), brain.bits % 2 == 0));
    }
    const float y = std::ldexp(x, static_cast<int>(rng() % 40) - 20);
    const Float16 half = to_float16(y);
    if (half.bits < 0x7bff && half.bits > 0) {
      CHECK(is_nearest(y, to_float(half), to_float(Float16{static_cast<uint16_t>(half.bits - 1)}),
                       to_float(Float16{static_cast<uint16_t>(half.bits + 1)}),
                       half.bits % 2 == 0));
    }
  }
  CHECK_EQ(to_float16(65519.9f).bits, 0x7bff);
  CHECK_EQ(to_float16(65520.0f).bits, 0x7c00);
  CHECK_EQ(to_float16(0x1p-25f).bits, 0);
  CHECK_EQ(to_float16(std::nextafter(0x1p-25f, 1.0f)).bits, 1);
}

int main() { return check::run_all(); }
