// SPDX-License-Identifier: Apache-2.0
// One block's rows, from the terms of the sum to the normalised result.
#pragma once

#include "kernels/cuda/rows.h"

namespace tp_native::kernels::cuda {

/// The scale of a row, in all threads: one warp adds the squares, lane k partial sum k.
template <class T>
__device__ Value<T> scale_of_row(const T* h, int64_t columns, double eps) {
  using V = Value<T>;
  static_assert(kPartialSums == 32, "a lane for each");
  __shared__ V scale;
  sync_block();  // h is whole, and nobody still reads the last row's scale
  if (threadIdx.x < kPartialSums) {
    V sum = sum_of_squares(h, columns, static_cast<int>(threadIdx.x));
    for (int half = kPartialSums / 2; half > 0; half /= 2) {
      sum += __shfl_down_sync(0xffffffffu, sum, static_cast<unsigned>(half));
    }
    if (threadIdx.x == 0) scale = inverse_rms(sum, columns, eps);
  }
  sync_block();
  return scale;
}

/// Rows share.block, share.block + share.blocks, ... with all that follows the sum. kIsKept: `kept`
/// is shared memory for a row. A thread reads again what it wrote itself, but for the squares.
template <int N, int kBatch, int kDepth, bool kIsKept, class T, class Terms>
__device__ void sum_rows(const Share& share, const Terms& terms, const After<T>& after,
                         int64_t rows, T* kept, T* out) {
  const auto mine = Columns<N>::of(share.thread, share.threads);
  for (int64_t r = share.block; r < rows; r += share.blocks) {
    const auto row = Row<T>::at(r, after, out, kIsKept ? kept : nullptr);
    sum_row<N, kBatch, kDepth, kIsKept>(mine, terms, after, row);
    const T* const h = kIsKept ? kept : row.h;  // in shared memory, the compiler sees
    normalise_row<N, kIsKept>(mine, after, row, scale_of_row(h, after.columns, after.eps));
  }
}

}  // namespace tp_native::kernels::cuda
