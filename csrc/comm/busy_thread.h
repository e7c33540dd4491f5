// SPDX-License-Identifier: Apache-2.0
// Which thread is in a collective. A signal handler runs inside that thread's wait: what it calls
// must not wait for the collective to end.
#pragma once

#include <pthread.h>

#include <atomic>

#include "comm/signature.h"

namespace tp_native::comm {

class BusyThread {
 public:
  /// While it lives, this thread is in a collective and failures name `signature`.
  class Collective {
   public:
    Collective(BusyThread& thread, const Signature*& current, const Signature& signature)
        : thread_(thread), current_(current) {
      current_ = &signature;
      thread_.enter();
    }
    ~Collective() {
      current_ = nullptr;
      thread_.leave();
    }
    Collective(const Collective&) = delete;
    Collective& operator=(const Collective&) = delete;

   private:
    BusyThread& thread_;
    const Signature*& current_;
  };

  /// This thread is in a collective already. Relaxed: only its own store can make it true.
  bool is_this() const { return thread_.load(std::memory_order_relaxed) == ::pthread_self(); }
  /// Some thread is; out of date at once unless it is this one.
  bool is_any() const { return thread_.load(std::memory_order_relaxed) != pthread_t{}; }

 private:
  void enter() { thread_.store(::pthread_self(), std::memory_order_relaxed); }
  void leave() { thread_.store({}, std::memory_order_relaxed); }

  std::atomic<pthread_t> thread_{};
};

}  // namespace tp_native::comm
