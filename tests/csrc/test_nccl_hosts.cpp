// SPDX-License-Identifier: Apache-2.0
// NCCL over several hosts, which share no memory: local groups and their leaders stand for hosts,
// and what ranks note goes over sockets.
// TSan: ranks are threads.
#include <sys/socket.h>

#include <chrono>
#include <thread>

#include "check.h"
#include "comm/socket_board.h"
#include "comm/two_level.h"
#include "memory_board.h"
#include "nccl_ranks.h"

namespace {

/// Ranks of "hosts" of these sizes: local groups and a local group of leaders, notes over sockets.
Made make_over_hosts(const std::vector<int64_t>& hosts, double timeout_s = 5) {
  use_doubles();
  static int count = 0;
  const std::string name = concat("tp:hosts:", count++);
  const int size = static_cast<int>(sum(hosts));
  const auto shared = std::make_shared<SharedBoard>(size);
  const Ranks leaders =
      make_local({0, static_cast<int>(hosts.size()), name + "/leaders", "local", 0, timeout_s});
  Ranks controls;
  for (size_t h = 0; h < hosts.size(); ++h) {
    const Ranks host = make_local(
        {0, static_cast<int>(hosts[h]), concat(name, '/', h), "local", 0, 2 * timeout_s + 2});
    for (size_t r = 0; r < host.size(); ++r) {
      const int rank = static_cast<int>(controls.size());
      controls.push_back(std::make_shared<TwoLevel>(
          Identity{rank, size, name, "two", 0, timeout_s}, host[r], r == 0 ? leaders[h] : nullptr,
          std::make_shared<MemoryBoard>(shared, rank), hosts));
    }
  }
  const auto width = static_cast<size_t>(size);
  std::vector<std::vector<int>> sockets(width, std::vector<int>(width, -1));
  for (size_t r = 1; r < width; ++r) {
    int ends[2];
    CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    sockets[0][r] = ends[0];
    sockets[r][0] = ends[1];
  }
  Made made;
  made.ranks.resize(width);
  made.failures = run(controls, [&](Communicator& control) {
    const int rank = control.identity().rank;
    made.ranks[rank] = make_nccl(options_of(rank), controls[rank],
                                 make_socket_board(controls[rank], sockets[rank]));
  });
  for (const FailureRecord& failure : made.failures) CHECK_EQ(failure.message, "");
  return made;
}

}  // namespace

TEST(ranks_of_several_hosts_number_note_and_leave_as_one_group) {
  const Ranks ranks = make_over_hosts({2, 1}).ranks;
  check_parts(ranks, {3, 0, 4});
  run_clean(ranks, [](Communicator& c) {
    c.barrier(0, {});
    c.check();
    const std::vector<LogEntry> log = c.op_log();
    for (size_t i = 1; i < log.size(); ++i) CHECK_EQ(log[i].seq, log[i - 1].seq + 1);
    CHECK(log.front().op == OpCode::kInit && log.back().op == OpCode::kBarrier);
  });
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 2) {
      c.close();
      fail("done");
    }
    loop(c);
  });
  check_all_told({failures[0], failures[1]}, FailureKind::kPeerLost, 2, "rank 2 left the group");
  close_all(ranks);
  CHECK_EQ(live_communicators(), 0);
}

TEST(ranks_of_several_hosts_take_windows_together) {
  const Ranks ranks = make_over_hosts({2, 1}).ranks;
  for (int step = 0; step < 3; ++step) {
    std::vector<Block> blocks(3);
    run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
                blocks[c.identity().rank] = c.allocate(4096);
                CHECK_EQ(c.stats().windows, 1);
                c.barrier(0, {});
                OnDevice<float> x(stream, ramp(64, 1));
                const int64_t shape[] = {64};
                c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                             x.data(), x.data(), 64, {}, {stream});
                CHECK(x.read() == ramp(64, 3));
                c.check();
              }));
  }
  check_all_told(
      run(ranks, [](Communicator& c) { c.allocate(c.identity().rank == 2 ? 8192 : 4096); }),
      FailureKind::kMismatch, 2, "rank 2 empty_shared(uint8 [8192])");
  close_all(ranks);
  CHECK_EQ(live_communicators(), 0);
}

TEST(unlike_calls_on_two_hosts_are_told_on_all_ranks) {
  for (const bool is_barrier : {false, true}) {
    const Ranks ranks = make_over_hosts({2, 2}).ranks;
    const auto failures = run(ranks, [&](Communicator& c) {
      if (c.identity().rank == 3 && is_barrier) c.barrier(0, {});
      if (c.identity().rank == 3) {
        int32_t x = 0;
        on_gpu([&](Communicator& group, cuda::StreamHandle stream) {
          OnDevice<int32_t> one(stream, {x});
          const int64_t shape[] = {1};
          group.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kInt32, .shape = shape},
                           one.data(), one.data(), 1, {}, {stream});
        })(c);
      }
      loop(c);
    });
    check_all_told(failures, FailureKind::kMismatch, 3,
                   is_barrier ? "rank 3 barrier" : "rank 3 all_reduce(sum, int32 [1])");
    close_all(ranks);
  }
  CHECK_EQ(live_communicators(), 0);
}

TEST(a_barrier_over_two_hosts_ends_with_a_verdict_of_either_part) {
  const Ranks ranks = make_over_hosts({1, 2}, 0.3).ranks;
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank != 2) c.barrier(0, {});
    for (const double end = now_s() + 10; now_s() < end;) {
      c.check();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  });
  // of its host, or of the leaders, whichever waits longer: they name it with its pid or without
  check_all_told(failures, FailureKind::kTimeout, 2, "did not come within 0.3 s");
  close_all(ranks);

  const Ranks others = make_over_hosts({1, 2}, 5).ranks;
  check_all_told(run(others,
                     [](Communicator& c) {
                       if (c.identity().rank == 0) c.abort("enough");
                       c.barrier(0, {});
                       loop(c);
                     }),
                 FailureKind::kAborted, 0, "rank 0 aborted the group: enough");
  close_all(others);
  CHECK_EQ(live_communicators(), 0);
}

int main() {
  ::setenv("FAKE_CUDA_DEVICES", "8", 1);
  return check::run_all();
}
