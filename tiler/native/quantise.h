// Rows of a weight as int8 whose products may be added in 16 bits before they become 32: see Quantise in kernels.h.
#include <math.h>

#include "dot.h"
#include "pool.h"

enum { FOUR = 4, EIGHT = 8, MOST_INT8 = 127 };

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

INLINE float sum_of_four(F4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }
INLINE F4 whole_numbers(F4 x) { return (x + 12582912.f) - 12582912.f; }  // as nearest()
INLINE F4 positive(F4 x) { return (F4)((I4)x & (x > 0)); }

// Whole values of one sign's sizes (zeros elsewhere) that add up to no more than MOST_FOUR: all lose the same, which errs least.
static __attribute__((noinline)) F4 limited(F4 size) {
  for (float less = fmaxf((sum_of_four(size) - MOST_FOUR) / FOUR, 0);; less += 0.25f) {
    F4 whole = whole_numbers(positive(size - less));
    if (sum_of_four(whole) <= MOST_FOUR) return whole;
  }
}

// Four values in steps of their scale as whole ones.
INLINE F4 whole_four(F4 x) {
  F4 whole = whole_numbers(x);
  float above = sum_of_four(positive(whole)), below = above - sum_of_four(whole);
  if (above > MOST_FOUR || below > MOST_FOUR) whole = limited(positive(x)) - limited(positive(-x));
  return whole;
}

// A row by one scale, written if `out` is given. Returns the sum of squared errors, or one beyond `most`.
static float whole_row(const Quantise *p, const float *x, float scale, float most, int8_t *out) {
  const float inverse = 1.f / scale;
  F4 squares = {0};
  for (int64_t input = 0; input < p->inputs && sum_of_four(squares) * scale * scale <= most; input += EIGHT)
    for (int64_t tap = 0; tap < p->taps; tap++)
      for (int half = 0; half < FOUR; half += 2) {
        const float *from = x + (input + half) * p->taps + tap;
        int is_whole = p->inputs - input > FOUR;
        F4 four = {from[0], from[p->taps], is_whole ? from[FOUR * p->taps] : 0, is_whole ? from[(FOUR + 1) * p->taps] : 0};
        F4 whole = whole_four(four *= inverse);
        squares += (whole - four) * (whole - four);
        if (!out) continue;
        int8_t *to = out + (from - x);
        to[0] = (int8_t)whole[0], to[p->taps] = (int8_t)whole[1];
        if (is_whole) to[FOUR * p->taps] = (int8_t)whole[2], to[(FOUR + 1) * p->taps] = (int8_t)whole[3];
      }
  return sum_of_four(squares) * scale * scale;
}

static void quantise_task(const void *context, int64_t row) {
  // The root mean square in steps of the scale: which errs least depends on how the values are distributed.
  static const float PARTS[] = {17, 13, 22};
  const Quantise *p = context;
  const int64_t count = p->inputs * p->taps;
  const float *x = p->x + row * count;
  F16 top = {0}, squares = {0};
  for (int64_t j = 0; j < count; j += LANES) {
    F16 v = magnitude(load_some(x + j, count - j));
    top = most(v, top);
    squares = fma16(v, v, squares);
  }
  float largest = most_of(top), finite = sum_of(squares) * 0, mean = sqrtf(sum_of(squares) / (float)count), best = 1, error = INFINITY;
  for (int i = 0; finite == 0 && largest > 0 && i < 3; i++) {
    float scale = fmaxf(mean / PARTS[i], largest / MOST_INT8);
    if (scale == best) break;
    float own = whole_row(p, x, scale, error, NULL);
    if (own < error) error = own, best = scale;
  }
  p->scale[row] = best + finite;  // NaN where a value is not finite
  if (finite == 0)
    whole_row(p, x, best, INFINITY, p->out + row * count);
  else
    memset(p->out + row * count, 0, (size_t)count);
}

static void quantise(Pool *pool, const Quantise *p, int threads) { pool_run(pool, quantise_task, p, p->outputs, threads); }
