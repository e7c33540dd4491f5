// SPDX-License-Identifier: Apache-2.0
// How the processes of one host find each other: rank 0 listens on an abstract UNIX socket, checks
// every caller, and hands all ranks the descriptors of everybody's arena and process. No file, no
// port, nothing to clean up.
#pragma once

#include <string>
#include <vector>

#include "comm/communicator.h"
#include "core/unique.h"

namespace tp_native::comm {

struct Member {
  int pid = -1;
  Fd arena;
  Fd process;  ///< pidfd; empty on kernels before 5.3
};

struct Roster {
  std::vector<Member> members;  ///< by rank, this one included
  std::vector<Fd> sockets;  ///< rank 0: one per peer by rank; others: sockets[0] leads to rank 0.
                            ///< Hang-up = death
  uint64_t generation = 0;  ///< the highest that any rank proposed
};

/// Gives this rank's arena (`arena_fd`, duplicated) and gets everybody's. Raises the same error on
/// all ranks that came: missing ranks by number at the deadline; at once for a rank that came and
/// died, a second process with the same rank, another world size, another version, another user.
/// `identity.generation` is this rank's proposal: one more than the last that it knows.
Roster meet(const Identity& identity, const std::string& address, int arena_fd, double timeout_s);

}  // namespace tp_native::comm
