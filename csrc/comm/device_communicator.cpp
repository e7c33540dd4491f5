// SPDX-License-Identifier: Apache-2.0
#include "comm/device_communicator.h"

#include <algorithm>
#include <chrono>

#include "core/callbacks.h"
#include "core/clock.h"

namespace tp_native::comm {
namespace {

constexpr double kWatchSeconds = 0.01;
constexpr double kWarnSeconds = 30;
constexpr double kDrainSeconds = 5;
constexpr double kEndSeconds = 12;  // what is pending, then the library

}  // namespace

DeviceCommunicator::DeviceCommunicator(Identity identity, const cuda::Device& device,
                                       std::shared_ptr<Communicator> control,
                                       std::shared_ptr<Board> board)
    : BoardCommunicator(std::move(identity), std::move(board)),
      device_(device),
      control_(std::move(control)) {}

DeviceCommunicator::~DeviceCommunicator() = default;

void DeviceCommunicator::start_watch() {
  thread_ = std::thread([this] { watch(); });
}

void DeviceCommunicator::stop_watch() {
  if (is_forked_child()) {
    new std::thread(std::move(thread_));  // it does not exist here: never joined, never ended
    return;
  }
  close();
  if (thread_.joinable()) thread_.join();
}

void DeviceCommunicator::launch(const Signature& signature, int64_t bytes, Stream stream,
                                const std::function<void(cuda::StreamHandle)>& body) {
  collective(signature, bytes, 0, [&] {
    const cuda::Current current(device_);
    auto* const handle = static_cast<cuda::StreamHandle>(stream.handle);
    body(handle);
    if (cuda::is_capturing(handle)) {  // nothing runs now, and a replay is noted nowhere
      board().finish(seq());
      return;
    }
    std::lock_guard lock(pending_mutex_);
    cuda::Event event = [&] {
      if (spare_.empty()) return cuda::Event();
      cuda::Event last = std::move(spare_.back());
      spare_.pop_back();
      return last;
    }();
    event.record(handle);
    pending_.push_back({seq(), std::move(event), now_s()});
  });
}

void DeviceCommunicator::barrier(double timeout_s, Stream) {
  const Signature signature{.op = OpCode::kBarrier};
  collective(signature, 0, timeout_s, [&] { control_->barrier(this->timeout_s(), {}); });
}

std::vector<int64_t> DeviceCommunicator::tell_all(OpCode op, std::span<const int64_t> mine) {
  const auto size = static_cast<size_t>(identity_.size);
  std::vector<int64_t> all(size * mine.size());
  const std::vector<int64_t> columns(size, static_cast<int64_t>(mine.size()));
  const int64_t shape[] = {static_cast<int64_t>(all.size())};
  control_->all_gather({.op = op, .dtype = DType::kInt64, .shape = shape}, mine.data(), all.data(),
                       1, columns, {});
  return all;
}

// ---- the watch

void DeviceCommunicator::watch() {
  const PlainErrors plain;
  std::unique_lock lock(watch_mutex_);
  while (!is_failed_ && !is_ending_) {
    changed_.wait_for(lock, std::chrono::duration<double>(kWatchSeconds));
    if (is_failed_ || is_ending_) break;
    lock.unlock();
    try {
      const cuda::Current current(device_);
      board().look();
      control_->look();
      look_at_library();
      look_at_pending();
    } catch (const std::exception& error) {
      board().claim({FailureKind::kError, identity_.rank,
                     concat("rank ", identity_.rank, " failed: ", error.what())});
    }
    const bool has_failed = board().verdict().has_value();
    lock.lock();
    is_failed_ = is_failed_ || has_failed;
  }
  lock.unlock();
  finish();
  lock.lock();
  has_ended_ = true;
  changed_.notify_all();
}

void DeviceCommunicator::look_at_pending() {
  std::lock_guard lock(pending_mutex_);
  while (!pending_.empty() && pending_.front().event.is_reached()) {
    board().finish(pending_.front().seq);
    spare_.push_back(std::move(pending_.front().event));
    pending_.pop_front();
  }
  if (pending_.empty()) return;
  Pending& oldest = pending_.front();
  if (const int left = board().left_before(oldest.seq); left >= 0) {
    board().claim({FailureKind::kPeerLost, left, concat("rank ", left, " left the group")});
    return;
  }
  const double waited_s = now_s() - oldest.since_s;
  const bool is_late = waited_s >= identity_.timeout_s;
  if (!is_late && (oldest.is_warned || waited_s < kWarnSeconds)) return;
  const Late late = find_late(board().call_roll(), oldest.seq);
  const std::string who =
      late.culprit >= 0 ? concat("rank ", late.culprit, " did not come")
                        : std::string("all ranks called it, but a GPU did not get through it");
  if (is_late) {
    board().claim({FailureKind::kTimeout, late.culprit,
                   concat("operation #", oldest.seq, ": ", who, " within ", identity_.timeout_s,
                          " s; ", late.table, "; raise timeout_s if it is only slow")});
    return;
  }
  oldest.is_warned = true;
  warn_later(concat("rank ", identity_.rank, " of group ", identity_.name, " has waited ",
                    static_cast<int>(waited_s), " s for operation #", oldest.seq, " on ",
                    device_.name(), ": ", who, "; ", late.table));
}

/// True once nothing is pending, false when it is too late or the group fails first.
bool DeviceCommunicator::drain(double end_s) {
  for (; now_s() < end_s && !board().verdict();
       std::this_thread::sleep_for(std::chrono::milliseconds(1))) {
    look_at_pending();
    std::lock_guard lock(pending_mutex_);
    if (pending_.empty()) return true;
  }
  return false;
}

/// The watch's last act.
void DeviceCommunicator::finish() noexcept {
  const auto clear = [&] {
    std::lock_guard lock(pending_mutex_);
    pending_.clear();
    spare_.clear();
  };
  try {
    const cuda::Current current(device_);
    end(!board().verdict() && drain(now_s() + kDrainSeconds));
    clear();
  } catch (const std::exception& error) {
    warn_later(concat("group ", identity_.name, " ended badly on rank ", identity_.rank, ": ",
                      error.what()));
    end(false);
  }
}

void DeviceCommunicator::drop() noexcept {
  {
    std::lock_guard lock(watch_mutex_);
    is_failed_ = true;
  }
  changed_.notify_all();
}

void DeviceCommunicator::interrupt() noexcept { close_control(); }

void DeviceCommunicator::close_control() noexcept {
  try {
    control_->close();               // sends away who waits in a barrier
  } catch (const std::exception&) {  // whoever waits there says why
  }
}

void DeviceCommunicator::release() noexcept {
  std::unique_lock lock(watch_mutex_);
  is_ending_ = true;
  changed_.notify_all();
  const auto limit = std::chrono::duration<double>(kEndSeconds);
  if (changed_.wait_for(lock, limit, [&] { return has_ended_; })) {
    lock.unlock();
    thread_.join();
    close_control();
    return;
  }
  lock.unlock();
  close_control();
  const auto self = weak_from_this().lock();
  if (!self) return;  // the destructor waits
  warn(concat("group ", identity_.name, ": a GPU does not end its work on rank ", identity_.rank,
              "; it is left behind until this process ends"));
  new std::shared_ptr<DeviceCommunicator>(self);  // its thread goes on
}

}  // namespace tp_native::comm
