// The kernels of one instruction set. Compiled once for each, with -DSET=v4_bf16 -DSET_NAME="v4-bf16" and so on.
#include "kernels.h"

#include "product.h"
#include "rows.h"

#include "attention.h"
#include "image.h"
#include "pack.h"
#include "quantise.h"
#include "winograd.h"

#define TABLE_OF(set) kernels_##set
#define TABLE(set) TABLE_OF(set)

extern const Kernels TABLE(SET);
const Kernels TABLE(SET) = {SET_NAME, product, rows, image, moments, sums, attention, pack, winograd, quantise};
