// SPDX-License-Identifier: Apache-2.0
// Ranks as threads: one function on all of them, and what each threw.
#pragma once

#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "comm/communicator.h"
#include "core/error.h"

using Ranks = std::vector<std::shared_ptr<tp_native::comm::Communicator>>;

/// Runs `fn(rank)` on every rank; what each threw, empty for nothing.
inline std::vector<tp_native::FailureRecord> run(
    const Ranks& ranks, const std::function<void(tp_native::comm::Communicator&)>& fn) {
  std::vector<tp_native::FailureRecord> failures(ranks.size());
  std::vector<std::thread> threads;
  for (size_t r = 0; r < ranks.size(); ++r) {
    threads.emplace_back([&, r] {
      try {
        fn(*ranks[r]);
      } catch (const tp_native::Error& error) {
        failures[r] = error.record();
      } catch (const std::exception& error) {
        failures[r].message = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return failures;
}

inline void run_clean(const Ranks& ranks,
                      const std::function<void(tp_native::comm::Communicator&)>& fn) {
  for (const tp_native::FailureRecord& failure : run(ranks, fn)) {
    if (!failure.message.empty()) throw std::runtime_error(failure.message);
  }
}
