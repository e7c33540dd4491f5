// SPDX-License-Identifier: Apache-2.0
// How each backend's communicators are made. One file per backend; a missing one is its
// `_unavailable` twin.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/board.h"
#include "comm/communicator.h"
#include "comm/nccl_api.h"

namespace tp_native::comm {

/// Of "shm", "local" and "nccl" what can work on this machine.
bool is_available(const std::string& backend);

struct ShmOptions {
  /// The abstract UNIX socket where rank 0 listens: the same on all ranks, unique to this group.
  std::string address;
  double init_timeout_s = 60;
  double frozen_timeout_s = 10;  ///< a peer without a heartbeat for so long is given up
  int launcher_pid = 0;          ///< the parent, whose death ends this process; 0: nobody's
  /// A short text for the other ranks: what this one can and wants to be.
  std::string offer = {};
  bool is_checked = true;  ///< false: no fingerprints, records or arrivals, for a benchmark
};

/// One host, one process per rank. Blocks until all ranks are there or `init_timeout_s` is over;
/// the error names the missing ones. The group's generation is the highest `identity.generation`
/// that a rank proposed, and ":" and that number are appended to its name.
std::shared_ptr<Communicator> make_shm(Identity identity, const ShmOptions& options);

/// What each rank offered.
std::vector<std::string> offers(const std::shared_ptr<Communicator>& shm);

/// `size` ranks as threads of this process; element r belongs to rank r.
std::vector<std::shared_ptr<Communicator>> make_local(const Identity& identity);

struct NcclOptions {
  int device = 0;  ///< number of the GPU in this process
  double init_timeout_s = 60;
  int max_ctas = 0;  ///< thread blocks that NCCL may use; 0: its own choice
  /// All-reduces of up to so many bytes by kernels of our own over memory that the ranks of this
  /// host reach directly, after a test that they give NCCL's sums; 0: none.
  int64_t peer_bytes = 0;
  /// How NCCL may know memory that is kept; the least of the ranks' holds.
  nccl::Registration registration = nccl::Registration::kWindow;
  bool is_gpu_shared = false;  ///< several ranks on one GPU, for tests; NCCL must allow it too
  nccl::Search search = {};
};

/// GPUs over NCCL, one rank each. Collective. `control`: the same ranks on their hosts, whose name
/// and failures become the group's; it must not be used for anything else, and is closed with it.
/// `board`: where ranks of several hosts agree on failures, make_socket_board()'s for instance;
/// null on one host, whose shared memory is one.
/// Raises on all ranks what one of them lacks: driver, library, GPU of its own.
std::shared_ptr<Communicator> make_nccl(const NcclOptions& options,
                                        const std::shared_ptr<Communicator>& control,
                                        std::shared_ptr<Board> board = nullptr);

/// The same ranks on GPUs by kernels of our own, several of them on one GPU if need be; each calls
/// from a stream of its own. Collective.
std::shared_ptr<Communicator> make_peers(int device, const std::shared_ptr<Communicator>& control);

}  // namespace tp_native::comm
