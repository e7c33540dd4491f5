// SPDX-License-Identifier: Apache-2.0
// Work of tests on the streams of the driver's test double: steps of the host that wait for each
// other, meet those of other ranks and tell what went wrong.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/cuda_driver.h"
#include "core/shared_library.h"

namespace fake_streams {

using namespace tp_native;  // NOLINT

constexpr auto kDeadline = std::chrono::seconds(20);

struct Double {
  void (*enqueue)(cuda::StreamHandle, void (*)(void*), void*);
  int (*live_streams)();
  int (*live_events)();
  int64_t (*live_bytes)();
};

inline const Double& fake() {
  static const Double one = [] {
    const char* const path = TPN_DOUBLES "/libfake_cuda.so";
    ::setenv("FAKE_CUDA_JITTER_US", "100", 1);  // before any stream reads it
    cuda::use_driver(path);
    std::string why;
    const SharedLibrary library = SharedLibrary::open(path, why);
    if (!library) throw std::runtime_error(why);
    Double found;
    *reinterpret_cast<void**>(&found.enqueue) = library.find("fake_cuda_enqueue");
    *reinterpret_cast<void**>(&found.live_streams) = library.find("fake_cuda_live_streams");
    *reinterpret_cast<void**>(&found.live_events) = library.find("fake_cuda_live_events");
    *reinterpret_cast<void**>(&found.live_bytes) = library.find("fake_cuda_live_bytes");
    (void)cuda::driver();
    return found;
  }();
  return one;
}

/// What went wrong in steps, which cannot throw.
class Faults {
 public:
  void add(const std::string& what) {
    std::lock_guard lock(mutex_);
    all_.push_back(what);
  }
  void check() {
    std::lock_guard lock(mutex_);
    if (!all_.empty()) throw std::runtime_error(all_.front());
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> all_;
};
inline Faults g_faults;

inline void enqueue(cuda::StreamHandle stream, std::function<void()> work) {
  fake().enqueue(
      stream,
      [](void* argument) {
        const std::unique_ptr<std::function<void()>> step(
            static_cast<std::function<void()>*>(argument));
        try {
          (*step)();
        } catch (const std::exception& error) {
          g_faults.add(error.what());
        }
      },
      new std::function<void()>(std::move(work)));
}

/// One collective after the other, as steps of the ranks' streams.
class Meeting {
 public:
  explicit Meeting(size_t ranks) : in_(ranks) {}

  /// Calls `read` with every rank's `in`; returns when all ranks' `read` have.
  void meet(size_t rank, const double* in,
            const std::function<void(const std::vector<const double*>&)>& read) {
    in_[rank] = in;
    wait_for_all();
    read(in_);
    wait_for_all();
  }

 private:
  void wait_for_all() {
    std::unique_lock lock(mutex_);
    const uint64_t round = round_;
    if (++come_ == in_.size()) {
      come_ = 0;
      ++round_;
      changed_.notify_all();
    } else if (!changed_.wait_for(lock, kDeadline, [&] { return round_ != round; })) {
      throw std::runtime_error("a rank did not come to a collective");
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<const double*> in_;
  size_t come_ = 0;
  uint64_t round_ = 0;
};

/// Flags that steps set and wait for, and the order in which they were set.
class Marks {
 public:
  void set(const std::string& name) {
    std::lock_guard lock(mutex_);
    order_.push_back(name);
    changed_.notify_all();
  }
  void await(const std::string& name) {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, kDeadline, [&] { return find(name) != order_.end(); }))
      throw std::runtime_error(name + " did not come");
  }
  bool is_before(const std::string& a, const std::string& b) {
    std::lock_guard lock(mutex_);
    return find(a) < find(b);
  }

 private:
  std::vector<std::string>::iterator find(const std::string& name) {
    return std::ranges::find(order_, name);
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> order_;
};

/// Runs `fn(i)` on so many threads; throws what the first of them threw.
inline void on_threads(size_t count, const std::function<void(size_t)>& fn) {
  std::vector<std::string> failures(count);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      try {
        fn(i);
      } catch (const std::exception& error) {
        failures[i] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures)
    if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace fake_streams
