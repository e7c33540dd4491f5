// SPDX-License-Identifier: Apache-2.0
// How the rows of a GEMM are cut into chunks and what waits for what, so that one chunk's
// collective runs under another chunk's GEMM. Pure: no device, no clock, no rank. Every input is a
// value that all ranks share, because the chunks decide how many collectives run.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace tp_native::overlap {

enum class Pattern : uint8_t {
  kGemmAllReduce,      ///< row-parallel: each chunk is summed over the ranks, in place
  kGemmReduceScatter,  ///< the same with sequence parallelism: each rank keeps its own rows
  kAllGatherGemm,      ///< column-parallel with sequence parallelism: the mirror image
};

/// Rows and columns of the result that one thread block of the GEMM makes.
struct Tile {
  int64_t rows = 128;
  int64_t columns = 256;
};
Tile default_tile(DType dtype);

/// What things take on one device and its links. Only the number of chunks depends on it.
struct CostModel {
  /// bf16, 8192^3, random data, one H200: 769 to 798e12 measured.
  double gemm_flop_per_s = 788e12;
  /// Device to device copy on the same machine.
  double memory_bytes_per_s = 4.3e12;
  /// Bytes that cross a rank's link, and what a collective takes beside them: the line through
  /// NCCL's all-reduce on 4 H100 (17, 19, 26, 37 us at 0.5, 1, 2, 4 MiB; vLLM pull request 24111).
  double link_bytes_per_s = 270e9;
  double collective_s = 14e-6;
  /// One more kernel in a stream: the gap before it. An assumption.
  double launch_s = 2e-6;
  /// A stream that goes on after another's event. An assumption.
  double event_s = 2e-6;
  /// What the collective's kernel takes from the GEMM while both run. An assumption.
  int communication_multiprocessors = 8;
  /// Overlap has to promise at least this share of the time without it: the estimate is no better.
  double least_gain = 0.03;
};
/// The defaults, with the GEMM's rate of that type.
CostModel default_costs(DType dtype);

/// What is to be cut. Every value is the same on all ranks: where ranks differ (uneven shards,
/// unlike devices), all of them pass the largest size and the fewest multiprocessors.
struct Problem {
  Pattern pattern = Pattern::kGemmAllReduce;
  int64_t rows = 0;     ///< M of the whole
  int64_t columns = 0;  ///< N of a rank's GEMM
  int64_t inner = 0;    ///< K of a rank's GEMM
  DType dtype = DType::kBFloat16;
  int ranks = 1;
  /// Rows of each rank, sum `rows`, zeros allowed. Not read for kGemmAllReduce.
  std::vector<int64_t> sizes = {};
  int multiprocessors = 132;
  Tile tile = {};
  /// Another GEMM of the same call that none of the collectives needs: backward's dW beside the
  /// collective of dx. It runs after the chunks' GEMMs. 0: none.
  double beside_flop = 0;
  int chunks =
      0;  ///< 0: as many as the estimate wants; else so many, or as many as there are tiles
  /// Chunk buffers that are used in turn, two at the least; 0: one for each chunk.
  int slots = 2;
};

/// Rows of one chunk that belong to one rank.
struct Piece {
  int64_t row = 0;         ///< the first one, in the whole
  int64_t local_row = 0;   ///< the same row, in its rank's own rows
  int64_t packed_row = 0;  ///< the same row, in the chunk's buffer
  int64_t rows = 0;
  bool operator==(const Piece&) const = default;
};

/// kGemmAllReduce: one piece, and the chunk lies where the result does. Else a piece for each rank,
/// some of them empty, back to back in the chunk's buffer in the order of ranks, as the collective
/// wants them: the GEMM writes the buffer and reads the whole (kGemmReduceScatter), or the other
/// way (kAllGatherGemm). A rank's own rows of the chunk are its piece's local rows.
struct Chunk {
  std::vector<Piece> pieces;
  int64_t rows = 0;
  int slot = -1;  ///< its buffer; -1: none
  bool operator==(const Chunk&) const = default;
};

/// Pieces of equal rows, equally far apart: one GEMM, strided and batched.
struct Batch {
  int64_t row = 0, packed_row = 0, rows = 0;  ///< the first of them
  int64_t count = 1;
  int64_t row_stride = 0;  ///< from one to the next in the whole; `rows` in the buffer
};
/// The GEMMs that make a chunk: one where the rows are cut evenly, none where it is empty.
std::vector<Batch> batches(const Chunk& chunk);
/// Values of each rank in the chunk's collective, `width` to a row.
std::vector<int64_t> counts(const Chunk& chunk, int64_t width);

enum class Lane : uint8_t { kCompute, kCommunication };  ///< kCompute: the caller's stream
enum class Work : uint8_t { kFork, kGemm, kCommunicate, kBeside, kJoin };

constexpr int kNoEvent = -1;
struct Step {
  Lane lane = Lane::kCompute;
  Work work = Work::kGemm;
  int chunk = -1;
  int waits = kNoEvent;    ///< before it runs
  int records = kNoEvent;  ///< behind it
  bool operator==(const Step&) const = default;
};

/// Steps in the order of their launch. A step runs after the last one of its lane and after the
/// event that it waits for, which an earlier step records; nothing else is relied on.
struct Schedule {
  Pattern pattern = Pattern::kGemmAllReduce;
  std::vector<Chunk> chunks;
  std::vector<Step> steps;
  int events = 0;  ///< 0: all of it on the caller's stream
  int slots = 0;
  int64_t slot_rows = 0;    ///< rows of the largest chunk that has a slot
  double estimated_s = 0;   ///< by the cost model
  double one_stream_s = 0;  ///< the same, in one chunk on one stream
  bool is_overlapped() const { return events > 0; }
  bool operator==(const Schedule&) const = default;
};

/// At least one chunk, even of no rows: every rank calls every collective.
Schedule plan(const Problem& problem, const CostModel& costs);

}  // namespace tp_native::overlap
