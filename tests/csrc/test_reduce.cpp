// SPDX-License-Identifier: Apache-2.0
// The reduction kernels: every variant gives the same bits, and they are the right ones.
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

constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

std::vector<char> random_values(DType dtype, int64_t count, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<double> normal(0, 3);
  std::vector<char> bytes(static_cast<size_t>(count) * item_bytes(dtype));
  for (int64_t i = 0; i < count; ++i) {
    const double x = normal(rng);
    char* const to = bytes.data() + i * static_cast<int64_t>(item_bytes(dtype));
    const auto put = [&](auto value) { std::memcpy(to, &value, sizeof(value)); };
    if (dtype == DType::kFloat32) put(static_cast<float>(x));
    if (dtype == DType::kFloat64) put(x);
    if (dtype == DType::kFloat16) put(to_float16(static_cast<float>(x)));
    if (dtype == DType::kBFloat16) put(to_bfloat16(static_cast<float>(x)));
  }
  return bytes;
}

double value_at(DType dtype, const char* bytes, int64_t i) {
  const auto get = [&](auto value) {
    std::memcpy(&value, bytes + i * static_cast<int64_t>(sizeof(value)), sizeof(value));
    return value;
  };
  switch (dtype) {
    case DType::kFloat32:
      return get(float{});
    case DType::kFloat64:
      return get(double{});
    case DType::kFloat16:
      return to_float(get(Float16{}));
    default:
      return to_float(get(BFloat16{}));
  }
}

struct Run {
  std::vector<std::vector<char>> sources;
  std::vector<char> bias;
  std::vector<char> result;
};

Run run_variant(ReduceSegment variant, DType dtype, int sources, int64_t count, int64_t shift,
                bool with_bias) {
  Run run;
  const auto width = static_cast<int64_t>(item_bytes(dtype));
  std::vector<const void*> src;
  for (int r = 0; r < sources; ++r) {
    run.sources.push_back(random_values(dtype, count + shift, static_cast<unsigned>(r + 1)));
  }
  for (const auto& bytes : run.sources) src.push_back(bytes.data() + shift * width);
  run.bias = random_values(dtype, count, 99);
  run.result.assign(static_cast<size_t>((count + 1) * width), '\x55');
  void* const dst[] = {run.result.data()};
  const Segment segment{
      sources, src.data(), 1, dst, 0, count, with_bias ? run.bias.data() : nullptr};
  variant(dtype, ReduceOp::kSum, segment);
  return run;
}

}  // namespace

TEST(every_variant_gives_the_same_bits_and_stays_in_bounds) {
  std::vector<ReduceSegment> variants;
  if (avx2_reduce()) variants.push_back(avx2_reduce());
  if (avx512_reduce()) variants.push_back(avx512_reduce());
  for (const DType dtype : kFloats) {
    for (const int sources : {1, 2, 3, 4, 5, 16}) {
      for (const int64_t count : {0, 1, 7, 15, 16, 17, 33, 1000}) {
        for (const int64_t shift : {0, 1, 3}) {
          for (const bool with_bias : {false, true}) {
            const Run expected =
                run_variant(&reduce_generic, dtype, sources, count, shift, with_bias);
            CHECK_EQ(expected.result.back(), '\x55');
            for (const ReduceSegment variant : variants) {
              CHECK(run_variant(variant, dtype, sources, count, shift, with_bias).result ==
                    expected.result);
            }
          }
        }
      }
    }
  }
}

TEST(sums_are_right_within_the_dtypes_rounding) {
  for (const DType dtype : kFloats) {
    const Run run = run_variant(&reduce_generic, dtype, 3, 1000, 0, true);
    const double unit = dtype == DType::kFloat64   ? 0x1p-52
                        : dtype == DType::kFloat32 ? 0x1p-23
                        : dtype == DType::kFloat16 ? 0x1p-10
                                                   : 0x1p-7;
    for (int64_t i = 0; i < 1000; ++i) {
      double sum = value_at(dtype, run.bias.data(), i);
      double scale = std::abs(sum);
      for (const auto& source : run.sources) {
        sum += value_at(dtype, source.data(), i);
        scale += std::abs(value_at(dtype, source.data(), i));
      }
      CHECK(std::abs(value_at(dtype, run.result.data(), i) - sum) <=
            4 * unit * scale);  // three roundings here, three in the sum above, one to the dtype
    }
  }
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
