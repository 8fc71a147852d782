// Sixteen fp32 values as one, in the compilers' vector extensions: one AVX-512 register, two of AVX2, four of NEON.
#ifndef TILER_VEC_H
#define TILER_VEC_H
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));
typedef uint8_t Byte16 __attribute__((vector_size(16)));

INLINE F16 all(float x) { return (F16){} + x; }
INLINE F16 load(const float *p) {
  F16 x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float *p, F16 x) { memcpy(p, &x, sizeof x); }

// The first `count` of 16, zeros behind them.
INLINE F16 load_some(const float *p, int64_t count) {
  if (count >= LANES) return load(p);
#if defined(__AVX512F__)
  return (F16)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  F16 x = {0};
  if (count == LANES / 2)  // often, and then no call
    memcpy(&x, p, sizeof x / 2);
  else
    memcpy(&x, p, (size_t)count * 4);
  return x;
#endif
}
INLINE void store_some(float *p, F16 x, int64_t count) {
  if (count >= LANES)
    store(p, x);
  else
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)x);
#else
  if (count == LANES / 2)
    memcpy(p, &x, sizeof x / 2);
  else
    memcpy(p, &x, (size_t)count * 4);
#endif
}

// Where `mask` is set (all bits of a lane or none) `a`, elsewhere `b`. A comparison with NaN is not set.
INLINE F16 choose(I16 mask, F16 a, F16 b) { return (F16)((mask & (I16)a) | (~mask & (I16)b)); }
INLINE F16 least(F16 a, F16 b) { return choose(a < b, a, b); }
INLINE F16 most(F16 a, F16 b) { return choose(a > b, a, b); }
// NaN stays NaN.
INLINE F16 between(F16 x, float low, float high) {
  x = choose(x < all(low), all(low), x);
  return choose(x > all(high), all(high), x);
}
INLINE F16 magnitude(F16 x) { return (F16)((I16)x & 0x7fffffff); }
// The first `count` lanes of x, zeros behind them.
INLINE F16 first(F16 x, int64_t count) {
  const I16 number = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return count >= LANES ? x : (F16)((number < (I16){} + (int32_t)count) & (I16)x);
}
// a · b + c in one rounding, written out: the compiler may not fuse by itself.
INLINE F16 fma16(F16 a, F16 b, F16 c) {
#if defined(__clang__)
  return __builtin_elementwise_fma(a, b, c);
#elif defined(__AVX512F__)
  return (F16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  F16 x;
  for (int i = 0; i < LANES; i++) x[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return x;
#endif
}
// In one order, whatever the instruction set.
INLINE float sum_of(F16 x) {
  float s[LANES];
  store(s, x);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) s[i] += s[i + n];
  return s[0];
}
INLINE float most_of(F16 x) {
  float s[LANES];
  store(s, x);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
  return s[0];
}

// Nearest even, by the sum with 1.5 · 2²³: for |x| < 2²². NaN gives some integer.
INLINE I16 nearest(F16 x) { return (I16)(x + 12582912.f) - 0x4b400000; }
INLINE Byte16 bytes(I16 x) { return __builtin_convertvector(x, Byte16); }

// Nearest even; NaN stays NaN.
INLINE Half16 bf16(F16 x) {
#if defined(__AVX512BF16__)
  return (Half16)_mm512_cvtneps_pbh((__m512)x);
#else
  U16 bits = (U16)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  U16 nan = (U16)(x != x);
  bits = (nan & (bits | 0x400000)) | (~nan & rounded);
  return __builtin_convertvector(bits >> 16, Half16);
#endif
}
INLINE void store_half(uint16_t *p, Half16 x, int64_t count) { memcpy(p, &x, count >= LANES ? sizeof x : (size_t)count * 2); }
INLINE void store_bytes(uint8_t *p, Byte16 x, int64_t count) { memcpy(p, &x, count >= LANES ? sizeof x : (size_t)count); }

// 2ˣ for x in [−126, 127], beyond them as there; relative error below 3e-7 (a least-squares fit of 2ᶠ for |f| ≤ ½). NaN stays NaN.
INLINE F16 exp2_16(F16 x) {
  x = between(x, -126.f, 127.f);
  // The sum's low bits are the nearest integer + 127, the exponent of a float.
  F16 sum = x + (12582912.f + 127.f), f = x - (sum - (12582912.f + 127.f));
  F16 p = all(0.001326472731307149f);
  p = fma16(p, f, all(0.009671512991189957f));
  p = fma16(p, f, all(0.05550733581185341f));
  p = fma16(p, f, all(0.24022242426872253f));
  p = fma16(p, f, all(0.6931470036506653f));
  p = fma16(p, f, all(1.f));
  return p * (F16)((I16)sum << 23);
}
#define LOG2_E 1.44269504088896f
INLINE F16 silu(F16 x) { return x / (exp2_16(x * -LOG2_E) + 1.f); }
// Hendrycks and Gimpel's approximation, x · σ(√(8/π) · (x + 0.044715 x³)).
INLINE F16 gelu_tanh(F16 x) {
  F16 z = x * fma16(x * x, all(0.044715f), all(1.f)) * 1.5957691216057308f;
  return x / (exp2_16(z * -LOG2_E) + 1.f);
}
// x · Φ(x), with erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: within 1.5e-7.
INLINE F16 gelu(F16 x) {
  F16 z = x * 0.70710678118655f, a = magnitude(z), t = 1.f / fma16(a, all(0.3275911f), all(1.f));
  F16 p = all(1.061405429f);
  p = fma16(p, t, all(-1.453152027f));
  p = fma16(p, t, all(1.421413741f));
  p = fma16(p, t, all(-0.284496736f));
  p = fma16(p, t, all(0.254829592f));
  F16 erf = 1.f - p * t * exp2_16(a * a * -LOG2_E);
  erf = (F16)((I16)erf | ((I16)z & (int32_t)0x80000000));
  return x * 0.5f * (erf + 1.f);
}
// Row i of 16 becomes lane i of all: blocks of 1, 2, 4 and 8 change places across the diagonal.
#define EXCHANGE(n, low, high)                               \
  for (int i = 0; i < LANES; i++) {                          \
    if (i & n) continue;                                     \
    F16 a = r[i], b = r[i + n];                              \
    r[i] = __builtin_shufflevector(a, b, low);               \
    r[i + n] = __builtin_shufflevector(a, b, high);          \
  }
#define LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
INLINE void transpose(F16 r[LANES]) {
#pragma GCC unroll 16
  EXCHANGE(1, LOW1, HIGH1)
#pragma GCC unroll 16
  EXCHANGE(2, LOW2, HIGH2)
#pragma GCC unroll 16
  EXCHANGE(4, LOW4, HIGH4)
#pragma GCC unroll 16
  EXCHANGE(8, LOW8, HIGH8)
}

// Eight rows of eight, `step` apart, times `factor` become eight lines, `line` apart: AVX2 has no registers for sixteen rows.
typedef float F8 __attribute__((vector_size(32)));
INLINE void transpose_8(const float *rows, int64_t step, F8 factor, float *lines, int64_t line) {
  F8 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    memcpy(&a[i], rows + i * step, sizeof a[i]);
    a[i] *= factor;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    F8 x = b[i % 2 + i / 2 * 4], y = b[i % 2 + i / 2 * 4 + 2];
    a[2 * i] = __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13);
    a[2 * i + 1] = __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    F8 low = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    F8 high = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    memcpy(lines + i * line, &low, sizeof low);
    memcpy(lines + (i + 4) * line, &high, sizeof high);
  }
}

