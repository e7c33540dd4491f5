// SPDX-License-Identifier: Apache-2.0
// Which thread is in a collective. A signal handler runs inside that thread's wait: what it calls
// must not wait for the collective to end.
#pragma once

#include <pthread.h>

#include <atomic>

namespace tp_native::comm {

class BusyThread {
 public:
  void enter() { thread_.store(::pthread_self(), std::memory_order_relaxed); }
  void leave() { thread_.store({}, std::memory_order_relaxed); }
  /// This thread is in a collective already. Relaxed: only its own store can make it true.
  bool is_this() const { return thread_.load(std::memory_order_relaxed) == ::pthread_self(); }
  /// Some thread is; out of date at once unless it is this one.
  bool is_any() const { return thread_.load(std::memory_order_relaxed) != pthread_t{}; }

 private:
  std::atomic<pthread_t> thread_{};
};

}  // namespace tp_native::comm
