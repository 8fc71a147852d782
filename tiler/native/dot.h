// One register of 32-bit lanes: all that differs between instruction sets in a product.
#ifndef TILER_DOT_H
#define TILER_DOT_H
#include "kernels.h"
#include "vec.h"

// REGISTERS hold 16 outputs; a tile has TILE_ROWS rows and BLOCKS · 16 outputs. Where products take signed values only, OFFSET is
// what int8 activations are made smaller by on their way.
#define TILE_ROWS 6
#define OFFSET 0
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#define REGISTERS 1
#define BLOCKS 4
typedef __m512i Register;
#elif defined(__AVX2__)
#include <immintrin.h>
#define REGISTERS 2
#define BLOCKS 1
typedef __m256i Register;
#else
#include <arm_neon.h>
#define REGISTERS 4
#define BLOCKS 1
typedef int32x4_t Register;
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
#undef OFFSET
#define OFFSET 128  // flipping the highest bit subtracts it
#endif
#endif
#define WIDTH (LANES / REGISTERS)
#if REGISTERS == 2 && !defined(__AVXVNNI__)
#define ADDS_FOURS 1
#else
#define ADDS_FOURS 0
#endif

INLINE Register load_register(const void *p) {
  Register r;
  memcpy(&r, p, sizeof r);
  return r;
}
INLINE void store_register(void *p, Register r) { memcpy(p, &r, sizeof r); }

INLINE Register splat(const char *p) {
  int32_t x;
  memcpy(&x, p, sizeof x);
#if REGISTERS == 1
  return _mm512_set1_epi32(x);
#elif REGISTERS == 2
  return _mm256_set1_epi32(x);
#else
  return vdupq_n_s32(x);
#endif
}

// Activations as `dot` takes them.
INLINE Register activations(const enum Kind kind, const char *p) {
  Register x = splat(p);
#if OFFSET
  if (kind == INT8) x = veorq_s32(x, vdupq_n_s32((int32_t)0x80808080));
#else
  (void)kind;
#endif
  return x;
}

// sum + a · b in each lane. AVX2 alone adds pairs of int8 products in 16 bits.
INLINE Register dot(const enum Kind kind, Register sum, Register a, Register b) {
#if REGISTERS == 1
  if (kind == INT8) return _mm512_dpbusd_epi32(sum, a, b);
#if defined(__AVX512BF16__)
  if (kind == BF16) return (Register)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return (Register)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif REGISTERS == 2
  if (kind == INT8) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
    Register pairs = _mm256_maddubs_epi16(a, b);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  }
  return (Register)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  if (kind == INT8) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(sum, vreinterpretq_u8_s32(a), vreinterpretq_s8_s32(b));
#elif defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
#else
    // 255 · 127 fits 16 bits; sums of two and of four do not.
    uint8x16_t u = vreinterpretq_u8_s32(a);
    int8x16_t s = vreinterpretq_s8_s32(b);
    int16x8_t low = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(u))), vmovl_s8(vget_low_s8(s)));
    int16x8_t high = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(u))), vmovl_s8(vget_high_s8(s)));
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
  }
  return vreinterpretq_s32_f32(vfmaq_f32(vreinterpretq_f32_s32(sum), vreinterpretq_f32_s32(a), vreinterpretq_f32_s32(b)));
#endif
}

#if ADDS_FOURS
// sum + a · b + c · d, whose four products are added in 16 bits: exact for weights as `Quantise` makes them.
INLINE Register dot_of_fours(Register sum, Register a, Register b, Register c, Register d) {
  Register pairs = _mm256_add_epi16(_mm256_maddubs_epi16(a, b), _mm256_maddubs_epi16(c, d));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

INLINE Register plus(const enum Kind kind, Register a, Register b) {
#if REGISTERS == 1
  return kind == INT8 ? _mm512_add_epi32(a, b) : (Register)_mm512_add_ps((__m512)a, (__m512)b);
#elif REGISTERS == 2
  return kind == INT8 ? _mm256_add_epi32(a, b) : (Register)_mm256_add_ps((__m256)a, (__m256)b);
#else
  if (kind == INT8) return vaddq_s32(a, b);
  return vreinterpretq_s32_f32(vaddq_f32(vreinterpretq_f32_s32(a), vreinterpretq_f32_s32(b)));
#endif
}
#endif
