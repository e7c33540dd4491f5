// SPDX-License-Identifier: Apache-2.0
// Collectives over any torch.distributed process group that moves CPU tensors. It moves bytes only:
// sums are made here, in ascending rank order, so that they are bitwise those of shared memory.
#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "comm/board_communicator.h"

namespace tp_native::ops {

class C10dCommunicator final : public comm::BoardCommunicator {
 public:
  C10dCommunicator(comm::Identity identity, c10::intrusive_ptr<c10d::ProcessGroup> group,
                   std::shared_ptr<comm::Board> board);
  ~C10dCommunicator() override;

  void all_reduce(const comm::Signature&, const void* in, void* out, int64_t count,
                  const comm::Epilogue&, comm::Stream) override;
  void all_gather(const comm::Signature&, const void* in, void* out, int64_t rows,
                  std::span<const int64_t> columns, comm::Stream) override;
  void reduce_scatter(const comm::Signature&, const void* in, void* out,
                      std::span<const int64_t> counts, comm::Stream) override;
  void gather(const comm::Signature&, const void* in, void* out, std::span<const int64_t> counts,
              comm::Stream) override;
  void scatter(const comm::Signature&, const void* in, void* out, std::span<const int64_t> counts,
               comm::Stream) override;
  void broadcast(const comm::Signature&, void* data, int64_t count, comm::Stream) override;
  void barrier(double timeout_s, comm::Stream) override;

 protected:
  void drop() noexcept override;
  void release() noexcept override;

 private:
  /// What this rank sends to each rank and receives from it, in bytes; staging of our own, which a
  /// transfer that never ends may hold for ever.
  struct Exchange {
    at::Tensor send, receive;
    std::vector<int64_t> send_bytes, receive_bytes;
    char* to(int rank);
    const char* from(int rank) const;
  };

  Exchange prepare(std::vector<int64_t> send_bytes, std::vector<int64_t> receive_bytes) const;
  void run(Exchange& exchange);
  /// Compares fingerprints; the frames it returns hold each rank's `bytes` of payload where they
  /// fit (fits()).
  Exchange meet(const comm::Signature& signature, const void* payload, int64_t bytes);
  void wait(const c10::intrusive_ptr<c10d::Work>& work);
  [[noreturn]] void lose_peer(const std::string& why);

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  c10::intrusive_ptr<c10d::Work> pending_;
  uint64_t group_hash_;
};

}  // namespace tp_native::ops
