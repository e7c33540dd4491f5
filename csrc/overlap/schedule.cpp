// SPDX-License-Identifier: Apache-2.0
#include "overlap/schedule.h"

#include <algorithm>
#include <cstdlib>

#include "core/error.h"

namespace tp_native::overlap {
namespace {

// More than this many collectives gain 3 % of the estimate at the most, for rows up to 2^20.
constexpr int kMostChunks = 16;
// How far from equal chunks a cut may move to fill its waves: a quarter, and no further than this.
constexpr int64_t kMostShift = 64;

constexpr int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

void check(const Problem& p) {
  TPN_CHECK(p.rows >= 0 && p.columns >= 0 && p.inner >= 0, "a GEMM of ", p.rows, " x ", p.columns,
            " x ", p.inner, ": no size may be negative");
  TPN_CHECK(p.ranks >= 1 && p.multiprocessors >= 1 && p.tile.rows >= 1 && p.tile.columns >= 1,
            p.ranks, " ranks, ", p.multiprocessors, " multiprocessors, tiles of ", p.tile.rows,
            " x ", p.tile.columns, ": each must be at least 1");
  TPN_CHECK(p.chunks >= 0 && p.slots >= 0, p.chunks, " chunks in ", p.slots,
            " slots: neither may be negative");
  if (p.pattern == Pattern::kGemmAllReduce) return;
  int64_t sum = 0;
  for (const int64_t size : p.sizes) {
    TPN_CHECK(size >= 0, "a rank with ", size, " rows");
    sum += size;
  }
  TPN_CHECK(static_cast<int>(p.sizes.size()) == p.ranks && sum == p.rows, p.sizes.size(),
            " sizes that sum to ", sum, ", expected ", p.ranks, " that sum to ", p.rows);
}

/// What is cut: the rows of each rank, or all of them at once.
std::vector<int64_t> slices(const Problem& p) {
  return p.pattern == Pattern::kGemmAllReduce ? std::vector{p.rows} : p.sizes;
}

/// Tile rows of a slice of `tiles` that lie before cut `i` of `chunks`, where the largest slice, of
/// `most` tiles, is cut at `cut`. A slice of at least `chunks` tiles has one in every chunk.
int64_t tiles_before(int64_t tiles, int64_t most, int64_t chunks, int64_t i, int64_t cut) {
  if (tiles < chunks) return tiles * i / chunks;
  return most == chunks ? i : i + (tiles - chunks) * (cut - i) / (most - chunks);
}

class Cutter {
 public:
  Cutter(const Problem& problem, int64_t chunks)
      : p_(problem), slices_(slices(problem)), chunks_(chunks) {
    for (const int64_t size : slices_) tiles_.push_back(tiles_of(size, p_.tile.rows));
    most_ = *std::ranges::max_element(tiles_);
    columns_ = tiles_of(p_.columns, p_.tile.columns);
  }

  std::vector<Chunk> cut() const {
    std::vector<Chunk> made;
    std::vector<int64_t> begin(slices_.size());
    int64_t last = 0;
    for (int64_t i = 1; i <= chunks_; ++i) {
      const int64_t next = i == chunks_ ? most_ : best_cut(i, last);
      Chunk chunk;
      int64_t offset = 0;
      for (size_t s = 0; s < slices_.size(); ++s) {
        const int64_t end = std::min(slices_[s], p_.tile.rows * before(s, i, next));
        chunk.pieces.push_back({offset + begin[s], begin[s], chunk.rows, end - begin[s]});
        chunk.rows += end - begin[s];
        begin[s] = end;
        offset += slices_[s];
      }
      last = next;
      made.push_back(std::move(chunk));
    }
    return made;
  }

 private:
  int64_t before(size_t slice, int64_t i, int64_t cut) const {
    return tiles_before(tiles_[slice], most_, chunks_, i, cut);
  }

