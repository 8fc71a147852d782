// Images: GroupNorm, SiLU, a cast, and a frame, in two passes over the input.
#include <math.h>

#include "dot.h"
#include "pool.h"

// Statistics are summed over this many places at a time whatever the threads, and lines are cast in parts of as many as that.
// SiLU has its least value at −1.278.
enum { PLACES = 128, STATISTICS = 4, PART_PLACES = 512 };
#define LEAST_SILU (-0.27846455f)
#define STEPS 254  // of a quantised value in 0 … 255, one of them for rounding

typedef struct {
  const Image *image;
  int64_t channels, places, panels;
  float *statistics;  // [images][panels][4][channels]: sum and sum of squares of differences from the panel's first place; least; most
  float *factor;      // [images][2][channels]: what a value is multiplied by, what is added then
  int64_t parts, factor_step;  // of a line; from one image's factors to the next
} ImageTasks;

static void statistics_task(const void *context, int64_t number) {
  const ImageTasks *t = context;
  const Image *p = t->image;
  int64_t image = number / t->panels, from = number % t->panels * PLACES;
  int64_t to = from + PLACES < t->places ? from + PLACES : t->places;
  float *out = t->statistics + number * STATISTICS * t->channels;
  for (int part = 0; part < 2; part++) {
    int64_t channels = p->channels[part];
    const float *x = p->x[part] + image * t->places * channels;
    for (int64_t j = 0; j < channels; j += LANES) {
      int64_t count = channels - j;
      F16 origin = load_some(x + from * channels + j, count), total = {0}, squares = {0}, low = origin, high = origin;
      for (int64_t place = from; place < to; place++) {
        F16 v = load_some(x + place * channels + j, count), d = v - origin;
        total += d;
        squares = fma16(d, d, squares);
        low = least(v, low);
        high = most(v, high);
      }
      store_some(out + j, total, count);
      store_some(out + t->channels + j, squares, count);
      store_some(out + 2 * t->channels + j, low, count);
      store_some(out + 3 * t->channels + j, high, count);
    }
    out += channels;
  }
}

// The value of a channel in the first place of a panel, from which its differences are.
INLINE double origin_of(const ImageTasks *t, int64_t image, int64_t panel, int64_t channel) {
  const Image *p = t->image;
  int part = channel >= p->channels[0];
  int64_t channels = p->channels[part], place = image * t->places + panel * PLACES;
  return p->x[part][place * channels + channel - (part ? p->channels[0] : 0)];
}

// Mean and variance of a group in fp64 from its panels' sums (Chan, Golub, LeVeque 1979); NaN where any value is not finite.
static void moments_of(const ImageTasks *t, int64_t image, int64_t first, int64_t last, double *mean, double *variance) {
  double total = 0, squares = 0, all_places = (double)t->places * (double)(last - first);
  const float *s = t->statistics + image * t->panels * STATISTICS * t->channels;
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t panel = 0; panel < t->panels; panel++) {
      int64_t left = t->places - panel * PLACES;
      double n = left < PLACES ? (double)left : PLACES;
      const float *of_panel = s + panel * STATISTICS * t->channels;
      for (int64_t c = first; c < last; c++) {
        double sum = of_panel[c], own = origin_of(t, image, panel, c) + sum / n;
        if (pass == 0)
          total += n * own;
        else
          squares += of_panel[t->channels + c] - sum * sum / n + n * (own - total) * (own - total);
      }
    }
    if (pass == 0) total /= all_places;
  }
  *mean = total;
  *variance = squares / all_places;
}

