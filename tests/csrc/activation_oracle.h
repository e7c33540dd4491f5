// SPDX-License-Identifier: Apache-2.0
// The activations by their textbook formulas, in long double.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/activation.h"

namespace tp_native::kernels {

inline long double exact_activation(Activation activation, long double x) {
  switch (activation) {
    case Activation::kRelu:
      return std::max(x, 0.0L);
    case Activation::kGeluTanh:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0L)) * (x + 0.044715L * x * x * x)));
    case Activation::kGeluErf:
      return x / 2 * std::erfc(-x / std::sqrt(2.0L));
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
  }
  return NAN;
}

/// Central difference: wrong by about 1e-10, more next to the corner of ReLU.
inline long double slope_of_activation(Activation activation, long double x) {
  constexpr long double kStep = 1e-5L;
  return (exact_activation(activation, x + kStep) - exact_activation(activation, x - kStep)) /
         (2 * kStep);
}

}  // namespace tp_native::kernels
