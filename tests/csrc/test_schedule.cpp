// SPDX-License-Identifier: Apache-2.0
// Rows covered once, every conflict ordered, no wait too many; and how many chunks the cost model
// asks for.
#include "overlap/schedule.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "check.h"
#include "core/error.h"
#include "schedule_graph.h"

using namespace tp_native;           // NOLINT
using namespace tp_native::overlap;  // NOLINT
using schedule_graph::fault;

namespace {

constexpr Pattern kPatterns[] = {Pattern::kGemmAllReduce, Pattern::kGemmReduceScatter,
                                 Pattern::kAllGatherGemm};

std::vector<int64_t> slices_of(const Problem& p) {
  return p.pattern == Pattern::kGemmAllReduce ? std::vector{p.rows} : p.sizes;
}

void check_rows(const Problem& p, const Schedule& s) {
  const std::vector<int64_t> slices = slices_of(p);
  std::vector<int> seen(static_cast<size_t>(p.rows), 0);
  std::vector<int64_t> next(slices.size(), 0);  // pieces of a slice come in its order
  for (const Chunk& chunk : s.chunks) {
    CHECK_EQ(chunk.pieces.size(), slices.size());
    CHECK(chunk.rows > 0 || s.chunks.size() == 1);
    int64_t packed = 0;
    int64_t offset = 0;
    for (size_t r = 0; r < slices.size(); ++r) {
      const Piece& piece = chunk.pieces[r];
      CHECK(piece.rows >= 0);
      CHECK_EQ(piece.packed_row, packed);
      CHECK_EQ(piece.local_row, next[r]);
      CHECK_EQ(piece.row, offset + piece.local_row);
      packed += piece.rows;
      next[r] += piece.rows;
      CHECK(next[r] <= slices[r]);
      CHECK(piece.rows % p.tile.rows == 0 || next[r] == slices[r]);
      const auto tiles = (slices[r] + p.tile.rows - 1) / p.tile.rows;
      CHECK(piece.rows > 0 || tiles < static_cast<int64_t>(s.chunks.size()));
      for (int64_t i = 0; i < piece.rows; ++i) ++seen[piece.row + i];
      offset += slices[r];
    }
    CHECK_EQ(chunk.rows, packed);
    const std::vector<int64_t> values = counts(chunk, 3);
    CHECK_EQ(std::accumulate(values.begin(), values.end(), int64_t{0}), 3 * chunk.rows);
    CHECK(chunk.slot < s.slots && (chunk.slot < 0) == (p.pattern == Pattern::kGemmAllReduce));
    CHECK(chunk.slot < 0 || chunk.rows <= s.slot_rows);
  }
  CHECK(std::ranges::all_of(seen, [](int count) { return count == 1; }));
  CHECK(next == slices);
}

/// The GEMMs cover each piece, and put a row of the whole beside the same row of the buffer.
void check_batches(const Chunk& chunk) {
  std::vector<std::pair<int64_t, int64_t>> wanted;
  for (const Piece& piece : chunk.pieces)
    for (int64_t i = 0; i < piece.rows; ++i)
      wanted.emplace_back(piece.packed_row + i, piece.row + i);
  std::vector<std::pair<int64_t, int64_t>> found;
  for (const Batch& batch : batches(chunk)) {
    CHECK(batch.rows > 0);
    CHECK(batch.count == 1 || batch.row_stride > batch.rows);
    for (int64_t b = 0; b < batch.count; ++b)
      for (int64_t i = 0; i < batch.rows; ++i)
        found.emplace_back(batch.packed_row + b * batch.rows + i,
                           batch.row + b * batch.row_stride + i);
  }
  CHECK(wanted == found);
}

void check_all(const Problem& p, const CostModel& costs) {
  const Schedule s = plan(p, costs);
  check_rows(p, s);
  for (const Chunk& chunk : s.chunks) check_batches(chunk);
  const std::string what = fault(p, s);
  if (!what.empty())
    throw std::runtime_error(concat("pattern ", static_cast<int>(p.pattern), ", ", p.rows,
                                    " rows, ", s.chunks.size(), " chunks: ", what));
  size_t expected = 2 * s.chunks.size() + (p.beside_flop > 0 ? 1 : 0);
  for (const Step& step : s.steps) {
    if (step.work != Work::kFork && step.work != Work::kJoin) --expected;
    CHECK(s.is_overlapped() || (step.lane == Lane::kCompute && step.waits == kNoEvent));
    CHECK((step.lane == Lane::kCommunication) ==
          (s.is_overlapped() && step.work == Work::kCommunicate));
  }
  CHECK_EQ(expected, 0U);
  CHECK(s.is_overlapped() || s.chunks.size() == 1);
  // dW finds every gathered chunk in its buffer still.
  if (p.pattern == Pattern::kAllGatherGemm && p.beside_flop > 0)
    CHECK_EQ(s.slots, static_cast<int>(s.chunks.size()));
  for (int rank = 0; rank < p.ranks; ++rank) CHECK(plan(p, costs) == s);
  for (size_t i = 0; i < s.steps.size(); ++i) {
    if (s.steps[i].waits == kNoEvent) continue;
    Schedule broken = s;
    broken.steps[i].waits = kNoEvent;
    CHECK(!fault(p, broken).empty());
  }
}

std::vector<int64_t> even(int64_t rows, int ranks) {
  std::vector<int64_t> sizes;
  for (int r = 0; r < ranks; ++r) sizes.push_back(rows / ranks + (r < rows % ranks ? 1 : 0));
  return sizes;
}

/// Uneven, with ranks that have nothing.
std::vector<int64_t> drawn(int64_t rows, int ranks, std::mt19937& draw) {
  std::vector<int64_t> cuts = {0, rows};
  for (int r = 1; r < ranks; ++r)
    cuts.push_back(draw() % 4 == 0 ? 0 : static_cast<int64_t>(draw() % (rows + 1)));
  std::ranges::sort(cuts);
  std::vector<int64_t> sizes;
  for (int r = 0; r < ranks; ++r) sizes.push_back(cuts[r + 1] - cuts[r]);
  return sizes;
}

Problem large(Pattern pattern, int64_t rows = 8192) {
  Problem p{.pattern = pattern, .rows = rows, .columns = 8192, .inner = 3584, .ranks = 8};
  p.sizes = even(rows, p.ranks);
  return p;
}

/// Latencies of nothing, so that the estimate cuts whatever can be cut.
CostModel eager() {
  CostModel costs;
  costs.collective_s = costs.launch_s = costs.event_s = costs.least_gain = 0;
  costs.memory_bytes_per_s = 1e18;
  costs.link_bytes_per_s = 50e9;
  return costs;
}

}  // namespace

