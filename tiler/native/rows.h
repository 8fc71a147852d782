// Rows of a matrix, normalised (LayerNorm) and cast.
#include "dot.h"
#include "pool.h"

enum { ROWS_A_TASK = 32, MIDDLE = 128 };
#define LEAST_SCALE 1e-30f

typedef struct {
  const Rows *rows;
  const float *x;
  float mean, factor;
} Row;

// Of values around MIDDLE whose magnitudes are at most those of `top` and add up to `total`: NaN, which a maximum loses, and
// Inf make it NaN.
INLINE float scale_of(F16 top, F16 total) {
  float scale = most_of(top) / (MIDDLE - 1);
  return (scale < LEAST_SCALE ? LEAST_SCALE : scale) + sum_of(total) * 0.f;
}

INLINE F16 row_values(const Row *row, int64_t j) {
  const Rows *p = row->rows;
  int64_t count = p->width - j;
  F16 x = load_some(row->x + j, count);
  if (!p->norm) return x;
  x = first((x - row->mean) * row->factor, count);
  return p->gamma ? fma16(x, load_some(p->gamma + j, count), p->beta ? load_some(p->beta + j, count) : all(0.f)) : x;
}

// Values j to j + 64, rotated.
INLINE void rotated_values(const Row *row, int64_t j, F16 x[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) x[i] = row_values(row, j + i * LANES);
  rotate(x);
}

// A row of whole groups of 64.
static float rotated_bytes(const Row *row, uint8_t *out) {
  const int64_t width = row->rows->width;
  F16 top = {0}, total = {0}, x[4];
  for (int64_t j = 0; j < width; j += 4 * LANES) {
    rotated_values(row, j, x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      top = most(magnitude(x[i]), top);
      total += magnitude(x[i]);
    }
  }
  float scale = scale_of(top, total);
  for (int64_t j = 0; j < width; j += 4 * LANES) {
    rotated_values(row, j, x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) store_bytes(out + j + i * LANES, bytes(nearest(x[i] * (1.f / scale)) + MIDDLE), LANES);
  }
  return scale;
}

static void rows_task(const void *context, int64_t number) {
  const Rows *p = context;
  int64_t last = (number + 1) * ROWS_A_TASK < p->rows ? (number + 1) * ROWS_A_TASK : p->rows;
  for (int64_t r = number * ROWS_A_TASK; r < last; r++) {
    Row row = {p, p->x + r * p->step, 0, 1};
    char *out = (char *)p->out + r * p->out_bytes;
    if (p->norm) {
      F16 total = {0}, squares = {0};
      for (int64_t j = 0; j < p->width; j += LANES) total += load_some(row.x + j, p->width - j);
      row.mean = sum_of(total) / (float)p->width;
      for (int64_t j = 0; j < p->width; j += LANES) {
        F16 d = first(load_some(row.x + j, p->width - j) - row.mean, p->width - j);
        squares = fma16(d, d, squares);
      }
      row.factor = 1.f / __builtin_sqrtf(sum_of(squares) / (float)p->width + p->eps);
    }
    if (p->out_type == AS_UINT8 && p->rotated) {
      p->scale[r] = rotated_bytes(&row, (uint8_t *)out);
    } else if (p->out_type == AS_UINT8) {
      F16 top = {0}, total = {0};
      for (int64_t j = 0; j < p->width; j += LANES) {
        F16 x = magnitude(row_values(&row, j));
        top = most(x, top);
        total += x;
      }
      float scale = scale_of(top, total);
      p->scale[r] = scale;
      for (int64_t j = 0; j < p->width; j += LANES) {
        I16 x = nearest(row_values(&row, j) * (1.f / scale)) + MIDDLE;
        store_bytes((uint8_t *)out + j, bytes(x), ((p->width + 3) & ~3) - j);
      }
    } else if (p->out_type == AS_BF16) {
      for (int64_t j = 0; j < p->width; j += LANES)
        store_half((uint16_t *)out + j, bf16(row_values(&row, j)), ((p->width + 1) & ~1) - j);
    } else {
      for (int64_t j = 0; j < p->width; j += LANES) store_some((float *)out + j, row_values(&row, j), p->width - j);
    }
  }
}

static void rows(Pool *pool, const Rows *p, int threads) {
  pool_run(pool, rows_task, p, (p->rows + ROWS_A_TASK - 1) / ROWS_A_TASK, threads);
}
