// Attention with queries in the lanes: Sᵀ = K · Qᵀ, softmax down its columns, Oᵀ = Vᵀ · Pᵀ. No sum goes across a register.
//
// A task is one head's share of the queries. It copies a block of keys and values (contiguous, filled up with zeros), and takes
// its queries through that a few registers at a time, with a running maximum (Milakov and Gimelshein, 2018). Which queries go
// together changes no bit of any.
#include "dot.h"
#include "pool.h"

// Keys at a time, or dims of the result, and registers of 16 queries beside them: a tile of sums that stays in registers. The last
// tiles of a head may have FEWER_DIMS.
#if REGISTERS == 1
enum { TILE_KEYS = 8, MOST_GROUPS = 3 };
#else
enum { TILE_KEYS = 6, FEWER_DIMS = 4, MOST_GROUPS = 1 };
#endif
// A head's dims at most; keys of a block and groups of 16 queries of a task, fewer for heads above NARROW and above WIDE. The more
// queries a task has the fewer copies of keys and values; SMALL_TASK_GROUPS where threads would lack tasks. All lies on the stack.
enum { MOST_DIMS = 512, NARROW = 160, KEY_BLOCK = 120, TASK_GROUPS = 18, SMALL_TASK_GROUPS = 12 };
enum { WIDE = 256, WIDE_KEY_BLOCK = 72, WIDEST_KEY_BLOCK = 48, WIDE_TASK_GROUPS = 6 };
#define PADDED(dims) (((dims) + TILE_KEYS - 1) / TILE_KEYS * TILE_KEYS)
#define LINE(dims) ((PADDED(dims) + LANES - 1) / LANES * LANES)  // lanes from one key or value to the next
#define MORE(a, b) ((a) > (b) ? (a) : (b))
#define TASK_LANES MORE(TASK_GROUPS * LINE(NARROW), WIDE_TASK_GROUPS * LINE(MOST_DIMS))
#define BLOCK_LANES MORE(KEY_BLOCK * LINE(NARROW), MORE(WIDE_KEY_BLOCK * LINE(WIDE), WIDEST_KEY_BLOCK * LINE(MOST_DIMS)))
#define NO_SCORE (-__builtin_inff())

typedef struct {
  const Attention *call;
  int64_t parts;  // of a head's queries
} AttentionTasks;

// `groups` registers of queries as they go through the blocks of keys. All lies in lanes of queries: [lane or dim][groups][16].
typedef struct {
  int64_t number, groups;
  float *queries, *sums;
  F16 top[MOST_GROUPS], total[MOST_GROUPS], shrink[MOST_GROUPS];
} Column;

typedef struct {
  int64_t dims, lanes, line, value_line, count;  // lanes of a key, lanes between keys and values, keys that are there
  int is_first;
  const float *next_keys, *next_values;  // of the next block, which has `ahead` keys
  int64_t ahead, key_step, value_step, columns;
  _Alignas(64) float scores[KEY_BLOCK * MOST_GROUPS * LANES];
  _Alignas(64) float keys[BLOCK_LANES], values[BLOCK_LANES];
  _Alignas(64) float queries[TASK_LANES * LANES], sums[TASK_LANES * LANES];
} Block;

_Static_assert(KEY_BLOCK % TILE_KEYS == 0 && WIDE_KEY_BLOCK % TILE_KEYS == 0 && WIDEST_KEY_BLOCK % TILE_KEYS == 0, "whole tiles");

// 2ˣ for x ≤ 0, in fp32 below −126 as there: relative error below 8e-8 and rounding for fp32, 8e-5 where the result becomes bf16
// (fits of 2ᶠ, |f| ≤ ½ or 0 ≤ f < 1, with the least largest error). NaN stays NaN.
INLINE F16 power(const enum Kind kind, F16 x) {
#if defined(__AVX512BF16__)
  if (kind == BF16) {  // in half the instructions: f = x − ⌊x⌋, and scalef multiplies by 2 to the power of ⌊x⌋
    F16 f = (F16)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), p;
    p = fma16(all(0.07802452147006989f), f, all(0.2260671705007553f));
    p = fma16(p, f, all(0.6958335041999817f));
    p = fma16(p, f, all(0.9999251961708069f));
    return (F16)_mm512_scalef_ps((__m512)p, (__m512)x);
  }
