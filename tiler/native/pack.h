// Weights into the order in which products read them: a block of 16 outputs is a task, a few inputs of it at a time.
#include "transform.h"
#include "pool.h"

enum { PACKED_INPUTS = 16, MOST_TAPS = 9 };

// Lane `lane` of what was transposed, [input][tap][16 outputs] for `count` inputs, of one tap.
INLINE F16 packed_lane(const enum Kind kind, const F16 *values, int64_t taps, int64_t tap, int64_t lane, int64_t count) {
  if (kind == FP32) return values[lane * taps + tap];
  F16 second = 2 * lane + 1 < count ? values[(2 * lane + 1) * taps + tap] : all(0.f);
  return pairs(values[2 * lane * taps + tap], second);
}

INLINE void pack_block(const enum Kind kind, const Pack *p, int64_t block) {
  F16 values[PACKED_INPUTS * WINOGRAD_POINTS], plain[PACKED_INPUTS * MOST_TAPS];
  const int64_t a_lane = kind == BF16 ? 2 : 1, steps = (p->inputs + a_lane - 1) / a_lane;
  const float *rows = p->rows + block * LANES * p->inputs * p->taps;
  for (int64_t input = 0; input < p->inputs; input += PACKED_INPUTS) {
    int64_t count = p->inputs - input < PACKED_INPUTS ? p->inputs - input : PACKED_INPUTS, elements = count * p->taps;
    for (int64_t e = 0; e < elements; e += LANES) {
      F16 r[LANES];
      for (int64_t i = 0; i < LANES; i++) {
        int is_there = block * LANES + i < p->outputs;
        r[i] = is_there ? load_some(rows + (i * p->inputs + input) * p->taps + e, elements - e) : all(0.f);
      }
      transpose(r);
      for (int64_t i = 0; i < LANES && e + i < elements; i++) plain[e + i] = r[i];
    }
    const F16 *from = plain;
    int64_t points = p->taps;
    if (p->is_transformed) {
      for (int64_t i = 0; p->enlarged && i < count; i++) weight_points(1, plain + i * 9, values + i * ENLARGED_POINTS);
      for (int64_t i = 0; !p->enlarged && i < count; i++) weight_points(0, plain + i * 9, values + i * WINOGRAD_POINTS);
      from = values, points = p->enlarged ? ENLARGED_POINTS : WINOGRAD_POINTS;
    }
    for (int64_t t = 0; t < points; t++) {
      char *out = (char *)p->out + (p->is_transformed ? t * p->point_bytes + block * steps * 64 : (block * points + t) * steps * 64);
      for (int64_t lane = 0; lane * a_lane < count; lane++)
        store((float *)(out + (input / a_lane + lane) * 64), packed_lane(kind, from, points, t, lane, count));
    }
  }
}

static void pack_fp32(const void *p, int64_t block) { pack_block(FP32, p, block); }
static void pack_bf16(const void *p, int64_t block) { pack_block(BF16, p, block); }

static void pack(Pool *pool, const Pack *p, int threads) {
  pool_run(pool, p->kind == BF16 ? pack_bf16 : pack_fp32, p, (p->outputs + LANES - 1) / LANES, threads);
}
