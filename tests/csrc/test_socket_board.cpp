// SPDX-License-Identifier: Apache-2.0
// Notes over socket pairs: what differs is told, what is damaged, cut off or late harms nobody.
// TSan: ranks are threads.
#include "comm/socket_board.h"

#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>

#include "check.h"
#include "core/clock.h"
#include "memory_board.h"

namespace {

struct World {
  std::shared_ptr<SharedBoard> shared;
  std::vector<std::shared_ptr<SocketBoard>> ranks;
};

/// The two ends of a connection between rank 0 and another; with buffers of `bytes` if not 0.
std::pair<Fd, Fd> connect(int bytes = 0) {
  int ends[2];
  CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  for (const int end : ends) {
    if (bytes == 0) break;
    CHECK(::setsockopt(end, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes)) == 0);
    CHECK(::setsockopt(end, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes)) == 0);
  }
  return {Fd(ends[0]), Fd(ends[1])};
}

std::shared_ptr<SocketBoard> board_of(const std::shared_ptr<SharedBoard>& shared, int rank,
                                      std::vector<Fd> sockets) {
  return std::make_shared<SocketBoard>(std::make_shared<MemoryBoard>(shared, rank), rank,
                                       std::move(sockets));
}

World make(int size, int bytes = 0) {
  World world;
  world.shared = std::make_shared<SharedBoard>(size);
  std::vector<Fd> hub(static_cast<size_t>(size));
  world.ranks.resize(static_cast<size_t>(size));
  for (int r = 1; r < size; ++r) {
    auto [near, far] = connect(bytes);
    hub[r] = std::move(near);
    std::vector<Fd> sockets(static_cast<size_t>(size));
    sockets[0] = std::move(far);
    world.ranks[r] = board_of(world.shared, r, std::move(sockets));
  }
  world.ranks[0] = board_of(world.shared, 0, std::move(hub));
  return world;
}

