// SPDX-License-Identifier: Apache-2.0
// Activations with their derivatives, computed as Value<T> and not yet rounded.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/element.h"

namespace tp_native::kernels {

enum class Activation : uint8_t {
  kRelu,
  kGeluTanh,  ///< GELU(approximate="tanh")
  kGeluErf,   ///< GELU()
  kSilu
};

/// e^x. 16-bit types take the hardware's approximation: its error is far below their rounding.
template <class T>
TPN_HOST_DEVICE Value<T> exponential(Value<T> x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {
    return __expf(x);
  } else {
    return exp(x);
  }
#else
  return std::exp(x);
#endif
}

/// a / b, approximated for 16-bit types as the exponential is.
template <class T>
TPN_HOST_DEVICE Value<T> quotient(Value<T> a, Value<T> b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {
    return __fdividef(a, b);
  } else {
    return a / b;
  }
#else
  return a / b;
#endif
}

/// f(x) and f'(x); what a caller does not use, the compiler leaves out.
template <class V>
struct Activated {
  V value;
  V slope;
};

/// x * sigmoid(s), for s(x) with the given slope.
template <class T>
TPN_HOST_DEVICE Activated<Value<T>> gated_by_sigmoid(Value<T> x, Value<T> s, Value<T> s_slope) {
  using V = Value<T>;
  const V e = exponential<T>(-s);
  const V gate = quotient<T>(1, 1 + e);
  const V rest = e > 1 ? 1 - gate : e * gate;  // 1 - gate without cancellation; e may be infinite
  return {quotient<T>(x, 1 + e), gate + x * gate * rest * s_slope};
}

template <Activation kActivation, class T>
TPN_HOST_DEVICE Activated<Value<T>> activated(Value<T> x) {
  using V = Value<T>;
  if constexpr (kActivation == Activation::kSilu) {
    return gated_by_sigmoid<T>(x, x, 1);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // x/2 * (1 + tanh(u)) = x * sigmoid(2u)
    constexpr V kTwice = static_cast<V>(1.5957691216057307118);  // 2 sqrt(2 / pi)
    constexpr V kCubic = static_cast<V>(0.044715);
    const V square = x * x;
    return gated_by_sigmoid<T>(x, kTwice * x * (1 + kCubic * square),
                               kTwice * (1 + 3 * kCubic * square));
  } else if constexpr (kActivation == Activation::kGeluErf) {
    constexpr V kRootHalf = static_cast<V>(0.70710678118654752440);
    constexpr V kDensity = static_cast<V>(0.39894228040143267794);  // 1 / sqrt(2 pi)
    const V half = static_cast<V>(0.5);
    const V below = half * (1 + std::erf(x * kRootHalf));
    return {x * below, below + x * kDensity * exponential<T>(-half * x * x)};
  } else {
    const bool is_off = x <= 0;  // NaN passes, as in torch
    return {is_off ? V{0} : x, is_off ? V{0} : V{1}};
  }
}

/// dy * f'(x)
template <Activation kActivation, class T>
TPN_HOST_DEVICE Value<T> through(Value<T> dy, Value<T> slope) {
  if constexpr (kActivation == Activation::kRelu) {
    return slope == 0 ? Value<T>{0} : dy;  // 0 * infinity would be NaN
  } else {
    return dy * slope;
  }
}

}  // namespace tp_native::kernels
