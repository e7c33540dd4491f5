// SPDX-License-Identifier: Apache-2.0
#include "comm/peer_memory.h"

#include <unistd.h>

#include <atomic>

#include "comm/introduction.h"
#include "core/callbacks.h"

namespace tp_native::comm {

/// What a rank tells the others of its memory.
struct PeerMemory::Introduction {
  int32_t pid = 0;
  uint64_t pointer = 0;
  cuda::IpcMemHandle handle = {};
  char error[400] = "";
};

PeerMemory::PeerMemory(const cuda::Device& device, Communicator& control, int64_t payload_bytes)
    : device_(device), payload_bytes_(payload_bytes) {
  const Identity& self = control.identity();
  TPN_CHECK(self.size <= kernels::cuda::kMaxRanks, "world size ", self.size, ": expected at most ",
            kernels::cuda::kMaxRanks);
  peers_.rank = self.rank;
  peers_.size = self.size;
  peers_.buffer_bytes = kernels::cuda::staged_bytes(payload_bytes);
  const cuda::Current current(device_);
  const std::vector<Introduction> ranks = introduce_all(control, introduce());
  std::string errors = errors_of(ranks);
  Introduction opened;
  if (errors.empty()) {
    const PlainErrors plain;
    try {
      for (int r = 0; r < self.size; ++r) {
        cuda::DevicePointer at = ranks[r].pointer;
        if (ranks[r].pid != ::getpid()) {
          TPN_CUDA(cuda::driver().IpcOpenMemHandle(&at, ranks[r].handle, 1),
                   "reaching the GPU memory of rank ", r);
          opened_.push_back(at);
        }
        peers_.data[r] = reinterpret_cast<void*>(at);
        peers_.flags[r] = reinterpret_cast<uint32_t*>(
            at + static_cast<uint64_t>(kernels::cuda::staging_bytes(payload_bytes_)));
      }
    } catch (const Error& error) {
      copy_text(opened.error, error.what());
    }
  }
  const std::string others = errors_of(introduce_all(control, opened));  // all have opened
  if (errors.empty()) errors = others;
  if (errors.empty()) return;
  give_back();
  fail(concat("the ranks cannot reach each other's GPU memory: ", errors));
}

PeerMemory::Introduction PeerMemory::introduce() {
  const PlainErrors plain;
  Introduction mine;
  mine.pid = ::getpid();
  try {
    const int64_t staging = kernels::cuda::staging_bytes(payload_bytes_);
    const int64_t bytes = staging + kernels::cuda::flag_bytes();
    TPN_CUDA(cuda::driver().MemAlloc(&own_, static_cast<size_t>(bytes)), "staging of ", bytes,
             " bytes on the GPU");
    const cuda::Stream stream;
    TPN_CUDA(cuda::driver().MemsetD8Async(own_ + static_cast<uint64_t>(staging), 0,
                                          kernels::cuda::flag_bytes(), stream.get()),
             "clearing flags");
    TPN_CUDA(cuda::driver().StreamSynchronize(stream.get()), "clearing flags");
    // portable and mapped: one address for host and device
    TPN_CUDA(cuda::driver().MemHostAlloc(&abort_word_, sizeof(uint32_t), 1 | 2), "pinned memory");
    *static_cast<uint32_t*>(abort_word_) = 0;
    peers_.abort = static_cast<const uint32_t*>(abort_word_);
    mine.pointer = own_;
    TPN_CUDA(cuda::driver().IpcGetMemHandle(&mine.handle, own_), "sharing GPU memory");
    last_.emplace();
  } catch (const Error& error) {
    copy_text(mine.error, error.what());
  }
  return mine;
}

PeerMemory::~PeerMemory() { give_back(); }

void PeerMemory::give_back() noexcept {
  try {
    const cuda::Current current(device_);
    for (const cuda::DevicePointer pointer : opened_)
      (void)cuda::driver().IpcCloseMemHandle(pointer);
    // A slow peer may still read what this rank has finished with. Within a process the driver
    // waits for it; what another process maps must not be freed before it lets go: the process's
    // end does.
    const bool is_shared = !opened_.empty();
    if (own_ && !is_shared) (void)cuda::driver().MemFree(own_);
    own_ = 0;
    opened_.clear();
    if (abort_word_) (void)cuda::driver().MemFreeHost(std::exchange(abort_word_, nullptr));
    last_.reset();
  } catch (const std::exception&) {  // the device has gone, and its memory with it
  }
}

const kernels::cuda::Peers& PeerMemory::before(cuda::StreamHandle stream) {
  if (last_stream_ != stream && last_stream_ && !cuda::is_capturing(stream)) last_->wait_on(stream);
  return peers_;
}

void PeerMemory::after(cuda::StreamHandle stream) {
  if (cuda::is_capturing(stream)) return;  // a replay is ordered by whoever launches it
  last_->record(stream);
  last_stream_ = stream;
}

void PeerMemory::all_reduce(kernels::AllReduceKind kind, const Signature& s, const void* in,
                            void* out, int64_t count, const Epilogue& e,
                            cuda::StreamHandle stream) {
  const bool has_rows = e.columns > 0 && (e.bias || e.norm_weight);
  kernels::cuda::all_reduce(kind, before(stream),
                            {.dtype = s.dtype,
                             .op = s.reduce,
                             .in = in,
                             .out = out,
                             .rows = has_rows ? count / e.columns : 1,
                             .columns = has_rows ? e.columns : count,
                             .bias = e.bias,
                             .residual = e.residual,
                             .norm_weight = e.norm_weight,
                             .eps = e.eps,
                             .hidden = e.hidden},
                            stream);
  after(stream);
}

void PeerMemory::abort() noexcept {
  if (abort_word_)
    std::atomic_ref(*static_cast<uint32_t*>(abort_word_)).store(1, std::memory_order_release);
}

}  // namespace tp_native::comm