TEST(edges_are_covered_and_ordered) {
  for (const Pattern pattern : kPatterns) {
    for (const int ranks : {1, 2, 3, 8}) {
      for (const int64_t rows : {0, 1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 97, 128, 257}) {
        for (const int chunks : {0, 1, 2, 3, 4, 7, 100}) {
          for (const int slots : {0, 1, 2, 3}) {
            for (const double beside_flop : {0.0, 1e9}) {
              Problem p{.pattern = pattern, .rows = rows, .columns = 96, .inner = 64};
              p.ranks = ranks;
              p.sizes = even(rows, ranks);
              p.multiprocessors = 4;
              p.tile = {8, 16};
              p.beside_flop = beside_flop;
              p.chunks = chunks;
              p.slots = slots;
              check_all(p, eager());
            }
          }
        }
      }
    }
  }
}

TEST(drawn_sizes_are_covered_and_ordered) {
  std::mt19937 draw(20260801);
  const auto up_to = [&](int most) { return static_cast<int64_t>(draw() % (most + 1)); };
  for (int round = 0; round < 4000; ++round) {
    Problem p{.pattern = kPatterns[draw() % 3], .rows = up_to(round % 2 ? 40 : 3000)};
    p.columns = up_to(1000);
    p.inner = up_to(1000);
    p.ranks = 1 + static_cast<int>(up_to(8));
    p.sizes = drawn(p.rows, p.ranks, draw);
    p.multiprocessors = 1 + static_cast<int>(up_to(140));
    p.tile = {1 + up_to(130), 1 + up_to(130)};
    p.chunks = static_cast<int>(up_to(9));
    p.slots = static_cast<int>(up_to(4));
    p.beside_flop = draw() % 2 ? 1e9 : 0;
    check_all(p, draw() % 2 ? eager() : default_costs(p.dtype));
  }
}

TEST(even_slices_make_one_batched_gemm_per_chunk) {
  for (const Pattern pattern : {Pattern::kGemmReduceScatter, Pattern::kAllGatherGemm}) {
    Problem p = large(pattern);
    p.chunks = 4;
    const Schedule s = plan(p, CostModel{});
    CHECK_EQ(s.chunks.size(), 4U);
    for (const Chunk& chunk : s.chunks) CHECK_EQ(batches(chunk).size(), 1U);
    p.chunks = 1;
    const std::vector<Batch> whole = batches(plan(p, CostModel{}).chunks[0]);
    CHECK_EQ(whole.size(), 1U);
    CHECK_EQ(whole[0].rows, p.rows);
  }
}

