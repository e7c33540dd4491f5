// SPDX-License-Identifier: Apache-2.0
// One function per instruction set; `bias` here is already aligned with src[.][0].
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tp_native::kernels {

struct Segment {
  int sources;
  const void* const* src;
  int targets;
  void* const* dst;
  int64_t offset;  ///< elements to skip in each src and dst
  int64_t count;
  const void* bias;  ///< `count` values, or null
};

using ReduceSegment = void (*)(DType, ReduceOp, const Segment&);

void reduce_generic(DType dtype, ReduceOp op, const Segment& segment);

/// Null where the build's target or this CPU lacks them. Sums run vectorised, the rest as in
/// reduce_generic.
ReduceSegment avx2_reduce();
ReduceSegment avx512_reduce();

}  // namespace tp_native::kernels
