// SPDX-License-Identifier: Apache-2.0
#include "comm/rendezvous.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>

#include <algorithm>
#include <cstddef>
#include <span>

#include "comm/limits.h"
#include "comm/protocol.h"
#include "core/callbacks.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/fault.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

namespace tp_native::comm {
namespace {

constexpr size_t kTextBytes = 768;
constexpr size_t kFdsMost = 2 * kMaxRanks;

struct Hello {
  uint64_t magic = kMagic;
  uint32_t version = kProtocolVersion;
  int32_t rank = -1;
  int32_t size = 0;
  int32_t pid = 0;
  uint64_t generation = 0;
  char build[64] = {};
  char group[64] = {};
};

struct Welcome {
  uint64_t magic = kMagic;
  int32_t is_refused = 0;
  int32_t size = 0;
  uint64_t generation = 0;
  int32_t pids[kMaxRanks] = {};
  int32_t has_process[kMaxRanks] = {};
  char text[kTextBytes] = {};
};

std::string get_text(std::span<const char> from) {
  return {from.data(), ::strnlen(from.data(), from.size())};
}

socklen_t fill_address(sockaddr_un& to, const std::string& name) {
  TPN_CHECK(!name.empty() && name.size() < sizeof(to.sun_path) - 1, "group address \"", name,
            "\": expected 1 to ", sizeof(to.sun_path) - 2, " bytes");
  to = {};
  to.sun_family = AF_UNIX;
  std::memcpy(to.sun_path + 1, name.data(), name.size());  // a leading NUL: abstract, no file
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

Fd make_socket() {
  const int raw = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (raw == -1 && (errno == EMFILE || errno == ENFILE))
    fail("the group's socket: " + describe_descriptor_limit(1));
  TPN_SYS(raw, "making a UNIX socket");
  return Fd(raw);
}

/// Whether `fd` became readable before `deadline_s`; lets signal handlers run.
bool wait_readable(int fd, double deadline_s) {
  for (;;) {
    const double left = deadline_s - now_s();
    pollfd p{fd, POLLIN, 0};
    const int rc = ::poll(&p, 1, static_cast<int>(std::clamp(left, 0.0, 0.05) * 1e3));
    if (rc > 0) return true;
    if (left <= 0) return false;
    if (callbacks().check_signals) callbacks().check_signals();
  }
}

template <class Message>
bool send_message(int socket, const Message& message, std::span<const int> fds) {
  iovec io{const_cast<Message*>(&message), sizeof(message)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kFdsMost)] = {};
  msghdr header{};
  header.msg_iov = &io;
  header.msg_iovlen = 1;
  if (!fds.empty()) {
    header.msg_control = control;
    header.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* const c = CMSG_FIRSTHDR(&header);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(c), fds.data(), fds.size_bytes());
  }
  return ::sendmsg(socket, &header, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof(message));
}

enum class Received { kWhole, kFewerDescriptors, kNothing };

/// kFewerDescriptors: this process may not have as many open as came along. Anything but one whole
/// message is kNothing.
template <class Message>
Received receive_message(int socket, Message& message, std::vector<Fd>& fds) {
  iovec io{&message, sizeof(message)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kFdsMost)] = {};
  msghdr header{};
  header.msg_iov = &io;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  const ssize_t bytes = ::recvmsg(socket, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  for (cmsghdr* c = CMSG_FIRSTHDR(&header); bytes >= 0 && c; c = CMSG_NXTHDR(&header, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
      fds.emplace_back(fd);
    }
  }
  if (bytes != static_cast<ssize_t>(sizeof(message)) || (header.msg_flags & MSG_TRUNC) ||
      message.magic != kMagic)
    return Received::kNothing;
  return header.msg_flags & MSG_CTRUNC ? Received::kFewerDescriptors : Received::kWhole;
}

ucred peer_of(int socket) {
  ucred peer{};
  socklen_t length = sizeof(peer);
  TPN_SYS(::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length),
          "asking who is at the other end");
  return peer;
}

Fd process_of(int socket, int pid) {
  int fd = -1;
  socklen_t length = sizeof(fd);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &length) == 0) return Fd(fd);
  if (pid <= 0) return {};  // in another pid namespace: its hang-up has to do
  return Fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));  // kernels before 6.5
}

