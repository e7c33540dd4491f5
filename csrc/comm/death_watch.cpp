// SPDX-License-Identifier: Apache-2.0
#include "comm/death_watch.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>

namespace tp_native::comm {

DeathWatch::DeathWatch(HostCommunicator& communicator, Roster roster)
    : communicator_(communicator), roster_(std::move(roster)), stop_(::eventfd(0, EFD_CLOEXEC)) {
  TPN_SYS(stop_.get(), "making an eventfd for the death watch");
  sigset_t all;  // signals go to the threads of the program
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ::pthread_setname_np(thread_.native_handle(), "tpn-deathwatch");
}

DeathWatch::~DeathWatch() {
  const uint64_t one = 1;
  (void)!::write(stop_.get(), &one, sizeof(one));
  thread_.join();
}

void DeathWatch::run() {
  const Identity& self = communicator_.identity();
  std::vector<pollfd> watched{{stop_.get(), POLLIN, 0}};
  std::vector<int> rank_of{-1};
  const auto watch = [&](int fd, int rank, short events) {
    if (fd < 0) return;
    watched.push_back({fd, events, 0});
    rank_of.push_back(rank);
  };
  for (int r = 0; r < self.size; ++r) {
    if (r != self.rank) watch(roster_.members[r].process.get(), r, POLLIN);
  }
  // A hang-up comes later than the pidfd where a child of the peer holds a copy of its socket; it
  // is for old kernels.
  for (size_t i = 0; i < roster_.sockets.size(); ++i) {
    watch(roster_.sockets[i].get(), static_cast<int>(i), POLLRDHUP);
  }
  for (;;) {
    if (::poll(watched.data(), watched.size(), -1) < 0) continue;
    if (watched[0].revents != 0) return;
    for (size_t i = 1; i < watched.size(); ++i) {
      if (watched[i].revents == 0) continue;
      watched[i].fd = -1;  // poll ignores it from now on
      report(rank_of[i]);
    }
  }
}

void DeathWatch::report(int rank) {
  if (communicator_.has_left(rank)) return;  // it closed the group first
  communicator_.publish_abort(FailureKind::kPeerLost, rank,
                              concat("rank ", rank, " (pid ", roster_.members[rank].pid, ") died"));
}

}  // namespace tp_native::comm