  /// The end of chunk `i - 1`, which begins at `last`: near the equal share of what is left, where
  /// its tiles fill their waves best.
  int64_t best_cut(int64_t i, int64_t last) const {
    const int64_t share = std::max<int64_t>(1, (most_ - last) / (chunks_ - i + 1));
    const int64_t shift = std::min(share / 4, kMostShift);
    const int64_t end = std::min(last + share + shift, most_ - (chunks_ - i));
    int64_t best = last + share;
    int64_t best_tiles = 0;
    int64_t best_waves = 1;
    for (int64_t cut = last + share - shift; cut <= end; ++cut) {
      int64_t tiles = 0;
      for (size_t s = 0; s < slices_.size(); ++s)
        tiles += (before(s, i, cut) - before(s, i - 1, last)) * columns_;
      const int64_t waves = std::max<int64_t>(1, tiles_of(tiles, p_.multiprocessors));
      const int64_t gain = tiles * best_waves - best_tiles * waves;
      if (gain > 0 || (gain == 0 && std::abs(cut - last - share) < std::abs(best - last - share))) {
        best = cut;
        best_tiles = tiles;
        best_waves = waves;
      }
    }
    return best;
  }

  const Problem& p_;
  std::vector<int64_t> slices_;
  std::vector<int64_t> tiles_;  // rows of tiles of each slice
  int64_t most_ = 0;            // of the largest slice
  int64_t columns_ = 0;         // of tiles
  int64_t chunks_;
};

void add(Schedule& schedule, Lane lane, Work work, int chunk, int waits, int records) {
  schedule.steps.push_back({lane, work, chunk, waits, records});
}

/// G0 C0 G1 C1 ...: a collective is launched before the next GEMM, which would take every
/// multiprocessor first where both share one hardware queue. Returns the event to join.
int add_gemm_first(Schedule& schedule) {
  const int chunks = static_cast<int>(schedule.chunks.size());
  const int slots = schedule.slots > 0 ? schedule.slots : chunks;
  std::vector<int> sent(static_cast<size_t>(chunks), kNoEvent);
  for (int i = 0; i < chunks; ++i) {
    const int made = schedule.events++;
    add(schedule, Lane::kCompute, Work::kGemm, i, i >= slots ? sent[i - slots] : kNoEvent, made);
    if (i + slots < chunks || i + 1 == chunks) sent[i] = schedule.events++;
    add(schedule, Lane::kCommunication, Work::kCommunicate, i, made, sent[i]);
  }
  return sent.back();
}

/// C0 C1 G0 C2 G1 ...: the next chunk is on its way when a GEMM begins. The last GEMM waits for the
/// last collective, so nothing is left to join.
int add_gather_first(Schedule& schedule) {
  const int chunks = static_cast<int>(schedule.chunks.size());
  const int slots = schedule.slots;
  std::vector<int> made(static_cast<size_t>(chunks), kNoEvent);
  std::vector<int> came(static_cast<size_t>(chunks), kNoEvent);
  const int fork = schedule.events++;
  add(schedule, Lane::kCompute, Work::kFork, -1, kNoEvent, fork);
  const auto gather = [&](int i) {
    came[i] = schedule.events++;
    const int freed = i >= slots ? made[i - slots] : kNoEvent;
    add(schedule, Lane::kCommunication, Work::kCommunicate, i, i == 0 ? fork : freed, came[i]);
  };
  gather(0);
  for (int i = 0; i < chunks; ++i) {
    if (i + 1 < chunks) gather(i + 1);
    if (i + slots < chunks) made[i] = schedule.events++;
    add(schedule, Lane::kCompute, Work::kGemm, i, came[i], made[i]);
  }
  return kNoEvent;
}

int add_one_stream(Schedule& schedule) {
  const bool is_gather = schedule.pattern == Pattern::kAllGatherGemm;
  for (const Work work :
       {is_gather ? Work::kCommunicate : Work::kGemm, is_gather ? Work::kGemm : Work::kCommunicate})
    add(schedule, Lane::kCompute, work, 0, kNoEvent, kNoEvent);
  return kNoEvent;
}

/// The estimate: durations of steps, and the walk over both lanes.
class Estimate {
 public:
  Estimate(const Problem& problem, const CostModel& costs) : p_(problem), c_(costs) {}

