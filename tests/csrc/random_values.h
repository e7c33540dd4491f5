// SPDX-License-Identifier: Apache-2.0
// Test data of every dtype, and a visit of all dtypes.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "core/dtype.h"
#include "kernels/element.h"

namespace tp_native::kernels {

/// A third ordinary values, a third any bits, a third values that are treated apart. Of T without
/// an order of magnitude: any bits.
template <class T>
std::vector<T> random_values(int64_t count, unsigned seed, bool is_ordinary = false) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<double> normal(0, 2);
  const double special[] = {0.0,    -0.0,  1.0,     -1.0,     HUGE_VAL, -HUGE_VAL,
                            NAN,    -NAN,  6e-08,   -1e-40,   65504.0,  -3.38e38,
                            2e-310, 256.0, 65519.0, 0x1p-149, 1024.0,   -256.0};
  std::vector<T> values(static_cast<size_t>(count));
  for (T& x : values) {
    const uint64_t bits = rng();
    std::memcpy(&x, &bits, sizeof(T));
    if constexpr (std::floating_point<Value<T>>) {
      const auto kind = is_ordinary ? 0 : bits % 3;
      if (kind == 0) x = narrowed<T>(static_cast<Value<T>>(normal(rng)));
      if (kind == 1) x = narrowed<T>(static_cast<Value<T>>(special[(bits >> 8) % 18]));
    } else if constexpr (std::same_as<T, Bool>) {
      x.byte = bits % 3 == 0 ? x.byte : static_cast<uint8_t>(bits % 3 - 1);
    }
  }
  return values;
}

/// visit(T{}, dtype) for every floating dtype.
template <class Visit>
void each_floating(const Visit& visit) {
  visit(float{}, DType::kFloat32);
  visit(double{}, DType::kFloat64);
  visit(Float16{}, DType::kFloat16);
  visit(BFloat16{}, DType::kBFloat16);
}

template <class Visit>
void each_dtype(const Visit& visit) {
  each_floating(visit);
  visit(int32_t{}, DType::kInt32);
  visit(int64_t{}, DType::kInt64);
  visit(int16_t{}, DType::kInt16);
  visit(int8_t{}, DType::kInt8);
  visit(uint8_t{}, DType::kUInt8);
  visit(Bool{}, DType::kBool);
}

}  // namespace tp_native::kernels