#endif
  x = choose(x < all(-126.f), all(-126.f), x);
  F16 sum = x + (12582912.f + 127.f), f = x - (sum - (12582912.f + 127.f)), p;  // as in exp2_16
  (void)kind;
  p = fma16(all(0.001327647129073739f), f, all(0.009675541892647743f));
  p = fma16(p, f, all(0.05550713092088699f));
  p = fma16(p, f, all(0.24022120237350464f));
  p = fma16(p, f, all(0.6931469440460205f));
  p = fma16(p, f, all(1.f));
  return p * (F16)((I16)sum << 23);
}

// `pairs` of powers, which are positive: rounded half up, since ties decide nothing. NaN may be lost, but not from their sum.
INLINE F16 power_pairs(F16 a, F16 b) {
  U16 half = (U16){} + 0x8000;
  return (F16)(((U16)a + half) >> 16 | (((U16)b + half) & 0xffff0000));
}

// Lanes [lane, lane + 16) of a row of `dims` values · factor, zeros behind them: of bf16 a lane has two values.
INLINE F16 row_lanes(const enum Kind kind, const float *row, int64_t lane, int64_t dims, float factor) {
  if (kind == FP32) return load_some(row + lane, dims - lane) * factor;
  Half16 half[2];
  for (int i = 0; i < 2; i++) {
    int64_t at = 2 * lane + i * LANES;
    half[i] = bf16(at < dims ? load_some(row + at, dims - at) * factor : all(0.f));
  }
  F16 x;
  memcpy(&x, half, sizeof x);
  return x;
}

// Rows of fp32 values side by side, zeros behind them up to a whole register.
INLINE void copy_rows(const float *from, int64_t step, int64_t rows, int64_t dims, float *to, int64_t line) {
  int64_t whole = dims / LANES * LANES;
  for (int64_t i = 0; i < rows; i++, from += step, to += line) {
    for (int64_t dim = 0; dim < whole; dim += LANES) store(to + dim, load(from + dim));
    if (whole < dims) store(to + whole, load_some(from + whole, dims - whole));
  }
}

// Keys [first, first + count) and their values.
INLINE void copy_block(const enum Kind kind, const Attention *p, const float *keys, const float *values, int64_t first,
                       Block *b) {
  keys += first * p->k_step[TOKEN], values += first * p->v_step[TOKEN];
  const int64_t rows = PADDED(b->count), count = b->count, dims = b->dims, line = b->line, value_line = b->value_line;
  for (int64_t i = count; i < rows; i++)
    for (int64_t lane = 0; lane < line; lane += LANES) store(b->keys + i * line + lane, all(0.f));
  if (kind == FP32) {
    copy_rows(keys, p->k_step[TOKEN], count, dims, b->keys, line);
    copy_rows(values, p->v_step[TOKEN], count, dims, b->values, value_line);
    return;
  }
  for (int64_t i = 0; i < count; i++)
    for (int64_t lane = 0; lane < line; lane += LANES)
      store(b->keys + i * line + lane, row_lanes(kind, keys + i * p->k_step[TOKEN], lane, dims, 1.f));
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t dim = 0; dim < dims; dim += LANES) {
      const float *value = values + i * p->v_step[TOKEN] + dim;
      F16 x = load_some(value, dims - dim), next = all(0.f);
      if (i + 1 < count) next = load_some(value + p->v_step[TOKEN], dims - dim);
      store(b->values + i / 2 * value_line + dim, pairs(x, next));
    }
}

