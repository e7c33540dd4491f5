// SPDX-License-Identifier: Apache-2.0
// Gradients through activations and of biases, where no GEMM epilogue computes them.
#include <cuda_runtime.h>

#include "kernels/cuda.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/slices.h"

namespace tp_native::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 2;
constexpr int kBlocksPerMultiprocessor = 8;

template <Activation kActivation, int N, class T>
__device__ void through_activation(const Pack<T, N>& dy, const Pack<T, N>& x, T* dx) {
  const Wide<T, N> slope_at = widen(x);
  Wide<T, N> d = widen(dy);
  TPN_UNROLL
  for (int k = 0; k < N; ++k) {
    d.lane[k] =
        through<kActivation, T>(d.lane[k], activated<kActivation, T>(slope_at.lane[k]).slope);
  }
  store(dx, narrowed(d));
}

template <Activation kActivation, class T>
__global__ void __launch_bounds__(kThreads)
    backward(const T* dy, const T* x, T* dx, const bool has_packs, const int64_t count) {
  constexpr int N = kLanes<T>;
  const Share share{blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), kThreads};
  const int64_t packs = has_packs ? count / N : 0;
  const int64_t stride = share.stride();
  for (int64_t pack = share.first_pack(); pack < packs; pack += kDepth * stride) {
    Pack<T, N> gradient[kDepth];
    Pack<T, N> input[kDepth];
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      if (pack + u * stride < packs) {
        gradient[u] = load<N>(dy + (pack + u * stride) * N);
        input[u] = load<N>(x + (pack + u * stride) * N);
      }
    }
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      if (pack + u * stride < packs) {
        through_activation<kActivation>(gradient[u], input[u], dx + (pack + u * stride) * N);
      }
    }
  }
  share.rest(packs * N, count, N, [&](int64_t i) {
    through_activation<kActivation>(load<1>(dy + i), load<1>(x + i), dx + i);
  });
}

template <Activation kActivation, class T>
void launch_backward(const ActivationBackward& b, cudaStream_t stream) {
  const bool packs = has_packs<T>({b.dy, b.x, b.dx}, {});
  const int64_t parts = b.count / (packs ? kDepth * kLanes<T> : 1) + 1;
  backward<kActivation>
      <<<grid_for(parts, kThreads, kBlocksPerMultiprocessor), kThreads, 0, stream>>>(
          static_cast<const T*>(b.dy), static_cast<const T*>(b.x), static_cast<T*>(b.dx), packs,
          b.count);
}

constexpr int kSumColumns = 32;  ///< threads side by side in a row
constexpr int kSumRows = 8;      ///< threads below each other

/// The sums of rows blockIdx.y * part_rows and on; of columns blockIdx.x * kSumColumns * N and on.
/// Thread row y adds rows y, y + kSumRows, ... of the part; the thread rows are then added in
/// order.
template <int N, class T, class Out>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    sum_part(const T* in, const int64_t rows, const int64_t columns, const int64_t stride,
             const int64_t part_rows, Out* out) {
  using V = Value<T>;
  __shared__ V sums[kSumRows][kSumColumns * N];
  const int64_t first_column = int64_t{blockIdx.x} * kSumColumns * N;
  const int64_t column = first_column + int64_t{threadIdx.x} * N;
  const int64_t begin = int64_t{blockIdx.y} * part_rows;
  const int64_t end = begin + part_rows < rows ? begin + part_rows : rows;
  Wide<T, N> sum{};
  if (column < columns) {
    TPN_UNROLL_BY(4)
    for (int64_t row = begin + threadIdx.y; row < end; row += kSumRows) {
      join<OpFamily::kSums>(ReduceOp::kSum, sum, load<N>(in + row * stride + column));
    }
  }
  TPN_UNROLL
  for (int k = 0; k < N; ++k) sums[threadIdx.y][threadIdx.x * N + k] = sum.lane[k];
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.y) * kSumColumns + static_cast<int>(threadIdx.x);
  if (thread >= kSumColumns * N || first_column + thread >= columns) return;
  V total = sums[0][thread];
  TPN_UNROLL
  for (int y = 1; y < kSumRows; ++y) total += sums[y][thread];
  out[int64_t{blockIdx.y} * columns + first_column + thread] = narrowed<Out>(total);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_parts(const Value<T>* sums, const int64_t parts, const int64_t columns, T* out) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= columns) return;
  Value<T> total = sums[column];
  TPN_UNROLL_BY(8)
  for (int64_t part = 1; part < parts; ++part) total += sums[part * columns + column];
  out[column] = narrowed<T>(total);
}

template <int N, class T>
void launch_sum(const ColumnSum& s, cudaStream_t stream) {
  using V = Value<T>;
  static_assert(kSumRows >= N, "one thread for each column of a block");
  const int64_t part_rows = column_sum_part_rows(s.rows);
  const int64_t parts = std::max<int64_t>(1, (s.rows + part_rows - 1) / part_rows);
  const dim3 grid(static_cast<unsigned>((s.columns + kSumColumns * N - 1) / (kSumColumns * N)),
                  static_cast<unsigned>(parts));
  const dim3 block(kSumColumns, kSumRows);
  const auto* const in = static_cast<const T*>(s.in);
  auto* const out = static_cast<T*>(s.out);
  auto* const sums = static_cast<V*>(s.workspace);
  if (parts == 1) {
    sum_part<N><<<grid, block, 0, stream>>>(in, s.rows, s.columns, s.stride, part_rows, out);
    return;
  }
  sum_part<N><<<grid, block, 0, stream>>>(in, s.rows, s.columns, s.stride, part_rows, sums);
  const auto blocks = static_cast<unsigned>((s.columns + kThreads - 1) / kThreads);
  sum_parts<T><<<blocks, kThreads, 0, stream>>>(sums, parts, s.columns, out);
}

}  // namespace

void activation_backward(const ActivationBackward& b, StreamHandle stream) {
  if (b.count == 0) return;
  with_floating(b.dtype, "activation_backward", [&](auto zero) {
    using T = decltype(zero);
    with_activation(b.activation, [&](auto chosen) { launch_backward<chosen(), T>(b, stream); });
  });
  check_launch("activation_backward");
}

void column_sum(const ColumnSum& s, StreamHandle stream) {
  if (s.columns == 0) return;
  with_floating(s.dtype, "column_sum", [&](auto zero) {
    using T = decltype(zero);
    if (has_packs<T>({s.in}, {s.columns, s.stride})) {
      launch_sum<kLanes<T>, T>(s, stream);
    } else {
      launch_sum<1, T>(s, stream);
    }
  });
  check_launch("column_sum");
}

}  // namespace tp_native::kernels::cuda
