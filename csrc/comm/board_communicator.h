// SPDX-License-Identifier: Apache-2.0
// Life and failures of communicators whose ranks share no memory: what they agree on goes over a
// Board. How bytes move is the business of those that derive from it.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>

#include "comm/arena.h"
#include "comm/board.h"
#include "comm/communicator.h"

namespace tp_native::comm {

class BoardCommunicator : public Communicator {
 public:
  Block allocate(int64_t) override { return {}; }
  void abort(const std::string& reason) override;
  void close() override;
  Stats stats() const override;
  std::vector<LogEntry> op_log() const override;
  std::optional<FailureRecord> failure() const override;

 protected:
  BoardCommunicator(Identity identity, std::shared_ptr<Board> board);

  /// Runs `body` as this rank's next operation. What it throws poisons the group on all ranks.
  void collective(const Signature& signature, int64_t bytes, double timeout_s,
                  const std::function<void()>& body);
  /// Called every now and then while this rank has waited `waited_s`; throws if it should not go
  /// on.
  void poll(double waited_s);
  [[noreturn]] void fail_group(const Verdict& verdict);

  /// Why the body threw, where it knows better than "a signal handler raised".
  virtual std::optional<Verdict> explain() { return std::nullopt; }
  /// The group has failed: nothing may stay pending.
  virtual void drop() noexcept = 0;
  /// The group ends on this rank; no collective runs.
  virtual void release() noexcept = 0;

  Board& board() const { return *board_; }
  double timeout_s() const { return timeout_s_; }
  uint64_t seq() const { return seq_; }
  bool is_forked_child() const { return owner_.is_elsewhere(); }

 private:
  void check_usable();
  [[noreturn]] void raise_verdict(const Verdict& verdict);
  std::string describe_current() const;

  Owner owner_;
  std::shared_ptr<Board> board_;
  mutable std::mutex mutex_;  ///< one collective of this rank at a time; guards what follows
  const Signature* current_ = nullptr;
  double timeout_s_ = 0;
  double waited_s_ = 0;
  double next_warning_s_ = 0;
  uint64_t seq_ = 0;
  std::optional<FailureRecord> failure_;
  Stats stats_;
  std::vector<LogEntry> log_;
  bool is_closed_ = false;
  std::atomic<bool> is_closing_{false};
};

}  // namespace tp_native::comm
