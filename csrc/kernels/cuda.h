// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels: what follows a sum over ranks, gated activations, gradients of activations and
// biases, and collectives over memory that peers map. All are asynchronous on `stream`, work under
// graph capture and allocate nothing. Rows are contiguous where no stride is given; strides and
// counts are in elements. A build without nvcc has them too: they raise.
#pragma once

#include <cstdint>
#include <span>

#include "core/cuda_driver.h"
#include "core/dtype.h"
#include "kernels/activation.h"
#include "kernels/all_reduce_choice.h"

namespace tp_native::kernels::cuda {

using StreamHandle = ::tp_native::cuda::StreamHandle;

/// Whether this build has the kernels.
bool is_built();

/// What follows a sum over ranks:
///   h = sum + bias, rounded, + residual, rounded
///   out = h, or with a norm_weight h / sqrt(mean(h^2) + eps), rounded, * norm_weight, rounded
/// with the bits of kernels::reduce and kernels::reduce_rms_norm of one source. Floating dtypes.
/// out may be sum; hidden may be the residual; other overlaps are not allowed.
struct SumEpilogue {
  DType dtype = DType::kFloat32;
  const void* sum = nullptr;
  void* out = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  const void* bias = nullptr;         ///< `columns` values, or null
  const void* residual = nullptr;     ///< rows * columns values, or null
  const void* norm_weight = nullptr;  ///< `columns` values, or null
  double eps = 0;
  void* hidden = nullptr;  ///< where h goes, or null; with a norm_weight only
};

void apply_epilogue(const SumEpilogue& epilogue, StreamHandle stream);

/// out = f(gate) * up, computed in float32 (float64 in float64) and rounded once. A row of gate_up
/// is `columns` values of gate, then `columns` of up. Floating dtypes.
/// Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
struct Glu {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kSilu;
  const void* gate_up = nullptr;
  void* out = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t gate_up_stride = 0;
  int64_t out_stride = 0;
};

void glu(const Glu& glu, StreamHandle stream);

/// d_gate = d_out * up * f'(gate), d_up = d_out * f(gate), each rounded once. d_gate_up may be
/// gate_up with the same stride.
struct GluBackward {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kSilu;
  const void* d_out = nullptr;
  const void* gate_up = nullptr;
  void* d_gate_up = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t d_out_stride = 0;
  int64_t gate_up_stride = 0;
  int64_t d_gate_up_stride = 0;
};

void glu_backward(const GluBackward& glu, StreamHandle stream);

/// dx = dy * f'(x), rounded once, for the input x of the activation. dx may be dy or x. Floating
/// dtypes.
struct ActivationBackward {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kRelu;
  const void* dy = nullptr;
  const void* x = nullptr;
  void* dx = nullptr;
  int64_t count = 0;
};

void activation_backward(const ActivationBackward& backward, StreamHandle stream);

/// out[c] = sum over the rows of in[row, c], rounded once: the gradient of a bias. Added in float32
/// (float64 in float64) in an order that depends on `rows` alone. Floating dtypes.
struct ColumnSum {
  DType dtype = DType::kFloat32;
  const void* in = nullptr;
  void* out = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t stride = 0;
  void* workspace = nullptr;  ///< column_sum_workspace_bytes(), 16-byte aligned
};

/// Rows that are added before their sums are: 64 parts at the most, of 128 rows or more.
constexpr int64_t column_sum_part_rows(int64_t rows) {
  return rows > 64 * 128 ? (rows + 63) / 64 : 128;
}
/// 0 where there is one part.
constexpr int64_t column_sum_workspace_bytes(DType dtype, int64_t rows, int64_t columns) {
  const int64_t part_rows = column_sum_part_rows(rows);
  const int64_t width = dtype == DType::kFloat64 ? 8 : 4;
  return rows <= part_rows ? 0 : (rows + part_rows - 1) / part_rows * columns * width;
}
void column_sum(const ColumnSum& sum, StreamHandle stream);

constexpr int kMaxRanks = 16;
constexpr int kMaxBlocks = 256;  ///< of one rank in one collective

/// The memory through which the ranks of a group meet, as this rank's device reaches it.
/// Collectives over the same flags run one after another on every rank, in the same order, with the
/// same counts and blocks, and all with a norm or none; nothing else writes there. After an abort
/// neither flags nor outputs mean anything.
struct Peers {
  /// Rank r's staging: two buffers of buffer_bytes, 16-byte aligned.
  void* data[kMaxRanks] = {};
  /// Rank r's flag_bytes(), all zero before the first collective of any rank.
  uint32_t* flags[kMaxRanks] = {};
  int rank = 0;
  int size = 1;
  int64_t buffer_bytes = 0;  ///< a multiple of 16, equal on all ranks
  /// A word that this device reads and the host may set (pinned host memory, say): anything but 0
  /// ends every wait, and the kernel.
  const uint32_t* abort = nullptr;
};

constexpr int64_t flag_bytes() { return int64_t{4} * kMaxBlocks * (kMaxRanks + 2); }

/// What a payload takes of a buffer: a collective needs buffer_bytes of at least as much. Longer
/// messages are the caller's to cut: alike on all ranks, and between rows where a norm follows.
constexpr int64_t staged_bytes(int64_t payload_bytes) { return (payload_bytes + 15) / 16 * 16; }
/// What to allocate for buffers that hold such payloads.
constexpr int64_t staging_bytes(int64_t payload_bytes) { return 2 * staged_bytes(payload_bytes); }
/// The payload of a reduce_scatter: every slice begins at a multiple of 16 bytes.
constexpr int64_t reduce_scatter_payload(DType dtype, std::span<const int64_t> counts) {
  int64_t bytes = 0;
  for (const int64_t n : counts) bytes += staged_bytes(n * static_cast<int64_t>(item_bytes(dtype)));
  return bytes;
}

/// The op over all ranks' `in`, ascending, element by element, then as SumEpilogue; the bits of
/// kernels::reduce and kernels::reduce_rms_norm on every rank. Any dtype; what follows the op needs
/// a floating one, kSum and kOneShot. out may be in.
struct AllReduce {
  DType dtype = DType::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  /// Null on all ranks: the operands lie in Peers::data already, and stay until every rank has read
  /// them. kOneShot leaves them alone and out must be elsewhere; kTwoShot writes results over this
  /// rank's slice, and out may be the operand.
  const void* in = nullptr;
  void* out = nullptr;
  int64_t rows = 1;
  int64_t columns = 0;         ///< rows * columns elements in all
  const void* bias = nullptr;  ///< as in SumEpilogue, down to hidden
  const void* residual = nullptr;
  const void* norm_weight = nullptr;
  double eps = 0;
  void* hidden = nullptr;
  /// Thread blocks, equal on all ranks; 0: a default that grows with the payload, up to 48. All
  /// blocks of all ranks on one device must be resident at once, two to a multiprocessor: they wait
  /// for each other. Ranks of one process load kernels before (CUDA_MODULE_LOADING=EAGER): a first
  /// launch may wait for what runs.
  int blocks = 0;
};

/// `kind`: kOneShot or kTwoShot.
void all_reduce(AllReduceKind kind, const Peers& peers, const AllReduce& all_reduce,
                StreamHandle stream);

/// All ranks in one launch on one device, ranks[r] for rank r: for tools that let one kernel run at
/// a time (compute-sanitizer, ncu). peers.rank is not read. Raises if the device cannot hold all
/// blocks at once.
void all_reduce_in_one_launch(AllReduceKind kind, const Peers& peers,
                              std::span<const AllReduce> ranks, StreamHandle stream);

/// out = this rank's slice of the op over all ranks' `in`, with the bits of kernels::reduce.
struct ReduceScatter {
  DType dtype = DType::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  const void* in = nullptr;  ///< counts[0] elements for rank 0, then counts[1] for rank 1, ...
  void* out = nullptr;       ///< counts[rank] elements; may be this rank's slice of `in`
  std::span<const int64_t> counts;
  int blocks = 0;  ///< as in AllReduce
};

void reduce_scatter(const Peers& peers, const ReduceScatter& scatter, StreamHandle stream);

/// out = all ranks' `in`, bytes[r] of rank r, in their order. `in` may lie at its place in out.
struct AllGather {
  const void* in = nullptr;
  void* out = nullptr;
  std::span<const int64_t> bytes;
  int blocks = 0;  ///< as in AllReduce
};

void all_gather(const Peers& peers, const AllGather& gather, StreamHandle stream);

/// out = the root's `in`; at the root out may be in.
struct Broadcast {
  const void* in = nullptr;  ///< read at the root only
  void* out = nullptr;
  int64_t bytes = 0;
  int root = 0;
  int blocks = 0;  ///< as in AllReduce
};

void broadcast(const Peers& peers, const Broadcast& broadcast, StreamHandle stream);

}  // namespace tp_native::kernels::cuda
