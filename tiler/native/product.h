// Products of any rows by packed weights: linear layers and convolutions. Every output is one sum over taps and lanes in one
// order, however rows and outputs are cut between tasks.
#include "dot.h"
#include "pool.h"

// Rows and outputs of a task's panel, and lanes of K at a time: 32 KB of weights, of which AVX2 and NEON take a half at a time,
// and sums that stay in the cache.
enum { PANEL_ROWS = 96, GROUP = 64, GROUP_BLOCKS = GROUP / LANES, CHUNK = 128, TASKS_A_THREAD = 8 };
enum { BLOCKS_TOGETHER = BLOCKS == 1 ? 2 : BLOCKS };

typedef struct {
  const Product *product;
  int64_t parts;  // of the outputs
} ProductTasks;

typedef struct {
  const char *row[PANEL_ROWS];
  int64_t scale_at[PANEL_ROWS], out_at[PANEL_ROWS];
  _Alignas(64) int32_t sums[PANEL_ROWS * GROUP];
} Panel;

// Blocks of outputs that a panel takes together, and what their epilogue needs.
typedef struct {
  F16 scale[GROUP_BLOCKS], bias[GROUP_BLOCKS];
  I16 sum[GROUP_BLOCKS];
  const char *weights[GROUP_BLOCKS];
  int64_t output[GROUP_BLOCKS];
  int count, is_whole;  // is_whole: no block goes beyond the outputs
} Group;

// Taps [t0, t1) and of each the lanes [s0, s1).
typedef struct {
  int64_t t0, t1, s0, s1;
} Span;

// Sums of `rows` × `blocks` · 16 outputs over a span, added to `sums` (`step` from one row to the next) unless it is the first.
// Spans are summed by themselves: one sum of thousands would round more.
INLINE void tile(const enum Kind kind, const int rows, const int blocks, const Product *p, const char *const *row,
                 const char *const *weights, const Span *span, int is_first, int32_t *sums, int64_t step) {
  Register c[TILE_ROWS][BLOCKS * REGISTERS];
#pragma GCC unroll 6
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < blocks * REGISTERS; j++) c[i][j] = (Register){0};
  for (int64_t t = span->t0; t < span->t1; t++) {
    const char *a[TILE_ROWS], *w[BLOCKS];
    int64_t tap = p->tap ? p->tap[t] : 0;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) a[i] = row[i] + tap;
#pragma GCC unroll 4
    for (int j = 0; j < blocks; j++) w[j] = weights[j] + t * p->steps * 64;
    int64_t s = span->s0;
#if ADDS_FOURS
    for (; kind == INT8 && s + 1 < span->s1; s += 2) {
      Register b[2][REGISTERS];
      for (int j = 0; j < REGISTERS; j++)
        b[0][j] = load_register(w[0] + s * 64 + j * WIDTH * 4), b[1][j] = load_register(w[0] + s * 64 + 64 + j * WIDTH * 4);
#pragma GCC unroll 6
      for (int i = 0; i < rows; i++) {
        Register x = splat(a[i] + s * 4), y = splat(a[i] + s * 4 + 4);
        for (int j = 0; j < REGISTERS; j++) c[i][j] = dot_of_fours(c[i][j], x, b[0][j], y, b[1][j]);
      }
    }
#endif
    for (; s < span->s1; s++) {
      Register b[BLOCKS * REGISTERS];
#pragma GCC unroll 4
      for (int j = 0; j < blocks * REGISTERS; j++) b[j] = load_register(w[j / REGISTERS] + s * 64 + j % REGISTERS * WIDTH * 4);
#pragma GCC unroll 6
      for (int i = 0; i < rows; i++) {
        Register x = activations(kind, a[i] + s * 4);
#pragma GCC unroll 4
        for (int j = 0; j < blocks * REGISTERS; j++) c[i][j] = dot(kind, c[i][j], x, b[j]);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < blocks * REGISTERS; j++) {
      int32_t *sum = sums + i * step + j * WIDTH;
      store_register(sum, is_first ? c[i][j] : plus(kind, load_register(sum), c[i][j]));
    }
}

// The sums of a row and a block as fp32, `scale` and `zero` being the row's.
INLINE F16 scaled(const enum Kind kind, const Group *g, int j, float scale, int32_t zero, const int32_t *sums) {
  I16 sum;
  memcpy(&sum, sums + j * LANES, sizeof sum);
  return kind == INT8 ? __builtin_convertvector(sum - g->sum[j] * zero, F16) * (g->scale[j] * scale) : (F16)sum;
}