Hello make_hello(const Identity& identity) {
  Hello hello;
  hello.rank = identity.rank;
  hello.size = identity.size;
  hello.pid = ::getpid();
  hello.generation = identity.generation;  // proof: gen.meet
  copy_text(hello.build, TPN_VERSION " torch " TPN_TORCH_VERSION);
  copy_text(hello.group, identity.name);
  return hello;
}

/// Why `theirs` cannot join rank 0's group; empty if it can.
std::string objection(const Hello& mine, const Hello& theirs, const std::vector<Member>& members) {
  const std::string who = concat("rank ", theirs.rank, " (pid ", theirs.pid, ")");
  if (theirs.version != mine.version || get_text(theirs.build) != get_text(mine.build)) {
    return concat(who, " runs tp_native ", get_text(theirs.build), ", rank 0 runs ",
                  get_text(mine.build), ": install one version for all ranks");
  }
  if (theirs.size != mine.size) {
    return concat(who, " was started with world size ", theirs.size, ", rank 0 (pid ", mine.pid,
                  ") with ", mine.size, ": start all ranks with the same WORLD_SIZE");
  }
  if (get_text(theirs.group) != get_text(mine.group)) {
    return concat(who, " wants group ", get_text(theirs.group), ", rank 0 ", get_text(mine.group),
                  ": all ranks must make their groups in the same order");
  }
  if (theirs.rank < 0 || theirs.rank >= mine.size) {
    return concat(who, " is outside a world of ", mine.size, ": expected 0 to ", mine.size - 1);
  }
  if (members[theirs.rank].pid >= 0) {
    return concat("two processes say that they are rank ", theirs.rank, ": pid ",
                  members[theirs.rank].pid, " and pid ", theirs.pid,
                  "; give each its own RANK, and each job its own MASTER_PORT");
  }
  return {};
}

struct Lobby {
  Hello mine;
  Roster roster;
  std::vector<Fd> waiting;  ///< accepted, hello not read yet

  int joined() const {
    return static_cast<int>(
        std::ranges::count_if(roster.members, [](const Member& m) { return m.pid >= 0; }));
  }

  [[noreturn]] void refuse_all(const std::string& why) {
    Welcome refusal;
    refusal.is_refused = 1;
    copy_text(refusal.text, why);
    for (const Fd& socket : roster.sockets) {
      if (socket) (void)send_message(socket.get(), refusal, {});
    }
    for (const Fd& socket : waiting) (void)send_message(socket.get(), refusal, {});
    fail(why);
  }

  /// Reads one caller's hello.
  void admit(Fd socket) {
    Hello theirs;
    std::vector<Fd> fds;
    const ucred peer = peer_of(socket.get());
    if (peer.uid != ::geteuid()) return;  // not one of ours: drop it
    const Received received = receive_message(socket.get(), theirs, fds);
    if (received == Received::kNothing) return;
    std::string why = objection(mine, theirs, roster.members);
    if (why.empty() && fds.size() != 1) {
      why = received == Received::kFewerDescriptors
                ? concat("rank 0 ", describe_descriptor_limit(2 * mine.size))
                : concat("rank ", theirs.rank, " sent no memory");
    }
    if (!why.empty()) {
      waiting.push_back(std::move(socket));
      refuse_all(why);
    }
    roster.generation = std::max(roster.generation, theirs.generation);  // proof: gen.agree
    Member& member = roster.members[theirs.rank];
    member.pid =
        peer.pid > 0 ? peer.pid : theirs.pid;  // 0: the caller lives in another pid namespace
    member.arena = std::move(fds[0]);
    member.process = process_of(socket.get(), peer.pid);
    roster.sockets[theirs.rank] = std::move(socket);
  }

