// SPDX-License-Identifier: Apache-2.0
// A Board of ranks that are threads: what a store is between hosts.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "comm/board.h"

using namespace tp_native;        // NOLINT
using namespace tp_native::comm;  // NOLINT

struct SharedBoard {
  explicit SharedBoard(int size)
      : ranks(static_cast<size_t>(size), {true, false, false, OpCode::kBarrier, 0}),
        listeners(static_cast<size_t>(size)) {}
  std::mutex mutex;
  std::optional<Verdict> verdict;
  std::vector<Status> ranks;
  std::vector<std::function<void(const Verdict&)>> listeners;
  int expected = 0;  ///< calls of expect_verdict()
};

class MemoryBoard final : public Board {
 public:
  MemoryBoard(std::shared_ptr<SharedBoard> shared, int rank)
      : shared_(std::move(shared)), rank_(static_cast<size_t>(rank)) {}
  Verdict claim(const Verdict& verdict) override {
    std::vector<std::function<void(const Verdict&)>> listeners;
    {
      std::lock_guard lock(shared_->mutex);
      if (shared_->verdict) return *shared_->verdict;
      shared_->verdict = verdict;
      listeners = shared_->listeners;
    }
    for (const auto& tell : listeners) {
      if (tell) tell(verdict);
    }
    return verdict;
  }
  std::optional<Verdict> verdict() const override {
    std::lock_guard lock(shared_->mutex);
    return shared_->verdict;
  }
  int left_before(uint64_t seq) const override {
    std::lock_guard lock(shared_->mutex);
    for (size_t r = 0; r < shared_->ranks.size(); ++r) {
      if (shared_->ranks[r].has_left && shared_->ranks[r].seq < seq) return static_cast<int>(r);
    }
    return -1;
  }
  void set_status(OpCode op, uint64_t seq, bool is_inside) override {
    std::lock_guard lock(shared_->mutex);
    shared_->ranks[rank_] = {true, false, is_inside, op, seq};
  }
  uint64_t noted() const override {
    std::lock_guard lock(shared_->mutex);
    return shared_->ranks[rank_].seq;
  }
  void expect_verdict() override {
    std::lock_guard lock(shared_->mutex);
    ++shared_->expected;
  }
  std::vector<Status> call_roll() override {
    std::lock_guard lock(shared_->mutex);
    return shared_->ranks;
  }
  void on_verdict(std::function<void(const Verdict&)> fn) override {
    std::lock_guard lock(shared_->mutex);
    shared_->listeners[rank_] = std::move(fn);
  }
  void leave() override {
    std::lock_guard lock(shared_->mutex);
    shared_->listeners[rank_] = nullptr;
    shared_->ranks[rank_].has_left = true;
  }

 private:
  std::shared_ptr<SharedBoard> shared_;
  size_t rank_;
};
