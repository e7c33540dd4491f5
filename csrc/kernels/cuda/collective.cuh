// SPDX-License-Identifier: Apache-2.0
// What the collectives have in common: the shape of their launches, the checks before.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/error.h"
#include "kernels/cuda.h"
#include "kernels/cuda/flat.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/meeting.h"

namespace tp_native::kernels::cuda {

constexpr int kCollectiveThreads = 256;
/// Of one block in one round: kCollectiveThreads packs.
constexpr int64_t kTileBytes = int64_t{kCollectiveThreads} * kPackBytes;
/// As a default. Not tuned on a device; 4 ranks of so many are resident at once on one A100 or
/// H200.
constexpr int kDefaultBlocks = 48;

__device__ inline Share share_of_collective() {
  return {blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), kCollectiveThreads};
}

inline void check_peers(const Peers& peers, int64_t payload, const char* what) {
  TPN_CHECK(
      peers.size >= 1 && peers.size <= kMaxRanks && peers.rank >= 0 && peers.rank < peers.size,
      what, ": rank ", peers.rank, " of ", peers.size, ", expected at most ", kMaxRanks);
  for (int r = 0; r < peers.size; ++r) {
    TPN_CHECK(is_aligned(peers.data[r]) && peers.flags[r], what, ": rank ", r, "'s staging ",
              peers.data[r], " or flags ", peers.flags[r], ", expected aligned memory");
  }
  TPN_CHECK(peers.abort, what, ": nothing could end a wait: Peers::abort is null");
  TPN_CHECK(payload <= peers.buffer_bytes && peers.buffer_bytes % kPackBytes == 0, what, ": ",
            payload, " bytes to stage, but a buffer has ", peers.buffer_bytes,
            " (a multiple of 16 is needed): cut the message");
}

/// The blocks asked for, or by default one for each part of the work, up to kDefaultBlocks.
inline unsigned blocks_for(int asked, int64_t parts, const char* what) {
  TPN_CHECK(asked >= 0 && asked <= kMaxBlocks, what, ": ", asked, " blocks, expected at most ",
            kMaxBlocks);
  if (asked > 0) return static_cast<unsigned>(asked);
  return static_cast<unsigned>(std::clamp<int64_t>(parts, 1, kDefaultBlocks));
}

inline int64_t tiles_for(int64_t bytes) { return (bytes + kTileBytes - 1) / kTileBytes; }

}  // namespace tp_native::kernels::cuda
