// SPDX-License-Identifier: Apache-2.0
// Ranks as forked processes without torch or Python: rendezvous, collectives, death.
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <random>

#include "check.h"
#include "comm/backends.h"
#include "core/error.h"

using namespace tp_native;        // NOLINT
using namespace tp_native::comm;  // NOLINT

// In a build that measures coverage (-u __gcov_dump): _exit() would lose what the rank counted.
extern "C" void __gcov_dump() __attribute__((weak));

namespace {

double now_s() {
  timespec t;
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

std::string fresh_address() {
  static int count = 0;
  return "tpn-test-" + std::to_string(::getpid()) + "-" + std::to_string(count++);
}

/// Forks a rank that exits with what `body` returns, 200 for an Error of another kind than
/// expected, 201 for anything else.
pid_t spawn(const std::function<int()>& body) {
  std::fflush(stdout);
  const pid_t pid = ::fork();
  if (pid != 0) return pid;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  int status = 201;
  try {
    status = body();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank: %s\n", error.what());
  }
  if (__gcov_dump != nullptr) __gcov_dump();
  ::_exit(status);
}

int exit_status(pid_t pid) {
  int status = 0;
  ::waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

std::shared_ptr<Communicator> join(const std::string& address, int rank, int size,
                                   double init_timeout_s = 10) {
  return make_shm(Identity{rank, size, "test", "shm", 0, 20, {}}, {address, init_timeout_s});
}

size_t open_descriptors() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    ++count;
  return count;
}

int reduces(Communicator& c, int rounds) {
  const int size = c.identity().size;
  for (int round = 0; round < rounds; ++round) {
    for (const int64_t count : {3, 700, 20000, 150000}) {
      const int64_t shape[] = {count};
      const Block block = c.allocate(count * 4);
      std::vector<float> own(static_cast<size_t>(count));
      float* const data = block.data && round % 2 ? static_cast<float*>(block.data) : own.data();
      for (int64_t i = 0; i < count; ++i) data[i] = static_cast<float>(c.identity().rank + 1);
      c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape}, data, data,
                   count, {}, {});
      for (int64_t i = 0; i < count; ++i) {
        if (data[i] != static_cast<float>(size * (size + 1) / 2)) return 1;
      }
    }
  }
  return 0;
}

}  // namespace

TEST(processes_reduce_in_any_start_order_and_leave_no_descriptor) {
  for (const int size : {1, 2, 3, 4}) {
    const std::string address = fresh_address();
    std::vector<pid_t> pids;
    for (int rank = size - 1; rank >= 0; --rank) {  // rank 0 last: the others wait for its socket
      pids.push_back(spawn([&, rank] {
        const size_t before = open_descriptors();
        {
          const auto c = join(address, rank, size);
          if (reduces(*c, 10) != 0) return 1;
          c->close();
        }
        return open_descriptors() == before ? 0 : 2;
      }));
    }
    for (const pid_t pid : pids) CHECK_EQ(exit_status(pid), 0);
  }
}

#ifndef __SANITIZE_ADDRESS__  // UBSan needs descriptors of its own to look at an object
TEST(rank_0_without_descriptors_for_its_callers_says_so) {
  const std::string address = fresh_address();
  const auto told = [&](int rank, int spare) {
    return spawn([&address, rank, spare] {
      rlimit limit{};
      ::getrlimit(RLIMIT_NOFILE, &limit);
      limit.rlim_cur = 64;
      ::setrlimit(RLIMIT_NOFILE, &limit);
      std::vector<int> held;
      for (int fd = ::dup(0); spare > 0 && fd >= 0; fd = ::dup(0)) held.push_back(fd);
      for (int i = 0; i < spare; ++i) {
        ::close(held.back());
        held.pop_back();
      }
      ::alarm(5);
      try {
        join(address, rank, 2);
      } catch (const Error& error) {
        const std::string text = error.what();
        if (rank == 0)
          return text.find("rank 0 needs 4 file descriptors, 64 of 64") != text.npos ? 0 : 3;
        return text.find("rank 0") != text.npos ? 0 : 4;  // its call was never accepted
      }
      return 2;
    });
  };
  // its arena, the listener, a copy of the arena and its own pidfd: none is left for a caller
  const pid_t pids[] = {told(0, 4), told(1, 0)};
  for (const pid_t pid : pids) CHECK_EQ(exit_status(pid), 0);
}
#endif

