// SPDX-License-Identifier: Apache-2.0
// Backend "local": ranks are threads of one process, for tests, notebooks and debuggers. Same
// protocol as shm.
#include <unistd.h>

#include "comm/backends.h"
#include "comm/host_communicator.h"
#include "comm/signature.h"

namespace tp_native::comm {

std::vector<std::shared_ptr<Communicator>> make_local(const Identity& identity) {
  constexpr size_t kCapacity = size_t{64} << 30;  // address space only
  TPN_CHECK(identity.size >= 1 && identity.size <= kMaxRanks, "world size ", identity.size,
            ": expected 1 to ", kMaxRanks);
  const uint64_t group = hash_text(identity.name);
  std::vector<std::shared_ptr<Arena>> arenas;
  std::vector<Peer> peers;
  std::vector<Identity> identities(static_cast<size_t>(identity.size), identity);
  for (int r = 0; r < identity.size; ++r) {
    identities[r].rank = r;
    arenas.push_back(Arena::anonymous(kCapacity, kReservedBytes));
    write_header(*arenas.back(), identities[r], group, ::getpid());
    peers.push_back({arenas.back()->mapping()});
  }
  std::vector<std::shared_ptr<Communicator>> ranks;
  for (int r = 0; r < identity.size; ++r) {
    ranks.push_back(std::make_shared<HostCommunicator>(identities[r], arenas[r], peers));
  }
  return ranks;
}

}  // namespace tp_native::comm
