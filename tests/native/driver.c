// Runs one case that pytest wrote (test_kernels.py, `write`) and compares with its reference: for sanitisers, and for processors
// that are not this one. `driver SET THREADS FILE…`; every array has a block of its own, so that nothing beyond it is read unseen.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../tiler/native/kernels.h"

typedef struct Tiler Tiler;
Tiler *tiler_open(const char *name);
void tiler_close(Tiler *);
void tiler_product(Tiler *, const Product *, int);
void tiler_rows(Tiler *, const Rows *, int);
void tiler_image(Tiler *, const Image *, int);
void tiler_sums(Tiler *, const Sums *, int);
void tiler_attention(Tiler *, const Attention *, int);
void tiler_pack(Tiler *, const Pack *, int);
void tiler_winograd(Tiler *, const Winograd *, int);
void tiler_moments(Tiler *, const Moments *, int);
void tiler_quantise(Tiler *, const Quantise *, int);

enum { AS_FP64 = AS_FP32 + 1 };  // of results alone

static void *get(FILE *file, size_t size) {
  void *p = malloc(size ? size : 1);
  if (!p || fread(p, 1, size, file) != size) exit(3);
  return p;
}

static int64_t number(FILE *file) {
  int64_t *p = get(file, sizeof *p), n = *p;
  free(p);
  return n;
}

static double value(const void *p, int64_t type, int64_t i) {
  if (type == AS_UINT8) return ((const uint8_t *)p)[i];
  if (type == AS_FP32) return ((const float *)p)[i];
  if (type == AS_FP64) return ((const double *)p)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The norm of the differences as a share of the reference's; of whole numbers the largest difference. NaN: any value will do.
static double error_of(const void *got, int64_t type, const double *want, int64_t count) {
  double apart = 0, whole = 0, largest = 0;
  for (int64_t i = 0; i < count; i++) {
    if (isnan(want[i])) continue;
    double d = fabs(value(got, type, i) - want[i]);
    apart += d * d, whole += want[i] * want[i], largest = d > largest ? d : largest;
  }
  return type == AS_UINT8 ? largest : sqrt(apart / (whole > 0 ? whole : 1));
}

int main(int count, char **arguments) {
  if (count < 4) return 2;
  Tiler *tiler = tiler_open(arguments[1]);
  if (!tiler) return 4;
  int threads = atoi(arguments[2]), wrong = 0;
  for (int n = 3; n < count; n++) {
    FILE *file = fopen(arguments[n], "rb");
    if (!file) return 3;
    int64_t operation = number(file), arrays = number(file), type = number(file), result = number(file), values = number(file);
    double *tolerance = get(file, sizeof *tolerance), *want = get(file, (size_t)values * sizeof *want);
    void **array = calloc((size_t)arrays, sizeof *array);
    for (int64_t i = 0; i < arrays; i++) array[i] = get(file, (size_t)number(file));
    int64_t pointers = number(file);
    int64_t *places = get(file, (size_t)pointers * 3 * sizeof *places);  // where in the struct, which array (-1: the struct), where in it
    char *fields = get(file, (size_t)number(file));
    for (int64_t i = 0; i < pointers; i++) {
      const char *p = places[3 * i + 1] < 0 ? fields : (const char *)array[places[3 * i + 1]];
      p += places[3 * i + 2];
      memcpy(fields + places[3 * i], &p, sizeof p);
    }
    fclose(file);
    if (operation == 0) tiler_product(tiler, (const Product *)fields, threads);
    if (operation == 1) tiler_rows(tiler, (const Rows *)fields, threads);
    if (operation == 2) tiler_image(tiler, (const Image *)fields, threads);
    if (operation == 3) tiler_sums(tiler, (const Sums *)fields, threads);
    if (operation == 4) tiler_attention(tiler, (const Attention *)fields, threads);
    if (operation == 5) tiler_pack(tiler, (const Pack *)fields, threads);
    if (operation == 6) tiler_winograd(tiler, (const Winograd *)fields, threads);
    if (operation == 7) tiler_moments(tiler, (const Moments *)fields, threads);
    if (operation == 8) tiler_quantise(tiler, (const Quantise *)fields, threads);
    double error = error_of(array[result], type, want, values);
    if (!(error <= *tolerance)) printf("%s: error %g, %g allowed\n", arguments[n], error, *tolerance), wrong++;
    for (int64_t i = 0; i < arrays; i++) free(array[i]);
    free(array), free(fields), free(places), free(want), free(tolerance);
  }
  tiler_close(tiler);
  return wrong > 0;
}