// c + a tile of products: `rows` of `a`, of which step t reads a lane at t · step_bytes, by steps of lanes of `b`.
INLINE void multiply(const enum Kind kind, const int rows, const int groups, const char *a, int64_t row_bytes,
                     int64_t step_bytes, const char *b, int64_t steps,
                     Register c[TILE_KEYS][MOST_GROUPS * REGISTERS]) {
#pragma GCC unroll 4
  for (int64_t t = 0; t < steps; t++, a += step_bytes, b += groups * LANES * 4) {
    Register x[MOST_GROUPS * REGISTERS];
#pragma GCC unroll 4
    for (int g = 0; g < groups * REGISTERS; g++) x[g] = load_register(b + g * WIDTH * 4);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      Register y = splat(a + i * row_bytes);
#pragma GCC unroll 4
      for (int g = 0; g < groups * REGISTERS; g++) c[i][g] = dot(kind, c[i][g], y, x[g]);
    }
  }
}

// What the next block will read, a few lines at a time between products: a copy by itself would wait for memory.
INLINE void fetch_ahead(const Block *b, int64_t key, int64_t number) {
  for (int64_t i = key + number; i < key + TILE_KEYS && i < b->ahead; i += b->columns)
    for (int64_t dim = 0; dim < b->dims; dim += LANES) {
      __builtin_prefetch(b->next_keys + i * b->key_step + dim, 0, 2);
      __builtin_prefetch(b->next_values + i * b->value_step + dim, 0, 2);
    }
}

// Scores in base 2 of a tile's keys, and what the maximum becomes. `is_whole`: all keys are there.
INLINE void tile_scores(const enum Kind kind, const int groups, const int is_whole, Block *b, const Column *column,
                        int64_t key, F16 *top) {
  Register c[TILE_KEYS][MOST_GROUPS * REGISTERS];
#pragma GCC unroll 8
  for (int i = 0; i < TILE_KEYS; i++)
#pragma GCC unroll 4
    for (int g = 0; g < groups * REGISTERS; g++) c[i][g] = (Register){0};
  const char *keys = (const char *)(b->keys + key * b->line);
  multiply(kind, TILE_KEYS, groups, keys, b->line * 4, 4, (const char *)column->queries, b->lanes, c);
#pragma GCC unroll 8
  for (int i = 0; i < TILE_KEYS; i++)
#pragma GCC unroll 3
    for (int g = 0; g < groups; g++) {
      F16 s;
      memcpy(&s, &c[i][g * REGISTERS], sizeof s);
      if (!is_whole && key + i >= b->count) s = all(NO_SCORE);
      store(b->scores + ((key + i) * groups + g) * LANES, s);
      top[g] = most(s, top[g]);  // NaN is not, and comes out of the powers
    }
}

INLINE void scores(const enum Kind kind, const int groups, Block *b, Column *column) {
  F16 top[MOST_GROUPS];
#pragma GCC unroll 3
  for (int g = 0; g < groups; g++) top[g] = column->top[g];
  int64_t key = 0;
  for (; key + TILE_KEYS <= b->count; key += TILE_KEYS) {
    fetch_ahead(b, key, column->number);
    tile_scores(kind, groups, 1, b, column, key, top);
  }
  if (key < b->count) tile_scores(kind, groups, 0, b, column, key, top);
#pragma GCC unroll 3
  for (int g = 0; g < groups; g++) {
    column->shrink[g] = power(FP32, column->top[g] - top[g]);
    column->top[g] = top[g];
  }
}

// Powers in place over the scores, bf16 as pairs of keys; and their sum.
INLINE void powers(const enum Kind kind, const int groups, Block *b, Column *column) {
  F16 total[MOST_GROUPS], top[MOST_GROUPS];
#pragma GCC unroll 3
  for (int g = 0; g < groups; g++) total[g] = all(0.f), top[g] = column->top[g];
#if REGISTERS > 1
  for (int64_t key = 0; key < b->count; key++)  // one at a time: AVX2 has no registers for two
#pragma GCC unroll 3
    for (int g = 0; g < groups; g++) {
      float *s = b->scores + (key * groups + g) * LANES;
      F16 x = power(kind, load(s) - top[g]);
      total[g] += x;
      store(s, x);
    }
#else
  for (int64_t key = 0; key < b->count; key += 2)
#pragma GCC unroll 3
    for (int g = 0; g < groups; g++) {
      float *s = b->scores + (key * groups + g) * LANES, *next = s + groups * LANES;
      F16 x = power(kind, load(s) - top[g]), y = power(kind, load(next) - top[g]);
      total[g] += x + y;
      if (kind == BF16) {
        store(b->scores + (key / 2 * groups + g) * LANES, power_pairs(x, y));
      } else {
        store(s, x);
        store(next, y);
      }
    }
#endif
#pragma GCC unroll 3
  for (int g = 0; g < groups; g++) column->total[g] = fma16(column->total[g], column->shrink[g], total[g]);
}

