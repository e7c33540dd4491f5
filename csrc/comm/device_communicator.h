// SPDX-License-Identifier: Apache-2.0
// Life of collectives that run on GPUs: a call returns once its work is in the stream, and a thread
// of the communicator's looks after what becomes of it: deadlines, ranks that left, what the ranks
// noted (promise 5). How bytes move is the business of those that derive from it.
#pragma once

#include <condition_variable>
#include <deque>
#include <thread>

#include "comm/board_communicator.h"
#include "core/cuda_driver.h"

namespace tp_native::comm {

class DeviceCommunicator : public BoardCommunicator,
                           public std::enable_shared_from_this<DeviceCommunicator> {
 public:
  void barrier(double timeout_s, Stream) final;  ///< of the hosts: it waits for no GPU

 protected:
  /// `control`: the same ranks on their hosts; from here on it runs barriers and what ranks tell
  /// each other, and is closed with this one.
  DeviceCommunicator(Identity identity, const cuda::Device& device,
                     std::shared_ptr<Communicator> control, std::shared_ptr<Board> board);
  ~DeviceCommunicator() override;

  void start_watch();  ///< at the end of the most derived constructor
  void stop_watch();   ///< at the beginning of its destructor

  /// A collective whose work `body` puts into `stream`, with the device current.
  void launch(const Signature& signature, int64_t bytes, Stream stream,
              const std::function<void(cuda::StreamHandle)>& body);

  /// Every rank's words, rank by rank; in a collective's body. Hosts meet, GPUs do not.
  std::vector<int64_t> tell_all(OpCode op, std::span<const int64_t> mine);

  // Called by the watch's thread.
  /// Claims a verdict if the library that moves the bytes has failed.
  virtual void look_at_library() {}
  /// Ends that library's part. `is_orderly`: nothing is pending and nobody has failed; else
  /// whatever still runs must end now.
  virtual void end(bool is_orderly) noexcept = 0;

  std::optional<Verdict> explain() final { return board().verdict(); }
  void drop() noexcept override;
  void interrupt() noexcept final;
  void release() noexcept final;

  const cuda::Device& device() const { return device_; }

 private:
  /// An operation in a stream whose end nobody has seen yet.
  struct Pending {
    uint64_t seq;
    cuda::Event event;
    double since_s;
    bool is_warned = false;
  };

  void watch();
  void look_at_pending();
  bool drain(double end_s);
  void finish() noexcept;
  void close_control() noexcept;

  cuda::Device device_;
  std::shared_ptr<Communicator> control_;

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
