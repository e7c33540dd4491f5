// SPDX-License-Identifier: Apache-2.0
// Collectives on GPUs over NCCL. Calls into it are short and under a lock; only the watch's thread
// aborts and destroys its communicator (DESIGN.md 7).
#pragma once

#include <memory>
#include <vector>

#include "comm/device_communicator.h"
#include "comm/nccl_api.h"
#include "comm/peer_memory.h"

namespace tp_native::comm {

class NcclCommunicator final : public DeviceCommunicator {
 public:
  /// Unusable before connect(). `control`: see DeviceCommunicator.
  NcclCommunicator(Identity identity, const nccl::Api& api, const cuda::Device& device,
                   std::shared_ptr<Communicator> control, std::shared_ptr<Board> board);
  /// Collective; raises on all ranks once one of them cannot.
  void connect(const nccl::UniqueId& id, nccl::Config config, double timeout_s);

  /// Collective, after connect(): all-reduces that fit take kernels of ours over `memory` from now
  /// on, if they give NCCL's sums on every rank; a warning says so if not.
  void use_peers(std::unique_ptr<PeerMemory> memory);

  /// Memory of NCCL's own, registered, so that it copies nothing where the hardware allows that.
  /// Collective: all ranks take the same amount. For buffers that live long: taking and giving back
  /// wait for the GPU, and a window's memory goes back with the next allocate() after all ranks
  /// have let go of it, or with the group. Null data where the library has no such functions.
  Block allocate(int64_t bytes) override;
  /// Of later blocks; the least of all ranks' holds.
  void limit_registration(nccl::Registration most);
  Stats stats() const override;
  ~NcclCommunicator() override;

  void all_reduce(const Signature&, const void* in, void* out, int64_t count, const Epilogue&,
                  Stream) override;
  void all_gather(const Signature&, const void* in, void* out, int64_t rows,
                  std::span<const int64_t> columns, Stream) override;
  void reduce_scatter(const Signature&, const void* in, void* out, std::span<const int64_t> counts,
                      Stream) override;
  void gather(const Signature&, const void* in, void* out, std::span<const int64_t> counts,
              Stream) override;
  void scatter(const Signature&, const void* in, void* out, std::span<const int64_t> counts,
               Stream) override;
  void broadcast(const Signature&, void* data, int64_t count, Stream) override;

 protected:
  void drop() noexcept override;
  void look_at_library() override;
  void end(bool is_orderly) noexcept override;

 private:
  /// One short call of NCCL's on the communicator; waits where it is still in progress.
  template <class Call>
  void call(const char* name, const Call& fn);
  template <class Calls>
  void grouped(const Calls& calls);
  void await_ready(const char* name, int result);
  int outcome(int result, double limit_s);
  bool agrees_with_nccl(PeerMemory& memory);
  bool reduce_by_peers(const Signature& s, const void* in, void* out, int64_t count,
                       const Epilogue& epilogue, cuda::StreamHandle stream);
  void end_library(nccl::Handle handle, bool is_orderly) noexcept;
  [[noreturn]] void fail_call(const char* name, int result);
  void move_parts(const Signature& s, char* whole, char* part, std::span<const int64_t> counts,
                  bool is_gather, Stream stream);
  void gather_blocks(const void* in, char* out, std::span<const int64_t> bytes,
                     cuda::StreamHandle stream);

  // nccl_memory.cpp
  struct Kept;
  struct MemoryFailure {
    int rank = -1;
    int result = nccl::kSuccess;
  };
  std::shared_ptr<Kept> allocate_alike(int64_t bytes, MemoryFailure& failure);
  nccl::Registration make_window(Kept& block, int64_t bytes);
  nccl::Registration register_buffer(Kept& block, int64_t bytes);
  uint64_t released_windows();
  bool give_up_windows(uint64_t which);
  int deregister(Kept& block);
  void give_back(const std::shared_ptr<Kept>& block) noexcept;
  std::vector<std::shared_ptr<Kept>> forget_blocks(bool is_orderly, nccl::Handle handle) noexcept;
  void free_block(Kept& block) noexcept;

  const nccl::Api& api_;
  mutable std::mutex nccl_mutex_;  ///< around short calls only; guards what follows
  nccl::Handle handle_ = nullptr;
  std::vector<std::shared_ptr<Kept>> blocks_;
  nccl::Registration best_registration_;

  std::mutex peers_mutex_;  ///< the watch aborts them
  std::unique_ptr<PeerMemory> peers_;
};

}  // namespace tp_native::comm
