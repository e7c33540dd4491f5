// SPDX-License-Identifier: Apache-2.0
// For targets other than x86-64: the generic code is all there is.
#include "kernels/cpu/reduce_variants.h"

namespace tp_native::kernels {
const Variant* avx2_variant() { return nullptr; }
const Variant* avx512_variant() { return nullptr; }
}  // namespace tp_native::kernels