static void factors_task(const void *context, int64_t image) {
  const ImageTasks *t = context;
  const Image *p = t->image;
  float *a = t->factor + image * 2 * t->channels, *b = a + t->channels, low = 0, high = 0, finite = 0;
  const float *s = t->statistics + image * t->panels * STATISTICS * t->channels;
  int64_t groups = p->groups ? p->groups : 1, per = t->channels / groups;
  for (int64_t g = 0; g < groups; g++) {
    double mean, variance;
    moments_of(t, image, g * per, (g + 1) * per, &mean, &variance);
    finite += (float)(mean * 0. + variance * 0.);
    float factor = (float)(1. / sqrt((variance < 0 ? 0 : variance) + (double)p->eps));
    for (int64_t c = g * per; c < (g + 1) * per; c++) {
      a[c] = !p->groups ? 1.f : p->gamma ? factor * p->gamma[c] : factor;
      b[c] = !p->groups ? 0.f : (float)((p->beta ? (double)p->beta[c] : 0.) - mean * (double)a[c]);
      for (int64_t panel = 0; panel < t->panels; panel++) {
        const float *of_panel = s + panel * STATISTICS * t->channels;
        float u = of_panel[2 * t->channels + c] * a[c] + b[c], v = of_panel[3 * t->channels + c] * a[c] + b[c];
        low = u < low ? u : low, low = v < low ? v : low;
        high = u > high ? u : high, high = v > high ? v : high;
      }
    }
  }
  if (p->out_type != AS_UINT8 || p->each_place) return;
  if (p->silu) {
    low = low < LEAST_SILU ? LEAST_SILU : low;
    high = high / (1.f + expf(-high));
  }
  float scale = (high - low) / STEPS;
  scale = scale < LEAST_SCALE ? LEAST_SCALE : scale;
  p->scale[image] = scale + finite;
  p->zero[image] = finite == 0 ? (int32_t)rintf(-low / scale) : 0;
}

// 16 channels of a part from `source` on, normed and activated; `at` is the first one's number among all.
INLINE F16 values_of(const Image *p, const float *source, const float *a, const float *b, int64_t at, int64_t count) {
  F16 v = fma16(load_some(source, count), load_some(a + at, count), load_some(b + at, count));
  return p->silu ? silu(v) : v;
}

// The scale of one place for values around MIDDLE.
INLINE float scale_of_place(const Image *p, int64_t place, const float *a, const float *b) {
  F16 top = {0}, total = {0};
  int64_t at = 0;
  for (int part = 0; part < 2; part++) {
    int64_t channels = p->channels[part];
    const float *source = p->x[part] + place * channels;
    for (int64_t j = 0; j < channels; j += LANES) {
      F16 v = magnitude(values_of(p, source + j, a, b, at + j, channels - j));
      top = most(v, top);
      total += v;
    }
    at += channels;
  }
  return scale_of(top, total);
}

static void cast_task(const void *context, int64_t number) {
  const ImageTasks *t = context;
  const Image *p = t->image;
  int64_t line_number = number / t->parts, part_number = number % t->parts;
  int64_t image = line_number / p->height, y = line_number % p->height, lines = p->height + 2 * p->padding_lines;
  int64_t first = p->width * part_number / t->parts, last = p->width * (part_number + 1) / t->parts, width = p->width + 2 * p->padding;
  const float *a = (p->given ? p->given : t->factor) + image * t->factor_step, *b = a + t->channels;
  int is_one_scale = p->out_type == AS_UINT8 && !p->each_place;
  float inverse = is_one_scale ? 1.f / p->scale[image] : 1.f;
  int32_t zero = is_one_scale ? p->zero[image] : p->each_place ? MIDDLE : 0;
  int64_t line_bytes = width * p->place_bytes, size = p->out_type == AS_UINT8 ? 1 : p->out_type == AS_BF16 ? 2 : 4;
  int64_t padded = p->place_bytes / size, above = p->padding_lines * line_bytes;
  char *line = (char *)p->out + (image * lines + y + p->padding_lines) * line_bytes;
  // The frame: lines above and below by the first and the last line's tasks.
  if (first == 0) {
    if (y == 0) memset(line - above, zero, (size_t)above);
    memset(line, zero, (size_t)(p->padding * p->place_bytes));
  }
  if (last == p->width) {
    if (y == p->height - 1) memset(line + line_bytes, zero, (size_t)above);
    memset(line + (width - p->padding) * p->place_bytes, zero, (size_t)(p->padding * p->place_bytes));
  }
  for (int64_t x = first; x < last; x++) {
    char *out = line + (x + p->padding) * p->place_bytes;
    int64_t at = 0, place = (image * p->height + y) * p->width + x;
    if (p->each_place) inverse = 1.f / (p->scale[place] = scale_of_place(p, place, a, b));
    for (int part = 0; part < 2; part++) {
      int64_t channels = p->channels[part];
      const float *source = p->x[part] + place * channels;
      int64_t room = at + channels == t->channels ? padded - at : channels;  // the last part fills the place
      for (int64_t j = 0; j < channels; j += LANES) {
        F16 v = values_of(p, source + j, a, b, at + j, channels - j);
        if (p->out_type == AS_UINT8)
          store_bytes((uint8_t *)out + at + j, bytes(nearest(v * inverse) + zero), room - j);
        else if (p->out_type == AS_BF16)
          store_half((uint16_t *)out + at + j, bf16(v), room - j);
        else
          store_some((float *)out + at + j, v, room - j);
      }
      at += channels;
    }
  }
}

