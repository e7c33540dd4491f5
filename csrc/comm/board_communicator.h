// SPDX-License-Identifier: Apache-2.0
// Life and failures of communicators whose ranks share no memory: what they agree on goes over a
// Board. How bytes move is the business of those that derive from it.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "comm/arena.h"
#include "comm/board.h"
#include "comm/busy_thread.h"
#include "comm/communicator.h"

namespace tp_native::comm {

class BoardCommunicator : public Communicator {
 public:
  Block allocate(int64_t) override { return {}; }
  void abort(const std::string& reason) override;
  void check() override;
  void close() override;
  Stats stats() const override;
  std::vector<LogEntry> op_log() const override;
  std::optional<FailureRecord> failure() const override;
  /// For another communicator of the same ranks, which then fails and leaves with this one.
  const std::shared_ptr<Board>& shared_board() const { return board_; }

 protected:
  BoardCommunicator(Identity identity, std::shared_ptr<Board> board);

  /// Runs `body` as this rank's next operation. What it throws poisons the group on all ranks.
  void collective(const Signature& signature, int64_t bytes, double timeout_s,
                  const std::function<void()>& body);
  /// Called every now and then while this rank has waited `waited_s`; throws if it should not go
  /// on.
  void poll(double waited_s);
  [[noreturn]] void fail_group(const Verdict& verdict);

  /// Why the body threw, where that is known better than from its exception.
  virtual std::optional<Verdict> explain() { return std::nullopt; }
  /// check() of what this one is made of: throws what explain() then translates.
  virtual void check_levels() {}
  /// The group has failed: nothing may stay pending.
  virtual void drop() noexcept = 0;
  /// close() was called while a collective runs, perhaps by a signal handler inside it: poll() ends
  /// it, and where waits do not pass there, this does.
  virtual void interrupt() noexcept {}
  /// The group ends on this rank; no collective runs.
  virtual void release() noexcept = 0;

  Board& board() const { return *board_; }
  double timeout_s() const { return timeout_s_; }
  uint64_t seq() const { return seq_; }
  bool is_forked_child() const { return owner_.is_elsewhere(); }

 private:
  void check_not_forked() const;
  void check_usable();
  [[noreturn]] void raise_verdict(const Verdict& verdict);
  void fail_own(const std::exception_ptr& thrown);
  FailureRecord record_of(const Verdict& verdict) const;
  void keep(FailureRecord record);
  std::string describe_current() const;

  Owner owner_;
  std::shared_ptr<Board> board_;
  std::mutex mutex_;        ///< one collective of this rank at a time; guards what follows
  BusyThread busy_thread_;  ///< who holds it for a collective
  const Signature* current_ = nullptr;
  double timeout_s_ = 0;
  double waited_s_ = 0;
  double next_warning_s_ = 0;
  uint64_t seq_ = 0;
  bool is_interrupted_ = false;  ///< a signal handler raised
  bool is_closed_ = false;

  mutable std::mutex record_mutex_;  ///< never held for long; both are for readers without mutex_
  std::optional<FailureRecord> failure_;  ///< written under both
  std::vector<LogEntry> log_;
  uint64_t logged_ = 0;

  std::atomic<uint64_t> collectives_{0};  // written under mutex_, read without it
  std::atomic<uint64_t> bytes_{0};
  std::atomic<bool> is_closing_{false};
};

}  // namespace tp_native::comm