// Lanes a distance d apart as (a, b) → (a + b, a − b); d is 1, 2, 4 or 8.
#define SWAPPED1 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#define SWAPPED2 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13
#define SWAPPED4 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11
#define SWAPPED8 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7
#define SUMS_AND_DIFFERENCES(d, x) \
  (__builtin_shufflevector(x, x, SWAPPED##d) + (F16)((I16)x ^ (((NUMBERS & d) == d) & (int32_t)0x80000000)))
#define NUMBERS ((I16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
// 64 values by the matrix of Walsh and Hadamard over 8, its root.
INLINE void rotate(F16 x[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    x[i] = SUMS_AND_DIFFERENCES(1, x[i]);
    x[i] = SUMS_AND_DIFFERENCES(2, x[i]);
    x[i] = SUMS_AND_DIFFERENCES(4, x[i]);
    x[i] = SUMS_AND_DIFFERENCES(8, x[i]);
  }
  F16 a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
  x[0] = (a + c) * 0.125f;
  x[1] = (b + d) * 0.125f;
  x[2] = (a - c) * 0.125f;
  x[3] = (b - d) * 0.125f;
}

// Two rows as pairs of bf16: `a` in the lower halves.
INLINE F16 pairs(F16 a, F16 b) {
  U16 low = __builtin_convertvector(bf16(a), U16), high = __builtin_convertvector(bf16(b), U16);
  return (F16)(low | high << 16);
}
#endif