  double gemm_s(const Chunk& chunk) const {
    int64_t tiles = 0;
    for (const Batch& batch : batches(chunk))
      tiles += batch.count * tiles_of(batch.rows, p_.tile.rows);
    tiles *= tiles_of(p_.columns, p_.tile.columns);
    const double wave_flop =
        2.0 * static_cast<double>(p_.tile.rows * p_.tile.columns * p_.inner) * p_.multiprocessors;
    const double wave_s = wave_flop / c_.gemm_flop_per_s;
    const double moved = bytes(p_.columns, p_.inner) + bytes(chunk.rows, p_.inner + p_.columns);
    return std::max(static_cast<double>(tiles_of(tiles, p_.multiprocessors)) * wave_s,
                    moved / c_.memory_bytes_per_s);
  }

  double communicate_s(const Chunk& chunk) const {
    if (p_.ranks == 1) return 0;
    // Uneven pieces are padded to the largest: each link carries as much as the busiest.
    int64_t largest = 0;
    for (const Piece& piece : chunk.pieces) largest = std::max(largest, piece.rows);
    const bool is_all_reduce = p_.pattern == Pattern::kGemmAllReduce;
    const int64_t width = p_.pattern == Pattern::kAllGatherGemm ? p_.inner : p_.columns;
    const double share = is_all_reduce ? 2.0 / p_.ranks : 1.0;
    return c_.collective_s + share * (p_.ranks - 1) * bytes(largest, width) / c_.link_bytes_per_s;
  }

  double total_s(const Schedule& schedule) const {
    double now[2] = {0, 0};
    std::vector<double> reached(static_cast<size_t>(schedule.events), 0.0);
    for (const Step& step : schedule.steps) {
      double& lane = now[static_cast<size_t>(step.lane)];
      if (step.waits != kNoEvent) lane = std::max(lane, reached[step.waits] + c_.event_s);
      lane += step_s(schedule, step);
      if (step.records != kNoEvent) reached[step.records] = lane;
    }
    return now[static_cast<size_t>(Lane::kCompute)];
  }

 private:
  double bytes(int64_t rows, int64_t width) const {
    return static_cast<double>(rows) * static_cast<double>(width) *
           static_cast<double>(item_bytes(p_.dtype));
  }

  double step_s(const Schedule& schedule, const Step& step) const {
    if (step.work == Work::kCommunicate) return communicate_s(schedule.chunks[step.chunk]);
    if (step.work == Work::kFork || step.work == Work::kJoin) return 0;
    double alone_s = p_.beside_flop / c_.gemm_flop_per_s;
    double launches = 1;
    if (step.work == Work::kGemm) {
      alone_s = gemm_s(schedule.chunks[step.chunk]);
      launches = static_cast<double>(batches(schedule.chunks[step.chunk]).size());
    }
    const int other = runs_under(schedule, step);
    const double shared_s =
        other < 0 ? 0 : std::min(alone_s, communicate_s(schedule.chunks[other]));
    const double taken =
        std::min(1.0, static_cast<double>(c_.communication_multiprocessors) / p_.multiprocessors);
    return launches * c_.launch_s + alone_s + taken * shared_s;
  }

  /// The chunk whose collective runs under this GEMM; -1: none.
  static int runs_under(const Schedule& schedule, const Step& step) {
    if (!schedule.is_overlapped()) return -1;
    const bool is_gather = schedule.pattern == Pattern::kAllGatherGemm;
    const int last = static_cast<int>(schedule.chunks.size()) - 1;
    if (step.work == Work::kBeside) return is_gather ? -1 : last;
    const int other = step.chunk + (is_gather ? 1 : -1);
    return other <= last ? other : -1;
  }