// The group's outputs of one row. `low` and `low_sums`: group and sums of the product beside.
INLINE void finish(const enum Kind kind, const int blocks, const int is_whole, const Product *p, int64_t r, int64_t scale_at,
                   int64_t out_at, const Group *g, const int32_t *sums, const Group *low, const int32_t *low_sums) {
  F16 f[GROUP_BLOCKS];
  float scale = kind == INT8 ? p->scale[scale_at] : 1.f;
  int32_t zero = kind == INT8 ? p->zero[scale_at * p->zero_step] - OFFSET : 0;
#pragma GCC unroll 4
  for (int j = 0; j < blocks; j++) f[j] = scaled(kind, g, j, scale, zero, sums);
  if (kind == INT8 && p->beside) {
    float low_scale = p->beside->scale[r];
    int32_t low_zero = p->beside->zero[r * p->beside->zero_step] - OFFSET;
#pragma GCC unroll 4
    for (int j = 0; j < blocks; j++) f[j] += scaled(kind, low, j, low_scale, low_zero, low_sums);
  }
#pragma GCC unroll 4
  for (int j = 0; j < blocks; j++) f[j] += g->bias[j];
  int outputs = p->gate_weights ? blocks / 2 : blocks;
#pragma GCC unroll 4
  for (int j = 0; j < blocks; j++) {
    if (outputs < blocks && j < blocks / 2) continue;
    if (p->activation == SILU)
      f[j] = silu(f[j]);
    else if (p->activation == GELU)
      f[j] = gelu(f[j]);
    else if (p->activation == GELU_TANH)
      f[j] = gelu_tanh(f[j]);
  }
  if (outputs < blocks) {
#pragma GCC unroll 2
    for (int j = 0; j < blocks / 2; j++) f[j] *= f[j + blocks / 2];
  }
#pragma GCC unroll 4
  for (int j = 0; j < blocks; j++) {
    if (j == outputs) break;
    int64_t at = g->output[j], count = is_whole ? LANES : p->outputs - at;
    if (p->residual) f[j] += load_some(p->residual + r * p->residual_step + at, count);
    if (p->out_type == AS_FP32)
      store_some((float *)p->out + out_at + at, f[j], count);
    else
      store_half((uint16_t *)p->out + out_at + at, bf16(f[j]), count);
  }
}

// The span that follows: whole taps where they are short, else an even part of one.
INLINE int next_span(const Product *p, Span *span) {
  if (span->s1 == p->steps) {
    if (span->t1 == p->taps) return 0;
    span->t0 = span->t1, span->s0 = 0;
  } else {
    span->s0 = span->s1;
  }
  if (p->steps <= CHUNK) {
    int64_t taps = CHUNK / p->steps;
    span->t1 = span->t0 + taps < p->taps ? span->t0 + taps : p->taps;
    span->s1 = p->steps;
  } else {
    int64_t parts = (p->steps + CHUNK - 1) / CHUNK, step = (p->steps + parts - 1) / parts;
    if (p->kind == INT8) step += step & 1;  // whole fours
    span->t1 = span->t0 + 1;
    span->s1 = span->s0 + step < p->steps ? span->s0 + step : p->steps;
  }
  return 1;
}

// Outputs of a group: half of it are gates, if there are any.
INLINE int group_blocks(const Product *p) { return p->gate_weights ? GROUP_BLOCKS / 2 : GROUP_BLOCKS; }

INLINE int64_t group_count(const Product *p) {
  int64_t outputs = group_blocks(p) * LANES;
  return (p->outputs + outputs - 1) / outputs;
}

INLINE Group group_of(const enum Kind kind, const Product *p, int64_t number) {
  int64_t bytes = p->taps * p->steps * 64, left = (p->outputs + LANES - 1) / LANES - number * group_blocks(p);
  int count = left < group_blocks(p) ? (int)left : group_blocks(p);
  Group g = {.is_whole = 1, .count = p->gate_weights ? 2 * count : count};
  for (int j = 0; j < g.count; j++) {
    int is_gate = j >= count;
    int64_t block = number * group_blocks(p) + j % count, at = block * LANES, some = p->outputs - at;
    const float *bias = is_gate ? p->gate_bias : p->bias;
    g.weights[j] = (const char *)(is_gate ? p->gate_weights : p->weights) + block * bytes;
    g.output[j] = at;
    g.is_whole &= some >= LANES;
    g.bias[j] = bias ? load_some(bias + at, some) : all(0.f);
    if (kind == INT8) {
      g.scale[j] = load_some((is_gate ? p->gate_scale : p->weight_scale) + at, some);
      g.sum[j] = (I16)load_some((const float *)(is_gate ? p->gate_sum : p->weight_sum) + at, some);
    }
  }
  return g;
}

