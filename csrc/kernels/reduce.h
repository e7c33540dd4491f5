// SPDX-License-Identifier: Apache-2.0
// Element-wise reduction of several ranks' data, with what follows a row-parallel linear in the
// same pass: bias, residual, RMSNorm.
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
  /// Null, or as many values as the whole result: residual[first + i] joins after the sum with its
  /// bias was rounded, and the total is rounded again, as adding a stored result would.
  const void* residual = nullptr;
};

void reduce(const Reduction& reduction);

/// The sum of whole rows, with the residual and the norm of a transformer block in the same pass:
///   h = sum over sources + bias, rounded, + residual, rounded
///   normed = h / sqrt(mean(h^2) + eps), rounded, * norm_weight, rounded
/// as Hugging Face's Llama does it apart. All pointers are at the first row handled; rows are
/// contiguous. Floating dtypes only; float64 is computed in float64, the others in float32. The
/// squares are added in an order that depends on `columns` alone: no split of the rows and no
/// instruction set changes a bit. normed[d] and hidden[d] may be any of the sources or the
/// residual, but not each other.
/// Source: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467, equation 4.
struct RowReduction {
  DType dtype = DType::kFloat32;
  int sources = 0;
  const void* const* src = nullptr;
  int targets = 0;
  void* const* normed = nullptr;
  void* const* hidden = nullptr;  ///< where each target gets h, or null
  int64_t rows = 0;
  int64_t columns = 0;
  const void* bias = nullptr;         ///< `columns` values, or null
  const void* residual = nullptr;     ///< rows * columns values, or null
  const void* norm_weight = nullptr;  ///< `columns` values
  double eps = 0;
};

void reduce_rms_norm(const RowReduction& reduction);

/// The order of the squares: column c adds to partial sum c % kPartialSums, columns ascending; then
/// the upper half of the partial sums is added to the lower until one is left.
constexpr int kPartialSums = 32;

/// "avx512", "avx2" or "generic": which code runs here.
const char* reduce_isa();

/// All but the avg of integers and bool.
bool can_reduce(DType dtype, ReduceOp op);

}  // namespace tp_native::kernels