  const Problem& p_;
  const CostModel& c_;
};

/// `chunks` of 0: one chunk on one stream.
Schedule build(const Problem& p, const Estimate& estimate, int chunks) {
  Schedule made;
  made.pattern = p.pattern;
  made.chunks = Cutter(p, std::max(1, chunks)).cut();
  const bool has_beside = p.beside_flop > 0;
  const bool is_gather = p.pattern == Pattern::kAllGatherGemm;
  if (p.pattern != Pattern::kGemmAllReduce) {
    const int count = static_cast<int>(made.chunks.size());
    // dW reads all that was gathered: no buffer is used twice.
    const bool is_kept = p.slots == 0 || (is_gather && has_beside);
    made.slots = is_kept ? count : std::min(count, std::max(2, p.slots));
    for (int i = 0; i < count; ++i) {
      made.chunks[i].slot = i % made.slots;
      made.slot_rows = std::max(made.slot_rows, made.chunks[i].rows);
    }
  }
  const int join = chunks == 0 ? add_one_stream(made)
                   : is_gather ? add_gather_first(made)
                               : add_gemm_first(made);
  if (has_beside) add(made, Lane::kCompute, Work::kBeside, -1, kNoEvent, kNoEvent);
  if (join != kNoEvent) add(made, Lane::kCompute, Work::kJoin, -1, join, kNoEvent);
  made.estimated_s = estimate.total_s(made);
  return made;
}

}  // namespace

Tile default_tile(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return {128, 256};  // cuBLAS's usual choice on Hopper for large GEMMs; not measured here
    case DType::kFloat64:
      return {64, 64};
    default:
      return {128, 128};
  }
}

CostModel default_costs(DType dtype) {
  CostModel costs;
  // Four fifths of the published 67e12, the share that bf16 was measured to reach of its 989e12.
  if (item_bytes(dtype) >= 4) costs.gemm_flop_per_s = 53e12;
  return costs;
}

std::vector<Batch> batches(const Chunk& chunk) {
  std::vector<Batch> runs;  // pieces that touch are one
  for (const Piece& piece : chunk.pieces) {
    if (piece.rows == 0) continue;
    if (!runs.empty() && runs.back().row + runs.back().rows == piece.row) {
      runs.back().rows += piece.rows;
    } else {
      runs.push_back({piece.row, piece.packed_row, piece.rows, 1, 0});
    }
  }
  std::vector<Batch> made;
  for (const Batch& run : runs) {
    if (!made.empty() && made.back().rows == run.rows) {
      Batch& last = made.back();
      const int64_t stride = run.row - last.row - (last.count - 1) * last.row_stride;
      if (last.count == 1 || last.row_stride == stride) {
        last.row_stride = stride;
        ++last.count;
        continue;
      }
    }
    made.push_back(run);
  }
  return made;
}

std::vector<int64_t> counts(const Chunk& chunk, int64_t width) {
  std::vector<int64_t> values;
  for (const Piece& piece : chunk.pieces) values.push_back(piece.rows * width);
  return values;
}

Schedule plan(const Problem& problem, const CostModel& costs) {
  check(problem);
  const Estimate estimate(problem, costs);
  const std::vector<int64_t> cut = slices(problem);
  const int64_t most = tiles_of(*std::ranges::max_element(cut), problem.tile.rows);
  // Beside another GEMM even one chunk has something to run under, unless that needs the chunk.
  const int fewest = problem.beside_flop > 0 && problem.pattern != Pattern::kAllGatherGemm ? 1 : 2;

  Schedule best = build(problem, estimate, 0);
  const double one_stream_s = best.estimated_s;
  if (problem.chunks > 0 && most > 0) {
    const int chunks = static_cast<int>(std::min<int64_t>(problem.chunks, most));
    if (chunks >= fewest) best = build(problem, estimate, chunks);
  } else if (problem.ranks > 1) {
    for (int chunks = fewest; chunks <= std::min<int64_t>(most, kMostChunks); ++chunks) {
      Schedule next = build(problem, estimate, chunks);
      const double bar =
          best.is_overlapped() ? best.estimated_s : one_stream_s * (1 - costs.least_gain);
      if (next.estimated_s < bar) best = std::move(next);
    }
  }
  best.one_stream_s = one_stream_s;
  return best;
}

}  // namespace tp_native::overlap
