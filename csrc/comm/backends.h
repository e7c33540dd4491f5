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

struct ShmOptions {
  /// The abstract UNIX socket where rank 0 listens: the same on all ranks, unique to this group.
  std::string address;
  double init_timeout_s = 60;
  double frozen_timeout_s = 10;  ///< a peer without a heartbeat for so long is given up
  int launcher_pid = 0;          ///< the parent, whose death ends this process; 0: nobody's
  bool is_checked = true;        ///< false: no fingerprints, records or arrivals, for a benchmark
};

/// One host, one process per rank. Blocks until all ranks are there or `init_timeout_s` is over;
/// the error names the missing ones. The group's generation is the highest `identity.generation`
/// that a rank proposed, and ":" and that number are appended to its name.
std::shared_ptr<Communicator> make_shm(Identity identity, const ShmOptions& options);

/// `size` ranks as threads of this process; element r belongs to rank r.
std::vector<std::shared_ptr<Communicator>> make_local(const Identity& identity);

/// GPUs over NCCL.
std::shared_ptr<Communicator> make_nccl(const Identity& identity,
                                        const std::vector<char>& unique_id, int device,
                                        double init_timeout_s);

}  // namespace tp_native::comm
