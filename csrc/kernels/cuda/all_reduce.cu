// SPDX-License-Identifier: Apache-2.0
// Launches all-reduces and reduce-scatters. The protocol is in meeting.h.
#include <cuda_runtime.h>

#include "kernels/cuda/all_reduce.h"
#include "kernels/cuda/collective.cuh"
#include "kernels/cuda/rows.cuh"

namespace tp_native::kernels::cuda {
namespace {

template <class T, OpFamily kFamily, bool kHasAfter, int kBatch, int kDepth>
__global__ void __launch_bounds__(kCollectiveThreads, 2)
    one_shot(const __grid_constant__ Ranks ranks) {
  reduce_in_one_shot<T, kFamily, kHasAfter, kBatch, kDepth>(share_of_collective(), ranks,
                                                            blockIdx.y);
}

template <class T, OpFamily kFamily, bool kGathers, int kBatch, int kDepth>
__global__ void __launch_bounds__(kCollectiveThreads, 2)
    in_slices(const __grid_constant__ Ranks ranks, const __grid_constant__ Slices slices) {
  reduce_in_slices<T, kFamily, kGathers, kBatch, kDepth>(share_of_collective(), ranks, slices,
                                                         blockIdx.y);
}

template <class T, int N, bool kIsKept, int kBatch, int kDepth>
__global__ void __launch_bounds__(kCollectiveThreads, 2)
    one_shot_and_norm(const __grid_constant__ Ranks ranks) {
  extern __shared__ uint4 kept[];
  const Share share = share_of_collective();
  Party<T> party(ranks, blockIdx.y, share);
  if (party.in) {
    const Share whole{0, 1, share.thread, share.threads};
    for (int64_t row = share.block; row < ranks.rows; row += share.blocks) {
      const int64_t begin = row * ranks.columns;
      copy_flat(whole, party.in + begin, party.staging() + begin, ranks.columns);
    }
  }
  if (!party.meetings.meet()) return;
  // rows go to blocks as they did above, on every rank and for every N
  sum_rows<N, kBatch, kDepth, kIsKept>(share, party.terms, party.after, ranks.rows,
                                       reinterpret_cast<T*>(kept), party.out);
  party.leave();
}

/// How to launch: one rank on a stream, or all ranks at once.
struct Launch {
  dim3 grid;
  size_t shared_bytes = 0;
  cudaStream_t stream;

