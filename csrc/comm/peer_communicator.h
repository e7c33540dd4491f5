// SPDX-License-Identifier: Apache-2.0
// Collectives of GPU ranks by kernels of our own over memory that the ranks reach directly. Ranks
// may be threads that share one GPU, which NCCL does not allow: for tests, notebooks and debuggers.
#pragma once

#include "comm/device_communicator.h"
#include "comm/peer_memory.h"

namespace tp_native::comm {

class PeerCommunicator final : public DeviceCommunicator {
 public:
  /// `control`: the same ranks on their host; from here on it runs barriers only.
  PeerCommunicator(Identity identity, const cuda::Device& device,
                   std::unique_ptr<PeerMemory> memory, std::shared_ptr<Communicator> control,
                   std::shared_ptr<Board> board);
  ~PeerCommunicator() override;

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
  void end(bool is_orderly) noexcept override;

 private:
  /// One kernel of the group's, in its turn.
  template <class Kernel>
  void run(cuda::StreamHandle stream, const Kernel& kernel);
  void gather_blocks(const char* in, char* out, std::span<const int64_t> bytes,
                     cuda::StreamHandle stream);
  void broadcast_bytes(const char* in, char* out, int64_t bytes, int root,
                       cuda::StreamHandle stream);

  std::unique_ptr<PeerMemory> memory_;
};

}  // namespace tp_native::comm
