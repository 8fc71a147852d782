// What the library computes, as data: ctypes fills these structs (library.py has the same fields in the same order), and each
// instruction set's table of functions runs them. All sizes of rows and lines are in bytes unless a comment says otherwise.
#ifndef TILER_KERNELS_H
#define TILER_KERNELS_H
#include <stdint.h>

#define TILER_VERSION 10  // of these structs and of results; library.py refuses a file of another one

enum Kind { INT8, BF16, FP32 };  // of a product: what a lane of 32 bits holds: 4, 2 or 1 values
enum Type { AS_UINT8, AS_BF16, AS_FP32 };
enum Activation { NO_ACTIVATION, SILU, GELU, GELU_TANH };

// out = activation((a · weightsᵀ) · scales + bias) + residual. With `gate_weights` a second product of as many outputs is made
// beside it, and out = first · activation(second) + residual.
//
// `weights` is [outputs / 16][taps][steps][16] lanes. `a` is a matrix, one row after another, or (per_image > 0) images whose
// places are rows: the row of place (y, x) begins at image · image_bytes + y · line_bytes + x · place_bytes, and tap t reads
// `steps` lanes at tap[t] behind it. int8: `a` holds uint8 whose zero is `zero`, (a − zero) · scale; row r takes
// scale[r / scale_rows] and zero[zero_step · (r / scale_rows)]. AVX2 without VNNI takes values as `Quantise` makes them.
//
// int8 may have another int8 product of the same rows and outputs `beside` it, a low-rank path, whose scaled sums are added before
// the bias, those of its gates to the gates. Of it are read: taps (1), outputs, steps, a, row_bytes, the weights and gates with
// their scales and sums, scale, zero, scale_rows (1) and zero_step.
typedef struct Product {
  int32_t kind, activation, out_type, taps;
  int64_t rows, outputs, steps;
  const void *a;
  int64_t row_bytes;
  int64_t per_image, width, image_bytes, line_bytes, place_bytes;
  const int64_t *tap;  // NULL: one tap at 0
  const void *weights;
  const float *weight_scale;  // (outputs,), int8 only
  const int32_t *weight_sum;  // (outputs,), int8 only: sums of a row's values
  const void *gate_weights;   // NULL: none
  const float *gate_scale, *gate_bias;
  const int32_t *gate_sum;
  const float *scale;
  const int32_t *zero;
  int64_t scale_rows, zero_step;
  const float *bias;      // (outputs,) or NULL
  const float *residual;  // like out, or NULL
  void *out;
  int64_t out_step, residual_step;  // elements from one row to the next
  int64_t out_width, out_line;      // out_width > 0: `out` has lines of that many rows, and these elements from one to the next
  const struct Product *beside;     // NULL: none
} Product;

// Rows of `width` values, normalised where `norm` is set (LayerNorm; gamma and beta may be NULL), then cast; as uint8 each
// symmetric around 128 with a scale of its own. Bytes of a row beyond its values are written up to a multiple of 4. With `rotated`,
// as uint8, groups of 64 values are rotated before they are cast (tiler/weights/rotation.py); `width` is a multiple of 64.
typedef struct {
  const float *x;
  int64_t rows, width, step;  // elements
  const float *gamma, *beta;
  float eps;
  int32_t norm, out_type, rotated;
  void *out;
  int64_t out_bytes;  // from one row to the next
  float *scale;       // (rows,), uint8 only
} Rows;

// Images (h, w, channels) of one or two parts that are joined along channels: GroupNorm (groups > 0), or a factor and a summand
// that are given for each channel, SiLU, then a cast into a frame whose value is zero, of `padding` places left and right and
// `padding_lines` above and below. As uint8 each image has one scale and one zero point or, with `each_place` (and no frame), each
// place a scale around 128.
typedef struct {
  const float *x[2];
  int64_t channels[2];
  int64_t images, height, width, padding, padding_lines;
  int32_t groups, silu, out_type, each_place;
  float eps;
  const float *gamma, *beta;  // (channels,) or NULL
  const float *given;         // (2, channels): factors, then what is added; NULL: none. Not with uint8 of one scale
  void *out;
  int64_t place_bytes;  // of a place of `out`
  float *scale;         // (images,) or (images · places,), uint8 only
  int32_t *zero;        // (images,), uint8 with one zero point only
  float *scratch;       // image_scratch() floats
} Image;

