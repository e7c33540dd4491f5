// SPDX-License-Identifier: Apache-2.0
// For targets other than x86-64: the generic code is all there is.
#include "kernels/cpu/reduce_variants.h"

namespace tp_native::kernels {
ReduceSegment avx2_reduce() { return nullptr; }
ReduceSegment avx512_reduce() { return nullptr; }
}  // namespace tp_native::kernels