static ImageTasks image_tasks(const Image *p) {
  int64_t channels = p->channels[0] + p->channels[1], places = p->height * p->width, panels = (places + PLACES - 1) / PLACES;
  return (ImageTasks){.image = p, .channels = channels, .places = places, .panels = panels, .statistics = p->scratch,
                      .factor = p->scratch + p->images * panels * STATISTICS * channels,
                      .parts = (p->width + PART_PLACES - 1) / PART_PLACES, .factor_step = 2 * channels};
}

static void image(Pool *pool, const Image *p, int threads) {
  ImageTasks tasks = image_tasks(p);
  if (p->groups || (p->out_type == AS_UINT8 && !p->each_place)) {
    pool_run(pool, statistics_task, &tasks, p->images * tasks.panels, threads);
    pool_run(pool, factors_task, &tasks, p->images, threads);
  } else {
    tasks.factor_step = 0, tasks.factor = p->scratch;
    for (int64_t i = 0; !p->given && i < 2 * tasks.channels; i++) tasks.factor[i] = i < tasks.channels ? 1.f : 0.f;
  }
  pool_run(pool, cast_task, &tasks, p->images * p->height * tasks.parts, threads);
}

typedef struct {
  ImageTasks tasks;
  const Moments *moments;
} MomentsTasks;

static void moments_task(const void *context, int64_t group) {
  const MomentsTasks *t = context;
  const Moments *p = t->moments;
  int64_t per = p->channels / p->groups;
  double *squares = p->out + p->groups + group;
  moments_of(&t->tasks, 0, group * per, (group + 1) * per, p->out + group, squares);
  *squares *= (double)p->places * (double)per;
}

static void moments(Pool *pool, const Moments *p, int threads) {
  Image image = {.x = {p->x}, .channels = {p->channels}, .images = 1, .height = p->places, .width = 1, .scratch = p->scratch};
  MomentsTasks t = {image_tasks(&image), p};
  pool_run(pool, statistics_task, &t.tasks, t.tasks.panels, threads);
  pool_run(pool, moments_task, &t, p->groups, threads);
  float low = p->x[0], high = low;
  for (int64_t panel = 0; panel < t.tasks.panels; panel++) {
    const float *least_values = t.tasks.statistics + (panel * STATISTICS + 2) * p->channels, *most_values = least_values + p->channels;
    for (int64_t c = 0; c < p->channels; c++) {
      low = least_values[c] < low ? least_values[c] : low;
      high = most_values[c] > high ? most_values[c] : high;
    }
  }
  p->out[2 * p->groups] = low, p->out[2 * p->groups + 1] = high;
}
