// SPDX-License-Identifier: Apache-2.0
// Element-wise reduction of several ranks' data, with the bias of a row-parallel linear in the same
// pass.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tp_native::kernels {

/// dst[d][i] = op over r = 0..sources-1, ascending, of src[r][i], plus bias[(first + i) % columns].
/// 16-bit types accumulate in float32 and round once; max and min keep the first of equal zeros;
/// avg divides the sum; a NaN among the sources wins and comes out as the positive quiet one
/// without payload. Integers wrap; for bool sum and max are "or", min is "and", bytes other than 0
/// count as true and come out as 1. Body and tail run the same code, so the result does not depend
/// on alignment, on the instruction set or on how a message was split: every rank gets the same
/// bits. dst[d] may be src[r]; other overlaps are not allowed.
struct Reduction {
  DType dtype = DType::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  int sources = 0;
  const void* const* src = nullptr;
  int targets = 0;
  void* const* dst = nullptr;
  int64_t count = 0;
  const void* bias = nullptr;  ///< `columns` values, or null
  int64_t columns = 0;
  int64_t first = 0;  ///< where in the flattened result src and dst begin; picks the bias column
};

void reduce(const Reduction& reduction);

/// "avx512", "avx2" or "generic": which code `reduce` runs here.
const char* reduce_isa();

/// All but the avg of integers and bool.
bool can_reduce(DType dtype, ReduceOp op);

}  // namespace tp_native::kernels
