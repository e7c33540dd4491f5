// SPDX-License-Identifier: Apache-2.0
#include "comm/nccl_communicator.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <numeric>

#include "core/callbacks.h"
#include "core/clock.h"
#include "kernels/cuda.h"

namespace tp_native::comm {
namespace {

constexpr double kBlameSeconds = 0.5;  // NCCL may notice a death before the watch has named it
bool is_perhaps_a_peers(int result) {
  return result == nccl::kSystemError || result == nccl::kInternalError ||
         result == nccl::kRemoteError;
}
constexpr double kFinalizeSeconds = 5;

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
    : DeviceCommunicator(std::move(identity), device, std::move(control), std::move(board)),
      api_(api),
      best_registration_(nccl::registration_of(api)) {
  start_watch();
}

NcclCommunicator::~NcclCommunicator() { stop_watch(); }

void NcclCommunicator::connect(const nccl::UniqueId& id, nccl::Config config, double timeout_s) {
  const Signature signature{.op = OpCode::kInit};
  collective(signature, 0, timeout_s, [&] {
    const cuda::Current current(device());
    int result = 0;
    {
      std::lock_guard lock(nccl_mutex_);
      result = api_.CommInitRankConfig(&handle_, identity_.size, id, identity_.rank, &config);
    }
    await_ready("CommInitRankConfig", result);
    board().finish(seq());
  });
}

// ---- calls

/// What becomes of a call that answered `result`; still in progress once `limit_s` are over.
int NcclCommunicator::outcome(int result, double limit_s) {
  const double start = now_s();
  double pause_s = 20e-6;
  while (result == nccl::kSuccess || result == nccl::kInProgress) {
    {
      std::lock_guard lock(nccl_mutex_);
      int state = nccl::kSuccess;
      result = handle_ ? api_.CommGetAsyncError(handle_, &state) : nccl::kInternalError;
      if (result == nccl::kSuccess) result = state;
    }
    if (result != nccl::kInProgress) break;
    const double waited_s = now_s() - start;
    poll(waited_s);
    if (waited_s >= limit_s) break;
    sleep_s(pause_s);
    pause_s = std::min(2 * pause_s, 1e-3);
  }
  return result;
}

void NcclCommunicator::await_ready(const char* name, int result) {
  result = outcome(result, std::numeric_limits<double>::infinity());
  if (result != nccl::kSuccess) fail_call(name, result);
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

// ---- kernels of ours for small sums

bool NcclCommunicator::reduce_by_peers(const Signature& s, const void* in, void* out, int64_t count,
                                       const Epilogue& e, cuda::StreamHandle on) {
  if (!peers_ || count == 0) return false;
  const int64_t bytes = count * static_cast<int64_t>(item_bytes(s.dtype));
  const kernels::AllReduceKind kind = kernels::choose_all_reduce(bytes, identity_.size);
  if (kind == kernels::AllReduceKind::kLibrary || bytes > peers_->payload_bytes()) return false;
  const bool is_fused =
      e.norm_weight ? kernels::fuses_norm(kind, bytes) : kind == kernels::AllReduceKind::kOneShot;
  peers_->all_reduce(kind, s, in, out, count, is_fused ? e : Epilogue{}, on);
  if (!is_fused) apply_epilogue(s, e, out, count, on);
  return true;
}

/// Sums of integers, which no order changes, by both forms of our kernel and by NCCL.
bool NcclCommunicator::agrees_with_nccl(PeerMemory& memory) {
  constexpr int64_t kCount = 4099;
  const auto bytes = static_cast<int64_t>(kCount * sizeof(int32_t));
  const Signature sums{.op = OpCode::kInit, .dtype = DType::kInt32};
  const cuda::Stream stream;
  const cuda::StreamHandle on = stream.get();
  const cuda::Workspace space(5 * bytes, on, "comparing all-reduces");
  const auto part = [&](int i) { return space.data() + i * bytes; };
  std::vector<int32_t> values(kCount);
  for (int64_t i = 0; i < kCount; ++i)
    values[i] = static_cast<int32_t>(
        (static_cast<uint32_t>(i) * 2654435761u + static_cast<uint32_t>(identity_.rank) * 40503u) >>
        6);  // 26 bits: 16 ranks' sum fits
  cuda::copy(part(0), values.data(), bytes, on);
  call("AllReduce", [&](nccl::Handle h) {
    return api_.AllReduce(part(0), part(1), kCount, nccl::reduced_type(DType::kInt32), 0, h, on);
  });
  memory.all_reduce(kernels::AllReduceKind::kOneShot, sums, part(0), part(2), kCount, {}, on);
  memory.all_reduce(kernels::AllReduceKind::kTwoShot, sums, part(0), part(3), kCount, {}, on);
  std::vector<int32_t> sum(kCount);
  std::vector<int32_t> other(kCount);
  const auto read = [&](int from, std::vector<int32_t>& to) {
    cuda::copy(to.data(), part(from), bytes, on);
    const cuda::Event event;
    event.record(on);
    for (const double start = now_s(); !event.is_reached(); sleep_s(1e-4)) poll(now_s() - start);
  };
  read(1, sum);
  read(2, other);
  bool is_equal = sum == other;
  read(3, other);
  is_equal = is_equal && sum == other;
  values[0] = is_equal ? 1 : 0;
  cuda::copy(part(0), values.data(), sizeof(int32_t), on);
  call("AllReduce", [&](nccl::Handle h) {
    return api_.AllReduce(part(0), part(1), 1, nccl::reduced_type(DType::kInt32),
                          nccl::reduction(DType::kInt32, ReduceOp::kMin), h, on);
  });
  read(1, sum);
  return sum[0] == 1;
}

void NcclCommunicator::use_peers(std::unique_ptr<PeerMemory> memory) {
  bool is_good = false;
  collective({.op = OpCode::kInit}, 0, 0, [&] {
    const cuda::Current current(device());
    {
      std::lock_guard lock(peers_mutex_);
      peers_ = std::move(memory);  // a failure from here on ends its kernels
    }
    is_good = agrees_with_nccl(*peers_);
    board().finish(seq());
  });
  if (is_good) return;
  std::lock_guard lock(peers_mutex_);
  peers_.reset();
  warn(concat("group ", identity_.name,
              ": all-reduce over peer memory does not give NCCL's sums on this machine; NCCL's is "
              "used for all sizes"));
}

void NcclCommunicator::drop() noexcept {
  {
    std::lock_guard lock(peers_mutex_);
    if (peers_) peers_->abort();
  }
  DeviceCommunicator::drop();
}

// ---- collectives

void NcclCommunicator::all_reduce(const Signature& s, const void* in, void* out, int64_t count,
                                  const Epilogue& epilogue, Stream stream) {
  const int type = nccl::reduced_type(s.dtype);
  const int op = nccl::reduction(s.dtype, s.reduce);
  launch(s, count * static_cast<int64_t>(item_bytes(s.dtype)), stream, [&](cuda::StreamHandle on) {
    if (reduce_by_peers(s, in, out, count, epilogue, on)) return;
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

/// Every rank's part between it and the root's whole, there (gather) or back (scatter).
void NcclCommunicator::move_parts(const Signature& s, char* whole, char* part,
                                  std::span<const int64_t> counts, bool is_gather, Stream stream) {
  const std::vector<int64_t> bytes = times(counts, static_cast<int64_t>(item_bytes(s.dtype)));
  const int64_t mine = bytes[identity_.rank];
  launch(s, mine, stream, [&](cuda::StreamHandle on) {
    if (total(bytes) == 0) return;
    const bool is_root = identity_.rank == s.root;
    grouped([&](nccl::Handle h) {
      const auto move = [&](char* data, int64_t n, int peer, bool sends) {
        if (n == 0) return static_cast<int>(nccl::kSuccess);
        const auto size = static_cast<size_t>(n);
        return sends ? api_.Send(data, size, nccl::kBytes, peer, h, on)
                     : api_.Recv(data, size, nccl::kBytes, peer, h, on);
      };
      if (!is_root) return move(part, mine, s.root, is_gather);
      char* at = whole;
      for (int r = 0; r < identity_.size; at += bytes[r++]) {
        if (r == s.root) continue;
        const int result = move(at, bytes[r], r, !is_gather);
        if (result != nccl::kSuccess && result != nccl::kInProgress) return result;
      }
      return static_cast<int>(nccl::kSuccess);
    });
    if (!is_root) return;
    char* const own = whole + total(std::span(bytes).first(static_cast<size_t>(s.root)));
    cuda::copy(is_gather ? own : part, is_gather ? part : own, mine, on);
  });
}

void NcclCommunicator::gather(const Signature& s, const void* in, void* out,
                              std::span<const int64_t> counts, Stream stream) {
  move_parts(s, static_cast<char*>(out), static_cast<char*>(const_cast<void*>(in)), counts, true,
             stream);
}

void NcclCommunicator::scatter(const Signature& s, const void* in, void* out,
                               std::span<const int64_t> counts, Stream stream) {
  move_parts(s, static_cast<char*>(const_cast<void*>(in)), static_cast<char*>(out), counts, false,
             stream);
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

// ---- the watch

void NcclCommunicator::look_at_library() {
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

void NcclCommunicator::end(bool is_orderly) noexcept {
  if (!is_orderly) {
    std::lock_guard lock(peers_mutex_);
    if (peers_) peers_->abort();
  }
  nccl::Handle handle = nullptr;
  std::vector<std::shared_ptr<Kept>> blocks;
  {
    std::lock_guard lock(nccl_mutex_);
    handle = std::exchange(handle_, nullptr);  // nobody else calls anything on it now
    blocks = forget_blocks(is_orderly, handle);
  }
  if (handle) end_library(handle, is_orderly);
  for (const auto& block : blocks) free_block(*block);  // NCCL's threads have let go of them
}

void NcclCommunicator::end_library(nccl::Handle handle, bool is_orderly) noexcept {
  if (is_orderly) {
    int state = api_.CommFinalize(handle);
    const double end_s = now_s() + kFinalizeSeconds;
    while (state == nccl::kInProgress && now_s() < end_s) {
      sleep_s(1e-3);
      if (api_.CommGetAsyncError(handle, &state) != nccl::kSuccess) break;
    }
    if (state == nccl::kSuccess && api_.CommDestroy(handle) == nccl::kSuccess) return;
  }
  (void)api_.CommAbort(handle);
}

}  // namespace tp_native::comm
