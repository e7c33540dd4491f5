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
//
// The host runs all of this too, with a thread for a block (tests/csrc/test_cuda_protocol.cpp).
#pragma once

#include <cstdint>

#include "kernels/cuda.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/slices.h"

namespace tp_native::kernels::cuda {

constexpr uint32_t kSpinsPerPoll = 256;

/// One rank's block in one collective.
class Meetings {
 public:
  /// All threads of the block; `rank` may differ from peers.rank, which is not read.
  TPN_HOST_DEVICE Meetings(const Peers& peers, int rank, const Share& share)
      : peers_(peers),
        rank_(rank),
        share_(share),
        epoch_(epochs()[share.block]),
        sequence_(sequences()[share.block]) {}

  /// The bytes to add to Peers::data for this collective.
  TPN_HOST_DEVICE int64_t buffer() const { return sequence_ % 2 * peers_.buffer_bytes; }

  /// Waits for the block of this index of every rank. False in all threads: abort was set.
  TPN_HOST_DEVICE bool meet() {
    ++epoch_;
    sync_block();
    for (int peer = share_.thread; peer < peers_.size; peer += share_.threads) {
      store_release(arrival(peer, rank_), epoch_);
    }
    bool have_come = true;
    for (int peer = share_.thread; peer < peers_.size; peer += share_.threads) {
      have_come = have_come && await(arrival(rank_, peer));
    }
    return sync_block_and(have_come);
  }

  /// After the last meeting; a kernel that was aborted leaves without.
  TPN_HOST_DEVICE void finish() {
    if (share_.thread == 0) epochs()[share_.block] = epoch_;
    TPN_UNROLL_BY(1)
    for (int64_t b = share_.first_of_blocks(); b < kMaxBlocks; b += share_.stride()) {
      sequences()[b] = sequence_ + 1;  // the block's own, and of those that sat out
    }
  }

 private:
  TPN_HOST_DEVICE uint32_t* arrival(int at, int of) const {
    return peers_.flags[at] + share_.block * kMaxRanks + of;
  }
  TPN_HOST_DEVICE uint32_t* epochs() const { return peers_.flags[rank_] + kMaxBlocks * kMaxRanks; }
  TPN_HOST_DEVICE uint32_t* sequences() const { return epochs() + kMaxBlocks; }

  TPN_HOST_DEVICE bool await(const uint32_t* word) const {
    for (uint32_t spins = 1; static_cast<int32_t>(load_acquire(word) - epoch_) < 0; ++spins) {
      if (spins % kSpinsPerPoll == 0 && load_relaxed(peers_.abort) != 0) return false;
      relax();
    }
    return true;
  }

  const Peers& peers_;
  const int rank_;
  const Share share_;
  uint32_t epoch_;
  const uint32_t sequence_;
};

}  // namespace tp_native::kernels::cuda
