// SPDX-License-Identifier: Apache-2.0
// Ranks of several hosts: one communicator among the ranks of a host, one among the hosts' first
// ranks (their leaders). Sums go in ascending order within each host, then in ascending order of
// hosts: bitwise equal on all ranks, but not the flat order. 16-bit types are summed in float32.
#pragma once

#include "comm/board_communicator.h"

namespace tp_native::comm {

class TwoLevel final : public BoardCommunicator {
 public:
  /// `host_sizes[h]` ranks are on host h, numbered host after host. `inter` is null but on leaders;
  /// its rank h is host h.
  TwoLevel(Identity identity, std::shared_ptr<Communicator> intra,
           std::shared_ptr<Communicator> inter, std::shared_ptr<Board> board,
           std::vector<int64_t> host_sizes);
  ~TwoLevel() override;

  Block allocate(int64_t bytes) override { return intra_->allocate(bytes); }
  Stats stats() const override;
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
  void barrier(double timeout_s, Stream) override;
  void look() override;

 protected:
  std::optional<Verdict> explain() override;
  void check_levels() override;
  void drop() noexcept override {}  // the verdict has aborted both levels
  void interrupt() noexcept override;
  void release() noexcept override;

 private:
  int hosts() const { return static_cast<int>(host_sizes_.size()); }
  int host_of(int rank) const;
  int local_of(int rank) const { return rank - static_cast<int>(first_[host_of(rank)]); }
  /// The counts of this host's ranks, and the sums of each host's.
  std::span<const int64_t> of_host(std::span<const int64_t> counts) const;
  std::vector<int64_t> by_host(std::span<const int64_t> counts) const;
  void sum_up(const Signature& part, const Signature& whole, const void* in, void* out,
              int64_t count, const Epilogue& epilogue, Stream stream);
  void average(DType dtype, void* data, int64_t count) const;
  Verdict translated(const FailureRecord& failure, bool is_intra);

  std::shared_ptr<Communicator> intra_;
  std::shared_ptr<Communicator> inter_;
  std::vector<int64_t> host_sizes_;
  std::vector<int64_t> first_;  ///< each host's first rank
  int host_;
};

}  // namespace tp_native::comm