TEST(chunks_fill_whole_waves) {
  // 32 tiles to a row of them, 132 multiprocessors: four rows of tiles fill 97 % of a wave.
  Problem p = large(Pattern::kGemmAllReduce, 128 * 32);
  for (const int chunks : {2, 4, 8}) {
    p.chunks = chunks;
    for (const Chunk& chunk : plan(p, CostModel{}).chunks) CHECK_EQ(chunk.rows % (4 * 128), 0);
  }
  // 33 tiles to a row: four rows fill a wave. Equal chunks would have 15 rows each; cuts move.
  p.columns = 33 * 256;
  p.rows = 128 * 45;
  p.chunks = 3;
  const Schedule s = plan(p, CostModel{});
  CHECK_EQ(s.chunks.size(), 3U);
  for (size_t i = 0; i + 1 < s.chunks.size(); ++i) CHECK_EQ(s.chunks[i].rows % (4 * 128), 0);
}

TEST(decode_and_one_rank_never_overlap) {
  for (const Pattern pattern : kPatterns) {
    for (const int64_t rows : {0, 1, 8, 64, 127, 128}) {
      Problem p = large(pattern, rows);
      CHECK(!plan(p, CostModel{}).is_overlapped());
      p.chunks = 4;  // there is one row of tiles to a slice
      CHECK(!plan(p, CostModel{}).is_overlapped());
    }
    Problem alone = large(pattern);
    alone.ranks = 1;
    alone.sizes = {alone.rows};
    CHECK(!plan(alone, CostModel{}).is_overlapped());
    alone.chunks = 4;
    CHECK_EQ(plan(alone, CostModel{}).chunks.size(), 4U);
  }
}

TEST(chunks_follow_the_costs) {
  for (const Pattern pattern : kPatterns) {
    const Problem p = large(pattern);
    const Schedule usual = plan(p, CostModel{});
    CHECK(usual.chunks.size() >= 2);
    CHECK(usual.estimated_s < 0.97 * usual.one_stream_s);

    CostModel slow_start;  // a collective's latency eats what overlap would gain
    slow_start.collective_s = 1e-3;
    CHECK_EQ(plan(p, slow_start).chunks.size(), 1U);
    CostModel fast_link;  // hardly anything to hide
    fast_link.link_bytes_per_s = 1e15;
    CHECK_EQ(plan(p, fast_link).chunks.size(), 1U);
    CostModel demanding;
    demanding.least_gain = 0.9;
    CHECK_EQ(plan(p, demanding).chunks.size(), 1U);

    size_t last = 100;  // dearer collectives, fewer of them
    for (const double collective_s : {0.0, 5e-6, 20e-6, 80e-6, 320e-6}) {
      CostModel costs;
      costs.collective_s = collective_s;
      const size_t chunks = plan(p, costs).chunks.size();
      CHECK(chunks <= last);
      last = chunks;
    }
  }
}

TEST(the_estimate_is_the_one_made_by_hand) {
  // A tile takes 1 s and so does its payload; the fractions tell the other costs apart.
  Problem p{.rows = 256, .columns = 256, .inner = 64, .ranks = 2, .multiprocessors = 1};
  p.chunks = 2;
  CostModel costs{.gemm_flop_per_s = 2.0 * 128 * 256 * 64, .memory_bytes_per_s = 1e30};
  costs.link_bytes_per_s = 128 * 256 * 2;
  costs.collective_s = 0.25;
  costs.launch_s = 0.125;
  costs.event_s = 0.0625;
  costs.communication_multiprocessors = 0;
  CHECK_EQ(plan(p, costs).one_stream_s, 0.125 + 2 + 0.25 + 2);
  // GEMM, event, two collectives, event: the second GEMM is hidden.
  CHECK_EQ(plan(p, costs).estimated_s, 1.125 + 0.0625 + 2 * 1.25 + 0.0625);
  costs.communication_multiprocessors = 1;  // now it stands still for the second it shares
  CHECK_EQ(plan(p, costs).estimated_s, 1.125 + 2.125 + 0.0625 + 1.25 + 0.0625);
  costs.memory_bytes_per_s = (256 * 64 + 256 * 64 + 256 * 256) * 2 / 8.0;
  CHECK_EQ(plan(p, costs).one_stream_s, 0.125 + 8 + 0.25 + 2);
  costs.memory_bytes_per_s = 1e30;

  p.pattern = Pattern::kGemmReduceScatter;
  p.rows = 384;
  p.chunks = 1;
  for (const auto& sizes : {std::vector<int64_t>{128, 256}, std::vector<int64_t>{256, 128}}) {
    p.sizes = sizes;  // both ranks' shares are padded to the larger
    CHECK_EQ(plan(p, costs).one_stream_s, 0.125 + 3 + 0.25 + 2);
  }
}

