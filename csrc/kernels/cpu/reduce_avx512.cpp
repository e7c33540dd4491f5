// SPDX-License-Identifier: Apache-2.0
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored \
    "-Wuninitialized"  // gcc 12's header uses _mm512_undefined_*: GCC bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "kernels/cpu/convert.h"
#include "kernels/cpu/reduce_variants.h"

namespace tp_native::kernels {
namespace {

struct Lanes {
  using Register = __m512i;

  static Register load(const char* p) { return _mm512_loadu_si512(p); }
  static Register load(const char* p, int64_t bytes) {
    return _mm512_maskz_loadu_epi8(first(bytes), p);
  }
  static void store(char* p, Register x) { _mm512_storeu_si512(p, x); }
  static void store(char* p, Register x, int64_t bytes) {
    _mm512_mask_storeu_epi8(p, first(bytes), x);
  }
  static __mmask64 first(int64_t bytes) {
    return bytes >= 64 ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1;
  }

  static bool has_nan(const __m512 (&x)[2]) {
    return _mm512_cmp_ps_mask(x[0], x[1], _CMP_UNORD_Q) != 0;
  }
  static bool has_nan(const __m512d (&x)[4]) {
    return (_mm512_cmp_pd_mask(x[0], x[1], _CMP_UNORD_Q) |
            _mm512_cmp_pd_mask(x[2], x[3], _CMP_UNORD_Q)) != 0;
  }

  // the even elements, then the odd ones: no element crosses a 32-bit lane
  static void widen(BFloat16, const Register (&x)[1], __m512 (&wide)[2]) {
    wide[0] = _mm512_castsi512_ps(_mm512_slli_epi32(x[0], 16));
    wide[1] = _mm512_castsi512_ps(_mm512_and_si512(x[0], _mm512_set1_epi32(-0x10000)));
  }
  // not vcvtneps2bf16: it flushes subnormals, which to_bfloat16 and torch keep
  [[gnu::always_inline]] static void narrow(BFloat16, const __m512 (&wide)[2], Register (&x)[1]) {
    const Register even = _mm512_srli_epi32(rounded(wide[0]), 16);
    x[0] = _mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded(wide[1]));
  }
  static Register rounded(__m512 x) {  // in the upper half
    const Register bits = _mm512_castps_si512(x);
    const Register lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
  }

  static void widen(Float16, const Register (&x)[1], __m512 (&wide)[2]) {
    wide[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(x[0]));
    wide[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x[0], 1));
  }
  // conversions read memory as fast as registers, and no half needs to be moved
  static void load(const Float16* p, __m512 (&wide)[2]) {
    const auto* const halves = reinterpret_cast<const __m256i*>(p);
    wide[0] = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
    wide[1] = _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1));
  }
  [[gnu::always_inline]] static void narrow(Float16, const __m512 (&wide)[2], Register (&x)[1]) {
    x[0] = _mm512_inserti64x4(_mm512_castsi256_si512(half(wide[0])), half(wide[1]), 1);
  }
  static __m256i half(__m512 x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

#include "kernels/cpu/reduce_simd.h"
#include "kernels/cpu/rms_norm_simd.h"

#include "kernels/cpu/cross_entropy_simd.h"

constexpr Variant kAvx512{"avx512", &reduce_any, &rms_norm_any, &logit_statistics_any,
                          &logit_gradient_any};

}  // namespace

const Variant* avx512_variant() {
  __builtin_cpu_init();
  const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return supported ? &kAvx512 : nullptr;
}

}  // namespace tp_native::kernels
