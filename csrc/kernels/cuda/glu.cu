// SPDX-License-Identifier: Apache-2.0
// Gated activations and their gradients: bound by memory, so every thread keeps the packs of
// kDepth places in flight.
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

template <class T>
struct Forward {
  const T* gate_up;
  T* out;
  int64_t columns;
  int64_t gate_up_stride;
  int64_t out_stride;

  template <int N>
  struct Terms {
    Pack<T, N> gate, up;
  };

  template <int N>
  __device__ Terms<N> fetch(const RowCursor& at) const {
    const T* const gate = gate_up + at.row * gate_up_stride + at.column * N;
    return {load<N>(gate), load<N>(gate + columns)};
  }

  template <Activation kActivation, int N>
  __device__ void finish(const RowCursor& at, const Terms<N>& terms) const {
    const Wide<T, N> gate = widen(terms.gate);
    const Wide<T, N> up = widen(terms.up);
    Wide<T, N> result;
    TPN_UNROLL
    for (int k = 0; k < N; ++k) {
      result.lane[k] = activated<kActivation, T>(gate.lane[k]).value * up.lane[k];
    }
    store(out + at.row * out_stride + at.column * N, narrowed(result));
  }
};

template <class T>
struct Backward {
  const T* d_out;
  const T* gate_up;
  T* d_gate_up;
  int64_t columns;
  int64_t d_out_stride;
  int64_t gate_up_stride;
  int64_t d_gate_up_stride;

  template <int N>
  struct Terms {
    Pack<T, N> dy, gate, up;
  };

  template <int N>
  __device__ Terms<N> fetch(const RowCursor& at) const {
    const T* const gate = gate_up + at.row * gate_up_stride + at.column * N;
    return {load<N>(d_out + at.row * d_out_stride + at.column * N), load<N>(gate),
            load<N>(gate + columns)};
  }

  template <Activation kActivation, int N>
  __device__ void finish(const RowCursor& at, const Terms<N>& terms) const {
    const Wide<T, N> gate = widen(terms.gate);
    const Wide<T, N> up = widen(terms.up);
    const Wide<T, N> dy = widen(terms.dy);
    Wide<T, N> d_gate;
    Wide<T, N> d_up;
    TPN_UNROLL
    for (int k = 0; k < N; ++k) {
      const auto f = activated<kActivation, T>(gate.lane[k]);
      d_gate.lane[k] = through<kActivation, T>(dy.lane[k] * up.lane[k], f.slope);
      d_up.lane[k] = dy.lane[k] * f.value;
    }
    T* const to = d_gate_up + at.row * d_gate_up_stride + at.column * N;
    store(to, narrowed(d_gate));
    store(to + columns, narrowed(d_up));
  }
};

template <Activation kActivation, int N, class Pass>
__global__ void __launch_bounds__(kThreads)
    gated(const Pass pass, const int64_t packs_per_row, const int64_t packs) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const RowCursor step = RowCursor::at(kDepth * stride, packs_per_row);
  int64_t pack = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  RowCursor at[kDepth];
  TPN_UNROLL
  for (int u = 0; u < kDepth; ++u) at[u] = RowCursor::at(pack + u * stride, packs_per_row);
  for (; pack < packs; pack += kDepth * stride) {
    typename Pass::template Terms<N> terms[kDepth];
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      if (pack + u * stride < packs) terms[u] = pass.template fetch<N>(at[u]);
    }
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      if (pack + u * stride < packs) pass.template finish<kActivation>(at[u], terms[u]);
      at[u].advance(step, packs_per_row);
    }
  }
}

template <int N, class Pass>
void launch(Activation activation, const Pass& pass, int64_t rows, cudaStream_t stream) {
  const int64_t packs_per_row = pass.columns / N;
  const int64_t packs = rows * packs_per_row;
  const unsigned grid = grid_for((packs + kDepth - 1) / kDepth, kThreads, kBlocksPerMultiprocessor);
  with_activation(activation, [&](auto chosen) {
    gated<chosen(), N><<<grid, kThreads, 0, stream>>>(pass, packs_per_row, packs);
  });
}

}  // namespace

void glu(const Glu& g, StreamHandle stream) {
  if (g.rows == 0 || g.columns == 0) return;
  with_floating(g.dtype, "glu", [&](auto zero) {
    using T = decltype(zero);
    const Forward<T> pass{static_cast<const T*>(g.gate_up), static_cast<T*>(g.out), g.columns,
                          g.gate_up_stride, g.out_stride};
    if (has_packs<T>({g.gate_up, g.out}, {g.columns, g.gate_up_stride, g.out_stride})) {
      launch<kLanes<T>>(g.activation, pass, g.rows, stream);
    } else {
      launch<1>(g.activation, pass, g.rows, stream);
    }
  });
  check_launch("glu");
}

void glu_backward(const GluBackward& g, StreamHandle stream) {
  if (g.rows == 0 || g.columns == 0) return;
  with_floating(g.dtype, "glu_backward", [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> pass{static_cast<const T*>(g.d_out),
                           static_cast<const T*>(g.gate_up),
                           static_cast<T*>(g.d_gate_up),
                           g.columns,
                           g.d_out_stride,
                           g.gate_up_stride,
                           g.d_gate_up_stride};
    if (has_packs<T>({g.d_out, g.gate_up, g.d_gate_up},
                     {g.columns, g.d_out_stride, g.gate_up_stride, g.d_gate_up_stride})) {
      launch<kLanes<T>>(g.activation, pass, g.rows, stream);
    } else {
      launch<1>(g.activation, pass, g.rows, stream);
    }
  });
  check_launch("glu_backward");
}

}  // namespace tp_native::kernels::cuda