// Values weighed by the powers, of `rows` dims from `dim` on. Blocks are summed by themselves: one sum of thousands would round
// more.
INLINE void tile_sums(const enum Kind kind, const int rows, const int groups, const Block *b, const Column *column,
                      int64_t dim) {
  const int64_t steps = kind == BF16 ? (b->count + 1) / 2 : b->count;
  const int is_first = b->is_first;
  float *sums = column->sums + dim * groups * LANES;
  Register c[TILE_KEYS][MOST_GROUPS * REGISTERS];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int g = 0; g < groups * REGISTERS; g++) c[i][g] = (Register){0};
  const char *values = (const char *)(b->values + dim);
  multiply(kind, rows, groups, values, 4, b->value_line * 4, (const char *)b->scores, steps, c);
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
    for (int g = 0; g < groups; g++) {
      F16 x;
      memcpy(&x, &c[i][g * REGISTERS], sizeof x);
      float *sum = sums + (i * groups + g) * LANES;
      store(sum, is_first ? x : fma16(load(sum), column->shrink[g], x));
    }
}

INLINE void weigh(const enum Kind kind, const int groups, Block *b, Column *column) {
  int64_t tiles = PADDED(b->dims) / TILE_KEYS, dim = 0;
#if REGISTERS > 1
  // 80 dims are 12 tiles of 6 and 2 of 4, not 14 of 6 that go beyond them.
  int64_t fewer = (PADDED(b->dims) - b->dims) / (TILE_KEYS - FEWER_DIMS);
  for (; tiles > fewer; tiles--, dim += TILE_KEYS) tile_sums(kind, TILE_KEYS, groups, b, column, dim);
  for (; tiles > 0; tiles--, dim += FEWER_DIMS) tile_sums(kind, FEWER_DIMS, groups, b, column, dim);
#else
  for (; tiles > 0; tiles--, dim += TILE_KEYS) tile_sums(kind, TILE_KEYS, groups, b, column, dim);
#endif
}

// One function for each of these: what a tile keeps in registers shares them with nothing else.
#define VARIANT(name, kind, groups) \
  static __attribute__((noinline)) void name##_##kind##_##groups(Block *b, Column *column) { \
    name(kind, groups, b, column);                                                           \
  }