// Sums of blocks [j, to) of a group.
INLINE void rows_of_group(const enum Kind kind, const int rows, const Product *p, const char *const *row, const Group *g, int j,
                          int to, const Span *span, int is_first, int32_t *sums, int64_t step) {
#define TILE(N) tile(kind, rows, N, p, row, g->weights + j, span, is_first, sums + j * LANES, step)
#if BLOCKS == 4
  if (j + 4 == to) TILE(4), j = 4;
  if (j + 2 <= to) TILE(2), j += 2;
#endif
  for (; j < to; j++) TILE(1);
#undef TILE
}

// The same for 6, 4, 2 rows or 1.
INLINE void some_rows_of_group(const enum Kind kind, int64_t rows, const Product *p, const char *const *row, const Group *g, int j,
                               int to, const Span *span, int is_first, int32_t *sums, int64_t step) {
  if (rows == 6)
    rows_of_group(kind, 6, p, row, g, j, to, span, is_first, sums, step);
  else if (rows == 4)
    rows_of_group(kind, 4, p, row, g, j, to, span, is_first, sums, step);
  else if (rows == 2)
    rows_of_group(kind, 2, p, row, g, j, to, span, is_first, sums, step);
  else
    rows_of_group(kind, 1, p, row, g, j, to, span, is_first, sums, step);
}

// Sums of the product beside, of its rows from `r` on. Not inlined: few products have one.
static __attribute__((noinline)) void sums_beside(const Product *p, int64_t r, int64_t rows, const Group *g, int32_t *sums) {
  const Span span = {0, 1, 0, p->steps};
  const char *row[TILE_ROWS];
  for (int64_t i = 0; i < rows; i++) row[i] = (const char *)p->a + (r + i) * p->row_bytes;
  some_rows_of_group(INT8, rows, p, row, g, 0, g->count, &span, 1, sums, GROUP);
}

