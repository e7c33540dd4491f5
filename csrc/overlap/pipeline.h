// SPDX-License-Identifier: Apache-2.0
// Runs a Schedule on a device: a communication stream beside the caller's, and the events between
// them. Knows nothing of what the steps launch. No host waits, so it can be captured in a graph.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <vector>

#include "core/cuda_driver.h"
#include "overlap/schedule.h"

namespace tp_native::overlap {

/// What a step launches on the stream that it is given, with the device current. Nothing here may
/// wait for either stream.
struct Launches {
  std::function<void(const Chunk&, cuda::StreamHandle)> gemm;
  std::function<void(const Chunk&, cuda::StreamHandle)> communicate;
  std::function<void(cuda::StreamHandle)> beside = nullptr;  ///< where the schedule has that step
};

/// Safe for several threads. Each of the callers' streams has a communication stream of its own, so
/// a run adds no order between callers (two communicators in one stream could wait for each other
/// crosswise), and a stream that is captured drags no other caller's work into its graph. The first
/// run on a stream creates what it needs: let it be one before the capture, as graphs ask for
/// anyway.
class Pipeline {
 public:
  explicit Pipeline(const cuda::Device& device) : device_(device) {}
  Pipeline(const Pipeline&) = delete;
  Pipeline& operator=(const Pipeline&) = delete;

  /// Launches the steps and returns; `caller` goes on when all of them have ended. Raises what a
  /// launch raises: then too `caller` waits for all that was launched, so that memory of its order
  /// can be given back.
  void run(const Schedule& schedule, cuda::StreamHandle caller, const Launches& launches);

 private:
  struct Side {
    cuda::StreamHandle caller;
    cuda::Stream stream;
    int users = 0;
    uint64_t last_use = 0;
  };
  class Lease;

  Side& side_of(cuda::StreamHandle caller);

  cuda::Device device_;
  std::mutex mutex_;
  std::deque<Side> sides_;           // never shrinks: runs hold references
  std::vector<cuda::Event> events_;  // those that no run holds
  size_t made_ = 0;                  // events, held or not
  uint64_t uses_ = 0;
};

}  // namespace tp_native::overlap