/// As the watch does, until `is_over` or 5 s have gone by.
void watch(SocketBoard& board, const std::function<bool()>& is_over) {
  for (const double end = now_s() + 5; !is_over() && now_s() < end;) {
    board.look();
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

void note(SocketBoard& board, uint64_t seq, int64_t width = 4) {
  const int64_t shape[] = {width, 7};
  board.note({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape}, seq, width);
}

/// What rank 0 of two finds when a peer of no SocketBoard does `as_peer` with its end.
Verdict verdict_on(const std::function<void(int)>& as_peer) {
  const auto shared = std::make_shared<SharedBoard>(2);
  auto [near, far] = connect();
  std::vector<Fd> sockets(2);
  sockets[1] = std::move(near);
  const auto board = board_of(shared, 0, std::move(sockets));
  for (uint64_t seq = 1; seq <= 3; ++seq) note(*board, seq);
  as_peer(far.get());
  watch(*board, [&] { return board->verdict().has_value(); });
  CHECK(board->verdict().has_value());
  return *board->verdict();
}

/// What a SocketBoard sends for operations 1 to `count`.
std::vector<char> sent_for(uint64_t count) {
  const auto shared = std::make_shared<SharedBoard>(2);
  auto [near, far] = connect();
  std::vector<Fd> sockets(2);
  sockets[0] = std::move(near);
  const auto board = board_of(shared, 1, std::move(sockets));
  for (uint64_t seq = 1; seq <= count; ++seq) note(*board, seq);
  board->look();
  std::vector<char> bytes(1 << 16);
  const ssize_t n = ::recv(far.get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
  CHECK(n > 0);
  bytes.resize(static_cast<size_t>(n));
  return bytes;
}

void send_all(int socket, const std::vector<char>& bytes) {
  CHECK(::send(socket, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()));
}

}  // namespace

TEST(unlike_notes_are_told_on_all_ranks_within_a_tenth_of_a_second) {
  const World world = make(3);
  std::vector<double> took(3, -1);
  std::atomic<double> begun{0};
  std::vector<std::thread> threads;
  for (int r = 0; r < 3; ++r) {
    threads.emplace_back([&, r] {
      SocketBoard& board = *world.ranks[r];
      std::thread caller([&] {
        for (uint64_t seq = 1; seq < 3000; ++seq) note(board, seq);
        begun = now_s();
        note(board, 3000, r == 2 ? 5 : 4);
        for (uint64_t seq = 3001; seq < 3010; ++seq) note(board, seq);
      });
      watch(board, [&] { return board.verdict().has_value(); });
      took[r] = now_s();
      caller.join();
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::optional<Verdict> verdict = world.ranks[1]->verdict();
  CHECK(verdict.has_value());
  CHECK(verdict->kind == FailureKind::kMismatch);
  CHECK_EQ(verdict->culprit, 2);
  CHECK_EQ(verdict->text,
           "#3000: the ranks entered different collectives: rank 0 all_reduce(sum, float32 [4, "
           "7]); rank 1 all_reduce(sum, float32 [4, 7]); rank 2 all_reduce(sum, float32 [5, 7]). "
           "All ranks must call the same operation with the same dtype, global shape and "
           "partition");
  for (const double at : took) CHECK(at - begun < 1.0);  // the bar is 0.1; a busy machine is slow
}

TEST(like_notes_are_no_verdict_and_a_verdict_wakes_the_others_boards) {
  const World world = make(2);
  for (uint64_t seq = 3; seq < 500; ++seq) {  // numbers that begin elsewhere
    for (const auto& rank : world.ranks) note(*rank, seq);
    for (const auto& rank : world.ranks) rank->look();
  }
  CHECK(!world.ranks[0]->verdict());
  note(*world.ranks[0], 500, 1);
  note(*world.ranks[1], 500, 2);
  world.ranks[1]->look();
  world.ranks[0]->look();
  CHECK_EQ(world.shared->expected, 0);
  world.ranks[1]->look();
  CHECK_EQ(world.shared->expected, 1);
}

TEST(a_rank_that_is_thousands_ahead_is_compared_once_the_others_come) {
  for (const bool is_ahead_first : {false, true}) {
    const World world = make(2);
    SocketBoard& ahead = *world.ranks[is_ahead_first ? 0 : 1];
    SocketBoard& behind = *world.ranks[is_ahead_first ? 1 : 0];
    for (uint64_t seq = 1; seq <= 9000; ++seq) {
      note(ahead, seq, seq == 100 ? 5 : 4);  // long overwritten when the other is there
      if (seq % 500 == 0) ahead.look();
    }
    for (uint64_t seq = 1; seq <= 8500; ++seq) {
      note(behind, seq);
      if (seq % 50 == 0) {
        for (const auto& rank : world.ranks) rank->look();
      }
    }
    for (int i = 0; i < 3; ++i) {
      for (const auto& rank : world.ranks) rank->look();
    }
    const std::optional<Verdict> verdict = ahead.verdict();
    CHECK(verdict.has_value());
    CHECK(verdict->kind == FailureKind::kMismatch);
    CHECK(verdict->text.find("different collectives between #1 and #") != std::string::npos);
  }
}

TEST(damaged_bytes_are_an_error_that_names_their_rank) {
  const std::vector<char> clean = sent_for(3);
  CHECK_EQ(clean.size() % 3, 0u);
  const size_t record = clean.size() / 3;
  for (size_t at = 0; at < clean.size(); at += 5) {
    std::vector<char> bytes = clean;
    bytes[at] = static_cast<char>(bytes[at] ^ 0x41);
    const Verdict verdict = verdict_on([&](int socket) { send_all(socket, bytes); });
    CHECK(verdict.kind == FailureKind::kError);
    CHECK_EQ(verdict.culprit, 1);
    CHECK(verdict.text.find("what rank 1 sent to rank 0 is no note") != std::string::npos);
  }
  const auto is_refused = [&](const std::vector<char>& bytes) {
    return verdict_on([&](int socket) { send_all(socket, bytes); }).kind == FailureKind::kError;
  };
  CHECK(is_refused(std::vector<char>(clean.begin() + 1, clean.end())));  // out of step
  CHECK(is_refused(std::vector<char>(200, 0)));
  std::vector<char> twice = clean;
  twice.insert(twice.end(), clean.begin(), clean.begin() + static_cast<std::ptrdiff_t>(record));
  CHECK(is_refused(twice));  // numbers only grow
}

TEST(notes_that_come_byte_by_byte_are_put_together) {
  const std::vector<char> bytes = sent_for(3);
  const auto shared = std::make_shared<SharedBoard>(2);
  auto [near, far] = connect();
  std::vector<Fd> sockets(2);
  sockets[1] = std::move(near);
  const auto board = board_of(shared, 0, std::move(sockets));
  for (uint64_t seq = 1; seq <= 3; ++seq) note(*board, seq, seq == 3 ? 9 : 4);
  for (const char byte : bytes) {
    CHECK(!board->verdict());
    CHECK(::send(far.get(), &byte, 1, 0) == 1);
    board->look();
  }
  CHECK(board->verdict().has_value());
  CHECK(board->verdict()->kind == FailureKind::kMismatch);
  CHECK(board->verdict()->text.starts_with("#3: "));
}

TEST(a_hang_up_names_the_rank_on_both_ends) {
  const Verdict verdict = verdict_on([](int socket) { ::shutdown(socket, SHUT_RDWR); });
  CHECK(verdict.kind == FailureKind::kPeerLost);
  CHECK_EQ(verdict.culprit, 1);
  CHECK_EQ(verdict.text, "rank 1 died or lost its network");

  const auto shared = std::make_shared<SharedBoard>(3);
  auto [near, far] = connect();
  std::vector<Fd> sockets(3);
  sockets[0] = std::move(near);
  const auto board = board_of(shared, 2, std::move(sockets));
  board->look();
  CHECK(!board->verdict());
  far = Fd();
  board->look();
  CHECK(board->verdict().has_value());
  CHECK_EQ(board->verdict()->culprit, 0);
  CHECK(board->verdict()->kind == FailureKind::kPeerLost);
}

TEST(a_rank_that_does_not_read_costs_the_others_no_time) {
  const World world = make(2, 2048);
  SocketBoard& sender = *world.ranks[1];
  const double start = now_s();
  for (uint64_t seq = 1; seq <= 20'000; ++seq) {
    note(sender, seq);
    if (seq % 100 == 0) sender.look();
  }
  sender.look();
  CHECK(now_s() - start < 2);
  for (uint64_t seq = 1; seq <= 20'000; ++seq) note(*world.ranks[0], seq, seq == 19'990 ? 5 : 4);
  for (int i = 0; i < 2000 && !sender.verdict(); ++i) {
    for (const auto& rank : world.ranks) rank->look();
  }
  CHECK(sender.verdict().has_value());
  CHECK(sender.verdict()->kind == FailureKind::kMismatch);
  CHECK(sender.verdict()->text.starts_with("#19990: "));
}

TEST(leaving_is_no_hang_up_and_waits_for_no_reader) {
  World world = make(3);
  note(*world.ranks[2], 1);
  world.ranks[2]->leave();
  world.ranks[2]->leave();  // idempotent
  world.ranks[2].reset();
  world.ranks[0]->look();
  CHECK(!world.ranks[0]->verdict());
  CHECK_EQ(world.ranks[0]->left_before(5), 2);
  world.ranks[0].reset();
  world.ranks[1]->look();
  CHECK(!world.ranks[1]->verdict());

  const World stuck = make(2, 2048);
  for (uint64_t seq = 1; seq <= 900; ++seq) note(*stuck.ranks[1], seq);
  const double start = now_s();
  stuck.ranks[1]->leave();
  CHECK(now_s() - start < 2);
}

TEST(the_last_notes_are_compared_when_a_rank_leaves) {
  const World world = make(2);
  note(*world.ranks[1], 1, 5);
  world.ranks[1]->leave();
  note(*world.ranks[0], 1, 4);
  world.ranks[0]->leave();
  CHECK(world.ranks[0]->verdict().has_value());
  CHECK(world.ranks[0]->verdict()->kind == FailureKind::kMismatch);
}

TEST(sockets_that_lead_elsewhere_are_refused) {
  const auto shared = std::make_shared<SharedBoard>(3);
  const auto told = [&](int rank, size_t linked) {
    auto [near, far] = connect();
    std::vector<Fd> sockets(3);
    sockets[linked] = std::move(near);
    try {
      (void)board_of(shared, rank, std::move(sockets));
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK(told(0, 1).find("rank 0 got no socket to rank 2") != std::string::npos);
  CHECK(told(2, 1).find("rank 2 got no socket to rank 0") != std::string::npos);
  CHECK(told(1, 0).empty());
}

int main() { return check::run_all(); }
