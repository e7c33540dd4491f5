// SPDX-License-Identifier: Apache-2.0
// One thread's part in an all-reduce: in one shot, where everyone reads everything, or in slices,
// where everyone reduces one and then reads the others'. The first half of that is a
// reduce-scatter.
#pragma once

#include <cstdint>

#include "kernels/cuda/flat.h"
#include "kernels/cuda/meeting.h"

namespace tp_native::kernels::cuda {

/// What is a rank's own in a collective.
struct Operand {
  const void* in = nullptr;    ///< null: it lies in Peers::data
  void* out = nullptr;         ///< in slices: where the rank's own slice goes
  const void* bias = nullptr;  ///< as in SumEpilogue, down to hidden
  const void* residual = nullptr;
  const void* norm_weight = nullptr;
  void* hidden = nullptr;
  bool has_packs = false;  ///< what sum_flat() asks for
};

/// One launch: of one rank, or of all with blockIdx.y for the rank.
struct Ranks {
  Peers peers;
  int first = 0;  ///< the rank of blockIdx.y == 0
  ReduceOp op = ReduceOp::kSum;
  int64_t rows = 1;
  int64_t columns = 0;
  double eps = 0;
  Operand operands[kMaxRanks];  ///< by blockIdx.y
};

/// One rank of a launch, as type T: where its terms lie, what follows.
template <class T>
struct Party {
  TPN_HOST_DEVICE Party(const Ranks& ranks, unsigned y, const Share& share)
      : operand(ranks.operands[y]),
        in(static_cast<const T*>(operand.in)),
        out(static_cast<T*>(operand.out)),
        meetings(ranks.peers, ranks.first + static_cast<int>(y), share),
        terms{ranks.peers.data, in ? meetings.buffer() : 0, ranks.peers.size,
              ranks.first + static_cast<int>(y), in},
        after{static_cast<const T*>(operand.bias),
              static_cast<const T*>(operand.residual),
              static_cast<const T*>(operand.norm_weight),
              static_cast<T*>(operand.hidden),
              ranks.columns,
              ranks.eps} {
    if (!in) terms.own = staging();
  }

  TPN_HOST_DEVICE T* staging() const { return terms.staging(terms.rank); }

  /// After the last read. Operands that are not staged wait for all readers.
  TPN_HOST_DEVICE void leave() {
    if (in || meetings.meet()) meetings.finish();
  }

  const Operand operand;
  const T* const in;
  T* const out;
  Meetings meetings;
  PeerTerms<T> terms;
  const After<T> after;
};

template <class T, OpFamily kFamily, bool kHasAfter, int kBatch, int kDepth>
TPN_HOST_DEVICE void reduce_in_one_shot(const Share& share, const Ranks& ranks, unsigned y) {
  Party<T> party(ranks, y, share);
  const int64_t count = ranks.rows * ranks.columns;
  if (party.in) copy_flat(share, party.in, party.staging(), count);
  if (!party.meetings.meet()) return;
  sum_flat<kFamily, kHasAfter, kBatch, kDepth>(share, party.terms, ranks.op, party.after,
                                               party.operand.has_packs, count, party.out);
  party.leave();
}

/// Stage the peers' slices, meet, reduce the own one into `out`; kGathers: and over its place in
/// staging, which no peer reads before the next meeting; then copy the peers' slices around it.
template <class T, OpFamily kFamily, bool kGathers, int kBatch, int kDepth>
TPN_HOST_DEVICE void reduce_in_slices(const Share& share, const Ranks& ranks, const Slices& slices,
                                      unsigned y) {
  Party<T> party(ranks, y, share);
  const int rank = party.terms.rank;
  party.terms.own += slices.begin[rank];
  party.terms.shift = slices.staged[rank];
  if (party.in) stage_slices(share, party.terms, slices, party.in);
  if (!party.meetings.meet()) return;
  T* const reduced = kGathers ? party.staging() + slices.staged[rank] : party.out;
  sum_flat<kFamily, false, kBatch, kDepth>(share, party.terms, ranks.op, party.after,
                                           party.operand.has_packs, slices.length[rank], reduced,
                                           kGathers && party.out != reduced ? party.out : nullptr);
  if constexpr (kGathers) {
    if (!party.meetings.meet()) return;
    gather_slices(share, party.terms, slices, party.out - slices.begin[rank]);
  }
  party.leave();
}

}  // namespace tp_native::kernels::cuda
