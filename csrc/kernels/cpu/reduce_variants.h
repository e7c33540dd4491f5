// SPDX-License-Identifier: Apache-2.0
// One table of functions per instruction set. All give the same bits.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "kernels/cross_entropy.h"
#include "kernels/reduce.h"

namespace tp_native::kernels {

struct Segment {
  int sources;
  const void* const* src;
  int targets;
  void* const* dst;
  int64_t offset;  ///< elements to skip in each src and dst
  int64_t count;
  const void* bias;                ///< `count` values, or null: already aligned with src[.][offset]
  const void* residual = nullptr;  ///< offset + count values or null: aligned with src[.][0]
};

struct Variant {
  const char* isa;
  void (*reduce)(DType, ReduceOp, const Segment&);
  void (*reduce_rms_norm)(const RowReduction&);
  void (*logit_statistics)(DType, const void* row, int64_t columns, bool has_shifted_sum,
                           LogitStatistics&);
  void (*logit_gradient)(DType, const void* row, int64_t columns, const LogitGradient&,
                         void* out);  ///< the label's column as every other
};

/// Plain C++, and the reference of the others.
extern const Variant kGeneric;

/// Null where the build's target or this CPU lacks them.
const Variant* avx2_variant();
const Variant* avx512_variant();

/// The one that runs here.
const Variant& variant();

/// The sum of partial sums; they are overwritten.
float total_of(float (&sums)[kPartialSums]);
double total_of(double (&sums)[kPartialSums]);

/// 1 / sqrt(mean + eps). The partial sums are overwritten.
float rms_scale(float (&sums)[kPartialSums], int64_t columns, double eps);
double rms_scale(double (&sums)[kPartialSums], int64_t columns, double eps);

}  // namespace tp_native::kernels
