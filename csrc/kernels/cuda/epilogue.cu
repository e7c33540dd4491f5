// SPDX-License-Identifier: Apache-2.0
// Bias, residual and RMSNorm after a sum that others made.
#include <cuda_runtime.h>

#include "kernels/cuda.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows.cuh"

namespace tp_native::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 2;
constexpr int kBlocksPerMultiprocessor = 8;

__device__ Share share_of_block() {
  return {blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), kThreads};
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    add_terms(const T* sum, const After<T> after, const bool has_packs, const int64_t count,
              T* out) {
  sum_flat<OpFamily::kSums, true, 1, kDepth>(share_of_block(), OneTerm<T>{sum}, ReduceOp::kSum,
                                             after, has_packs, count, out);
}

template <int N, bool kIsKept, class T>
__global__ void __launch_bounds__(kThreads)
    add_terms_and_norm(const T* sum, const After<T> after, const int64_t rows, T* out) {
  extern __shared__ uint4 kept[];
  sum_rows<N, 1, kDepth, kIsKept>(share_of_block(), OneTerm<T>{sum}, after, rows,
                                  reinterpret_cast<T*>(kept), out);
}

template <int N, class T>
void launch_norm(const T* sum, const After<T>& after, int64_t rows, T* out, cudaStream_t stream) {
  const unsigned grid = grid_for(rows, 1, kBlocksPerMultiprocessor);
  const int64_t row_bytes = after.columns * static_cast<int64_t>(sizeof(T));
  if (row_bytes <= kKeptRowBytes) {
    add_terms_and_norm<N, true>
        <<<grid, kThreads, static_cast<size_t>(row_bytes), stream>>>(sum, after, rows, out);
  } else {
    add_terms_and_norm<N, false><<<grid, kThreads, 0, stream>>>(sum, after, rows, out);
  }
}

}  // namespace

void apply_epilogue(const SumEpilogue& e, StreamHandle stream) {
  if (e.rows == 0 || e.columns == 0) return;
  with_floating(e.dtype, "apply_epilogue", [&](auto zero) {
    using T = decltype(zero);
    const auto* const sum = static_cast<const T*>(e.sum);
    auto* const out = static_cast<T*>(e.out);
    const After<T> after{static_cast<const T*>(e.bias),
                         static_cast<const T*>(e.residual),
                         static_cast<const T*>(e.norm_weight),
                         static_cast<T*>(e.hidden),
                         e.columns,
                         e.eps};
    const bool needs_rows = e.bias || e.norm_weight;
    const bool packs = has_packs<T>({e.sum, e.out, e.bias, e.residual, e.norm_weight, e.hidden},
                                    {needs_rows ? e.columns : 0});
    if (!e.norm_weight) {
      const int64_t count = e.rows * e.columns;
      const int64_t parts = count / (packs ? kDepth * kLanes<T> : 1) + 1;
      add_terms<<<grid_for(parts, kThreads, kBlocksPerMultiprocessor), kThreads, 0, stream>>>(
          sum, after, packs, count, out);
    } else if (packs) {
      launch_norm<kLanes<T>>(sum, after, e.rows, out, stream);
    } else {
      launch_norm<1>(sum, after, e.rows, out, stream);
    }
  });
  check_launch("apply_epilogue");
}

}  // namespace tp_native::kernels::cuda
