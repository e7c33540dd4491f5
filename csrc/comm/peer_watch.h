// SPDX-License-Identifier: Apache-2.0
// One thread per group and process: it beats for this rank, and sleeps until a peer's process ends
// or its heart has stopped, or the launcher has gone. Then it aborts the group.
#pragma once

#include <thread>
#include <vector>

#include "comm/host_communicator.h"
#include "comm/rendezvous.h"

namespace tp_native::comm {

class PeerWatch final : public Companion {
 public:
  /// `frozen_timeout_s`: how long a heart may stand still. `launcher_pid`: this process ends when
  /// that one has died; 0: nobody's.
  PeerWatch(HostCommunicator& communicator, Roster roster, double frozen_timeout_s, Fd launcher,
            int launcher_pid);
  ~PeerWatch() override;

 private:
  struct Heart {
    uint64_t beats = 0;
    double since_s = 0;  ///< when `beats` was first seen
    bool is_warned = false;
  };

  void run();
  void report_death(int rank);
  void check_hearts(double now, double since_last_s);
  [[noreturn]] void end_without_launcher();

  HostCommunicator& communicator_;
  Roster roster_;
  double frozen_timeout_s_;
  Fd launcher_;
  int launcher_pid_;
  Fd stop_;  ///< eventfd
  std::vector<Heart> hearts_;
  std::thread thread_;
};

}  // namespace tp_native::comm