TEST(a_launcher_that_has_died_already_is_told) {
  const pid_t dead = spawn([] { return 0; });
  CHECK_EQ(exit_status(dead), 0);
  for (const pid_t launcher : {dead, ::getpid()}) {  // nobody's, and not the parent
    const std::string address = fresh_address();
    std::string text;
    try {
      make_shm(Identity{0, 1, "test", "shm", 0, 20, {}},
               {.address = address, .launcher_pid = launcher});
    } catch (const Error& error) {
      text = error.what();
    }
    CHECK(text.find("has died") != text.npos);
  }
}

TEST(a_killed_peer_is_named_within_100_ms_wherever_it_died) {
  std::mt19937 rng(3);
  double worst_s = 0;
  for (int trial = 0; trial < 30; ++trial) {
    const int size = 2 + trial % 3;
    const int victim = trial % size;
    const std::string address = fresh_address();
    int pipe_fds[2];
    CHECK_EQ(::pipe(pipe_fds), 0);
    std::vector<pid_t> pids;
    for (int rank = 0; rank < size; ++rank) {
      pids.push_back(spawn([&, rank] {
        const auto c = join(address, rank, size);
        try {
          for (;;) {
            if (reduces(*c, 1) != 0) return 1;
          }
        } catch (const Error& error) {
          const double at = now_s();
          if (::write(pipe_fds[1], &at, sizeof(at)) != sizeof(at)) return 2;
          const FailureRecord& r = error.record();
          return r.kind == FailureKind::kPeerLost && r.peer == victim && r.op == "all_reduce" &&
                         r.seq > 0
                     ? 0
                     : 3;
        }
      }));
    }
    ::usleep(30000 + rng() % 20000);
    const double killed_at = now_s();
    ::kill(pids[static_cast<size_t>(victim)], SIGKILL);
    for (int rank = 0; rank < size; ++rank) {
      CHECK_EQ(exit_status(pids[static_cast<size_t>(rank)]), rank == victim ? 1000 + SIGKILL : 0);
    }
    for (int rank = 1; rank < size; ++rank) {
      double at = 0;
      CHECK_EQ(::read(pipe_fds[0], &at, sizeof(at)), static_cast<ssize_t>(sizeof(at)));
      worst_s = std::max(worst_s, at - killed_at);
    }
    ::close(pipe_fds[0]);
    ::close(pipe_fds[1]);
  }
  std::printf("        slowest of 30: %.1f ms\n", worst_s * 1e3);
  CHECK(worst_s <= 0.1);
}

TEST(a_peer_that_dies_before_the_first_collective_is_named_too) {
  const std::string address = fresh_address();
  const pid_t victim = spawn([&] {
    const auto c = join(address, 1, 2);
    ::raise(SIGKILL);
    return 0;
  });
  const pid_t survivor = spawn([&] {
    const auto c = join(address, 0, 2);
    ::usleep(200000);
    try {
      c->barrier(0, {});
    } catch (const Error& error) {
      return error.record().kind == FailureKind::kPeerLost && error.record().peer == 1 ? 0 : 3;
    }
    return 4;
  });
  CHECK_EQ(exit_status(victim), 1000 + SIGKILL);
  CHECK_EQ(exit_status(survivor), 0);
}

TEST(missing_ranks_are_named_at_the_deadline_on_all_that_came) {
  const std::string address = fresh_address();
  std::vector<pid_t> pids;
  for (const int rank : {0, 2}) {
    pids.push_back(spawn([&, rank] {
      try {
        (void)join(address, rank, 4, 0.3);
      } catch (const Error& error) {
        return std::string(error.what()).find("ranks missing: 1 3 after") == 0 ? 0 : 3;
      }
      return 4;
    }));
  }
  for (const pid_t pid : pids) CHECK_EQ(exit_status(pid), 0);
}

TEST(strangers_and_silent_callers_do_not_stop_the_group) {
  const std::string address = fresh_address();
  const pid_t first = spawn([&] { return reduces(*join(address, 0, 2), 1); });
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path + 1, address.data(), address.size());
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + address.size());
  const auto call = [&] {
    const int caller = ::socket(AF_UNIX, SOCK_SEQPACKET, 0);
    for (int i = 0; i < 200 && ::connect(caller, reinterpret_cast<sockaddr*>(&name), length) != 0;
         ++i)
      ::usleep(5000);
    return caller;
  };
  const int silent = call();
  const int garbage = call();
  CHECK_EQ(::send(garbage, "hello", 5, MSG_NOSIGNAL), ssize_t{5});
  const pid_t second = spawn([&] { return reduces(*join(address, 1, 2), 1); });
  CHECK_EQ(exit_status(first), 0);
  CHECK_EQ(exit_status(second), 0);
  ::close(silent);
  ::close(garbage);
}

int main() { return check::run_all(); }