#define VARIANTS(kind, groups) VARIANT(scores, kind, groups) VARIANT(powers, kind, groups) VARIANT(weigh, kind, groups)
#define ALL(kind, groups)               \
  (scores_##kind##_##groups(b, column), \
   powers_##kind##_##groups(b, column), \
   weigh_##kind##_##groups(b, column))
VARIANTS(FP32, 1)
#if REGISTERS == 1
VARIANTS(FP32, 2)
VARIANTS(FP32, 3)
#endif
#if defined(__AVX512BF16__)
VARIANTS(BF16, 1)
VARIANTS(BF16, 2)
VARIANTS(BF16, 3)
#endif

INLINE void attend_block(const enum Kind kind, Block *b, Column *column) {
#if defined(__AVX512BF16__)
  if (kind == BF16) {
    if (column->groups == 3)
      ALL(BF16, 3);
    else if (column->groups == 2)
      ALL(BF16, 2);
    else
      ALL(BF16, 1);
    return;
  }
#endif
#if REGISTERS == 1
  if (column->groups == 3)
    ALL(FP32, 3);
  else if (column->groups == 2)
    ALL(FP32, 2);
  else
#endif
    ALL(FP32, 1);
  (void)kind;
}

#if REGISTERS > 1
// transpose_8 where only some rows and lanes are there: as many lines as lanes, of `width` values, zeros for rows that are not.
static __attribute__((noinline)) void transpose_some(const float *rows, int64_t step, int64_t row_count, int64_t lane_count,
                                                     F8 factor, float *lines, int64_t line, int64_t width) {
  float from[64] = {0}, to[64];
  if (lane_count > 8) lane_count = 8;
  for (int64_t i = 0; i < row_count && i < 8; i++) memcpy(from + i * 8, rows + i * step, (size_t)lane_count * 4);
  transpose_8(from, 8, factor, to, 8);
  for (int64_t i = 0; i < lane_count; i++) memcpy(lines + i * line, to + i * 8, (size_t)width * 4);
}

// Queries from `first` on into the lanes of a column, zeros where there are none.
INLINE void load_queries(const enum Kind kind, const Attention *p, const float *q, int64_t first, const Block *b,
                         Column *column) {
  (void)kind;
  const int64_t step = p->q_step[TOKEN], line = column->groups * LANES;
  const F8 factor = (F8){} + p->scale * LOG2_E;
  for (int64_t at = 0; at < line; at += 8) {
    int64_t left = p->queries - first - at;
    const float *rows = q + (first + at) * step;
    float *lines = column->queries + at;
    for (int64_t dim = 0; dim < b->dims; dim += 8)
      if (left >= 8 && dim + 8 <= b->dims)
        transpose_8(rows + dim, step, factor, lines + dim * line, line);
      else
        transpose_some(rows + dim, step, left, b->dims - dim, factor, lines + dim * line, line, 8);
  }
}
#else
// Queries from `first` on into the lanes of a column, zeros where there are none.
INLINE void load_queries(const enum Kind kind, const Attention *p, const float *q, int64_t first, const Block *b,
                         Column *column) {
  float factor = p->scale * LOG2_E;
  for (int64_t g = 0; g < column->groups; g++)
    for (int64_t lane = 0; lane < b->lanes; lane += LANES) {
      F16 r[LANES];
      for (int i = 0; i < LANES; i++) {
        int64_t query = first + g * LANES + i;
        r[i] = query < p->queries ? row_lanes(kind, q + query * p->q_step[TOKEN], lane, b->dims, factor) : all(0.f);
      }
      transpose(r);
      for (int i = 0; i < LANES && lane + i < b->lanes; i++)
        store(column->queries + ((lane + i) * column->groups + g) * LANES, r[i]);
    }
}
#endif

// `head` counts over all samples.
INLINE void store_results(const Attention *p, float *out, int64_t head, int64_t first, const Block *b, const Column *column) {
  for (int64_t g = 0; g < column->groups; g++) {
    F16 factor = 1.f / column->total[g];
    int64_t query = first + g * LANES, at = head * p->queries + query;
    if (p->top && query < p->queries) {
      store_some(p->top + at, column->top[g], p->queries - query);
      store_some(p->total + at, column->total[g], p->queries - query);
    }
#if REGISTERS > 1
    const int64_t line = column->groups * LANES, step = p->out_step[TOKEN];
    for (int64_t half = 0; half < LANES && query + half < p->queries; half += 8) {
      F8 factors;
      memcpy(&factors, (const float *)&factor + half, sizeof factors);
      const float *sums = column->sums + g * LANES + half;
      float *lines = out + (query + half) * step;
      int64_t left = p->queries - query - half;
      for (int64_t dim = 0; dim < b->dims; dim += 8) {
        int64_t dims = b->dims - dim < 8 ? b->dims - dim : 8;
        if (left >= 8 && dims == 8)
          transpose_8(sums + dim * line, line, factors, lines + dim, step);
        else
          transpose_some(sums + dim * line, line, dims, left, factors, lines + dim, step, dims);
      }
    }
#else
    for (int64_t dim = 0; dim < b->dims; dim += LANES) {
      F16 r[LANES];
      for (int i = 0; i < LANES; i++)
        r[i] = dim + i < b->dims ? load(column->sums + ((dim + i) * column->groups + g) * LANES) * factor : all(0.f);
      transpose(r);
      for (int i = 0; i < LANES && query + i < p->queries; i++)
        store_some(out + (query + i) * p->out_step[TOKEN] + dim, r[i], b->dims - dim);
    }
#endif
  }
}

// Registers of the next column, of `left`: none narrower than needs be.
INLINE int64_t column_groups(int64_t left) {
  if (MOST_GROUPS == 1) return 1;
  return left == 2 || left == 4 ? 2 : left < MOST_GROUPS ? left : MOST_GROUPS;
}

INLINE int64_t group_total(const Attention *p) { return (p->queries + LANES - 1) / LANES; }

INLINE void attention_task(const enum Kind kind, const AttentionTasks *tasks, int64_t number) {
  const Attention *p = tasks->call;
  int64_t part = number % tasks->parts, head = number / tasks->parts % p->heads, sample = number / tasks->parts / p->heads;
  int64_t at = group_total(p) * part / tasks->parts, end = group_total(p) * (part + 1) / tasks->parts, first = at * LANES;
  Block b;
  b.dims = p->dims, b.lanes = kind == BF16 ? (p->dims + 1) / 2 : p->dims;
  b.value_line = LINE(p->dims);
  b.line = kind == BF16 ? (b.lanes + LANES - 1) / LANES * LANES : LINE(p->dims);
  Column columns[TASK_GROUPS];
  int64_t count = 0;
  float *queries = b.queries, *sums = b.sums;
  for (; at < end; at += columns[count++].groups) {
    Column *column = columns + count;
    *column = (Column){.number = count, .groups = column_groups(end - at), .queries = queries, .sums = sums};
    for (int g = 0; g < MOST_GROUPS; g++) column->top[g] = all(NO_SCORE), column->total[g] = all(0.f);
    load_queries(kind, p, p->q + sample * p->q_step[SAMPLE] + head * p->q_step[HEAD], at * LANES, &b, column);
    queries += column->groups * LANES * b.lanes;
    sums += column->groups * LANES * PADDED(b.dims);
  }
  const float *k = p->k + sample * p->k_step[SAMPLE] + head * p->k_step[HEAD];
  const float *v = p->v + sample * p->v_step[SAMPLE] + head * p->v_step[HEAD];
  int64_t most = p->dims > WIDE ? WIDEST_KEY_BLOCK : p->dims > NARROW ? WIDE_KEY_BLOCK : KEY_BLOCK;
  b.columns = count, b.key_step = p->k_step[TOKEN], b.value_step = p->v_step[TOKEN];
  for (int64_t key = 0; key < p->keys; key += most) {
    b.count = p->keys - key < most ? p->keys - key : most, b.is_first = key == 0;
    b.ahead = p->keys - key - b.count < most ? p->keys - key - b.count : most;
    b.next_keys = k + (key + b.count) * b.key_step, b.next_values = v + (key + b.count) * b.value_step;
    copy_block(kind, p, k, v, key, &b);
    for (int64_t i = 0; i < count; i++) attend_block(kind, &b, columns + i);
  }
  float *out = p->out + sample * p->out_step[SAMPLE] + head * p->out_step[HEAD];
  for (int64_t i = 0; i < count; first += columns[i++].groups * LANES) store_results(p, out, number / tasks->parts, first, &b, columns + i);
}

static void attention_fp32(const void *tasks, int64_t number) { attention_task(FP32, tasks, number); }
#if defined(__AVX512BF16__)
static void attention_bf16(const void *tasks, int64_t number) { attention_task(BF16, tasks, number); }
#endif

static void attention(Pool *pool, const Attention *p, int threads) {
  Task task = attention_fp32;
#if defined(__AVX512BF16__)
  if (p->kind == BF16) task = attention_bf16;
#endif
  int64_t heads = p->samples * p->heads, groups = group_total(p), most = p->dims > NARROW ? WIDE_TASK_GROUPS : TASK_GROUPS;
  if (most > SMALL_TASK_GROUPS && heads * ((groups + most - 1) / most) < TASKS_A_THREAD * threads) most = SMALL_TASK_GROUPS;
  AttentionTasks tasks = {p, (groups + most - 1) / most};
  pool_run(pool, task, &tasks, heads * tasks.parts, threads);
}
