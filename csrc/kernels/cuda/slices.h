// SPDX-License-Identifier: Apache-2.0
// Which element is whose: slices of ranks, tiles of blocks. Pure; what one rank's block writes for
// its namesakes on other ranks follows from counts alone, never from how a pointer is aligned.
#pragma once

#include <cstdint>
#include <span>

#include "core/dtype.h"
#include "kernels/cuda.h"
#include "kernels/cuda/pack.h"

namespace tp_native::kernels::cuda {

/// Slice r of an operand, and where it lies in staging; in elements.
struct Slices {
  int64_t begin[kMaxRanks] = {};
  int64_t length[kMaxRanks] = {};
  int64_t staged[kMaxRanks] = {};
};

/// Elements of `item_bytes` in the widest access.
constexpr int64_t lanes_of(int64_t item_bytes) { return kPackBytes / item_bytes; }

/// Slices that differ by one pack at the most, the first ones longer; each begins at a whole pack
/// and lies in staging where it lies in the operand.
inline Slices even_slices(int64_t count, int size, int64_t item_bytes) {
  const int64_t lanes = lanes_of(item_bytes);
  const int64_t packs = (count + lanes - 1) / lanes;
  Slices slices;
  for (int r = 0; r < size; ++r) {
    const auto end_of = [&](int64_t rank) {
      const int64_t end =
          (packs / size * rank + (rank < packs % size ? rank : packs % size)) * lanes;
      return end < count ? end : count;
    };
    slices.begin[r] = slices.staged[r] = end_of(r);
    slices.length[r] = end_of(r + 1) - end_of(r);
  }
  return slices;
}

/// Slices of the given lengths, one after the other; in staging each begins at a whole pack.
inline Slices slices_of(std::span<const int64_t> counts, int64_t item_bytes) {
  const int64_t lanes = lanes_of(item_bytes);
  Slices slices;
  int64_t begin = 0;
  int64_t staged = 0;
  for (size_t r = 0; r < counts.size(); ++r) {
    slices.begin[r] = begin;
    slices.length[r] = counts[r];
    slices.staged[r] = staged;
    begin += counts[r];
    staged += (counts[r] + lanes - 1) / lanes * lanes;
  }
  return slices;
}

/// Where a flat index is in rows of `columns`; moving on takes no division.
struct RowCursor {
  int64_t row;
  int64_t column;

  static TPN_HOST_DEVICE RowCursor at(int64_t index, int64_t columns) {
    return {index / columns, index % columns};
  }
  TPN_HOST_DEVICE void advance(const RowCursor& step, int64_t columns) {
    row += step.row;
    column += step.column;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
};

/// One thread's part of a flat range. The range is cut into tiles of one pack for each thread; tile
/// t is block t % blocks's. A thread takes its packs in steps of stride(); what is not taken in
/// whole packs, the threads of the tile's block take element by element.
struct Share {
  int64_t block;
  int64_t blocks;
  int thread;
  int threads;

  TPN_HOST_DEVICE int64_t first_pack() const { return block * threads + thread; }
  TPN_HOST_DEVICE int64_t stride() const { return blocks * threads; }
  /// The first of the numbers n with n % blocks == block that is this thread's, in steps of
  /// stride().
  TPN_HOST_DEVICE int64_t first_of_blocks() const { return block + thread * blocks; }

  /// visit(i) for this thread's elements of [taken, count), where `taken` elements are in packs of
  /// `lanes`.
  template <class Visit>
  TPN_HOST_DEVICE void rest(int64_t taken, int64_t count, int lanes, const Visit& visit) const {
    const int64_t tile_elements = int64_t{lanes} * threads;
    const int64_t first = taken / tile_elements;
    for (int64_t tile = first + (block + blocks - first % blocks) % blocks;
         tile * tile_elements < count; tile += blocks) {
      const int64_t begin = tile * tile_elements < taken ? taken : tile * tile_elements;
      const int64_t end = (tile + 1) * tile_elements < count ? (tile + 1) * tile_elements : count;
      TPN_UNROLL_BY(1)  // rare, and large where it is inlined
      for (int64_t i = begin + thread; i < end; i += threads) visit(i);
    }
  }
};

/// Walks (pack, slice) in the order: all slices of one tile, then the next tile of the block.
struct SliceCursor {
  int64_t pack;
  int slice;

  TPN_HOST_DEVICE void advance(const Share& share, int slices) {
    if (++slice < slices) return;
    slice = 0;
    pack += share.stride();
  }
};

}  // namespace tp_native::kernels::cuda
