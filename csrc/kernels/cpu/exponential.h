// SPDX-License-Identifier: Apache-2.0
// e^x for x <= 0, of a number or of a register of numbers: the same operations, so the same bits.
// Included inside an anonymous namespace; like reduce_simd.h it calls nothing from outside.

template <class V>
struct ExponentialOf;

template <>
struct ExponentialOf<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kRound =
      0x1.8p23f + 127;  // leaves n + the exponent's bias in the low bits
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f;  // n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -87;  // below, the result is within 2^-125 of 0
  static constexpr int kDegree = 7;      // Taylor: the rest is below 1e-8 for |r| <= ln(2) / 2
};

template <>
struct ExponentialOf<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kRound = 0x1.8p52 + 1023;
  static constexpr double kLog2E = 1.4426950408889634074;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLowest = -708;
  static constexpr int kDegree = 13;  // the rest is below 5e-18
};

template <class V>
constexpr V inverse_factorial(int n) {
  double product = 1;
  for (int k = 2; k <= n; ++k) product *= k;
  return static_cast<V>(1 / product);
}

template <class V, int kPower, class X>
[[gnu::always_inline]] inline X taylor(X r) {
  constexpr V kFactor = inverse_factorial<V>(kPower);
  if constexpr (kPower == ExponentialOf<V>::kDegree) {
    return X{} + kFactor;
  } else {
    return taylor<V, kPower + 1>(r) * r + kFactor;
  }
}

/// X is V, or a register of V; Bits the unsigned integers of its size. A NaN stays one.
/// Source: Cody & Waite, Software Manual for the Elementary Functions, chapter 6: e^x = 2^n e^r.
template <class V, class Bits = typename ExponentialOf<V>::Bits, class X = V>
[[gnu::always_inline]] inline X exponential(X x) {
  using C = ExponentialOf<V>;
  const X shifted = x * C::kLog2E + C::kRound;
  const X power = __builtin_bit_cast(X, __builtin_bit_cast(Bits, shifted) << C::kMantissaBits);
  const X n = shifted - C::kRound;
  const X r = x - n * C::kLn2High - n * C::kLn2Low;
  const X result = taylor<V, 0>(r) * power;
  return x < C::kLowest ? X{} : result;
}
