// SPDX-License-Identifier: Apache-2.0
// Cross entropy over a vocabulary of which each rank holds some columns: what one row of logits
// tells, what the ranks found together, and the row's gradient. float64 logits are computed in
// float64, the others in float32.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

#include "core/dtype.h"

namespace tp_native::kernels {

/// Of some columns of a row, relative to their maximum: no exponential overflows, and nothing is
/// lost where all logits are large. Without a column, or where all are -infinity, the rest is
/// relative to 0. Float32 values where the logits are not float64.
struct LogitStatistics {
  double max = -std::numeric_limits<double>::infinity();
  double exp_sum = 0;      ///< of e^(x - max)
  double shifted_sum = 0;  ///< of x - max; 0 where it was not asked for
};

/// The sums are taken in the order of reduce.h's kPartialSums: no instruction set changes a bit. A
/// NaN leaves `max` as it is and makes the sums NaN.
LogitStatistics logit_statistics(DType dtype, const void* row, int64_t columns,
                                 bool has_shifted_sum);

/// Those of a whole row; `ranks` in rank order, `columns` of each.
/// Source: Milakov & Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867.
LogitStatistics combined(std::span<const LogitStatistics> ranks, std::span<const int64_t> columns);

/// What the statistics of an all -infinity row are relative to.
double shift_of(double max);

double logit_value(DType dtype, const void* row, int64_t column);

/// out[c] = weight * (e^(x[c] - max) / exp_sum - smoothing), less `hit_weight` where c is `hit`.
struct LogitGradient {
  double max = 0;        ///< of the whole row, shifted as shift_of() says
  double exp_sum = 1;    ///< of the whole row
  double weight = 1;     ///< the gradient of this row's loss
  double smoothing = 0;  ///< the label's share of every column
  int64_t hit = -1;      ///< the label's column; -1: another rank's
  double hit_weight = 0;
};
void logit_gradient(DType dtype, const void* row, int64_t columns, const LogitGradient& gradient,
                    void* out);

}  // namespace tp_native::kernels