  /// Nobody waits until the deadline for a rank that has come and died.
  void check_living(int rank) {
    char byte;
    const ssize_t got = ::recv(roster.sockets[rank].get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR))) return;
    const int pid = roster.members[rank].pid;
    roster.sockets[rank] = Fd();
    refuse_all(concat("rank ", rank, " (pid ", pid, ") left while the group was being made"));
  }

  void accept_caller(const Fd& listener) {
    const int caller = ::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC);
    if (caller >= 0) {
      waiting.emplace_back(caller);
    } else if (errno == EMFILE || errno == ENFILE) {
      refuse_all(concat("rank 0 ", describe_descriptor_limit(2 * mine.size)));
    }
  }

  void check_signals() {
    if (!callbacks().check_signals) return;
    try {
      callbacks().check_signals();
    } catch (...) {
      try {
        refuse_all("rank 0 was interrupted by a signal while the group was being made");
      } catch (...) {  // the signal's own exception is the one to report
      }
      throw;
    }
  }

  [[noreturn]] void refuse_late(double timeout_s) {
    std::ostringstream why;
    why << "ranks missing:";
    for (int r = 0; r < mine.size; ++r) {
      if (roster.members[r].pid < 0) why << ' ' << r;
    }
    why << " after " << timeout_s << " s; joined:";
    for (int r = 0; r < mine.size; ++r) {
      if (roster.members[r].pid >= 0) why << ' ' << r << " (pid " << roster.members[r].pid << ')';
    }
    why << ". Start all " << mine.size << " ranks, or raise init_timeout_s";
    refuse_all(why.str());
  }
};

Roster host(const Identity& identity, const std::string& address, int arena_fd, double deadline_s,
            double timeout_s) {
  sockaddr_un name;
  const socklen_t length = fill_address(name, address);
  const Fd listener = make_socket();
  if (::bind(listener.get(), reinterpret_cast<sockaddr*>(&name), length) == -1) {
    TPN_CHECK(
        errno != EADDRINUSE,
        "another process is rank 0 of this job already: two jobs share MASTER_ADDR and MASTER_PORT,"
        " or two processes have RANK=0; give each job its own MASTER_PORT");
    TPN_SYS(-1, "binding the group's UNIX socket");
  }
  TPN_FAULT("meet.listen");
  TPN_SYS(::listen(listener.get(), 64), "listening for the other ranks");

  Lobby lobby;
  lobby.mine = make_hello(identity);
  lobby.roster.members.resize(identity.size);
  lobby.roster.sockets.resize(identity.size);
  lobby.roster.generation = identity.generation;
  Member& self = lobby.roster.members[0];
  self.pid = ::getpid();
  self.arena = Fd(::fcntl(arena_fd, F_DUPFD_CLOEXEC, 0));
  self.process = Fd(static_cast<int>(::syscall(SYS_pidfd_open, self.pid, 0)));

  while (lobby.joined() < identity.size) {
    std::vector<pollfd> polled{{listener.get(), POLLIN, 0}};
    for (const Fd& socket : lobby.waiting) polled.push_back({socket.get(), POLLIN, 0});
    const size_t joined = polled.size();
    for (const Fd& socket : lobby.roster.sockets) polled.push_back({socket.get(), POLLRDHUP, 0});
    const double left = deadline_s - now_s();
    (void)::poll(polled.data(), polled.size(), static_cast<int>(std::clamp(left, 0.0, 0.05) * 1e3));
    for (int r = 1; r < identity.size; ++r) {
      if (polled[joined + r].revents != 0) lobby.check_living(r);
    }
    std::vector<Fd> still_waiting;
    std::vector<Fd> callers = std::exchange(lobby.waiting, {});
    for (size_t i = 0; i < callers.size(); ++i) {
      if (polled[i + 1].revents != 0) {
        lobby.admit(std::move(callers[i]));
      } else {
        still_waiting.push_back(std::move(callers[i]));
      }
    }
    lobby.waiting = std::move(still_waiting);
    if (polled[0].revents != 0) lobby.accept_caller(listener);
    lobby.check_signals();
    if (left <= 0 && lobby.joined() < identity.size) lobby.refuse_late(timeout_s);
  }

  Welcome welcome;
  welcome.size = identity.size;
  welcome.generation = lobby.roster.generation;
  std::vector<int> fds;
  for (int r = 0; r < identity.size; ++r) fds.push_back(lobby.roster.members[r].arena.get());
  for (int r = 0; r < identity.size; ++r) {
    const Member& member = lobby.roster.members[r];
    welcome.pids[r] = member.pid;
    welcome.has_process[r] = member.process ? 1 : 0;
    if (member.process) fds.push_back(member.process.get());
  }
  for (int r = 1; r < identity.size; ++r) {
    TPN_FAULT("meet.welcome");
    if (!send_message(lobby.roster.sockets[r].get(), welcome, fds)) {
      lobby.refuse_all(
          concat("rank ", r, " (pid ", welcome.pids[r], ") died while the group was being made"));
    }
  }
  return std::move(lobby.roster);
}

