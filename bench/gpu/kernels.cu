// SPDX-License-Identifier: Apache-2.0
#include "gpu/kernels.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/activation.h"
#include "kernels/cuda/collective.cuh"
#include "kernels/cuda/meeting.h"

namespace tp_native::bench::gpu {
namespace {

using Bf16 = __nv_bfloat16;
using kernels::Activation;
using kernels::BFloat16;

constexpr int kThreads = 256;
constexpr int kPack = 8;  // values in 16 bytes

void check(cudaError_t error, const char* what) {
  TPN_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorName(error), ": ",
            cudaGetErrorString(error));
}
void check_launch(const char* what) { check(cudaGetLastError(), what); }

unsigned grid_of(int64_t threads) {
  constexpr int64_t kMost = 132 * 16;
  return static_cast<unsigned>(
      std::max<int64_t>(1, std::min(kMost, (threads + kThreads - 1) / kThreads)));
}

__device__ int64_t first_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ int64_t all_threads() { return int64_t{gridDim.x} * blockDim.x; }

/// MurmurHash3's finaliser.
__device__ uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

__global__ void fill_kernel(Bf16* to, int64_t count, float scale, uint32_t seed) {
  for (int64_t i = first_thread(); i < count; i += all_threads()) {
    const uint32_t bits = mixed(static_cast<uint32_t>(i) + 0x9e3779b9u * seed);
    to[i] = __float2bfloat16_rn(scale * (static_cast<float>(bits >> 8) * 0x1p-23f - 1.0f));
  }
}

__global__ void __launch_bounds__(512) copy_kernel(uint4* to, const uint4* from, int64_t packs) {
  constexpr int kDepth = 8;
  for (int64_t first = first_thread(); first < packs; first += kDepth * all_threads()) {
    uint4 x[kDepth];
#pragma unroll
    for (int u = 0; u < kDepth; ++u)
      if (first + u * all_threads() < packs) x[u] = from[first + u * all_threads()];
#pragma unroll
    for (int u = 0; u < kDepth; ++u)
      if (first + u * all_threads() < packs) to[first + u * all_threads()] = x[u];
  }
}

__device__ float gelu(float x) {
  return kernels::activated<Activation::kGeluTanh, BFloat16>(x).value;
}

/// A block has one part of the columns, whose bias stays in registers, and every gridDim.y-th row.
__global__ void __launch_bounds__(kThreads)
    bias_gelu_kernel(uint4* y, const uint4* bias, int64_t rows, int64_t packs) {
  const int64_t column = first_thread();
  if (column >= packs) return;
  const uint4 added = bias[column];
  const auto* const b = reinterpret_cast<const __nv_bfloat162*>(&added);
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    uint4 pack = y[row * packs + column];
    auto* const values = reinterpret_cast<__nv_bfloat162*>(&pack);
#pragma unroll
    for (int i = 0; i < kPack / 2; ++i) {
      const float2 v = __bfloat1622float2(values[i]);
      const float2 w = __bfloat1622float2(b[i]);
      values[i] = __floats2bfloat162_rn(gelu(v.x + w.x), gelu(v.y + w.y));
    }
    y[row * packs + column] = pack;
  }
}

__global__ void empty_kernel() {}

__global__ void hold_kernel(uint64_t nanoseconds) {
  const auto now = [] {
    uint64_t ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
  };
  const uint64_t start = now();
  while (now() - start < nanoseconds) __nanosleep(1000);
}

__global__ void __launch_bounds__(kernels::cuda::kCollectiveThreads, 2)
    meet_kernel(const __grid_constant__ kernels::cuda::Peers peers, int count) {
  kernels::cuda::Meetings meetings(peers, static_cast<int>(blockIdx.y),
                                   kernels::cuda::share_of_collective());
  for (int i = 0; i < count; ++i)
    if (!meetings.meet()) return;
  meetings.finish();
}

struct Product {
  const Bf16 *a, *b, *bias, *c;
  int64_t m, n, k, lda, ldb, ldc;
  bool has_gelu;
  int passes;
};

__device__ double gelu_exactly(double x) {
  constexpr double kRoot = 0.79788456080286535588;  // sqrt(2 / pi)
  return 0.5 * x * (1 + tanh(kRoot * (x + 0.044715 * x * x * x)));
}