TEST(the_estimate_picks_the_best_number) {
  for (const Pattern pattern : kPatterns) {
    for (const int64_t rows : {1024, 2048, 4096, 5000, 16384, 65536, 1 << 20}) {
      Problem p = large(pattern, rows);
      const Schedule chosen = plan(p, CostModel{});
      double best_s = chosen.one_stream_s;
      for (p.chunks = 2; p.chunks <= 100; ++p.chunks)
        best_s = std::min(best_s, plan(p, CostModel{}).estimated_s);
      if (chosen.is_overlapped() && rows <= 16384) CHECK_EQ(chosen.estimated_s, best_s);
      if (chosen.is_overlapped()) CHECK(chosen.estimated_s <= 1.03 * best_s);
      if (!chosen.is_overlapped()) CHECK(best_s >= 0.97 * chosen.one_stream_s);
    }
  }
}

TEST(a_second_gemm_hides_one_chunk) {
  for (const Pattern pattern : {Pattern::kGemmAllReduce, Pattern::kGemmReduceScatter}) {
    Problem p = large(pattern);
    p.beside_flop = 2.0 * 8192 * 8192 * 3584;
    const Schedule chosen = plan(p, CostModel{});
    CHECK(chosen.is_overlapped());
    p.chunks = 1;
    const Schedule one = plan(p, CostModel{});
    CHECK(one.is_overlapped());
    CHECK_EQ(one.chunks.size(), 1U);
    CHECK(one.estimated_s < 0.8 * one.one_stream_s);
    CHECK(chosen.estimated_s <= one.estimated_s);
    // The GEMM beside needs none of the collectives.
    const auto beside = std::ranges::find(one.steps, Work::kBeside, &Step::work);
    CHECK(beside != one.steps.end() && beside->waits == kNoEvent);
  }
}

TEST(what_cannot_be_cut_is_refused) {
  const auto refused = [](const Problem& p, const char* text) {
    try {
      plan(p, CostModel{});
    } catch (const Error& error) {
      return std::string(error.what()).find(text) != std::string::npos;
    }
    return false;
  };
  CHECK(refused({.rows = -1}, "-1"));
  CHECK(refused({.ranks = 0}, "0 ranks"));
  CHECK(refused({.tile = {0, 1}}, "tiles of 0 x 1"));
  CHECK(refused({.pattern = Pattern::kAllGatherGemm, .rows = 5, .ranks = 2, .sizes = {2, 2}},
                "sum to 4, expected 2 that sum to 5"));
  CHECK(refused({.pattern = Pattern::kAllGatherGemm, .rows = 5, .ranks = 2, .sizes = {7, -2}},
                "-2 rows"));
}

TEST(the_checker_sees_other_faults) {
  Problem p = large(Pattern::kGemmReduceScatter);
  p.chunks = 4;
  const Schedule s = plan(p, CostModel{});
  CHECK_EQ(fault(p, s), "");
  const auto position = [&](Work work, int chunk) {
    return std::ranges::find_if(
               s.steps,
               [&](const Step& step) { return step.work == work && step.chunk == chunk; }) -
           s.steps.begin();
  };
  Schedule late = s;  // the collective of chunk 0 behind the GEMM of chunk 1
  late.steps[position(Work::kCommunicate, 0)].waits = s.steps[position(Work::kGemm, 1)].records;
  CHECK(!fault(p, late).empty());
  std::swap(late.steps[position(Work::kCommunicate, 0)], late.steps[position(Work::kGemm, 1)]);
  CHECK_EQ(fault(p, late), "a chunk waits for a later one");
  Schedule shared = s;  // two chunks in one buffer at a time
  shared.chunks[1].slot = 0;
  CHECK(!fault(p, shared).empty());
  Schedule cyclic = s;
  cyclic.steps[0].waits = s.steps[position(Work::kCommunicate, 0)].records;
  CHECK_EQ(fault(p, cyclic), "a cycle");
}

int main() { return check::run_all(); }
