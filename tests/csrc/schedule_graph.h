// SPDX-License-Identifier: Apache-2.0
// A schedule as a graph: what its steps touch, known from the pattern alone, and in which order
// they must run.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "core/error.h"
#include "overlap/schedule.h"

namespace schedule_graph {

using namespace tp_native;           // NOLINT
using namespace tp_native::overlap;  // NOLINT

/// Rows [begin, end) of something that steps read or write.
struct Touch {
  std::string what;
  int64_t begin = 0, end = 0;
  bool is_write = false;
};

inline bool conflict(const Touch& a, const Touch& b) {
  return (a.is_write || b.is_write) && a.what == b.what && a.begin < b.end && b.begin < a.end;
}

inline std::string buffer(int slot) { return "slot " + std::to_string(slot); }
inline std::string own(const char* what, size_t rank) { return what + std::to_string(rank); }

/// What the caller's stream did before and does after: it owns everything.
inline std::vector<Touch> touches_of_caller(const Problem& p, const Schedule& s) {
  std::vector<Touch> all = {{"x", 0, p.rows, true}, {"y", 0, p.rows, true}, {"dW", 0, 1, true}};
  for (int i = 0; i < s.slots; ++i) all.push_back({buffer(i), 0, s.slot_rows, true});
  for (size_t r = 0; r < p.sizes.size(); ++r) {
    all.push_back({own("x of ", r), 0, p.sizes[r], true});
    all.push_back({own("y of ", r), 0, p.sizes[r], true});
  }
  return all;
}

inline std::vector<Touch> touches_of(const Problem& p, const Schedule& s, const Step& step) {
  std::vector<Touch> all;
  if (step.work == Work::kFork || step.work == Work::kJoin) return all;
  if (step.work == Work::kBeside) {
    all = {{"x", 0, p.rows, false}, {"dW", 0, 1, true}};
    if (p.pattern == Pattern::kAllGatherGemm)
      for (int i = 0; i < s.slots; ++i) all.push_back({buffer(i), 0, s.slot_rows, false});
    return all;
  }
  const Chunk& chunk = s.chunks[step.chunk];
  const bool is_gemm = step.work == Work::kGemm;
  for (size_t r = 0; r < chunk.pieces.size(); ++r) {
    const Piece& piece = chunk.pieces[r];
    const int64_t end = piece.row + piece.rows;
    const int64_t local_end = piece.local_row + piece.rows;
    switch (p.pattern) {
      case Pattern::kGemmAllReduce:
        if (is_gemm) all.push_back({"x", piece.row, end, false});
        all.push_back({"y", piece.row, end, true});
        break;
      case Pattern::kGemmReduceScatter:
        if (is_gemm)
          all.push_back({"x", piece.row, end, false});
        else
          all.push_back({own("y of ", r), piece.local_row, local_end, true});
        break;
      case Pattern::kAllGatherGemm:
        if (is_gemm)
          all.push_back({"y", piece.row, end, true});
        else
          all.push_back({own("x of ", r), piece.local_row, local_end, false});
        break;
    }
  }
  const bool fills = is_gemm == (p.pattern == Pattern::kGemmReduceScatter);
  if (chunk.slot >= 0) all.push_back({buffer(chunk.slot), 0, chunk.rows, fills});
  return all;
}

/// Node 0 is the caller before, node i + 1 step i, the last the caller after.
class Graph {
 public:
  Graph(const Problem& p, const Schedule& s) : nodes_(s.steps.size() + 2) {
    before_.assign(nodes_, std::vector<bool>(nodes_, false));
    std::vector<size_t> recorder(static_cast<size_t>(s.events), 0);
    for (size_t i = 0; i < s.steps.size(); ++i)
      if (s.steps[i].records != kNoEvent) recorder[s.steps[i].records] = i + 1;
    size_t last[2] = {0, nodes_};  // the communication stream is not the caller's: no edge
    std::vector<std::vector<size_t>> into(nodes_);
    for (size_t i = 0; i < s.steps.size(); ++i) {
      size_t& lane = last[static_cast<size_t>(s.steps[i].lane)];
      if (lane != nodes_) into[i + 1].push_back(lane);
      lane = i + 1;
      if (s.steps[i].waits != kNoEvent) {
        const size_t from = recorder[s.steps[i].waits];
        is_stale_ |= from == 0 || from > i;  // a wait sees only what was recorded before it
        into[i + 1].push_back(from);
      }
    }
    into[nodes_ - 1].push_back(last[0]);
    sort(into);
    touches_.push_back(touches_of_caller(p, s));
    for (const Step& step : s.steps) touches_.push_back(touches_of(p, s, step));
    touches_.push_back(touches_of_caller(p, s));
  }

  bool reaches(size_t from, size_t to) const { return before_[to][from]; }

  std::string fault(const Schedule& s) const {
    if (is_cyclic_) return "a cycle";
    if (is_stale_) return "a wait for an event that no earlier step records";
    for (size_t a = 0; a < nodes_; ++a) {
      for (size_t b = a + 1; b < nodes_; ++b) {
        if (reaches(a, b) || reaches(b, a)) continue;
        for (const Touch& x : touches_[a])
          for (const Touch& y : touches_[b])
            if (conflict(x, y))
              return concat("nodes ", a, " and ", b, " of ", nodes_, " both touch ", x.what);
      }
      if (!reaches(a, nodes_ - 1) && a + 1 < nodes_)
        return concat("the caller's stream does not wait for step ", a - 1);
    }
    return of_patterns(s);
  }

 private:
  void sort(const std::vector<std::vector<size_t>>& into) {
    std::vector<bool> is_done(nodes_, false);
    for (size_t round = 0; round < nodes_; ++round) {
      size_t next = 0;
      while (next < nodes_ &&
             (is_done[next] ||
              !std::ranges::all_of(into[next], [&](size_t from) { return is_done[from]; })))
        ++next;
      if (next == nodes_) {
        is_cyclic_ = true;
        return;
      }
      is_done[next] = true;
      for (const size_t from : into[next]) {
        before_[next][from] = true;
        for (size_t i = 0; i < nodes_; ++i)
          if (before_[from][i]) before_[next][i] = true;
      }
    }
  }

  /// What makes it an overlap: a chunk's collective waits for that chunk's GEMM and none later, or
  /// the other way.
  std::string of_patterns(const Schedule& s) const {
    const bool is_gather = s.pattern == Pattern::kAllGatherGemm;
    const Work first = is_gather ? Work::kCommunicate : Work::kGemm;
    for (size_t a = 0; a < s.steps.size(); ++a) {
      for (size_t b = 0; b < s.steps.size(); ++b) {
        const Step& from = s.steps[a];
        const Step& to = s.steps[b];
        if (from.work != first || to.work == first || to.chunk < 0) continue;
        const bool is_before = reaches(a + 1, b + 1);
        if (from.chunk <= to.chunk && !is_before) return "a chunk is not ready when it is used";
        if (from.chunk > to.chunk && is_before) return "a chunk waits for a later one";
      }
    }
    return "";
  }

  size_t nodes_;
  bool is_cyclic_ = false;
  bool is_stale_ = false;
  std::vector<std::vector<bool>> before_;  // [to][from]
  std::vector<std::vector<Touch>> touches_;
};

/// What is wrong with it; empty if nothing.
inline std::string fault(const Problem& p, const Schedule& s) { return Graph(p, s).fault(s); }

}  // namespace schedule_graph
