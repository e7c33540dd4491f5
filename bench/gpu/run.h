// SPDX-License-Identifier: Apache-2.0
// The part of tpn_microbench that runs on a GPU. Where this build has no CUDA kernels,
// gpu_unavailable.cpp takes its place.
#pragma once

namespace tp_native::bench::gpu {

constexpr int kSkipped = 77;

/// `tpn_microbench --gpu ...`: 0; 1 where something failed or is wrong; 2 for bad arguments; 77,
/// with one line, where there is no device, no cuBLASLt or no kernels.
int run(int argc, char** argv);

}  // namespace tp_native::bench::gpu
