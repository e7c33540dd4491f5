// SPDX-License-Identifier: Apache-2.0
// Where ranks that share no memory agree on what failed: the first verdict of all ranks holds. It
// carries no payload, and nothing of it is on the path of a collective that goes well.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace tp_native::comm {

struct Verdict {
  FailureKind kind = FailureKind::kError;
  int culprit = -1;
  std::string text;  ///< equal on all ranks: names no reporter
};

/// What a rank is doing, as the others see it.
struct Status {
  bool is_known = false;  ///< it answered
  bool has_left = false;
  bool is_inside = false;  ///< in operation `op` number `seq`; otherwise that was its last one
  OpCode op = OpCode::kBarrier;
  uint64_t seq = 0;
};

class Board {
 public:
  virtual ~Board() = default;
  /// Returns the verdict that holds: `verdict`, or the one of a rank that was faster.
  virtual Verdict claim(const Verdict& verdict) = 0;
  /// What has been claimed as far as this rank knows; a peer's claim within 0.2 s. Cheap.
  virtual std::optional<Verdict> verdict() const = 0;
  /// A rank that has left and will not come to operation `seq`, or -1. Cheap.
  virtual int left_before(uint64_t seq) const = 0;
  virtual void set_status(OpCode op, uint64_t seq, bool is_inside) = 0;
  /// This rank's operations so far: two communicators that share a board count on from each other.
  virtual uint64_t noted() const { return 0; }
  /// A peer says that there is a verdict: verdict() has it soon.
  virtual void expect_verdict() {}

  // For collectives that run on devices, where nobody meets on the way (promise 5). A board of
  // ranks that compare as they meet does nothing here.
  /// Notes this rank's operation `seq`, without waiting.
  virtual void note(const Signature&, uint64_t /*seq*/, int64_t /*bytes*/) {}
  virtual void finish(uint64_t /*seq*/) noexcept {}  ///< it has ended on the device
  /// Compares what the ranks have noted and claims a verdict where they differ. One thread.
  virtual void look() {}
  /// What to add to a failure's message: where its flight record is.
  virtual std::string hint() const { return {}; }

  /// Asks every rank, waits a second at most; one element per rank.
  virtual std::vector<Status> call_roll() = 0;
  /// Called once, from a thread of the board's, when a verdict appears.
  virtual void on_verdict(std::function<void(const Verdict&)> fn) = 0;
  /// This rank takes part no longer; stops the board's thread.
  virtual void leave() = 0;
};

struct Late {
  int culprit = -1;   ///< the first rank that does not answer, else one that is behind `seq`
  std::string table;  ///< "ranks: 0 is in barrier #3, 1 last called all_reduce #2"
};
Late find_late(const std::vector<Status>& ranks, uint64_t seq);

}  // namespace tp_native::comm
