// SPDX-License-Identifier: Apache-2.0
#include "comm/board_communicator.h"

#include <algorithm>
#include <limits>

#include "comm/signature.h"
#include "core/callbacks.h"

namespace tp_native::comm {
namespace {

constexpr double kWarnSeconds = 30;

}  // namespace

BoardCommunicator::BoardCommunicator(Identity identity, std::shared_ptr<Board> board)
    : Communicator(std::move(identity)),
      board_(std::move(board)),
      seq_(board_->noted()),
      log_(1024) {}

void BoardCommunicator::collective(const Signature& signature, int64_t bytes, double timeout_s,
                                   const std::function<void()>& body) {
  check_not_forked();  // before the lock, which another thread may have held at the fork
  TPN_CHECK(!busy_thread_.is_this(), name(signature.op),
            " was called by a signal handler while this thread is in a collective of group ",
            identity_.name, ": set a flag there and look at it between steps");
  std::lock_guard lock(mutex_);
  const BusyThread::Collective running(busy_thread_, current_, signature);
  timeout_s_ = timeout_s > 0 ? timeout_s : identity_.timeout_s;
  waited_s_ = 0;
  next_warning_s_ = kWarnSeconds;
  seq_ = std::max(seq_, board_->noted()) + 1;
  check_usable();
  collectives_.fetch_add(1, std::memory_order_relaxed);
  bytes_.fetch_add(static_cast<uint64_t>(bytes), std::memory_order_relaxed);
  {
    std::lock_guard record(record_mutex_);
    log_[logged_++ % log_.size()] = {seq_, signature.op, signature.dtype,
                                     hash_signature(signature)};
  }
  board_->set_status(signature.op, seq_, true);
  board_->note(signature, seq_, bytes);
  try {
    body();
  } catch (...) {
    if (!failure_) fail_own(std::current_exception());
    throw;
  }
  board_->set_status(signature.op, seq_, false);
}

/// The body threw and has not failed the group; returns where that exception is to go on.
void BoardCommunicator::fail_own(const std::exception_ptr& thrown) {
  Verdict verdict{FailureKind::kError, identity_.rank,
                  concat("rank ", identity_.rank, " failed: ", text_of(thrown))};
  if (is_interrupted_) {
    verdict.kind = FailureKind::kInterrupted;
    verdict.text = concat("rank ", identity_.rank, " was interrupted by a signal");
  } else if (const std::optional<Verdict> reason = explain()) {
    const bool is_own =
        reason->culprit == identity_.rank &&
        (reason->kind == FailureKind::kInterrupted || reason->kind == FailureKind::kError);
    if (!is_own) fail_group(*reason);
    verdict = *reason;
  }
  const Verdict held = board_->claim(verdict);  // perhaps somebody else's
  keep(record_of(held));
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
  if (callbacks().check_signals) {
    is_interrupted_ = true;  // if it throws
    callbacks().check_signals();
    is_interrupted_ = false;
  }
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
  FailureRecord record = record_of(verdict);
  keep(record);
  raise(std::move(record));
}

FailureRecord BoardCommunicator::record_of(const Verdict& verdict) const {
  FailureRecord record;
  record.kind = verdict.kind;
  record.rank = identity_.rank;
  record.peer = verdict.culprit < identity_.size ? verdict.culprit : -1;
  record.op = current_ ? name(current_->op) : "no operation";
  record.seq = seq_;
  record.elapsed_s = waited_s_;
  record.message =
      current_ ? concat("rank ", identity_.rank, " in ", describe_current(), ": ", verdict.text)
               : concat("rank ", identity_.rank, " of group ", identity_.name, ": ", verdict.text);
  if (verdict.kind != FailureKind::kError)
    record.message += "; the group is unusable now, start its ranks again";
  if (verdict.kind != FailureKind::kInterrupted) record.message += board_->hint();
  return record;
}

void BoardCommunicator::keep(FailureRecord record) {
  {
    std::lock_guard lock(record_mutex_);
    failure_ = std::move(record);
  }
  drop();
}

/// Of the operation that runs: current_ is set.
std::string BoardCommunicator::describe_current() const {
  return concat(describe(*current_), " #", seq_);
}

void BoardCommunicator::abort(const std::string& reason) {
  if (is_forked_child()) return;
  board_->claim({FailureKind::kAborted, identity_.rank,
                 concat("rank ", identity_.rank, " aborted the group: ", reason)});
}

void BoardCommunicator::check() {
  check_not_forked();
  if (busy_thread_.is_this()) return;
  std::lock_guard lock(mutex_);
  waited_s_ = 0;
  check_usable();
  try {
    check_levels();
  } catch (...) {
    if (const auto reason = explain(); reason && !failure_) fail_group(*reason);
    throw;
  }
  if (const int left = board_->left_before(std::numeric_limits<uint64_t>::max()); left >= 0)
    fail_group({FailureKind::kPeerLost, left, concat("rank ", left, " left the group")});
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
  stats.late_share.resize(static_cast<size_t>(identity_.size));  // nobody's arrival is noted
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
