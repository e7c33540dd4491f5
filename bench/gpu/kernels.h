// SPDX-License-Identifier: Apache-2.0
// What the GPU benchmarks launch besides the product's own kernels: stand-ins for what they are
// compared with, random data, checks of results on the device, graphs. All of bf16, on a stream.
#pragma once

#include <cstdint>
#include <functional>

#include "core/cuda_driver.h"
#include "kernels/cuda.h"
#include "kernels/gemm.h"

namespace tp_native::bench::gpu {

using cuda::StreamHandle;

/// Uniform in [-scale, scale); the same for the same seed.
void fill(void* to, int64_t count, float scale, uint32_t seed, StreamHandle stream);

/// As a collective of a library moves data: so many thread blocks, the other multiprocessors left
/// alone. Pointers and `bytes` are multiples of 16.
void copy_in_blocks(void* to, const void* from, int64_t bytes, int blocks, StreamHandle stream);

/// y = gelu_tanh(y + bias) in place: the pass that a fused epilogue saves. `columns` is a multiple
/// of 8.
void bias_gelu(void* y, const void* bias, int64_t rows, int64_t columns, StreamHandle stream);

void empty(StreamHandle stream);
/// Keeps the stream busy, so that the host gets ahead of it.
void hold(int microseconds, StreamHandle stream);

/// All ranks' blocks in one launch, meeting as a collective's do, and nothing else.
void meet_in_one_launch(const kernels::cuda::Peers& peers, int blocks, int meetings,
                        StreamHandle stream);

/// Each adds to `wrong`, a word that device and host reach.
///
/// `samples` values of C that differ from the product in float64 by more than its roundings; A as
/// it is, B transposed, epilogues kNone, kBias and kGeluTanhBias. `passes`: how often C was rounded
/// on its way.
void count_wrong_products(const kernels::Gemm& product, kernels::GemmEpilogue epilogue, int passes,
                          int samples, uint32_t* wrong, StreamHandle stream);
/// out[i] that are not the sum of the ranks' in[i], ascending in float32 and rounded once.
void count_wrong_sums(const void* const* in, int ranks, const void* out, int64_t count,
                      uint32_t* wrong, StreamHandle stream);
/// out = silu(gate) * up, values that are off by more than a rounding.
void count_wrong_swiglu(const void* gate_up, const void* out, int64_t rows, int64_t columns,
                        uint32_t* wrong, StreamHandle stream);
/// Words of 4 bytes that differ.
void count_different(const void* a, const void* b, int64_t bytes, uint32_t* wrong,
                     StreamHandle stream);

/// What `body` launches on `stream`, as one graph.
class Graph {
 public:
  Graph(StreamHandle stream, const std::function<void()>& body);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(StreamHandle stream) const;

 private:
  void* graph_ = nullptr;
  void* executable_ = nullptr;
};

}  // namespace tp_native::bench::gpu