/// One block for one value of C.
__global__ void __launch_bounds__(kThreads) check_products(Product p, uint32_t* wrong) {
  __shared__ double sums[kThreads], sizes[kThreads];
  const int64_t i = mixed(2 * blockIdx.x + 1) % p.m;
  const int64_t j = mixed(2 * blockIdx.x + 2) % p.n;
  double sum = 0;
  double size = 0;
  for (int64_t l = threadIdx.x; l < p.k; l += kThreads) {
    const double term = static_cast<double>(__bfloat162float(p.a[i * p.lda + l])) *
                        static_cast<double>(__bfloat162float(p.b[j * p.ldb + l]));
    sum += term;
    size += fabs(term);
  }
  sums[threadIdx.x] = sum;
  sizes[threadIdx.x] = size;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
      sizes[threadIdx.x] += sizes[threadIdx.x + half];
    }
  }
  if (threadIdx.x != 0) return;
  const double x = sums[0] + (p.bias ? static_cast<double>(__bfloat162float(p.bias[j])) : 0);
  const double expected = p.has_gelu ? gelu_exactly(x) : x;
  const double of_sum = 0x1p-23 * static_cast<double>(p.k + 8) * sizes[0];
  // the tanh of the hardware is good to 2^-11; GELU's slope is below 1.13
  const double limit = 1.13 * of_sum + 1.01 * 0x1p-8 * fabs(expected) +
                       (p.passes - 1) * 1.13 * 0x1p-8 * fabs(sums[0]) +
                       (p.has_gelu ? 1e-3 * (1 + fabs(x)) : 0);
  const double got = static_cast<double>(__bfloat162float(p.c[i * p.ldc + j]));
  if (!(fabs(got - expected) <= limit)) atomicAdd_system(wrong, 1);
}

struct Terms {
  const Bf16* of[kernels::cuda::kMaxRanks];
};

__global__ void check_sums(const __grid_constant__ Terms in, int ranks, const Bf16* out,
                           int64_t count, uint32_t* wrong) {
  for (int64_t i = first_thread(); i < count; i += all_threads()) {
    float sum = __bfloat162float(in.of[0][i]);
    for (int r = 1; r < ranks; ++r) sum += __bfloat162float(in.of[r][i]);
    if (__bfloat16_as_ushort(__float2bfloat16_rn(sum)) != __bfloat16_as_ushort(out[i]))
      atomicAdd_system(wrong, 1);
  }
}

__global__ void check_swiglu(const Bf16* gate_up, const Bf16* out, int64_t rows, int64_t columns,
                             uint32_t* wrong) {
  for (int64_t i = first_thread(); i < rows * columns; i += all_threads()) {
    const int64_t row = i / columns;
    const double gate = __bfloat162float(gate_up[row * 2 * columns + i % columns]);
    const double up = __bfloat162float(gate_up[(row * 2 + 1) * columns + i % columns]);
    const double expected = gate / (1 + exp(-gate)) * up;
    const double got = __bfloat162float(out[i]);
    if (!(fabs(got - expected) <= 1.01 * 0x1p-8 * fabs(expected) + 1e-6))
      atomicAdd_system(wrong, 1);
  }
}

__global__ void check_equal(const uint32_t* a, const uint32_t* b, int64_t words, uint32_t* wrong) {
  for (int64_t i = first_thread(); i < words; i += all_threads())
    if (a[i] != b[i]) atomicAdd_system(wrong, 1);
}

const Bf16* bf16(const void* p) { return static_cast<const Bf16*>(p); }

}  // namespace

void fill(void* to, int64_t count, float scale, uint32_t seed, StreamHandle stream) {
  fill_kernel<<<grid_of(count), kThreads, 0, stream>>>(static_cast<Bf16*>(to), count, scale, seed);
  check_launch("fill");
}

void copy_in_blocks(void* to, const void* from, int64_t bytes, int blocks, StreamHandle stream) {
  copy_kernel<<<static_cast<unsigned>(blocks), 512, 0, stream>>>(
      static_cast<uint4*>(to), static_cast<const uint4*>(from), bytes / 16);
  check_launch("copy_in_blocks");
}

