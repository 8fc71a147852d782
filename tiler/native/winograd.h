// Large 3 × 3 convolutions with a quarter of the multiplications (transform.h): some tiles of the input at a time are
// transformed, multiplied with 36 matrices, and transformed back. What a tile gives does not depend on which go together.
#include "transform.h"
#include "pool.h"

typedef struct {
  const Winograd *call;
  int64_t down, across;  // tiles of an image
  int64_t first, count;  // tiles of these, over all images
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

INLINE void seen_of_tile(const enum Kind kind, const WinogradTasks *t, int64_t number) {
  const Winograd *p = t->call;
  Tile tile = tile_at(t, t->first + number);
  const float *image = p->a + tile.image * p->image_step;
  char *out = (char *)p->seen + number * t->seen_bytes;
  int64_t point = t->count * t->seen_bytes;
  for (int64_t c = 0; c < p->channels; c += LANES) {
    F16 half[SEEN * SEEN], points[SEEN * SEEN];
    // Lines that are far from each other are fetched while the ones before are computed.
    for (int i = 0; i < WINOGRAD_POINTS; i++) __builtin_prefetch(out + i * point + (c + LANES) * (kind == BF16 ? 2 : 4), 1);
    for (int j = 0; j < SEEN; j++) {
      F16 x[SEEN];
      for (int i = 0; i < SEEN; i++) {
        int64_t line = tile.y + i, place = tile.x + j;
        int is_there = line < p->lines && place < p->places;
        x[i] = is_there ? load_some(image + (line * p->places + place) * p->channels + c, p->channels - c) : all(0.f);
      }
      transform_input(x, 1, half + j, SEEN);
    }
    for (int i = 0; i < SEEN; i++) transform_input(half + SEEN * i, 1, points + SEEN * i, 1);
    for (int i = 0; i < WINOGRAD_POINTS; i++) {
      if (kind == BF16)
        store_half((uint16_t *)(out + i * point) + c, bf16(points[i]), t->seen_bytes / 2 - c);
      else
        store_some((float *)(out + i * point) + c, points[i], p->channels - c);
    }
  }
}

INLINE void products_task(const enum Kind kind, const WinogradTasks *t, int64_t number) {
  const ProductTasks *of_point = t->products + number % WINOGRAD_POINTS;
  panel_of(kind, of_point, number / WINOGRAD_POINTS);
}

static void result_of_tile(const void *context, int64_t number) {
  const WinogradTasks *t = context;
  const Winograd *p = t->call;
  Tile tile = tile_at(t, t->first + number);
  int64_t down = p->height - tile.y < SIDE ? p->height - tile.y : SIDE, across = p->width - tile.x < SIDE ? p->width - tile.x : SIDE;
  int64_t first = (tile.image * p->height + tile.y) * p->width + tile.x, point = t->count * t->outputs;
  const float *products = p->products + number * t->outputs;
  for (int64_t c = 0; c < p->outputs; c += LANES) {
    int64_t count = p->outputs - c;
    for (int i = 0; i < WINOGRAD_POINTS; i++) __builtin_prefetch(products + i * point + c + LANES);
    F16 half[SIDE * SEEN], out[SIDE * SIDE], bias = p->bias ? load_some(p->bias + c, count) : all(0.f);
    for (int j = 0; j < SEEN; j++) {
      F16 m[SEEN];
      for (int i = 0; i < SEEN; i++) m[i] = load(products + (SEEN * i + j) * point + c);
      transform_output(m, 1, half + j, SEEN);
    }
    for (int i = 0; i < SIDE; i++) transform_output(half + SEEN * i, 1, out + SIDE * i, 1);
    for (int64_t i = 0; i < down; i++)
      for (int64_t j = 0; j < across; j++) {
        int64_t place = first + i * p->width + j;
        F16 x = out[SIDE * i + j] + bias;
        if (p->residual) x += load_some(p->residual + place * p->residual_step + c, count);
        store_some(p->out + place * p->out_step + c, x, count);
      }
  }
}

static void seen_fp32(const void *t, int64_t number) { seen_of_tile(FP32, t, number); }
static void products_fp32(const void *t, int64_t number) { products_task(FP32, t, number); }
#if defined(__AVX512BF16__)
static void seen_bf16(const void *t, int64_t number) { seen_of_tile(BF16, t, number); }
static void products_bf16(const void *t, int64_t number) { products_task(BF16, t, number); }
#endif

static void winograd(Pool *pool, const Winograd *p, int threads) {
  Task seen = seen_fp32, products = products_fp32;
  int is_bf16 = 0;
#if defined(__AVX512BF16__)
  is_bf16 = p->kind == BF16;
  if (is_bf16) seen = seen_bf16, products = products_bf16;
#endif
  WinogradTasks t = {.call = p, .down = (p->height + SIDE - 1) / SIDE, .across = (p->width + SIDE - 1) / SIDE};
  int64_t steps = is_bf16 ? (p->channels + 1) / 2 : p->channels, tiles = p->images * t.down * t.across;
  int64_t panels = (tiles + WINOGRAD_TILES - 1) / WINOGRAD_TILES, rows = (tiles + TILE_ROWS - 1) / TILE_ROWS, parts = 1;
  t.seen_bytes = steps * 4, t.outputs = (p->outputs + LANES - 1) / LANES * LANES;
  while (parts * WINOGRAD_POINTS < TASKS_A_THREAD * threads && parts * 2 * GROUP <= t.outputs) parts *= 2;
  for (int64_t panel = 0; panel < panels; panel++) {
    int64_t last = rows * (panel + 1) / panels * TILE_ROWS;  // whole tiles of the product, except at the end
    t.first = rows * panel / panels * TILE_ROWS, t.count = (last < tiles ? last : tiles) - t.first;
    for (int64_t i = 0; i < WINOGRAD_POINTS; i++) {
      t.product[i] = (Product){
          .kind = p->kind, .activation = NO_ACTIVATION, .out_type = AS_FP32, .taps = 1, .rows = t.count, .outputs = t.outputs,
          .steps = steps, .a = (const char *)p->seen + i * t.count * t.seen_bytes, .row_bytes = t.seen_bytes,
          .weights = (const char *)p->weights + i * p->point_bytes, .out = p->products + i * t.count * t.outputs,
          .out_step = t.outputs};
      t.products[i] = (ProductTasks){&t.product[i], parts};
    }
    pool_run(pool, seen, &t, t.count, threads);
    pool_run(pool, products, &t, WINOGRAD_POINTS * parts, threads);
    pool_run(pool, result_of_tile, &t, t.count, threads);
  }
}