  template <class... Parameters>
  void run(void (*kernel)(Parameters...), const Parameters&... parameters) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = kCollectiveThreads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute resident{};  // a launch that cannot be resident at once fails
    resident.id = cudaLaunchAttributeCooperative;
    resident.val.cooperative = 1;
    config.attrs = &resident;
    // not for one rank: the device might not run the cooperative kernels of other ranks beside it
    config.numAttrs = grid.y > 1 ? 1 : 0;
    (void)cudaLaunchKernelEx(&config, kernel, parameters...);  // check_launch() follows
  }
};

/// Sums over few ranks of the dtypes of models have twice as many packs of each rank in flight.
template <class T, class Run>
void with_sums(int size, const Run& run) {
  if constexpr (std::is_same_v<Value<T>, float>) {
    if (size <= 4) return run.template operator()<T, OpFamily::kSums, 4, 2>();
  }
  // integers of less than 4 bytes are spread over registers as they come: fewer at once, or they
  // spill
  run.template operator()<T, OpFamily::kSums, sizeof(Value<T>) < 4 ? 4 : 8, 1>();
}

template <class T, class Run>
void with_orders(const Run& run) {
  run.template operator()<T, OpFamily::kOrders, sizeof(T) == 1 ? 2 : 4, 1>();
}

template <class T, class Run>
void with_family(ReduceOp op, int size, const Run& run) {
  if (op == ReduceOp::kMax || op == ReduceOp::kMin) return with_orders<T>(run);
  with_sums<T>(size, run);
}

/// run.template operator()<T, kFamily, kBatch, kDepth>()
template <class Run>
void with_any(DType dtype, ReduceOp op, int size, const char* what, const Run& run) {
  TPN_CHECK(op != ReduceOp::kAvg || is_floating(dtype), what, ": ", name(dtype), " has no avg");
  switch (dtype) {
    case DType::kInt32:
      return with_family<int32_t>(op, size, run);
    case DType::kInt64:
      return with_family<int64_t>(op, size, run);
    case DType::kInt16:
      return with_family<int16_t>(op, size, run);
    case DType::kUInt8:
      return with_family<uint8_t>(op, size, run);
    case DType::kInt8:  // sums have the same bits with and without a sign
      return op == ReduceOp::kSum ? with_sums<uint8_t>(size, run) : with_orders<int8_t>(run);
    case DType::kBool:  // a sum is a maximum
      return with_orders<Bool>(run);
    default:
      with_floating(dtype, what, [&](auto zero) { with_family<decltype(zero)>(op, size, run); });
  }
}

bool has_after(const AllReduce& a) { return a.bias || a.residual || a.norm_weight; }

bool has_packs(const AllReduce& a, const void* out) {
  bool all = true;
  for (const void* pointer :
       {a.in, out, a.bias, a.residual, a.norm_weight, static_cast<const void*>(a.hidden)}) {
    all = all && is_aligned(pointer);
  }
  const bool needs_rows = a.bias || a.norm_weight;
  return all &&
         (!needs_rows || a.columns % lanes_of(static_cast<int64_t>(item_bytes(a.dtype))) == 0);
}

Operand operand_of(const AllReduce& a, int64_t out_shift_bytes) {
  void* const out = static_cast<char*>(a.out) + out_shift_bytes;
  return {a.in, out, a.bias, a.residual, a.norm_weight, a.hidden, has_packs(a, out)};
}

template <class T>
void launch_norm(Launch launch, const Ranks& ranks) {
  constexpr int N = kLanes<T>;
  const int64_t row_bytes = ranks.columns * static_cast<int64_t>(sizeof(T));
  const bool is_kept = row_bytes <= kKeptRowBytes;
  if (is_kept) launch.shared_bytes = static_cast<size_t>(row_bytes);
  bool packs = true;
  for (unsigned y = 0; y < launch.grid.y; ++y) packs = packs && ranks.operands[y].has_packs;
  if (packs && is_kept && ranks.peers.size <= 4) {
    launch.run(one_shot_and_norm<T, N, true, 4, 2>, ranks);
  } else if (packs) {
    launch.run(is_kept ? one_shot_and_norm<T, N, true, 8, 1> : one_shot_and_norm<T, N, false, 8, 1>,
               ranks);
  } else {
    launch.run(is_kept ? one_shot_and_norm<T, 1, true, 8, 1> : one_shot_and_norm<T, 1, false, 8, 1>,
               ranks);
  }
}

struct OneShot {
  const Launch& launch;
  const Ranks& ranks;

  template <class T, OpFamily kFamily, int kBatch, int kDepth>
  void operator()() const {
    launch.run(one_shot<T, kFamily, false, kBatch, kDepth>, ranks);
  }
};

template <bool kGathers>
struct InSlices {
  const Launch& launch;
  const Ranks& ranks;
  const Slices& slices;

