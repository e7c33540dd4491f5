// SPDX-License-Identifier: Apache-2.0
// A Board in a torch.distributed store: keys under a prefix of its own, one thread that looks at
// one counter ten times a second.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "comm/arena.h"
#include "comm/board.h"

namespace tp_native::ops {

class StoreBoard final : public comm::Board {
 public:
  /// `prefix`: equal on all ranks, never used before.
  StoreBoard(const c10::intrusive_ptr<c10d::Store>& store, std::string prefix, int rank, int size);
  ~StoreBoard() override;

  comm::Verdict claim(const comm::Verdict& verdict) override;
  std::optional<comm::Verdict> verdict() const override;
  int left_before(uint64_t seq) const override;
  void set_status(comm::OpCode op, uint64_t seq, bool is_inside) override;
  uint64_t noted() const override;
  void expect_verdict() override;
  std::vector<comm::Status> call_roll() override;
  void on_verdict(std::function<void(const comm::Verdict&)> fn) override;
  void leave() override;

 private:
  void run();
  void refresh();
  void answer();
  void adopt(const comm::Verdict& verdict);
  std::optional<std::string> find(const std::string& key);
  void put(const std::string& key, const std::string& value);
  void announce();
  comm::Status status_of(int rank);
  std::string own_status() const;

  comm::Owner owner_;
  c10::intrusive_ptr<c10d::Store> origin_;  ///< where this rank serves the store, it ends with it
  c10::intrusive_ptr<c10d::Store> store_;
  std::string prefix_;
  int rank_;
  int size_;
  mutable std::mutex mutex_;  ///< guards what follows
  std::condition_variable changed_;
  std::optional<comm::Verdict> verdict_;
  std::function<void(const comm::Verdict&)> on_verdict_;
  std::vector<int64_t> left_;  ///< operations that a rank had called when it left; -1: still there
  comm::OpCode op_ = comm::OpCode::kBarrier;
  uint64_t seq_ = 0;
  bool is_inside_ = false;
  bool is_stopping_ = false;
  bool is_hurried_ = false;  ///< the next look is now
  bool has_left_ = false;
  std::atomic<bool> has_news_{false};  ///< a verdict or a rank that left; spares waiters the lock
  std::thread thread_;
};

}  // namespace tp_native::ops