void bias_gelu(void* y, const void* bias, int64_t rows, int64_t columns, StreamHandle stream) {
  TPN_CHECK(columns % kPack == 0, columns, " columns, expected a multiple of ", kPack);
  const int64_t packs = columns / kPack;
  const int64_t across = (packs + kThreads - 1) / kThreads;
  const int64_t down = std::min<int64_t>(rows, std::max<int64_t>(1, 132 * 8 / across));
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  bias_gelu_kernel<<<grid, kThreads, 0, stream>>>(static_cast<uint4*>(y),
                                                  static_cast<const uint4*>(bias), rows, packs);
  check_launch("bias_gelu");
}

void empty(StreamHandle stream) {
  empty_kernel<<<1, 32, 0, stream>>>();
  check_launch("empty");
}

void hold(int microseconds, StreamHandle stream) {
  hold_kernel<<<1, 1, 0, stream>>>(uint64_t{1000} * static_cast<uint64_t>(microseconds));
  check_launch("hold");
}

void meet_in_one_launch(const kernels::cuda::Peers& peers, int blocks, int meetings,
                        StreamHandle stream) {
  cudaLaunchAttribute resident{};
  resident.id = cudaLaunchAttributeCooperative;
  resident.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(peers.size));
  config.blockDim = kernels::cuda::kCollectiveThreads;
  config.stream = stream;
  config.attrs = &resident;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, meet_kernel, peers, meetings), "meet_in_one_launch");
}

void count_wrong_products(const kernels::Gemm& g, kernels::GemmEpilogue epilogue, int passes,
                          int samples, uint32_t* wrong, StreamHandle stream) {
  using kernels::GemmEpilogue;
  TPN_CHECK(g.dtype == DType::kBFloat16 && !g.a.is_transposed && g.b.is_transposed,
            "only products as a linear layer has them are checked");
  const Product p{bf16(g.a.data),
                  bf16(g.b.data),
                  epilogue == GemmEpilogue::kNone ? nullptr : bf16(g.bias),
                  bf16(g.c),
                  g.m,
                  g.n,
                  g.k,
                  g.a.ld,
                  g.b.ld,
                  g.ldc,
                  epilogue == GemmEpilogue::kGeluTanhBias,
                  passes};
  check_products<<<static_cast<unsigned>(samples), kThreads, 0, stream>>>(p, wrong);
  check_launch("count_wrong_products");
}

void count_wrong_sums(const void* const* in, int ranks, const void* out, int64_t count,
                      uint32_t* wrong, StreamHandle stream) {
  Terms terms{};
  for (int r = 0; r < ranks; ++r) terms.of[r] = bf16(in[r]);
  check_sums<<<grid_of(count), kThreads, 0, stream>>>(terms, ranks, bf16(out), count, wrong);
  check_launch("count_wrong_sums");
}

void count_wrong_swiglu(const void* gate_up, const void* out, int64_t rows, int64_t columns,
                        uint32_t* wrong, StreamHandle stream) {
  check_swiglu<<<grid_of(rows * columns), kThreads, 0, stream>>>(bf16(gate_up), bf16(out), rows,
                                                                 columns, wrong);
  check_launch("count_wrong_swiglu");
}

void count_different(const void* a, const void* b, int64_t bytes, uint32_t* wrong,
                     StreamHandle stream) {
  check_equal<<<grid_of(bytes / 4), kThreads, 0, stream>>>(
      static_cast<const uint32_t*>(a), static_cast<const uint32_t*>(b), bytes / 4, wrong);
  check_launch("count_different");
}

Graph::Graph(StreamHandle stream, const std::function<void()>& body) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "beginning a graph");
  try {
    body();
  } catch (...) {
    (void)cudaStreamEndCapture(stream, &graph);
    if (graph) (void)cudaGraphDestroy(graph);
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "ending a graph");
  graph_ = graph;
  check(cudaGraphInstantiate(&executable, graph, 0), "making a graph");
  executable_ = executable;
}

Graph::~Graph() {
  if (executable_) (void)cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_));
  if (graph_) (void)cudaGraphDestroy(static_cast<cudaGraph_t>(graph_));
}

void Graph::launch(StreamHandle stream) const {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), stream), "launching a graph");
}

}  // namespace tp_native::bench::gpu
