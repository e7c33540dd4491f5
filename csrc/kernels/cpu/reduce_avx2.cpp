// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/reduce_variants.h"

namespace tp_native::kernels {
namespace {

struct Lanes {
  using Register = __m256i;

  static Register load(const char* p) {
    return _mm256_loadu_si256(reinterpret_cast<const Register*>(p));
  }
  static Register load(const char* p, int64_t bytes) {
    if (bytes >= 32) return load(p);
    char padded[32] = {};
    __builtin_memcpy(padded, p, static_cast<size_t>(bytes));
    return load(padded);
  }
  static void store(char* p, Register x) { _mm256_storeu_si256(reinterpret_cast<Register*>(p), x); }
  static void store(char* p, Register x, int64_t bytes) {
    if (bytes >= 32) return store(p, x);
    char padded[32];
    store(padded, x);
    __builtin_memcpy(p, padded, static_cast<size_t>(bytes));
  }

  static bool has_nan(const __m256 (&x)[4]) {
    const __m256 low = _mm256_cmp_ps(x[0], x[1], _CMP_UNORD_Q);
    return _mm256_movemask_ps(_mm256_or_ps(low, _mm256_cmp_ps(x[2], x[3], _CMP_UNORD_Q))) != 0;
  }
  static bool has_nan(const __m256d (&x)[8]) {
    const __m256d a = _mm256_cmp_pd(x[0], x[1], _CMP_UNORD_Q);
    const __m256d b = _mm256_cmp_pd(x[2], x[3], _CMP_UNORD_Q);
    const __m256d c = _mm256_cmp_pd(x[4], x[5], _CMP_UNORD_Q);
    const __m256d d = _mm256_cmp_pd(x[6], x[7], _CMP_UNORD_Q);
    return _mm256_movemask_pd(_mm256_or_pd(_mm256_or_pd(a, b), _mm256_or_pd(c, d))) != 0;
  }

  // of each register the even elements, then the odd ones: no element crosses a 32-bit lane
  static void widen(BFloat16, const Register (&x)[2], __m256 (&wide)[4]) {
    const Register upper = _mm256_set1_epi32(-0x10000);
    wide[0] = _mm256_castsi256_ps(_mm256_slli_epi32(x[0], 16));
    wide[1] = _mm256_castsi256_ps(_mm256_and_si256(x[0], upper));
    wide[2] = _mm256_castsi256_ps(_mm256_slli_epi32(x[1], 16));
    wide[3] = _mm256_castsi256_ps(_mm256_and_si256(x[1], upper));
  }
  [[gnu::always_inline]] static void narrow(BFloat16, const __m256 (&wide)[4], Register (&x)[2]) {
    const Register even[] = {_mm256_srli_epi32(rounded(wide[0]), 16),
                             _mm256_srli_epi32(rounded(wide[2]), 16)};
    x[0] = _mm256_blend_epi16(even[0], rounded(wide[1]), 0xaa);
    x[1] = _mm256_blend_epi16(even[1], rounded(wide[3]), 0xaa);
  }
  static Register rounded(__m256 x) {  // in the upper half
    const Register bits = _mm256_castps_si256(x);
    const Register lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
  }

  static void widen(Float16, const Register (&x)[2], __m256 (&wide)[4]) {
    wide[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(x[0]));
    wide[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(x[0], 1));
    wide[2] = _mm256_cvtph_ps(_mm256_castsi256_si128(x[1]));
    wide[3] = _mm256_cvtph_ps(_mm256_extracti128_si256(x[1], 1));
  }
  // conversions read memory as fast as registers, and no half needs to be moved
  static void load(const Float16* p, __m256 (&wide)[4]) {
    const auto* const halves = reinterpret_cast<const __m128i*>(p);
    wide[0] = _mm256_cvtph_ps(_mm_loadu_si128(halves));
    wide[1] = _mm256_cvtph_ps(_mm_loadu_si128(halves + 1));
    wide[2] = _mm256_cvtph_ps(_mm_loadu_si128(halves + 2));
    wide[3] = _mm256_cvtph_ps(_mm_loadu_si128(halves + 3));
  }
  [[gnu::always_inline]] static void narrow(Float16, const __m256 (&wide)[4], Register (&x)[2]) {
    x[0] = _mm256_set_m128i(half(wide[1]), half(wide[0]));
    x[1] = _mm256_set_m128i(half(wide[3]), half(wide[2]));
  }
  static __m128i half(__m256 x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

#include "kernels/cpu/reduce_simd.h"
#include "kernels/cpu/rms_norm_simd.h"

#include "kernels/cpu/cross_entropy_simd.h"

constexpr Variant kAvx2{"avx2", &reduce_any, &rms_norm_any, &logit_statistics_any,
                        &logit_gradient_any};

}  // namespace

const Variant* avx2_variant() {
  __builtin_cpu_init();
  const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("f16c");
  return supported ? &kAvx2 : nullptr;
}

}  // namespace tp_native::kernels