// Of (places, channels): each group's mean, then each group's sum of squares of the differences from it, then the least and the
// most of all values. NaN and Inf make a mean NaN or Inf.
typedef struct {
  const float *x;
  int64_t places, channels, groups;
  float *scratch;  // image_scratch() floats of one image
  double *out;     // (2 · groups + 2,)
} Moments;

// Sums of the int8 values of each output: (blocks · 16,) from [blocks][lanes][16] lanes.
typedef struct {
  const void *weights;
  int64_t blocks, lanes;
  int32_t *sum;
} Sums;

// Rows (outputs, inputs, taps) of a weight as int8 for processors that add products in 16 bits, with the scale of each by which it
// errs least: values are in ±127, and of the four products that are added, those of the first or the last two inputs of lanes 2i
// and 2i + 1, neither the positive nor the negative weights add up to more than MOST_FOUR. `inputs` is a multiple of 4.
enum { MOST_FOUR = 128 };  // times 255 fits 16 bits
typedef struct {
  const float *x;
  int64_t outputs, inputs, taps;
  int8_t *out;
  float *scale;  // (outputs,)
} Quantise;

// Rows (outputs, inputs, taps) of a weight, into the order of a product of `kind`, FP32 or BF16; outputs up to a multiple of 16
// and inputs up to a whole lane are filled with zeros. With `is_transformed` (9 taps) what `Winograd` takes instead:
// [WINOGRAD_POINTS][outputs / 16][steps][16] lanes, of which these rows are some blocks of each; what it takes for `enlarged`
// images has ENLARGED_POINTS.
typedef struct {
  int32_t kind, is_transformed, enlarged;
  int64_t outputs, inputs, taps;
  const float *rows;
  void *out;
  int64_t point_bytes;  // from one point to the next
} Pack;

// 3 × 3 convolutions of images (lines, places, channels) of fp32, zeros beyond them, by transformed weights: out (height, width)
// begins with the window at the first line and place. With `enlarged` they are of the images with both sides doubled (nearest
// neighbours), without the outermost lines and places that this gives: of a small image in a frame of 1, all of the large one.
enum { WINOGRAD_SIDE = 4, WINOGRAD_POINTS = (WINOGRAD_SIDE + 2) * (WINOGRAD_SIDE + 2), WINOGRAD_TILES = 96 };
enum { ENLARGED_POINTS = 5 * 5, ENLARGED_SEEN = 4 * 4 };
typedef struct {
  int32_t kind, enlarged;
  int64_t images, lines, places, channels, height, width, outputs;
  const float *a;
  int64_t image_step;  // elements from one image to the next
  const void *weights;
  int64_t point_bytes;  // 0: the weights are in the order of a product of FP32, and are transformed here
  const float *bias, *residual;  // (outputs,) or NULL; like out, or NULL
  float *out;
  int64_t out_step, residual_step;  // elements from one place to the next
  void *seen;                       // WINOGRAD_POINTS (enlarged: ENLARGED_SEEN) · WINOGRAD_TILES · lanes of a place
  float *products;                  // WINOGRAD_POINTS (ENLARGED_POINTS) · WINOGRAD_TILES · outputs up to a multiple of 16
} Winograd;

// out = softmax(scale · q · kᵀ) · v for each sample and head, of `dims` values up to 512; those of a token lie side by side.
// BF16: products are of values rounded to that, sums are fp32. Steps in elements. Where keys come in several calls, `top` and
// `total` take what puts their results together: the largest score of each query in base 2, and the sum of 2^(score − top).
enum Axis { SAMPLE, HEAD, TOKEN, AXES };
typedef struct {
  int32_t kind;  // FP32, or BF16 where the instruction set has it
  float scale;
  int64_t samples, heads, queries, keys, dims;
  const float *q, *k, *v;
  float *out;
  int64_t q_step[AXES], k_step[AXES], v_step[AXES], out_step[AXES];
  float *top, *total;  // (samples, heads, queries) or NULL
} Attention;

typedef struct Pool Pool;

// One instruction set's functions. Nothing that they compute depends on `threads`.
typedef struct {
  const char *name;
  void (*product)(Pool *, const Product *, int threads);
  void (*rows)(Pool *, const Rows *, int threads);
  void (*image)(Pool *, const Image *, int threads);
  void (*moments)(Pool *, const Moments *, int threads);
  void (*sums)(Pool *, const Sums *, int threads);
  void (*attention)(Pool *, const Attention *, int threads);
  void (*pack)(Pool *, const Pack *, int threads);
  void (*winograd)(Pool *, const Winograd *, int threads);
  void (*quantise)(Pool *, const Quantise *, int threads);
} Kernels;

#endif
