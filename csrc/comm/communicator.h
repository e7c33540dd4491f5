// SPDX-License-Identifier: Apache-2.0
// What a collective is, whatever carries it. Backends (shm, local, nccl) are files behind this
// interface; nothing of theirs is visible outside comm/.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"

namespace tp_native::comm {

/// The operation that a fingerprint and an error message name.
enum class OpCode : uint8_t {
  kBarrier,
  kAllReduce,
  kAllGather,
  kReduceScatter,
  kBroadcast,
  kCopyToRanks,
  kRowParallelLinear,
  kColumnParallelLinear,
  kVocabParallelEmbedding,
  kGather,
  kScatter,
  kRowParallelLinearAddRmsNorm,
  kInit,
  kVocabParallelCrossEntropy,
  kEmptyShared,
  kRowParallelLinearScatter,
  kGatheredColumnParallelLinear,
};
const char* name(OpCode op);

/// What every rank must agree on before a byte moves. `shape` is the global one, equal on all
/// ranks.
struct Signature {
  OpCode op = OpCode::kBarrier;
  DType dtype = DType::kUInt8;
  ReduceOp reduce = ReduceOp::kSum;
  int root = -1;
  int dim = -1;
  std::span<const int64_t> shape = {};
  std::span<const int64_t> sizes =
      {};  ///< how `dim` is cut, one size per rank; empty where nothing is cut
  /// The collective that this one is a step of, or null: it is compared too, and it is what
  /// messages name.
  const Signature* whole = nullptr;
};

/// Joins the reduction; all values are of the signature's dtype and the same on all ranks.
/// out = sum + bias + residual; with `norm_weight` that goes to `hidden`, and
/// out = hidden / sqrt(mean(hidden^2) + eps) * norm_weight, row by row.
struct Epilogue {
  const void* bias = nullptr;         ///< `columns` values, added once to each row
  int64_t columns = 0;                ///< width of a row; 0 where nothing here needs rows
  const void* residual = nullptr;     ///< as many values as `out`
  const void* norm_weight = nullptr;  ///< `columns` values
  double eps = 0;
  void* hidden = nullptr;  ///< as many values as `out`; where norm_weight is given
};

/// The device's stream; null on a CPU.
struct Stream {
  void* handle = nullptr;
};

/// Memory that collectives need not copy. Plain memory to its owner; it outlives the communicator.
struct Block {
  void* data = nullptr;         ///< null: exhausted, use ordinary memory
  std::shared_ptr<void> owner;  ///< gives the block back
};

struct Stats {
  uint64_t collectives = 0;
  uint64_t bytes = 0;   ///< payload of this rank, summed over collectives
  uint64_t staged = 0;  ///< collectives that copied through staging
  int64_t arena_bytes_in_use = 0;
  int64_t arena_bytes_peak = 0;
  /// Blocks of allocate() that NCCL knows as a symmetric window, as a buffer, or not at all.
  int64_t windows = 0;
  int64_t registered = 0;
  int64_t unregistered = 0;
  /// By rank: the share of the time between collectives, 0 to 1, that went by after the first rank
  /// had come and before this one came.
  std::vector<double> late_share = {};
};

/// One line of the operation log.
struct LogEntry {
  uint64_t seq = 0;
  OpCode op = OpCode::kBarrier;
  DType dtype = DType::kUInt8;
  uint64_t signature_hash = 0;
};

struct Identity {
  int rank = 0;
  int size = 1;
  std::string name;  ///< "tp:0": the same on all ranks
  std::string backend;
  uint64_t generation = 0;
  double timeout_s = 600;
  std::string flight_folder = {};  ///< where a failure leaves its flight record; empty: nowhere
  int device = -1;                 ///< the GPU that it works on; -1: the CPU
};

/// All ranks call the same collectives in the same order. Calls of one rank are serialised. Every
/// call may throw PeerLost, Mismatch, Timeout or Aborted; from then on the communicator is poisoned
/// and rethrows the same record.
class Communicator {
 public:
  virtual ~Communicator() = default;
  const Identity& identity() const { return identity_; }

  virtual Block allocate(int64_t bytes) = 0;

  /// `in` and `out` are equal or disjoint; both hold `count` values.
  virtual void all_reduce(const Signature&, const void* in, void* out, int64_t count,
                          const Epilogue&, Stream) = 0;

  /// Cut along the rows' width: `in` is [rows, columns[rank]], `out` [rows, sum(columns)].
  virtual void all_gather(const Signature&, const void* in, void* out, int64_t rows,
                          std::span<const int64_t> columns, Stream) = 0;

  /// `in` is the concatenation of counts[r] values for each rank r, `out` holds counts[rank].
  virtual void reduce_scatter(const Signature&, const void* in, void* out,
                              std::span<const int64_t> counts, Stream) = 0;

  /// signature.root's `out` is the concatenation of all ranks' `in`, counts[r] values of rank r;
  /// elsewhere `out` is not touched and may be null.
  virtual void gather(const Signature&, const void* in, void* out, std::span<const int64_t> counts,
                      Stream) = 0;

  /// The other way: signature.root's `in` is cut into counts[r] values for rank r; elsewhere `in`
  /// may be null.
  virtual void scatter(const Signature&, const void* in, void* out, std::span<const int64_t> counts,
                       Stream) = 0;

  virtual void broadcast(const Signature&, void* data, int64_t count,
                         Stream) = 0;                  ///< from signature.root
  virtual void barrier(double timeout_s, Stream) = 0;  ///< timeout_s <= 0: the group's

  virtual void abort(
      const std::string& reason) = 0;  ///< every rank's pending and later calls raise
  virtual void check() {}              ///< throws if no collective can follow; asks nobody
  /// Tells all ranks what has failed between two collectives; never waits. One thread.
  virtual void look() {}
  virtual void close() = 0;  ///< leaves; idempotent; blocks stay valid
  virtual Stats stats() const = 0;
  virtual std::vector<LogEntry> op_log() const = 0;  ///< the last operations, oldest first
  /// What poisoned it, once a call has raised that, where it keeps it: for communicators that are
  /// made of others.
  virtual std::optional<FailureRecord> failure() const { return std::nullopt; }

 protected:
  explicit Communicator(Identity identity) : identity_(std::move(identity)) {}
  Identity identity_;
};

}  // namespace tp_native::comm
