// The library's own functions: which instruction set runs, and a handle that has the threads.
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
extern const Kernels kernels_v3, kernels_v3_vnni, kernels_v4, kernels_v4_bf16;
#elif defined(__aarch64__)
extern const Kernels kernels_neon, kernels_dotprod, kernels_i8mm;
#if defined(__APPLE__)
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif
#else
#error "no kernels for this processor"
#endif

#define EXPORT __attribute__((visibility("default")))

typedef struct {
  Pool *pool;
  const Kernels *kernels;
} Tiler;

typedef struct {
  const Kernels *kernels;
  int runs;
  int slow;  // slower than the set before it: only taken if it is named
} Set;

enum { SETS = 4 };

#if defined(__x86_64__)
static unsigned long long saved_state(void) {  // which registers the system saves: XCR0
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (unsigned long long)high << 32 | low;
}

static int bits(unsigned word, unsigned wanted) { return (word & wanted) == wanted; }

static void find_sets(Set sets[SETS]) {
  unsigned a, b, c, d, extended_c = 0, b7 = 0, c7 = 0, d7 = 0, a71 = 0, leaves = __get_cpuid_max(0, NULL);
  sets[0].kernels = &kernels_v3, sets[1].kernels = &kernels_v3_vnni, sets[2].kernels = &kernels_v4, sets[3].kernels = &kernels_v4_bf16;
  if (leaves < 7 || !__get_cpuid(1, &a, &b, &c, &d)) return;
  unsigned c1 = c;
  if (__get_cpuid(0x80000001, &a, &b, &c, &d)) extended_c = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    b7 = b, c7 = c, d7 = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) a71 = a;
  }
  // FMA, MOVBE, OSXSAVE, AVX, F16C; LZCNT; BMI1, AVX2, BMI2.
  if (!bits(c1, 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29) || !bits(extended_c, 1u << 5)) return;
  unsigned long long state = saved_state();
  int v3 = bits(b7, 1u << 3 | 1u << 5 | 1u << 8) && (state & 0x6) == 0x6;
  // AVX512F, DQ, CD, BW, VL.
  int v4 = v3 && bits(b7, 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31) && (state & 0xe6) == 0xe6;
  int vnni512 = v4 && bits(c7, 1u << 11);
  sets[0].runs = v3;
  sets[1].runs = v3 && bits(a71, 1u << 4);
  sets[2].runs = vnni512;
  sets[3].runs = vnni512 && bits(a71, 1u << 5);
  // AMX-BF16. On Emerald Rapids, passes of SD 1.5's size and of `mini` have 0.57 and 0.69 of fp32's speed in bf16
  // (scripts/README.md), on Zen 4 1.7 and 1.1. Of other processors with AMX none was measured; all are Intel's.
  sets[3].slow = bits(d7, 1u << 22);
}
#else
static void find_sets(Set sets[SETS]) {
  sets[0].kernels = &kernels_neon, sets[1].kernels = &kernels_dotprod, sets[2].kernels = &kernels_i8mm;
  sets[0].runs = 1;
#if defined(__APPLE__)
  size_t size = sizeof(int);
  sysctlbyname("hw.optional.arm.FEAT_DotProd", &sets[1].runs, &size, NULL, 0);
  size = sizeof(int);
  sysctlbyname("hw.optional.arm.FEAT_I8MM", &sets[2].runs, &size, NULL, 0);
#else
  sets[1].runs = (getauxval(AT_HWCAP) >> 20 & 1) != 0;   // ASIMDDP
  sets[2].runs = (getauxval(AT_HWCAP2) >> 13 & 1) != 0;  // I8MM
#endif
}
#endif

EXPORT int tiler_version(void) { return TILER_VERSION; }

// A handle for the instruction set of this name, or for the fastest that runs here where it is empty. NULL: it does not run here.
EXPORT Tiler *tiler_open(const char *name) {
  Set sets[SETS] = {{0}};
  find_sets(sets);
  const Kernels *found = NULL;
  for (int i = 0; i < SETS; i++)
    if (sets[i].runs && (*name ? !strcmp(name, sets[i].kernels->name) : !sets[i].slow)) found = sets[i].kernels;
  Tiler *tiler = found ? malloc(sizeof *tiler) : NULL;
  if (!tiler) return NULL;
  *tiler = (Tiler){pool_open(), found};
  if (!tiler->pool) {
    free(tiler);
    return NULL;
  }
  return tiler;
}

EXPORT void tiler_close(Tiler *tiler) {
  pool_close(tiler->pool);
  free(tiler);
}

EXPORT const char *tiler_isa(const Tiler *tiler) { return tiler->kernels->name; }
EXPORT void tiler_product(Tiler *tiler, const Product *p, int threads) { tiler->kernels->product(tiler->pool, p, threads); }
EXPORT void tiler_rows(Tiler *tiler, const Rows *p, int threads) { tiler->kernels->rows(tiler->pool, p, threads); }
EXPORT void tiler_image(Tiler *tiler, const Image *p, int threads) { tiler->kernels->image(tiler->pool, p, threads); }
EXPORT void tiler_moments(Tiler *tiler, const Moments *p, int threads) { tiler->kernels->moments(tiler->pool, p, threads); }
EXPORT void tiler_sums(Tiler *tiler, const Sums *p, int threads) { tiler->kernels->sums(tiler->pool, p, threads); }
EXPORT void tiler_attention(Tiler *tiler, const Attention *p, int threads) { tiler->kernels->attention(tiler->pool, p, threads); }
EXPORT void tiler_pack(Tiler *tiler, const Pack *p, int threads) { tiler->kernels->pack(tiler->pool, p, threads); }
EXPORT void tiler_quantise(Tiler *tiler, const Quantise *p, int threads) { tiler->kernels->quantise(tiler->pool, p, threads); }
EXPORT void tiler_winograd(Tiler *tiler, const Winograd *p, int threads) { tiler->kernels->winograd(tiler->pool, p, threads); }