// Rows of the next tile if there are `left`.
INLINE int64_t rows_of_tile(const enum Kind kind, int64_t left) {
  const int most = ADDS_FOURS && kind == INT8 ? 4 : TILE_ROWS;
  return left >= 6 && most >= 6 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// The weights that are needed after a span of a group's blocks before `to`: of the next blocks, the next span or the next group.
INLINE const char *weights_after(const Product *p, const Group *g, int to, const Span *span) {
  Span next = *span;
  if (to < g->count) return g->weights[to] + (span->t0 * p->steps + span->s0) * 64;
  if (next_span(p, &next)) return g->weights[0] + (next.t0 * p->steps + next.s0) * 64;
  return g->weights[to - 1] + p->taps * p->steps * 64;
}

INLINE void panel_of(const enum Kind kind, const ProductTasks *tasks, int64_t number) {
  const Product *p = tasks->product;
  Panel panel;
  int64_t part = number % tasks->parts, first = number / tasks->parts * PANEL_ROWS;
  int64_t rows = p->rows - first < PANEL_ROWS ? p->rows - first : PANEL_ROWS;
  for (int64_t i = 0; i < rows; i++) {
    int64_t r = first + i;
    panel.scale_at[i] = kind == INT8 ? r / p->scale_rows : 0;
    panel.out_at[i] = p->out_width ? r / p->out_width * p->out_line + r % p->out_width * p->out_step : r * p->out_step;
    if (p->per_image) {
      int64_t place = r % p->per_image;
      panel.row[i] = (const char *)p->a + r / p->per_image * p->image_bytes + place / p->width * p->line_bytes + place % p->width * p->place_bytes;
    } else {
      panel.row[i] = (const char *)p->a + r * p->row_bytes;
    }
  }
  // The result is nothing but sums: they are made in their place.
  const int is_sum = kind != INT8 && p->activation == NO_ACTIVATION && p->out_type == AS_FP32 && !p->gate_weights && !p->bias &&
                     !p->residual && !p->out_width && p->outputs % LANES == 0;
  int64_t groups = group_count(p);
  const Product *beside = kind == INT8 ? p->beside : NULL;
  _Alignas(64) int32_t low_sums[TILE_ROWS * GROUP];
  for (int64_t n = groups * part / tasks->parts; n < groups * (part + 1) / tasks->parts; n++) {
    Group g = group_of(kind, p, n), low;
    if (beside) low = group_of(INT8, beside, n);
    Span span = {.t1 = 0, .s1 = p->steps};
    for (int is_first = 1; next_span(p, &span); is_first = 0) {
      int is_last = span.t1 == p->taps && span.s1 == p->steps;
      // All rows by some blocks, whose weights of a span stay in the nearest cache while the next ones are fetched.
      for (int j = 0, to; j < g.count; j = to) {
        to = j + BLOCKS_TOGETHER < g.count ? j + BLOCKS_TOGETHER : g.count;
        const char *ahead = weights_after(p, &g, to, &span);
        int64_t lines = BLOCKS == 1 ? (span.t1 - span.t0) * (span.s1 - span.s0) : 0, line = 0;
        int ends = !is_sum && is_last && to == g.count;
        for (int64_t r = 0, many; r < rows; r += many) {
          many = rows_of_tile(kind, rows - r);
          for (int64_t end = lines * (r + many) / rows; line < end; line++)
            for (int i = 0; i < BLOCKS_TOGETHER; i++) __builtin_prefetch(ahead + i * p->taps * p->steps * 64 + line * 64, 0, 2);
          int32_t *sums = is_sum ? (int32_t *)p->out + panel.out_at[r] + g.output[0] : panel.sums + r * GROUP;
          some_rows_of_group(kind, many, p, panel.row + r, &g, j, to, &span, is_first, sums, is_sum ? p->out_step : GROUP);
          if (ends && beside) sums_beside(beside, first + r, many, &low, low_sums);
          for (int64_t i = r; ends && i < r + many; i++) {
            const int32_t *of_row = panel.sums + i * GROUP, *of_low = low_sums + (i - r) * GROUP;
            if (g.count == GROUP_BLOCKS && g.is_whole)
              finish(kind, GROUP_BLOCKS, 1, p, first + i, panel.scale_at[i], panel.out_at[i], &g, of_row, &low, of_low);
            else
              finish(kind, g.count, 0, p, first + i, panel.scale_at[i], panel.out_at[i], &g, of_row, &low, of_low);
          }
        }
      }
    }
  }
}

static void int8_panel(const void *tasks, int64_t number) { panel_of(INT8, tasks, number); }
static void fp32_panel(const void *tasks, int64_t number) { panel_of(FP32, tasks, number); }
#if defined(__AVX512BF16__)
static void bf16_panel(const void *tasks, int64_t number) { panel_of(BF16, tasks, number); }
#endif

static void product(Pool *pool, const Product *p, int threads) {
  Task task = p->kind == INT8 ? int8_panel : fp32_panel;
#if defined(__AVX512BF16__)
  if (p->kind == BF16) task = bf16_panel;
#endif
  int64_t panels = (p->rows + PANEL_ROWS - 1) / PANEL_ROWS, groups = group_count(p);
  ProductTasks tasks = {p, 1};
  while (panels * tasks.parts < TASKS_A_THREAD * threads && tasks.parts * 2 <= groups) tasks.parts *= 2;
  pool_run(pool, task, &tasks, panels * tasks.parts, threads);
}

static void sums_of_block(const void *context, int64_t block) {
  const Sums *p = context;
  const char *weights = (const char *)p->weights + block * p->lanes * 64;
  int32_t ones = 0x01010101;
  Register c[REGISTERS], one = splat((const char *)&ones);
  for (int j = 0; j < REGISTERS; j++) c[j] = (Register){0};
  for (int64_t s = 0; s < p->lanes; s++)
    for (int j = 0; j < REGISTERS; j++) c[j] = dot(INT8, c[j], one, load_register(weights + s * 64 + j * WIDTH * 4));
  for (int j = 0; j < REGISTERS; j++) store_register(p->sum + block * LANES + j * WIDTH, c[j]);
}

static void sums(Pool *pool, const Sums *p, int threads) { pool_run(pool, sums_of_block, p, p->blocks, threads); }
