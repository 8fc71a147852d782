// Winograd's F(4 × 4, 3 × 3): an output of 4 × 4 pixels is Aᵀ[(G w Gᵀ) ⊙ (Bᵀ x B)]A of the 6 × 6 pixels x below it (Lavin and
// Gray 2015, arXiv:1509.09308). The points of interpolation are 0, ±5/8, ±3/2 and infinity (Barabasz et al. 2020,
// arXiv:1803.10986, on points): rounding is half that of 0, ±1, ±2.
#ifndef TILER_TRANSFORM_H
#define TILER_TRANSFORM_H
#include "dot.h"

enum { SIDE = WINOGRAD_SIDE, SEEN = SIDE + 2 };
#define NEAR (5.f / 8)
#define FAR (3.f / 2)
#define NEAR2 (NEAR * NEAR)
#define FAR2 (FAR * FAR)

// G x: three of a weight's rows or columns → six points.
INLINE void transform_weight(const F16 *x, int step, F16 *out, int out_step) {
  F16 w0 = x[0], w1 = x[step], w2 = x[2 * step];
  out[0] = w0 * (1 / (NEAR2 * FAR2));
  F16 even = fma16(w2, all(NEAR2), w0) * (1 / (2 * NEAR2 * (NEAR2 - FAR2))), odd = w1 * (NEAR / (2 * NEAR2 * (NEAR2 - FAR2)));
  out[out_step] = even + odd;
  out[2 * out_step] = even - odd;
  even = fma16(w2, all(FAR2), w0) * (1 / (2 * FAR2 * (FAR2 - NEAR2))), odd = w1 * (FAR / (2 * FAR2 * (FAR2 - NEAR2)));
  out[3 * out_step] = even + odd;
  out[4 * out_step] = even - odd;
  out[5 * out_step] = w2;
}

// Bᵀ x: six of the input's rows or columns → six points.
INLINE void transform_input(const F16 *x, int step, F16 *out, int out_step) {
  F16 x1 = x[step], x2 = x[2 * step], x3 = x[3 * step], x4 = x[4 * step];
  out[0] = fma16(x[0], all(NEAR2 * FAR2), fma16(x2, all(-(NEAR2 + FAR2)), x4));
  out[5 * out_step] = fma16(x1, all(NEAR2 * FAR2), fma16(x3, all(-(NEAR2 + FAR2)), x[5 * step]));
  F16 even = fma16(x2, all(-FAR2), x4), odd = fma16(x1, all(-FAR2), x3) * NEAR;
  out[out_step] = even + odd;
  out[2 * out_step] = even - odd;
  even = fma16(x2, all(-NEAR2), x4), odd = fma16(x1, all(-NEAR2), x3) * FAR;
  out[3 * out_step] = even + odd;
  out[4 * out_step] = even - odd;
}

// Aᵀ m: six points → four of the output's rows or columns.
INLINE void transform_output(const F16 *m, int step, F16 *out, int out_step) {
  F16 near = m[step] + m[2 * step], near_odd = (m[step] - m[2 * step]) * NEAR;
  F16 far = m[3 * step] + m[4 * step], far_odd = (m[3 * step] - m[4 * step]) * FAR;
  out[0] = m[0] + near + far;
  out[out_step] = near_odd + far_odd;
  out[2 * out_step] = fma16(near, all(NEAR2), far * FAR2);
  out[3 * out_step] = fma16(near_odd, all(NEAR2), fma16(far_odd, all(FAR2), m[5 * step]));
}

// The same for an image with both sides doubled, whose 6 × 6 pixels are 4 × 4 of the small one (a, b, c and d, of which b and c
// are seen twice): 5 × 5 products of 4 × 4 values, and no factor but ±1 and ½. It is the algorithm for the points 0, ±1, ±i and
// infinity: there, what is seen at −1 vanishes, and at i and −i is the same.
enum { SEEN_SMALL = 4, POINTS_SMALL = 5 };
static const int SEEN_AT_SMALL[POINTS_SMALL] = {0, 1, 2, 2, 3};  // which values a point multiplies

INLINE void transform_weight_small(const F16 *x, int step, F16 *out, int out_step) {
  F16 w0 = x[0], w1 = x[step], w2 = x[2 * step];
  out[0] = w0;
  out[out_step] = (w0 + w1 + w2) * 0.5f;
  out[2 * out_step] = w1 * 0.5f;
  out[3 * out_step] = (w0 - w2) * 0.5f;
  out[4 * out_step] = w2;
}

INLINE void transform_input_small(const F16 *x, int step, F16 *out, int out_step) {
  F16 a = x[0], b = x[step], c = x[2 * step], d = x[3 * step];
  out[0] = a - c;
  out[out_step] = b + c;
  out[2 * out_step] = c - b;
  out[3 * out_step] = d - b;
}

INLINE void transform_output_small(const F16 *m, int step, F16 *out, int out_step) {
  F16 outer = m[step] + m[3 * step], inner = m[step] - m[3 * step], odd = m[2 * step];
  out[0] = m[0] + (outer - odd);
  out[out_step] = inner - odd;
  out[2 * out_step] = inner + odd;
  out[3 * out_step] = m[4 * step] + (outer + odd);
}

// One line or column of a tile's input or products, and all of a weight's 9 taps, for an image that is `enlarged` or not.
INLINE void input_line(const int enlarged, const F16 *x, F16 *out, int out_step) {
  if (enlarged)
    transform_input_small(x, 1, out, out_step);
  else
    transform_input(x, 1, out, out_step);
}

INLINE void output_line(const int enlarged, const F16 *m, F16 *out, int out_step) {
  if (enlarged)
    transform_output_small(m, 1, out, out_step);
  else
    transform_output(m, 1, out, out_step);
}

INLINE void weight_line(const int enlarged, const F16 *w, int step, F16 *out, int out_step) {
  if (enlarged)
    transform_weight_small(w, step, out, out_step);
  else
    transform_weight(w, step, out, out_step);
}

INLINE void weight_points(const int enlarged, const F16 *taps, F16 *points) {
  const int side = enlarged ? POINTS_SMALL : SEEN;
  F16 half[SEEN * 3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; j++) weight_line(enlarged, taps + j, 3, half + j, 3);
#pragma GCC unroll 6
  for (int j = 0; j < side; j++) weight_line(enlarged, half + 3 * j, 1, points + side * j, 1);
}
#endif
