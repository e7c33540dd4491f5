// SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "gpu/run.h"

namespace tp_native::bench::gpu {

int run(int, char**) {
  std::fputs("tpn_microbench --gpu: skipped: this build has no CUDA kernels; build where nvcc is\n",
             stderr);
  return kSkipped;
}

}  // namespace tp_native::bench::gpu
