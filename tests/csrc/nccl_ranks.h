// SPDX-License-Identifier: Apache-2.0
// Ranks as threads over NCCL's and the driver's test doubles, one GPU each.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "check.h"
#include "comm/backends.h"
#include "device_ranks.h"

constexpr const char* kNccl = TPN_DOUBLES "/libfake_nccl.so";

inline int live_communicators() { return symbol<int()>(kNccl, "fake_nccl_live")(); }

inline NcclOptions options_of(int rank) {
  NcclOptions options;
  options.device = rank;
  options.init_timeout_s = 5;
  options.search.file = kNccl;
  return options;
}

/// `size` ranks as threads, one GPU each; what making them threw.
struct Made {
  Ranks ranks;
  std::vector<FailureRecord> failures;
};
inline Made make(int size, double timeout_s = 5,
                 const std::function<NcclOptions(int)>& options = options_of) {
  use_doubles();
  static int count = 0;
  const Ranks controls = make_local({0, size, concat("tp:", count++), "local", 0, timeout_s});
  Made made;
  made.ranks.resize(static_cast<size_t>(size));
  made.failures = run(controls, [&](Communicator& control) {
    const int rank = control.identity().rank;
    made.ranks[rank] = make_nccl(options(rank), controls[rank]);
  });
  return made;
}

inline Ranks make_clean(int size, double timeout_s = 5) {
  Made made = make(size, timeout_s);
  for (const FailureRecord& failure : made.failures) {
    if (!failure.message.empty()) throw std::runtime_error(failure.message);
  }
  return made.ranks;
}

inline void close_all(const Ranks& ranks) {
  run_clean(ranks, [](Communicator& c) { c.close(); });
}

/// Three processes of this test, each told "rank", its rank, a name of the job and where to say
/// that it is ready; `settle_s` after that rank 1 is killed. The others have to end well, and soon.
/// Nothing under TSan, which cannot follow them.
inline void kill_one_of_three([[maybe_unused]] const char* program,
                              [[maybe_unused]] double settle_s) {
#if !defined(__SANITIZE_THREAD__)
  // fresh processes: the libraries of this one have threads
  int pipes[2];
  CHECK(::pipe(pipes) == 0);
  pid_t pids[3];
  for (int rank = 0; rank < 3; ++rank) {
    pids[rank] = ::fork();
    CHECK(pids[rank] >= 0);
    if (pids[rank] == 0) {
      ::execl("/proc/self/exe", program, "rank", std::to_string(rank).c_str(),
              std::to_string(::getppid()).c_str(), std::to_string(pipes[1]).c_str(), nullptr);
      ::_exit(99);
    }
  }
  char ready = 0;
  for (int rank = 0; rank < 3; ++rank) CHECK(::read(pipes[0], &ready, 1) == 1);
  std::this_thread::sleep_for(std::chrono::duration<double>(settle_s));
  const double start = now_s();
  CHECK(::kill(pids[1], SIGKILL) == 0);
  for (int rank = 0; rank < 3; ++rank) {
    int status = 0;
    CHECK(::waitpid(pids[rank], &status, 0) == pids[rank]);
    if (rank != 1) CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  CHECK(now_s() - start < 5);
  ::close(pipes[0]);
  ::close(pipes[1]);
#endif
}
