// SPDX-License-Identifier: Apache-2.0
// Promise 5 for collectives on GPUs of several hosts: the notes of all ranks go to rank 0 over
// sockets that the caller has connected, and rank 0 compares them. What ranks agree on goes over
// another board.
#pragma once

#include <mutex>
#include <vector>

#include "comm/arena.h"
#include "comm/board.h"
#include "comm/flight.h"
#include "core/unique.h"

namespace tp_native::comm {

class SocketBoard final : public Board {
 public:
  /// `sockets[r]` is connected to rank r: on rank 0 one for each other rank, elsewhere one for rank
  /// 0, and the others are empty. `inner` may be that of the host communicator whose barriers these
  /// ranks meet in, and which numbers and tells those itself.
  SocketBoard(std::shared_ptr<Board> inner, int rank, std::vector<Fd> sockets);
  ~SocketBoard() override;

  Verdict claim(const Verdict& verdict) override { return inner_->claim(verdict); }
  std::optional<Verdict> verdict() const override { return inner_->verdict(); }
  int left_before(uint64_t seq) const override { return inner_->left_before(seq); }
  void set_status(OpCode op, uint64_t seq, bool is_inside) override;
  uint64_t noted() const override { return inner_->noted(); }
  void expect_verdict() override { inner_->expect_verdict(); }
  void note(const Signature& signature, uint64_t seq, int64_t bytes) override;
  void finish(uint64_t seq) noexcept override;
  void look() override;
  std::string hint() const override { return inner_->hint(); }
  std::vector<Status> call_roll() override { return inner_->call_roll(); }
  void on_verdict(std::function<void(const Verdict&)> fn) override {
    inner_->on_verdict(std::move(fn));
  }
  void leave() override;

 private:
  struct Record;
  struct Link;

  FlightRing& own() const { return *rings_[static_cast<size_t>(rank_)]; }
  std::optional<Verdict> exchange();
  void queue(Link& link, const Record& record);
  void queue_notes(Link& link);
  void send(Link& link);
  void receive(Link& link);
  void take(Link& link, const Record& record);
  void say_goodbye();

  Owner owner_;
  std::shared_ptr<Board> inner_;
  int rank_;
  std::vector<std::unique_ptr<FlightRing>> rings_;  ///< by rank; but rank 0 keeps its own only
  uint64_t chain_ = 0;                              ///< of this rank's notes; its caller's thread

  std::mutex mutex_;  ///< guards what follows; nothing waits for long under it
  std::vector<Link> links_;
  std::optional<Verdict> found_;  ///< what this look has found first
  uint64_t sent_ = 0;             ///< this rank's notes up to here are on their way
  uint64_t compared_ = 0;         ///< notes up to here are equal on all ranks
  bool has_left_ = false;
};

/// The board of `control`, whose ranks meet on their hosts, with `sockets` beside it (-1: none).
/// Takes the descriptors over.
std::shared_ptr<Board> make_socket_board(const std::shared_ptr<Communicator>& control,
                                         std::span<const int> sockets);

}  // namespace tp_native::comm