  template <class T, OpFamily kFamily, int kBatch, int kDepth>
  void operator()() const {
    launch.run(in_slices<T, kFamily, kGathers, kBatch, kDepth>, ranks, slices);
  }
};

void launch_one_shot(const Launch& launch, const Ranks& ranks, const AllReduce& a) {
  if (!has_after(a)) {
    return with_any(a.dtype, a.op, ranks.peers.size, "all_reduce", OneShot{launch, ranks});
  }
  with_floating(a.dtype, "all_reduce with an epilogue", [&](auto zero) {
    using T = decltype(zero);
    if (a.norm_weight) return launch_norm<T>(launch, ranks);
    launch.run(one_shot<T, OpFamily::kSums, true, 8, 1>, ranks);
  });
}

/// One rank, or all for `ranks` of more than one.
void launch_all_reduce(AllReduceKind kind, const Peers& peers, std::span<const AllReduce> all,
                       int first, StreamHandle stream) {
  constexpr const char* kWhat = "all_reduce";
  const AllReduce& a = all.front();
  const auto item = static_cast<int64_t>(item_bytes(a.dtype));
  const int64_t count = a.rows * a.columns;
  if (count == 0) return;
  TPN_CHECK(kind == AllReduceKind::kOneShot || (kind == AllReduceKind::kTwoShot && !has_after(a)),
            "all_reduce: expected kOneShot, or kTwoShot without an epilogue");
  TPN_CHECK(!has_after(a) || a.op == ReduceOp::kSum, "all_reduce: an epilogue follows a sum, not ",
            name(a.op));
  check_peers(peers, a.in ? staged_bytes(count * item) : 0, kWhat);
  Ranks ranks{peers, first, a.op, a.rows, a.columns, a.eps, {}};
  const Slices slices =
      kind == AllReduceKind::kTwoShot ? even_slices(count, peers.size, item) : Slices{};
  for (size_t y = 0; y < all.size(); ++y) {
    ranks.operands[y] = operand_of(all[y], slices.begin[static_cast<size_t>(first) + y] * item);
  }
  const int64_t parts = a.norm_weight                     ? a.rows
                        : kind == AllReduceKind::kTwoShot ? tiles_for(slices.length[0] * item)
                                                          : tiles_for(count * item);
  const Launch launch{dim3(blocks_for(a.blocks, parts, kWhat), static_cast<unsigned>(all.size())),
                      0, stream};
  if (kind == AllReduceKind::kOneShot) {
    launch_one_shot(launch, ranks, a);
  } else {
    with_any(a.dtype, a.op, peers.size, kWhat, InSlices<true>{launch, ranks, slices});
  }
  check_launch(kWhat);
}

}  // namespace

void all_reduce(AllReduceKind kind, const Peers& peers, const AllReduce& all_reduce,
                StreamHandle stream) {
  launch_all_reduce(kind, peers, {&all_reduce, 1}, peers.rank, stream);
}

void all_reduce_in_one_launch(AllReduceKind kind, const Peers& peers,
                              std::span<const AllReduce> ranks, StreamHandle stream) {
  TPN_CHECK(ranks.size() == static_cast<size_t>(peers.size),
            "all_reduce_in_one_launch: ", ranks.size(), " operands for ", peers.size, " ranks");
  launch_all_reduce(kind, peers, ranks, 0, stream);
}

void reduce_scatter(const Peers& peers, const ReduceScatter& scatter, StreamHandle stream) {
  constexpr const char* kWhat = "reduce_scatter";
  TPN_CHECK(scatter.counts.size() == static_cast<size_t>(peers.size),
            "reduce_scatter: ", scatter.counts.size(), " counts for ", peers.size, " ranks");
  const auto item = static_cast<int64_t>(item_bytes(scatter.dtype));
  const int64_t payload = reduce_scatter_payload(scatter.dtype, scatter.counts);
  if (payload == 0) return;
  check_peers(peers, payload, kWhat);
  const Slices slices = slices_of(scatter.counts, item);
  Ranks ranks{peers, peers.rank, scatter.op, 0, 0, 0, {}};
  ranks.operands[0].in = scatter.in;
  ranks.operands[0].out = scatter.out;
  ranks.operands[0].has_packs =
      is_aligned(scatter.out) &&
      is_aligned(static_cast<const char*>(scatter.in) + slices.begin[peers.rank] * item);
  const int64_t most = *std::ranges::max_element(scatter.counts);
  const Launch launch{dim3(blocks_for(scatter.blocks, tiles_for(most * item), kWhat)), 0, stream};
  with_any(scatter.dtype, scatter.op, peers.size, kWhat, InSlices<false>{launch, ranks, slices});
  check_launch(kWhat);
}

}  // namespace tp_native::kernels::cuda
