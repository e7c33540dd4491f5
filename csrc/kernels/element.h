// SPDX-License-Identifier: Apache-2.0
// One element: what its dtype is computed in, how two combine, how a result is rounded. The plain
// C++ kernels and the CUDA kernels are made of these, so they agree to the bit.
// __CUDA_ARCH__ stands here, in activation.h and in cuda/memory.h: it picks an instruction that has
// no name in C++, never a meaning.
#pragma once

#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/dtype.h"
#include "kernels/cpu/convert.h"
#include "kernels/host_device.h"

namespace tp_native::kernels {

template <class T>
struct ComputedIn {
  using Type = T;
};
template <>
struct ComputedIn<BFloat16> {
  using Type = float;
};
template <>
struct ComputedIn<Float16> {
  using Type = float;
};
template <>
struct ComputedIn<Bool> {
  using Type = bool;
};

/// What T is computed in: float for 16-bit floating types, otherwise T.
template <class T>
using Value = typename ComputedIn<T>::Type;

TPN_HOST_DEVICE inline float widen(BFloat16 x) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
#else
  return to_float(x);
#endif
}

TPN_HOST_DEVICE inline float widen(Float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return to_float(x);
#endif
}

TPN_HOST_DEVICE inline bool widen(Bool x) { return x.byte != 0; }

template <class T>
  requires std::is_arithmetic_v<T>
TPN_HOST_DEVICE T widen(T x) {
  return x;
}

TPN_HOST_DEVICE inline void narrow(float x, BFloat16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  out = to_bfloat16(x);
#endif
}

TPN_HOST_DEVICE inline void narrow(float x, Float16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  out = to_float16(x);
#endif
}

TPN_HOST_DEVICE inline void narrow(bool x, Bool& out) { out.byte = x ? 1 : 0; }

template <class T>
  requires std::is_arithmetic_v<T>
TPN_HOST_DEVICE void narrow(T x, T& out) {
  out = x;
}

/// x rounded to T; which NaN a NaN becomes is left open.
template <class T>
TPN_HOST_DEVICE T narrowed(Value<T> x) {
  T out;
  narrow(x, out);
  return out;
}

inline constexpr float kQuietNan = std::numeric_limits<float>::quiet_NaN();

/// x rounded to T; a NaN becomes the positive quiet one without payload.
template <class T>
TPN_HOST_DEVICE T rounded(Value<T> x) {
  T out = narrowed<T>(x);
  if (x != x) {  // after the conversion: a GPU's makes a NaN of its own
    if constexpr (std::same_as<T, BFloat16>) {
      out.bits = 0x7fc0;
    } else if constexpr (std::same_as<T, Float16>) {
      out.bits = 0x7e00;
    } else if constexpr (std::floating_point<T>) {
      out = static_cast<T>(kQuietNan);
    }
  }
  return out;
}

template <class V>
TPN_HOST_DEVICE V plus(V a, V b) {
  if constexpr (std::same_as<V, bool>) {
    return a || b;
  } else if constexpr (std::integral<V>) {  // wraps, as torch does
    using Unsigned = std::make_unsigned_t<V>;
    return static_cast<V>(
        static_cast<Unsigned>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b)));
  } else {
    return a + b;
  }
}

/// A product that no compiler fuses with a sum: fused, the two round once and not twice.
TPN_HOST_DEVICE inline float times(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

TPN_HOST_DEVICE inline double times(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

/// kAvg adds as kSum does; what divides is the caller's.
template <ReduceOp kOp, class V>
TPN_HOST_DEVICE V combine(V a, V b) {
  if constexpr (kOp == ReduceOp::kMax) {
    return (b > a || b != b) ? b : a;  // NaN wins, as in torch.max; the first of equal zeros stays
  } else if constexpr (kOp == ReduceOp::kMin) {
    return (b < a || b != b) ? b : a;
  } else {
    return plus(a, b);
  }
}

}  // namespace tp_native::kernels
