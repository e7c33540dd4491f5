// SPDX-License-Identifier: Apache-2.0
#include "comm/peer_watch.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "core/callbacks.h"
#include "core/clock.h"

namespace tp_native::comm {
namespace {

constexpr int kBeatMilliseconds = 100;
constexpr double kFrozenWarnSeconds = 1.5;
constexpr double kStalledSeconds = 0.5;  // beyond it this process stood still itself

/// The process's state letter from /proc ("T": stopped, "D": in the kernel); '?' where it cannot be
/// seen, as in another pid namespace.
char state_of(int pid) {
  std::ifstream file(concat("/proc/", pid, "/stat"));
  std::string text;
  std::getline(file, text);
  const size_t name_end = text.rfind(')');  // the name may hold blanks and parentheses
  return name_end != std::string::npos && name_end + 2 < text.size() ? text[name_end + 2] : '?';
}

}  // namespace

PeerWatch::PeerWatch(HostCommunicator& communicator, Roster roster, double frozen_timeout_s,
                     Fd launcher, int launcher_pid)
    : communicator_(communicator),
      roster_(std::move(roster)),
      frozen_timeout_s_(frozen_timeout_s),
      launcher_(std::move(launcher)),
      launcher_pid_(launcher_pid),
      stop_(::eventfd(0, EFD_CLOEXEC)),
      hearts_(roster_.members.size()) {
  TPN_SYS(stop_.get(), "making an eventfd for the watch over the peers");
  sigset_t all;  // signals go to the threads of the program
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { run(); });
  } catch (...) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ::pthread_setname_np(thread_.native_handle(), "tpn-watch");
}

PeerWatch::~PeerWatch() {
  const uint64_t one = 1;
  (void)!::write(stop_.get(), &one, sizeof(one));
  thread_.join();
}

void PeerWatch::run() {
  const Identity& self = communicator_.identity();
  constexpr int kStop = -1;
  constexpr int kLauncher = -2;
  std::vector<pollfd> watched;
  std::vector<int> whose;
  const auto watch = [&](int fd, int who, short events) {
    if (fd < 0) return;
    watched.push_back({fd, events, 0});
    whose.push_back(who);
  };
  watch(stop_.get(), kStop, POLLIN);
  watch(launcher_.get(), kLauncher, POLLIN);
  for (int r = 0; r < self.size; ++r) {
    if (r != self.rank) watch(roster_.members[r].process.get(), r, POLLIN);
  }
  // A hang-up comes later than the pidfd where a child of the peer holds a copy of its socket; it
  // is for old kernels.
  for (size_t i = 0; i < roster_.sockets.size(); ++i) {
    watch(roster_.sockets[i].get(), static_cast<int>(i), POLLRDHUP);
  }
  double last_s = now_s();
  for (;;) {
    const int ready = ::poll(watched.data(), watched.size(), kBeatMilliseconds);
    communicator_.beat();
    for (size_t i = 0; ready > 0 && i < watched.size(); ++i) {
      if (watched[i].revents == 0) continue;  // proof: death.notice
      if (whose[i] == kStop) return;
      if (whose[i] == kLauncher) end_without_launcher();
      watched[i].fd = -1;  // poll ignores it from now on
      report_death(whose[i]);
    }
    const double now = now_s();
    check_hearts(now, now - last_s);
    last_s = now;
  }
}

void PeerWatch::report_death(int rank) {
  if (communicator_.has_left(rank)) return;  // it closed the group first; proof: death.report
  communicator_.publish_abort(FailureKind::kPeerLost, rank,
                              concat("rank ", rank, " (pid ", roster_.members[rank].pid, ") died ",
                                     communicator_.describe_last(rank)));
}

void PeerWatch::check_hearts(double now, double since_last_s) {
  const Identity& self = communicator_.identity();
  for (int r = 0; r < self.size; ++r) {
    if (r == self.rank) continue;
    Heart& heart = hearts_[r];
    const uint64_t beats = communicator_.beats(r);
    // after a stop of this process, or of the whole job, its own clock of the others means nothing
    if (beats != heart.beats || heart.since_s == 0 || since_last_s > kStalledSeconds) {
      heart = {beats, now, false};
      continue;
    }
    const double still_s = now - heart.since_s;
    if (still_s < std::min(kFrozenWarnSeconds, frozen_timeout_s_) || communicator_.has_left(r))
      continue;
    const auto text = [&] {
      return concat("rank ", r, " (pid ", roster_.members[r].pid, ") is frozen: no heartbeat for ",
                    static_cast<int>(still_s * 10) / 10.0, " s, process state ",
                    state_of(roster_.members[r].pid), ", ", communicator_.describe_last(r));
    };
    if (!heart.is_warned) {
      heart.is_warned = true;
      warn_later(concat("rank ", self.rank, " of group ", self.name, ": ", text(),
                        "; the group is given up after ", frozen_timeout_s_, " s"));
    }
    if (still_s >= frozen_timeout_s_)
      communicator_.publish_abort(FailureKind::kPeerLost, r, text());
  }
}

/// As if the launcher had said so itself: a handler of the program may clean up, but not for long.
void PeerWatch::end_without_launcher() {
  communicator_.publish_abort(FailureKind::kAborted, communicator_.identity().rank,
                              concat("the launcher (pid ", launcher_pid_, ") died"));
  ::kill(::getpid(), SIGTERM);
  ::sleep(3);
  ::kill(::getpid(), SIGKILL);
  for (;;) ::pause();
}

}  // namespace tp_native::comm
