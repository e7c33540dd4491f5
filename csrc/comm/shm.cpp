// SPDX-License-Identifier: Apache-2.0
// Backend "shm": one process per rank on one host, memory in sealed memfds that never had a name.
#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "comm/backends.h"
#include "comm/host_communicator.h"
#include "comm/peer_watch.h"

namespace tp_native::comm {
namespace {

Peer map_peer(const Member& member, int rank) {
  struct stat info;
  TPN_SYS(::fstat(member.arena.get(), &info), "looking at the memory of rank ", rank);
  const int seals = ::fcntl(member.arena.get(), F_GET_SEALS);
  TPN_CHECK(
      seals >= 0 && (seals & F_SEAL_SHRINK) && static_cast<size_t>(info.st_size) >= kReservedBytes,
      "rank ", rank, " sent ", info.st_size, " bytes that are no sealed arena");
  return {std::make_shared<Mapping>(member.arena.get(), static_cast<size_t>(info.st_size))};
}

/// Opened before anything that takes time: who dies later is seen by it.
Fd launcher_of(int pid) {
  if (pid <= 0) return {};
  Fd launcher(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  TPN_CHECK((launcher || errno != ESRCH) && ::getppid() == pid, "the launcher (pid ", pid,
            ") has died");
  return launcher;
}

}  // namespace

std::shared_ptr<Communicator> make_shm(Identity identity, const ShmOptions& options) {
  Fd launcher = launcher_of(options.launcher_pid);
  const auto memory =
      static_cast<size_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const std::shared_ptr<Arena> arena =
      Arena::shared(std::max(memory, 2 * kReservedBytes), kReservedBytes);
  const uint64_t group = hash_text(options.address + "/" + identity.name);
  write_header(*arena, identity, group, ::getpid(), options.offer);

  Roster roster = meet(identity, options.address, arena->fd(), options.init_timeout_s);
  identity.generation = roster.generation;
  identity.name = concat(identity.name, ':', roster.generation);
  std::vector<Peer> peers;
  for (int r = 0; r < identity.size; ++r) {
    // proof: gen.fence
    peers.push_back(r == identity.rank ? Peer{arena->mapping()} : map_peer(roster.members[r], r));
    check_header(peers.back(), r, identity, group);
    roster.members[r].arena = Fd();  // the mapping is enough
  }
  auto communicator =
      std::make_shared<HostCommunicator>(identity, arena, std::move(peers), options.is_checked);
  communicator->keep(std::make_unique<PeerWatch>(*communicator, std::move(roster),
                                                 options.frozen_timeout_s, std::move(launcher),
                                                 options.launcher_pid));
  communicator->barrier(options.init_timeout_s, {});  // every rank has mapped everybody's memory
  return communicator;
}

std::vector<std::string> offers(const std::shared_ptr<Communicator>& shm) {
  const auto host = std::dynamic_pointer_cast<HostCommunicator>(shm);
  TPN_CHECK(host, "only ranks over shared memory have offers");
  std::vector<std::string> all;
  for (int r = 0; r < host->identity().size; ++r) all.push_back(host->offer(r));
  return all;
}

}  // namespace tp_native::comm
