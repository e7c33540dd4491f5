// SPDX-License-Identifier: Apache-2.0
// How each backend's communicators are made. One file per backend; a missing one is its
// `_unavailable` twin.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace tp_native::comm {

bool is_available(const std::string& backend);  ///< "shm", "local", "nccl"

/// One host, one process per rank. `address` names the abstract UNIX socket where rank 0 listens:
/// the same on all ranks, unique to this group. Blocks until all ranks are there or
/// `init_timeout_s` is over; the error names the missing ones.
std::shared_ptr<Communicator> make_shm(const Identity& identity, const std::string& address,
                                       double init_timeout_s);

/// `size` ranks as threads of this process; element r belongs to rank r.
std::vector<std::shared_ptr<Communicator>> make_local(const Identity& identity);

/// GPUs over NCCL.
std::shared_ptr<Communicator> make_nccl(const Identity& identity,
                                        const std::vector<char>& unique_id, int device,
                                        double init_timeout_s);

}  // namespace tp_native::comm