Fd call(const std::string& address, double deadline_s, double timeout_s) {
  sockaddr_un name;
  const socklen_t length = fill_address(name, address);
  for (long pause_us = 200;; pause_us = std::min(pause_us * 2, 20'000L)) {
    Fd socket = make_socket();
    if (::connect(socket.get(), reinterpret_cast<sockaddr*>(&name), length) == 0) return socket;
    TPN_CHECK(errno == ECONNREFUSED || errno == ENOENT || errno == EAGAIN || errno == EINTR,
              "reaching rank 0: ", std::strerror(errno));
    TPN_CHECK(now_s() < deadline_s, "ranks missing: 0 after ", timeout_s,
              " s. Start all ranks on this host with the same MASTER_ADDR and MASTER_PORT, or "
              "raise init_timeout_s");
    if (callbacks().check_signals) callbacks().check_signals();
    const timespec pause{0, pause_us * 1000};
    ::nanosleep(&pause, nullptr);
  }
}

Roster join(const Identity& identity, const std::string& address, int arena_fd, double deadline_s,
            double timeout_s) {
  Roster roster;
  Fd socket = call(address, deadline_s, timeout_s);
  TPN_CHECK(peer_of(socket.get()).uid == ::geteuid(),
            "rank 0's socket belongs to another user: choose another MASTER_PORT");
  const int give[] = {arena_fd};
  TPN_FAULT("meet.hello");
  TPN_CHECK(send_message(socket.get(), make_hello(identity), give),
            "rank 0 left while the group was being made");

  Welcome welcome;
  std::vector<Fd> fds;
  // rank 0 reports at its own deadline, which may be a little later than this one
  TPN_CHECK(wait_readable(socket.get(), deadline_s + 5), "rank 0 has not answered within ",
            timeout_s + 5, " s: is it stopped?");
  const Received received = receive_message(socket.get(), welcome, fds);
  TPN_CHECK(received != Received::kNothing, "rank 0 died while the group was being made");
  TPN_CHECK(!welcome.is_refused, get_text(welcome.text));
  size_t expected = static_cast<size_t>(identity.size);
  for (int r = 0; r < identity.size; ++r) expected += welcome.has_process[r] ? 1 : 0;
  TPN_CHECK(received == Received::kWhole, "rank ", identity.rank, " ",
            describe_descriptor_limit(static_cast<int>(expected)));
  TPN_CHECK(welcome.size == identity.size && fds.size() == expected, "rank 0 sent ", fds.size(),
            " descriptors, expected ", expected);
  roster.generation = welcome.generation;
  roster.members.resize(identity.size);
  size_t next = static_cast<size_t>(identity.size);
  for (int r = 0; r < identity.size; ++r) {
    roster.members[r].pid = welcome.pids[r];
    roster.members[r].arena = std::move(fds[r]);
    if (welcome.has_process[r]) roster.members[r].process = std::move(fds[next++]);
  }
  roster.sockets.push_back(std::move(socket));
  return roster;
}

}  // namespace

Roster meet(const Identity& identity, const std::string& address, int arena_fd, double timeout_s) {
  TPN_CHECK(identity.size >= 1 && identity.size <= kMaxRanks, "world size ", identity.size,
            ": expected 1 to ", kMaxRanks, " ranks on one host");
  TPN_CHECK(identity.rank >= 0 && identity.rank < identity.size, "rank ", identity.rank,
            ": expected 0 to ", identity.size - 1);
  const double deadline_s = now_s() + timeout_s;
  return identity.rank == 0 ? host(identity, address, arena_fd, deadline_s, timeout_s)
                            : join(identity, address, arena_fd, deadline_s, timeout_s);
}

}  // namespace tp_native::comm
