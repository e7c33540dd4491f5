// SPDX-License-Identifier: Apache-2.0
// How the blocks of one index meet across ranks, and why staging needs two buffers and no more.
//
// Flags of a rank: arrivals[block][rank], written by the peers; epochs[block], its own meetings so
// far; sequences[block], its own collectives so far. Only kernels touch them, so a replayed graph
// goes on where the last run left off.
//
// Meeting. A block's threads __syncthreads(), then one thread for each peer stores the next epoch
// into the peer's arrivals with release.sys and waits, with acquire.sys, until the peer's epoch is
// in its own; __syncthreads() again. Barriers order the block's other accesses before the release
// and after the acquire (PTX memory model: causality order is transitive). So what block b of any
// rank wrote before its meeting, block b of every rank sees after it, and what it read before,
// others may overwrite after.
//
// Epochs count a block's meetings, not the group's: arrivals hold e - 1, e or e + 1 while a block
// waits for e. A peer that has left meeting e may have entered e + 1, but it leaves that one only
// after this block came. So the signed difference decides, and wrapping around does no harm.
//
// Two buffers. Collective n stages into buffer n % 2, which collective n - 2 used. Claim: when a
// kernel of collective n starts on rank r, every peer p has finished collective n - 2, reading
// included. Kernel n - 1 of r is over (stream order), so its block 0 has met block 0 of p's kernel
// n - 1: every collective has a meeting, and at least one block. p's kernel n - 1 had begun, hence
// (stream order on p) p's kernel n - 2 was over. One buffer would not do: p may still read what
// collective n - 1 left while r starts n. n is the same for all blocks although a block may have
// sat out collectives with fewer blocks: each collective advances the sequences of all kMaxBlocks.
// Collectives without data to move do not count on any rank: their launchers return at once.
//
// Operands that are not staged have no second buffer: such a collective ends with another meeting,
// after the last read, and until then their owners' kernels are not over.
#pragma once

#include <cstdint>

#include "kernels/cuda.h"
#include "kernels/cuda/memory.h"

namespace tp_native::kernels::cuda {

constexpr uint32_t kSpinsPerPoll = 256;

/// One rank's block in one collective.
class Meetings {
 public:
  /// All threads; `rank` may differ from peers.rank, which is not read.
  __device__ Meetings(const Peers& peers, int rank)
      : peers_(peers),
        rank_(rank),
        epoch_(epochs()[blockIdx.x]),
        sequence_(sequences()[blockIdx.x]) {}

  /// The bytes to add to Peers::data for this collective.
  __device__ int64_t buffer() const { return sequence_ % 2 * peers_.buffer_bytes; }

  /// Waits for the block of this index of every rank. False in all threads: abort was set.
  __device__ bool meet() {
    ++epoch_;
    __syncthreads();
    const int peer = static_cast<int>(threadIdx.x);
    bool has_come = true;
    if (peer < peers_.size) {
      store_release(peers_.flags[peer] + blockIdx.x * kMaxRanks + rank_, epoch_);
      has_come = await(peers_.flags[rank_] + blockIdx.x * kMaxRanks + peer);
    }
    return __syncthreads_and(has_come) != 0;
  }

  /// After the last meeting; a kernel that was aborted leaves without.
  __device__ void finish() {
    if (threadIdx.x == 0) epochs()[blockIdx.x] = epoch_;
    const unsigned block = blockIdx.x + threadIdx.x * gridDim.x;  // and those that sat out
    if (block < kMaxBlocks) sequences()[block] = sequence_ + 1;
  }

 private:
  __device__ uint32_t* epochs() const { return peers_.flags[rank_] + kMaxBlocks * kMaxRanks; }
  __device__ uint32_t* sequences() const { return epochs() + kMaxBlocks; }

  __device__ bool await(const uint32_t* arrival) const {
    for (uint32_t spins = 1; static_cast<int32_t>(load_acquire(arrival) - epoch_) < 0; ++spins) {
      if (spins % kSpinsPerPoll == 0 && load_relaxed(peers_.abort) != 0) return false;
    }
    return true;
  }

  const Peers& peers_;
  const int rank_;
  uint32_t epoch_;
  const uint32_t sequence_;
};

}  // namespace tp_native::kernels::cuda
