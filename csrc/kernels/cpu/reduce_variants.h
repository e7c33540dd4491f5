// SPDX-License-Identifier: Apache-2.0
// One table of functions per instruction set. All give the same bits.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "kernels/reduce.h"

namespace tp_native::kernels {

struct Segment {
  int sources;
  const void* const* src;
  int targets;
  void* const* dst;
  int64_t offset;  ///< elements to skip in each src and dst
  int64_t count;
  const void* bias;  ///< `count` values, or null: already aligned with src[.][offset]
};

struct Variant {
  const char* isa;
  void (*reduce)(DType, ReduceOp, const Segment&);
};

/// Plain C++, and the reference of the others.
extern const Variant kGeneric;

/// Null where the build's target or this CPU lacks them.
const Variant* avx2_variant();
const Variant* avx512_variant();

}  // namespace tp_native::kernels
