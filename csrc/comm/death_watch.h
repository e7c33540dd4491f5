// SPDX-License-Identifier: Apache-2.0
// One thread per group and process that sleeps until a peer's process ends, and then aborts the
// group.
#pragma once

#include <thread>
#include <vector>

#include "comm/host_communicator.h"
#include "comm/rendezvous.h"

namespace tp_native::comm {

class DeathWatch final : public Companion {
 public:
  DeathWatch(HostCommunicator& communicator, Roster roster);
  ~DeathWatch() override;

 private:
  void run();
  void report(int rank);

  HostCommunicator& communicator_;
  Roster roster_;
  Fd stop_;  ///< eventfd
  std::thread thread_;
};

}  // namespace tp_native::comm
