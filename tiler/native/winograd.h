// 3 × 3 convolutions with a quarter of the multiplications (transform.h), or of an image that is enlarged first with a
// sixth: some tiles of the input at a time are transformed, multiplied with 36 or 25 matrices, and transformed back. What a tile
// gives does not depend on which go together, nor on whether the weights were transformed before or are now.
#include "transform.h"
#include "pool.h"

typedef struct {
  const Winograd *call;
  int64_t down, across;  // tiles of an image
  int64_t first, count;  // tiles of these, over all images
  int64_t points;        // products of a tile
  int64_t seen_bytes, outputs;  // of a tile at a point; up to a multiple of 16
  ProductTasks products[WINOGRAD_POINTS];
  Product product[WINOGRAD_POINTS];
} WinogradTasks;

typedef struct {
  int64_t image, y, x;  // the first pixel of its result
} Tile;

INLINE Tile tile_at(const WinogradTasks *t, int64_t number) {
  int64_t place = number % (t->down * t->across);
  return (Tile){number / (t->down * t->across), place / t->across * SIDE, place % t->across * SIDE};
}

// Transform the pixels that a tile sees, `side` × `side`: the left factors of its products.
INLINE void seen_of_tile(const enum Kind kind, const int enlarged, const WinogradTasks *t, int64_t number) {
  const int side = enlarged ? SEEN_SMALL : SEEN;
  const Winograd *p = t->call;
  Tile tile = tile_at(t, t->first + number);
  if (enlarged) tile.y /= 2, tile.x /= 2;
  const float *image = p->a + tile.image * p->image_step;
  char *out = (char *)p->seen + number * t->seen_bytes;
  int64_t point = t->count * t->seen_bytes;
  for (int64_t c = 0; c < p->channels; c += LANES) {
    F16 half[SEEN * SEEN], points[SEEN * SEEN];
    // Lines that are far from each other are fetched while the ones before are computed.
    for (int i = 0; i < side * side; i++) __builtin_prefetch(out + i * point + (c + LANES) * (kind == BF16 ? 2 : 4), 1);
    for (int j = 0; j < side; j++) {
      F16 x[SEEN];
      for (int i = 0; i < side; i++) {
        int64_t line = tile.y + i, place = tile.x + j;
        int is_there = line < p->lines && place < p->places;
        x[i] = is_there ? load_some(image + (line * p->places + place) * p->channels + c, p->channels - c) : all(0.f);
      }
      input_line(enlarged, x, half + j, side);
    }
    for (int i = 0; i < side; i++) input_line(enlarged, half + side * i, points + side * i, 1);
    for (int i = 0; i < side * side; i++) {
      if (kind == BF16)
        store_half((uint16_t *)(out + i * point) + c, bf16(points[i]), t->seen_bytes / 2 - c);
      else
        store_some((float *)(out + i * point) + c, points[i], p->channels - c);
    }
  }
}

INLINE void products_task(const enum Kind kind, const WinogradTasks *t, int64_t number) {
  panel_of(kind, t->products + number % t->points, number / t->points);
}

INLINE void result_of_tile(const int enlarged, const WinogradTasks *t, int64_t number) {
  const int side = enlarged ? POINTS_SMALL : SEEN;
  const Winograd *p = t->call;
  Tile tile = tile_at(t, t->first + number);
  int64_t down = p->height - tile.y < SIDE ? p->height - tile.y : SIDE, across = p->width - tile.x < SIDE ? p->width - tile.x : SIDE;
  int64_t first = (tile.image * p->height + tile.y) * p->width + tile.x, point = t->count * t->outputs;
  const float *products = p->products + number * t->outputs;
  for (int64_t c = 0; c < p->outputs; c += LANES) {
    int64_t count = p->outputs - c;
    for (int i = 0; i < side * side; i++) __builtin_prefetch(products + i * point + c + LANES);
    F16 half[SIDE * SEEN], out[SIDE * SIDE], bias = p->bias ? load_some(p->bias + c, count) : all(0.f);
    for (int j = 0; j < side; j++) {
      F16 m[SEEN];
      for (int i = 0; i < side; i++) m[i] = load(products + (side * i + j) * point + c);
      output_line(enlarged, m, half + j, side);
    }
    for (int i = 0; i < SIDE; i++) output_line(enlarged, half + side * i, out + SIDE * i, 1);
    for (int64_t i = 0; i < down; i++)
      for (int64_t j = 0; j < across; j++) {
        int64_t place = first + i * p->width + j;
        F16 x = out[SIDE * i + j] + bias;
        if (p->residual) x += load_some(p->residual + place * p->residual_step + c, count);
        store_some(p->out + place * p->out_step + c, x, count);
      }
  }
}

// Inputs of a block of outputs that are transformed at a time: they take 315 KB, and fit most second-level caches. Were the distance between two
// points a multiple of 4 KB, all of them would share a few lines of the first.
enum { LATE_STEP = CHUNK * LANES + 9 * LANES };

