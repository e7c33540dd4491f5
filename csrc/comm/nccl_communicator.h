// SPDX-License-Identifier: Apache-2.0
// Collectives on GPUs over NCCL. A call returns once the operation is in the stream; what ranks
// agree on beside it, order, failures, deadlines, goes over a Board and is looked after by a thread
// of this communicator's, which alone aborts and destroys NCCL's (DESIGN.md 7).
#pragma once

#include <condition_variable>
#include <deque>
#include <thread>

#include "comm/board_communicator.h"
#include "comm/nccl_api.h"

namespace tp_native::comm {

class NcclCommunicator final : public BoardCommunicator,
                               public std::enable_shared_from_this<NcclCommunicator> {
 public:
  /// Unusable before connect(). `control`: the same ranks on their hosts; from here on it runs
  /// barriers only.
  NcclCommunicator(Identity identity, const nccl::Api& api, const cuda::Device& device,
                   std::shared_ptr<Communicator> control, std::shared_ptr<Board> board);
  /// Collective; raises on all ranks once one of them cannot.
  void connect(const nccl::UniqueId& id, nccl::Config config, double timeout_s);
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
  void barrier(double timeout_s, Stream) override;

 protected:
  std::optional<Verdict> explain() override { return board().verdict(); }
  void drop() noexcept override;
  void interrupt() noexcept override;
  void release() noexcept override;

 private:
  /// An operation in a stream whose end nobody has seen yet.
  struct Pending {
    uint64_t seq;
    cuda::Event event;
    double since_s;
    bool is_warned = false;
  };

  /// A collective whose work `body` puts into `stream`.
  void launch(const Signature& signature, int64_t bytes, Stream stream,
              const std::function<void(cuda::StreamHandle)>& body);
  /// One short call of NCCL's on the communicator; waits where it is still in progress.
  template <class Call>
  void call(const char* name, const Call& fn);
  template <class Calls>
  void grouped(const Calls& calls);
  void await_ready(const char* name, int result);
  [[noreturn]] void fail_call(const char* name, int result);
  void gather_blocks(const void* in, char* out, std::span<const int64_t> bytes,
                     cuda::StreamHandle stream);

  void watch();
  void look_at_nccl();
  void look_at_pending();
  bool drain(double end_s);
  void end_nccl() noexcept;

  const nccl::Api& api_;
  cuda::Device device_;
  std::shared_ptr<Communicator> control_;

  std::mutex nccl_mutex_;  ///< around short calls only
  nccl::Handle handle_ = nullptr;

  std::mutex pending_mutex_;
  std::deque<Pending> pending_;
  std::vector<cuda::Event> spare_;

  std::mutex watch_mutex_;
  std::condition_variable changed_;
  bool is_failed_ = false;
  bool is_ending_ = false;
  bool has_ended_ = false;
  std::thread thread_;
};

}  // namespace tp_native::comm
