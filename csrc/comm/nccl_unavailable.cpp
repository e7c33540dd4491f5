// SPDX-License-Identifier: Apache-2.0
// Stands in for nccl.cpp in a build without the CUDA sources.
#include "comm/backends.h"
#include "core/error.h"

namespace tp_native::comm {

bool is_available(const std::string& backend) { return backend == "shm" || backend == "local"; }

std::shared_ptr<Communicator> make_nccl(const Identity&, const std::vector<char>&, int, double) {
  fail(
      "backend \"nccl\" is not part of this build: expected \"shm\" (CPU); build with TPN_CUDA=ON "
      "where nvcc is found");
}

}  // namespace tp_native::comm