// Inputs [first, first + count) from the order of a product, [tap][inputs][16], to [point][count][16].
INLINE void transform_block(const float *weights, int64_t inputs, int64_t first, int64_t count, float *out) {
  for (int64_t c = 0; c < count; c++) {
    F16 plain[9], points[WINOGRAD_POINTS];
#pragma GCC unroll 9
    for (int i = 0; i < 9; i++) plain[i] = load(weights + (i * inputs + first + c) * LANES);
    weight_points(0, plain, points);
#pragma GCC unroll 36
    for (int i = 0; i < WINOGRAD_POINTS; i++) store(out + i * LATE_STEP + c * LANES, points[i]);
  }
}

// The products of 16 outputs, whose weights are transformed some inputs at a time: the spans of a product (next_span).
static void late_products(const void *context, int64_t block) {
  const WinogradTasks *t = context;
  const Winograd *p = t->call;
  const Product *whole = &t->product[0];
  _Alignas(64) float weights[WINOGRAD_POINTS * LATE_STEP];
  Span span = {.t1 = 0, .s1 = whole->steps};
  for (int is_first = 1; next_span(whole, &span); is_first = 0) {
    transform_block((const float *)p->weights + block * 9 * p->channels * LANES, p->channels, span.s0, span.s1 - span.s0, weights);
    for (int64_t i = 0; i < WINOGRAD_POINTS; i++) {
      Product part = t->product[i];
      part.outputs = LANES, part.steps = span.s1 - span.s0, part.weights = weights + i * LATE_STEP;
      part.a = (const char *)part.a + span.s0 * 4;
      part.out = (float *)part.out + block * LANES;
      part.residual = is_first ? NULL : part.out, part.residual_step = part.out_step;
      ProductTasks tasks = {&part, 1};
      panel_of(FP32, &tasks, 0);
    }
  }
}

static void result_plain(const void *t, int64_t number) { result_of_tile(0, t, number); }
static void result_enlarged(const void *t, int64_t number) { result_of_tile(1, t, number); }
static void seen_fp32(const void *t, int64_t number) { seen_of_tile(FP32, 0, t, number); }
static void seen_enlarged_fp32(const void *t, int64_t number) { seen_of_tile(FP32, 1, t, number); }
static void products_fp32(const void *t, int64_t number) { products_task(FP32, t, number); }
#if defined(__AVX512BF16__)
static void seen_bf16(const void *t, int64_t number) { seen_of_tile(BF16, 0, t, number); }
static void seen_enlarged_bf16(const void *t, int64_t number) { seen_of_tile(BF16, 1, t, number); }
static void products_bf16(const void *t, int64_t number) { products_task(BF16, t, number); }
#endif

static void winograd(Pool *pool, const Winograd *p, int threads) {
  Task seen = p->enlarged ? seen_enlarged_fp32 : seen_fp32, products = products_fp32;
  int is_bf16 = 0;
#if defined(__AVX512BF16__)
  is_bf16 = p->kind == BF16;
  if (is_bf16) seen = p->enlarged ? seen_enlarged_bf16 : seen_bf16, products = products_bf16;
#endif
  WinogradTasks t = {.call = p, .down = (p->height + SIDE - 1) / SIDE, .across = (p->width + SIDE - 1) / SIDE};
  int64_t steps = is_bf16 ? (p->channels + 1) / 2 : p->channels, tiles = p->images * t.down * t.across;
  int64_t panels = (tiles + WINOGRAD_TILES - 1) / WINOGRAD_TILES, rows = (tiles + TILE_ROWS - 1) / TILE_ROWS, parts = 1;
  t.seen_bytes = steps * 4, t.outputs = (p->outputs + LANES - 1) / LANES * LANES;
  t.points = p->enlarged ? ENLARGED_POINTS : WINOGRAD_POINTS;
  while (parts * t.points < TASKS_A_THREAD * threads && parts * 2 * GROUP <= t.outputs) parts *= 2;
  for (int64_t panel = 0; panel < panels; panel++) {
    int64_t last = rows * (panel + 1) / panels * TILE_ROWS;  // whole tiles of the product, except at the end
    t.first = rows * panel / panels * TILE_ROWS, t.count = (last < tiles ? last : tiles) - t.first;
    for (int64_t i = 0; i < t.points; i++) {
      int64_t at = p->enlarged ? SEEN_AT_SMALL[i / POINTS_SMALL] * SEEN_SMALL + SEEN_AT_SMALL[i % POINTS_SMALL] : i;
      t.product[i] = (Product){
          .kind = p->kind, .activation = NO_ACTIVATION, .out_type = AS_FP32, .taps = 1, .rows = t.count, .outputs = t.outputs,
          .steps = steps, .a = (const char *)p->seen + at * t.count * t.seen_bytes, .row_bytes = t.seen_bytes,
          .weights = (const char *)p->weights + i * p->point_bytes, .out = p->products + i * t.count * t.outputs,
          .out_step = t.outputs};
      t.products[i] = (ProductTasks){&t.product[i], parts};
    }
    pool_run(pool, seen, &t, t.count, threads);
    if (p->point_bytes)
      pool_run(pool, products, &t, t.points * parts, threads);
    else
      pool_run(pool, late_products, &t, t.outputs / LANES, threads);
    pool_run(pool, p->enlarged ? result_enlarged : result_plain, &t, t.count, threads);
  }
}
