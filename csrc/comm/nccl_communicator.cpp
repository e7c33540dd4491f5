// SPDX-License-Identifier: Apache-2.0
#include "comm/nccl_communicator.h"

#include <algorithm>
#include <chrono>
#include <numeric>

#include "core/callbacks.h"
#include "core/clock.h"
#include "core/fault.h"
#include "kernels/cuda.h"

namespace tp_native::comm {
namespace {

constexpr double kWatchSeconds = 0.01;
constexpr double kWarnSeconds = 30;
constexpr double kBlameSeconds = 0.5;  // NCCL may notice a death before the watch has named it
bool is_perhaps_a_peers(int result) {
  return result == nccl::kSystemError || result == nccl::kInternalError ||
         result == nccl::kRemoteError;
}
constexpr double kEndSeconds = 5;  // for what is pending, then for NCCL to finish

void sleep_s(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

int64_t total(std::span<const int64_t> counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

bool is_even(std::span<const int64_t> counts) {
  return std::ranges::all_of(counts, [&](int64_t n) { return n == counts[0]; });
}

std::vector<int64_t> times(std::span<const int64_t> counts, int64_t factor) {
  std::vector<int64_t> out;
  for (const int64_t n : counts) out.push_back(n * factor);
  return out;
}

void apply_epilogue(const Signature& s, const Epilogue& e, void* out, int64_t count,
                    cuda::StreamHandle stream) {
  if (count == 0 || (!e.bias && !e.residual && !e.norm_weight)) return;
  const int64_t columns = e.columns > 0 ? e.columns : count;
  kernels::cuda::apply_epilogue({.dtype = s.dtype,
                                 .sum = out,
                                 .out = out,
                                 .rows = count / columns,
                                 .columns = columns,
                                 .bias = e.bias,
                                 .residual = e.residual,
                                 .norm_weight = e.norm_weight,
                                 .eps = e.eps,
                                 .hidden = e.hidden},
                                stream);
}

}  // namespace

NcclCommunicator::NcclCommunicator(Identity identity, const nccl::Api& api,
                                   const cuda::Device& device,
                                   std::shared_ptr<Communicator> control,
                                   std::shared_ptr<Board> board)
    : BoardCommunicator(std::move(identity), std::move(board)),
      api_(api),
      device_(device),
      control_(std::move(control)),
      thread_([this] { watch(); }) {}

NcclCommunicator::~NcclCommunicator() {
  if (is_forked_child()) {
    new std::thread(std::move(thread_));  // it does not exist here: never joined, never ended
    return;
  }
  close();
  if (thread_.joinable()) thread_.join();
}

void NcclCommunicator::connect(const nccl::UniqueId& id, nccl::Config config, double timeout_s) {
  const Signature signature{.op = OpCode::kInit};
  collective(signature, 0, timeout_s, [&] {
    const cuda::Current current(device_);
    int result = 0;
    {
      std::lock_guard lock(nccl_mutex_);
      TPN_FAULT("nccl.init");
      result = api_.CommInitRankConfig(&handle_, identity_.size, id, identity_.rank, &config);
    }
    await_ready("CommInitRankConfig", result);
    board().finish(seq());
  });
}

// ---- calls

void NcclCommunicator::await_ready(const char* name, int result) {
  const double start = now_s();
  double pause_s = 20e-6;
  while (result == nccl::kSuccess || result == nccl::kInProgress) {
    {
      std::lock_guard lock(nccl_mutex_);
      int state = nccl::kSuccess;
      result = handle_ ? api_.CommGetAsyncError(handle_, &state) : nccl::kInternalError;
      if (result == nccl::kSuccess) result = state;
    }
    if (result == nccl::kSuccess) return;
    if (result != nccl::kInProgress) break;
    poll(now_s() - start);
    sleep_s(pause_s);
    pause_s = std::min(2 * pause_s, 1e-3);
  }
  fail_call(name, result);
}

void NcclCommunicator::fail_call(const char* name, int result) {
  std::string text;
  {
    std::lock_guard lock(nccl_mutex_);
    text = nccl::text_of(api_, result, handle_);
  }
  const double blame_s = is_perhaps_a_peers(result) ? kBlameSeconds : 0;
  for (const double end = now_s() + blame_s; now_s() < end; sleep_s(1e-3))
    poll(0);  // raises what the others know better
  const bool is_peers = result == nccl::kRemoteError;
  fail_group({is_peers ? FailureKind::kPeerLost : FailureKind::kError,
              is_peers ? -1 : identity_.rank,
              concat("nccl", name, " failed on rank ", identity_.rank, ": ", text)});
}

template <class Call>
void NcclCommunicator::call(const char* name, const Call& fn) {
  int result = nccl::kInternalError;
  {
    std::lock_guard lock(nccl_mutex_);
    TPN_FAULT("nccl.call");
    if (handle_) result = fn(handle_);
  }
  if (result == nccl::kInProgress) {
    await_ready(name, result);
  } else if (result != nccl::kSuccess) {
    fail_call(name, result);
  }
}

template <class Calls>
void NcclCommunicator::grouped(const Calls& calls) {
  call("GroupEnd", [&](nccl::Handle handle) {
    if (const int result = api_.GroupStart()) return result;
    const int result = calls(handle);
    const int ended = api_.GroupEnd();  // also after a failure: the group is this thread's
    return result != nccl::kSuccess && result != nccl::kInProgress ? result : ended;
  });
}

void NcclCommunicator::launch(const Signature& signature, int64_t bytes, Stream stream,
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

// ---- collectives

void NcclCommunicator::all_reduce(const Signature& s, const void* in, void* out, int64_t count,
                                  const Epilogue& epilogue, Stream stream) {
  const int type = nccl::reduced_type(s.dtype);
  const int op = nccl::reduction(s.dtype, s.reduce);
  launch(s, count * static_cast<int64_t>(item_bytes(s.dtype)), stream, [&](cuda::StreamHandle on) {
    if (count > 0) {
      call("AllReduce", [&](nccl::Handle h) {
        return api_.AllReduce(in, out, static_cast<size_t>(count), type, op, h, on);
      });
    }
    apply_epilogue(s, epilogue, out, count, on);
  });
}

/// Rank r's `bytes[r]` bytes, one block behind the other.
void NcclCommunicator::gather_blocks(const void* in, char* out, std::span<const int64_t> bytes,
                                     cuda::StreamHandle on) {
  if (total(bytes) == 0) return;
  if (is_even(bytes)) {
    call("AllGather", [&](nccl::Handle h) {
      return api_.AllGather(in, out, static_cast<size_t>(bytes[0]), nccl::kBytes, h, on);
    });
    return;
  }
  grouped([&](nccl::Handle h) {
    char* to = out;
    for (int r = 0; r < identity_.size; to += bytes[r++]) {
      if (bytes[r] == 0) continue;
      const int result = api_.Broadcast(r == identity_.rank ? in : to, to,
                                        static_cast<size_t>(bytes[r]), nccl::kBytes, r, h, on);
      if (result != nccl::kSuccess && result != nccl::kInProgress) return result;
    }
    return static_cast<int>(nccl::kSuccess);
  });
}

void NcclCommunicator::all_gather(const Signature& s, const void* in, void* out, int64_t rows,
                                  std::span<const int64_t> columns, Stream stream) {
  const std::vector<int64_t> widths =
      times(columns, static_cast<int64_t>(item_bytes(s.dtype)));  // of a row, by rank
  const int64_t pitch = total(widths);
  launch(s, rows * widths[identity_.rank], stream, [&](cuda::StreamHandle on) {
    if (rows <= 1) {
      gather_blocks(in, static_cast<char*>(out), times(widths, rows), on);
      return;
    }
    const cuda::Workspace blocks(rows * pitch, on, "all_gather");
    gather_blocks(in, blocks.data(), times(widths, rows), on);
    const char* from = blocks.data();
    char* to = static_cast<char*>(out);
    for (const int64_t width : widths) {
      cuda::copy_rows(to, pitch, from, width, width, rows, on);
      from += rows * width;
      to += width;
    }
  });
}

void NcclCommunicator::reduce_scatter(const Signature& s, const void* in, void* out,
                                      std::span<const int64_t> counts, Stream stream) {
  const int type = nccl::reduced_type(s.dtype);
  const int op = nccl::reduction(s.dtype, s.reduce);
  const std::vector<int64_t> bytes = times(counts, static_cast<int64_t>(item_bytes(s.dtype)));
  const int64_t most = std::ranges::max(counts);
  launch(s, total(bytes), stream, [&](cuda::StreamHandle on) {
    const auto reduce = [&](const void* from, void* to) {
      call("ReduceScatter", [&](nccl::Handle h) {
        return api_.ReduceScatter(from, to, static_cast<size_t>(most), type, op, h, on);
      });
    };
    if (most == 0) return;
    if (is_even(counts)) {
      reduce(in, out);
      return;
    }
    // NCCL cuts evenly: every part is as long as the longest, and what fills it up is not read
    const int64_t part = std::ranges::max(bytes);
    const cuda::Workspace padded((identity_.size + 1) * part, on, "reduce_scatter");
    const char* from = static_cast<const char*>(in);
    for (int r = 0; r < identity_.size; from += bytes[r++])
      cuda::copy(padded.data() + r * part, from, bytes[r], on);
    char* const mine = padded.data() + identity_.size * part;
    reduce(padded.data(), mine);
    cuda::copy(out, mine, bytes[identity_.rank], on);
  });
}

void NcclCommunicator::gather(const Signature& s, const void* in, void* out,
                              std::span<const int64_t> counts, Stream stream) {
  const std::vector<int64_t> bytes = times(counts, static_cast<int64_t>(item_bytes(s.dtype)));
  const int64_t mine = bytes[identity_.rank];
  launch(s, mine, stream, [&](cuda::StreamHandle on) {
    const bool is_root = identity_.rank == s.root;
    if (total(bytes) == 0) return;
    grouped([&](nccl::Handle h) {
      int result = nccl::kSuccess;
      if (!is_root)
        return mine == 0 ? result
                         : api_.Send(in, static_cast<size_t>(mine), nccl::kBytes, s.root, h, on);
      char* to = static_cast<char*>(out);
      for (int r = 0; r < identity_.size; to += bytes[r++]) {
        if (r == s.root || bytes[r] == 0) continue;
        result = api_.Recv(to, static_cast<size_t>(bytes[r]), nccl::kBytes, r, h, on);
        if (result != nccl::kSuccess && result != nccl::kInProgress) return result;
      }
      return static_cast<int>(nccl::kSuccess);
    });
    if (is_root) {
      const int64_t before = total(std::span(bytes).first(static_cast<size_t>(s.root)));
      cuda::copy(static_cast<char*>(out) + before, in, mine, on);
    }
  });
}

void NcclCommunicator::scatter(const Signature& s, const void* in, void* out,
                               std::span<const int64_t> counts, Stream stream) {
  const std::vector<int64_t> bytes = times(counts, static_cast<int64_t>(item_bytes(s.dtype)));
  const int64_t mine = bytes[identity_.rank];
  launch(s, mine, stream, [&](cuda::StreamHandle on) {
    const bool is_root = identity_.rank == s.root;
    if (total(bytes) == 0) return;
    grouped([&](nccl::Handle h) {
      int result = nccl::kSuccess;
      if (!is_root)
        return mine == 0 ? result
                         : api_.Recv(out, static_cast<size_t>(mine), nccl::kBytes, s.root, h, on);
      const char* from = static_cast<const char*>(in);
      for (int r = 0; r < identity_.size; from += bytes[r++]) {
        if (r == s.root || bytes[r] == 0) continue;
        result = api_.Send(from, static_cast<size_t>(bytes[r]), nccl::kBytes, r, h, on);
        if (result != nccl::kSuccess && result != nccl::kInProgress) return result;
      }
      return static_cast<int>(nccl::kSuccess);
    });
    if (is_root) {
      const int64_t before = total(std::span(bytes).first(static_cast<size_t>(s.root)));
      cuda::copy(out, static_cast<const char*>(in) + before, mine, on);
    }
  });
}

void NcclCommunicator::broadcast(const Signature& s, void* data, int64_t count, Stream stream) {
  const int64_t bytes = count * static_cast<int64_t>(item_bytes(s.dtype));
  launch(s, bytes, stream, [&](cuda::StreamHandle on) {
    if (bytes == 0) return;
    call("Broadcast", [&](nccl::Handle h) {
      return api_.Broadcast(data, data, static_cast<size_t>(bytes), nccl::kBytes, s.root, h, on);
    });
  });
}

void NcclCommunicator::barrier(double timeout_s, Stream) {
  const Signature signature{.op = OpCode::kBarrier};
  collective(signature, 0, timeout_s, [&] { control_->barrier(this->timeout_s(), {}); });
}

// ---- the watch

void NcclCommunicator::watch() {
  const PlainErrors plain;
  std::unique_lock lock(watch_mutex_);
  while (!is_failed_ && !is_ending_) {
    changed_.wait_for(lock, std::chrono::duration<double>(kWatchSeconds));
    if (is_failed_ || is_ending_) break;
    lock.unlock();
    try {
      const cuda::Current current(device_);
      board().look();
      look_at_nccl();
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
  end_nccl();
  lock.lock();
  has_ended_ = true;
  changed_.notify_all();
}

void NcclCommunicator::look_at_nccl() {
  int state = nccl::kSuccess;
  std::string text;
  {
    std::lock_guard lock(nccl_mutex_);
    if (!handle_) return;
    const int result = api_.CommGetAsyncError(handle_, &state);
    if (result != nccl::kSuccess) state = result;
    if (state == nccl::kSuccess || state == nccl::kInProgress) return;
    text = nccl::text_of(api_, state, handle_);
  }
  const double blame_s = is_perhaps_a_peers(state) ? kBlameSeconds : 0;
  for (const double end = now_s() + blame_s; now_s() < end; sleep_s(1e-3)) {
    board().look();
    if (board().verdict()) return;
  }
  const bool is_peers = state == nccl::kRemoteError;
  board().claim({is_peers ? FailureKind::kPeerLost : FailureKind::kError,
                 is_peers ? -1 : identity_.rank,
                 concat("NCCL failed on rank ", identity_.rank, ": ", text)});
}

void NcclCommunicator::look_at_pending() {
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
bool NcclCommunicator::drain(double end_s) {
  for (; now_s() < end_s && !board().verdict(); sleep_s(1e-3)) {
    look_at_pending();
    std::lock_guard lock(pending_mutex_);
    if (pending_.empty()) return true;
  }
  return false;
}

void NcclCommunicator::end_nccl() noexcept {
  nccl::Handle handle = nullptr;
  {
    std::lock_guard lock(nccl_mutex_);
    handle = std::exchange(handle_, nullptr);  // nobody else calls anything on it now
  }
  if (!handle) return;
  bool is_orderly = false;
  try {
    const cuda::Current current(device_);
    if (!board().verdict() && drain(now_s() + kEndSeconds)) {
      int state = api_.CommFinalize(handle);
      const double end = now_s() + kEndSeconds;
      while (state == nccl::kInProgress && now_s() < end) {
        sleep_s(1e-3);
        if (api_.CommGetAsyncError(handle, &state) != nccl::kSuccess) break;
      }
      is_orderly = state == nccl::kSuccess && api_.CommDestroy(handle) == nccl::kSuccess;
    }
    if (!is_orderly) (void)api_.CommAbort(handle);
    std::lock_guard lock(pending_mutex_);
    pending_.clear();
    spare_.clear();
  } catch (const std::exception& error) {
    warn_later(concat("group ", identity_.name, " ended badly on rank ", identity_.rank, ": ",
                      error.what()));
    if (!is_orderly) (void)api_.CommAbort(handle);
  }
}

void NcclCommunicator::drop() noexcept {
  {
    std::lock_guard lock(watch_mutex_);
    is_failed_ = true;
  }
  changed_.notify_all();
}

void NcclCommunicator::interrupt() noexcept {
  try {
    control_->close();               // sends away who waits in a barrier
  } catch (const std::exception&) {  // whoever waits there says why
  }
}

void NcclCommunicator::release() noexcept {
  std::unique_lock lock(watch_mutex_);
  is_ending_ = true;
  changed_.notify_all();
  const auto limit = std::chrono::duration<double>(2 * kEndSeconds + 2);
  if (changed_.wait_for(lock, limit, [&] { return has_ended_; })) {
    lock.unlock();
    thread_.join();
    return;
  }
  lock.unlock();
  const auto self = weak_from_this().lock();
  if (!self) return;  // the destructor waits
  warn(concat("group ", identity_.name, ": NCCL does not end on rank ", identity_.rank,
              "; it is left behind until this process ends"));
  new std::shared_ptr<NcclCommunicator>(self);  // its thread goes on
}

}  // namespace tp_native::comm
