// SPDX-License-Identifier: Apache-2.0
// GPU memory of a group's ranks that each of them can reach: what our own collective kernels work
// in. Ranks of one process have it by address, processes of one host by CUDA's IPC handles.
#pragma once

#include <optional>
#include <vector>

#include "comm/communicator.h"
#include "core/cuda_driver.h"
#include "kernels/cuda.h"

namespace tp_native::comm {

class PeerMemory {
 public:
  /// Collective over `control`, ranks of one host. Payloads up to `payload_bytes` fit. Raises on
  /// all ranks what one of them cannot.
  PeerMemory(const cuda::Device& device, Communicator& control, int64_t payload_bytes);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  /// For the next collective in `stream`: it runs after the last one, in whatever stream that was.
  /// Call after() behind it.
  const kernels::cuda::Peers& before(cuda::StreamHandle stream);
  void after(cuda::StreamHandle stream);

  /// The op over all ranks' `count` values, of at most payload_bytes() and whole rows where the
  /// epilogue has a bias or a norm; with an epilogue kOneShot only.
  void all_reduce(kernels::AllReduceKind kind, const Signature& s, const void* in, void* out,
                  int64_t count, const Epilogue& epilogue, cuda::StreamHandle stream);

  int64_t payload_bytes() const { return payload_bytes_; }
  void abort() noexcept;  ///< ends every kernel that waits

 private:
  struct Introduction;
  Introduction introduce();
  void give_back() noexcept;

  cuda::Device device_;
  int64_t payload_bytes_;
  cuda::DevicePointer own_ = 0;
  std::vector<cuda::DevicePointer> opened_;
  void* abort_word_ = nullptr;  ///< pinned, read by the kernels
  kernels::cuda::Peers peers_;
  std::optional<cuda::Event> last_;
  cuda::StreamHandle last_stream_ = nullptr;
};

}  // namespace tp_native::comm
