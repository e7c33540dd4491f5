// SPDX-License-Identifier: Apache-2.0
#include "comm/board_communicator.h"

#include <algorithm>

#include "comm/signature.h"
#include "core/callbacks.h"

namespace tp_native::comm {
namespace {

constexpr double kWarnSeconds = 30;

}  // namespace

BoardCommunicator::BoardCommunicator(Identity identity, std::shared_ptr<Board> board)
    : Communicator(std::move(identity)), board_(std::move(board)), log_(1024) {}

void BoardCommunicator::collective(const Signature& signature, int64_t bytes, double timeout_s,
                                   const std::function<void()>& body) {
  check_not_forked();  // before the lock, which another thread may have held at the fork
  TPN_CHECK(!busy_thread_.is_this(), name(signature.op),
            " was called by a signal handler while this thread is in a collective of group ",
            identity_.name, ": set a flag there and look at it between steps");
  std::lock_guard lock(mutex_);
  struct Current {  // while it is set, failures name this operation
    BoardCommunicator& self;
    ~Current() {
      self.current_ = nullptr;
      self.busy_thread_.leave();
    }
  } const current{*this};
  current_ = &signature;
  busy_thread_.enter();
  timeout_s_ = timeout_s > 0 ? timeout_s : identity_.timeout_s;
  waited_s_ = 0;
  next_warning_s_ = kWarnSeconds;
  ++seq_;
  check_usable();
  collectives_.fetch_add(1, std::memory_order_relaxed);
  bytes_.fetch_add(static_cast<uint64_t>(bytes), std::memory_order_relaxed);
  {
    std::lock_guard record(record_mutex_);
    log_[logged_++ % log_.size()] = {seq_, signature.op, signature.dtype,
                                     hash_signature(signature)};
  }
  board_->set_status(signature.op, seq_, true);
  try {
    body();
  } catch (...) {
    if (failure_) throw;
    const std::optional<Verdict> reason = explain();
    if (reason && !(reason->kind == FailureKind::kInterrupted && reason->culprit == identity_.rank))
      fail_group(*reason);
    // a signal handler of this process raised while it waited: its own exception goes on
    const Verdict verdict{FailureKind::kInterrupted, identity_.rank,
                          concat("rank ", identity_.rank, " was interrupted by a signal")};
    board_->claim(verdict);
    FailureRecord record;
    record.kind = verdict.kind;
    record.rank = record.peer = identity_.rank;
    record.op = name(signature.op);
    record.seq = seq_;
    record.message = verdict.text;
    {
      std::lock_guard kept(record_mutex_);
      failure_ = std::move(record);
    }
    drop();
    throw;
  }
  board_->set_status(signature.op, seq_, false);
}

void BoardCommunicator::poll(double waited_s) {
  waited_s_ = waited_s;
  if (const auto verdict = board_->verdict()) raise_verdict(*verdict);
  if (is_closing_.load(std::memory_order_acquire)) {
    fail_group({FailureKind::kAborted, identity_.rank,
                concat("rank ", identity_.rank,
                       " closed the group while one of its threads was in a collective")});
  }
  if (const int left = board_->left_before(seq_); left >= 0)
    fail_group({FailureKind::kPeerLost, left, concat("rank ", left, " left the group")});
  if (callbacks().check_signals) callbacks().check_signals();
  if (waited_s >= timeout_s_) {
    const Late late = find_late(board_->call_roll(), seq_);
    fail_group({FailureKind::kTimeout, late.culprit,
                concat(late.culprit >= 0 ? concat("rank ", late.culprit) : "a rank",
                       " did not come within ", timeout_s_, " s; ", late.table,
                       "; raise timeout_s if it is only slow")});
  }
  if (waited_s >= next_warning_s_) {
    next_warning_s_ += kWarnSeconds;
    warn(concat("rank ", identity_.rank, " has waited ", static_cast<int>(waited_s), " s in ",
                describe_current()));
  }
}

void BoardCommunicator::check_not_forked() const {
  TPN_CHECK(!is_forked_child(), "group ", identity_.name,
            " was made before fork(): a forked child cannot use it; make the child first, or use "
            "spawn");
}

void BoardCommunicator::check_usable() {
  if (failure_) raise(*failure_);
  TPN_CHECK(!is_closed_ && !is_closing_.load(std::memory_order_acquire), "group ", identity_.name,
            " is closed: make a new one");
  if (const auto verdict = board_->verdict()) raise_verdict(*verdict);
}

void BoardCommunicator::fail_group(const Verdict& verdict) {
  raise_verdict(board_->claim(verdict));  // whoever was first is what all ranks report
}

void BoardCommunicator::raise_verdict(const Verdict& verdict) {
  FailureRecord record;
  record.kind = verdict.kind;
  record.rank = identity_.rank;
  record.peer = verdict.culprit < identity_.size ? verdict.culprit : -1;
  record.op = name(current_->op);
  record.seq = seq_;
  record.elapsed_s = waited_s_;
  record.message = concat("rank ", identity_.rank, " in ", describe_current(), ": ", verdict.text);
  if (verdict.kind != FailureKind::kError)
    record.message += "; the group is unusable now, start its ranks again";
  {
    std::lock_guard kept(record_mutex_);
    failure_ = record;
  }
  drop();
  raise(std::move(record));
}

std::string BoardCommunicator::describe_current() const {
  return concat(describe(*current_), " #", seq_);
}

void BoardCommunicator::abort(const std::string& reason) {
  if (is_forked_child()) return;
  board_->claim({FailureKind::kAborted, identity_.rank,
                 concat("rank ", identity_.rank, " aborted the group: ", reason)});
}

void BoardCommunicator::close() {
  if (is_forked_child()) return;                       // it would leave in its parent's name
  is_closing_.store(true, std::memory_order_release);  // sends away a thread that waits
  if (busy_thread_.is_any()) interrupt();
  if (busy_thread_.is_this())
    return;  // the wait below this handler ends the group; then close() comes again
  {
    std::lock_guard lock(mutex_);
    if (std::exchange(is_closed_, true)) return;
  }
  board_->leave();
  release();
}

Stats BoardCommunicator::stats() const {
  Stats stats;
  stats.collectives = collectives_.load(std::memory_order_relaxed);
  stats.bytes = bytes_.load(std::memory_order_relaxed);
  return stats;
}

std::vector<LogEntry> BoardCommunicator::op_log() const {
  if (is_forked_child()) return {};  // another thread may have held the lock at the fork
  std::lock_guard lock(record_mutex_);
  std::vector<LogEntry> entries;
  for (uint64_t i = logged_ - std::min<uint64_t>(logged_, log_.size()); i < logged_; ++i)
    entries.push_back(log_[i % log_.size()]);
  return entries;
}

std::optional<FailureRecord> BoardCommunicator::failure() const {
  if (is_forked_child()) return std::nullopt;
  std::lock_guard lock(record_mutex_);
  return failure_;
}

}  // namespace tp_native::comm
