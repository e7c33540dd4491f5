// SPDX-License-Identifier: Apache-2.0
// One thread's work on flat ranges: sums over ranks with what follows them, copies between operands
// and staging. `Terms` says where rank r's term lies: in a peer's staging, or, with one rank, where
// an earlier sum left it.
#pragma once

#include <cstdint>

#include "kernels/cuda.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/slices.h"

namespace tp_native::kernels::cuda {

template <class T>
struct OneTerm {
  const T* term;
  TPN_HOST_DEVICE const T* of(int) const { return term; }
  TPN_HOST_DEVICE int size() const { return 1; }
};

/// The own term where the caller has it, the peers' in staging.
template <class T>
struct PeerTerms {
  void* const* data;  ///< as Peers has it
  int64_t buffer;     ///< bytes to add to it
  int ranks;
  int rank;
  const T* own;
  int64_t shift = 0;  ///< of the peers' terms in staging, in elements

  TPN_HOST_DEVICE T* staging(int r) const {
    return reinterpret_cast<T*>(static_cast<char*>(data[r]) + buffer);
  }
  TPN_HOST_DEVICE const T* of(int r) const { return r == rank ? own : staging(r) + shift; }
  TPN_HOST_DEVICE int size() const { return ranks; }
};

/// What follows a sum, as SumEpilogue has it.
template <class T>
struct After {
  const T* bias;
  const T* residual;
  const T* norm_weight;
  T* hidden;
  int64_t columns;
  double eps;
};

template <int N, class T>
TPN_HOST_DEVICE Term<T, N> fetch_term(const T* values, int64_t at) {
  Term<T, N> term;
  term.is_there = values != nullptr;
  if (term.is_there) term.values = load<N>(values + at);
  return term;
}

/// out[i] = op over the ranks' [i] for this share's i < count; kHasAfter: then bias and residual.
/// has_packs: all pointers, and rows where there is a bias, allow whole packs.
template <OpFamily kFamily, bool kHasAfter, int kBatch, int kDepth, class T, class Terms>
TPN_HOST_DEVICE void sum_flat(const Share& share, const Terms& terms, ReduceOp op,
                              const After<T>& after, bool has_packs, int64_t count, T* out,
                              T* out_too = nullptr) {
  constexpr int N = kLanes<T>;
  const int64_t packs = has_packs ? count / N : 0;
  const int64_t stride = share.stride();
  const int64_t packs_per_row = packs > 0 && kHasAfter && after.bias ? after.columns / N : 1;
  RowCursor at[kDepth]{};
  RowCursor step{};
  if (kHasAfter && after.bias) {
    step = RowCursor::at(kDepth * stride, packs_per_row);
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      at[u] = RowCursor::at(share.first_pack() + u * stride, packs_per_row);
    }
  }
  TPN_UNROLL_BY(1)
  for (int64_t pack = share.first_pack(); pack < packs; pack += kDepth * stride) {
    Term<T, N> bias[kDepth];
    Term<T, N> residual[kDepth];
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      bias[u].is_there = residual[u].is_there = false;
      if (kHasAfter && pack + u * stride < packs) {
        residual[u] = fetch_term<N>(after.residual, (pack + u * stride) * N);
        if (after.bias) {
          bias[u] = fetch_term<N>(after.bias, at[u].column * N);
          at[u].advance(step, packs_per_row);
        }
      }
    }
    Wide<T, N> acc[kDepth]{};
    reduce_ranks<kFamily, kBatch>(op, terms.size(), acc, [&](int u, int rank) {
      Pack<T, N> term{};
      if (u == 0 || pack + u * stride < packs) {
        term = load<N>(terms.of(rank) + (pack + u * stride) * N);
      }
      return term;
    });
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      if (u == 0 || pack + u * stride < packs) {
        const Pack<T, N> h = kHasAfter ? finished(acc[u], bias[u], residual[u]) : rounded(acc[u]);
        store(out + (pack + u * stride) * N, h);
        if (out_too) store(out_too + (pack + u * stride) * N, h);
      }
    }
  }
  share.rest(packs * N, count, N, [&](int64_t i) {
    Wide<T, 1> acc[1]{};
    reduce_ranks<kFamily, kBatch>(op, terms.size(), acc,
                                  [&](int, int rank) { return load<1>(terms.of(rank) + i); });
    Pack<T, 1> h;
    if constexpr (kHasAfter) {
      const Term<T, 1> bias = fetch_term<1>(after.bias, after.bias ? i % after.columns : 0);
      h = finished(acc[0], bias, fetch_term<1>(after.residual, i));
    } else {
      h = rounded(acc[0]);
    }
    store(out + i, h);
    if (out_too) store(out_too + i, h);
  });
}

/// to(s)[i] = from(s)[i] for this share's i < length(s), of all slices s but `skipped`. The packs
/// of kDepth slices, or tiles where there are few slices, travel together. Slices that are not
/// aligned at both ends go element by element.
template <class T, class From, class To, class Length>
TPN_HOST_DEVICE void copy_slices(const Share& share, int slices, int skipped, const From& from,
                                 const To& to, const Length& length) {
  constexpr int N = kLanes<T>;
  constexpr int kDepth = 4;
  const auto packs_of = [&](int s) -> int64_t {
    return s != skipped && is_aligned(from(s)) && is_aligned(to(s)) ? length(s) / N : 0;
  };
  int64_t most = 0;
  TPN_UNROLL_BY(1)
  for (int s = 0; s < slices; ++s) most = packs_of(s) > most ? packs_of(s) : most;
  TPN_UNROLL_BY(1)
  for (SliceCursor next{share.first_pack(), 0}; next.pack < most;) {
    Pack<T, N> x[kDepth];
    T* target[kDepth];
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      target[u] = nullptr;
      if (next.pack < packs_of(next.slice)) {
        x[u] = load<N>(from(next.slice) + next.pack * N);
        target[u] = to(next.slice) + next.pack * N;
      }
      next.advance(share, slices);
    }
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      if (target[u]) store(target[u], x[u]);
    }
  }
  TPN_UNROLL_BY(1)
  for (int s = 0; s < slices; ++s) {
    if (s == skipped) continue;
    const T* const source = from(s);
    T* const target = to(s);
    share.rest(packs_of(s) * N, length(s), N, [&](int64_t i) { target[i] = source[i]; });
  }
}

/// One slice: the whole of [0, count).
template <class T>
TPN_HOST_DEVICE void copy_flat(const Share& share, const T* from, T* to, int64_t count) {
  copy_slices<T>(
      share, 1, -1, [&](int) { return from; }, [&](int) { return to; }, [&](int) { return count; });
}

/// Of `in`, the peers' slices to where they lie in this rank's staging.
template <class T>
TPN_HOST_DEVICE void stage_slices(const Share& share, const PeerTerms<T>& terms,
                                  const Slices& slices, const T* in) {
  T* const staging = terms.staging(terms.rank);
  copy_slices<T>(
      share, terms.ranks, terms.rank, [&](int r) { return in + slices.begin[r]; },
      [&](int r) { return staging + slices.staged[r]; }, [&](int r) { return slices.length[r]; });
}

/// The peers' slices, from where they lie in the peers' staging, to their places in `out`.
template <class T>
TPN_HOST_DEVICE void gather_slices(const Share& share, const PeerTerms<T>& terms,
                                   const Slices& slices, T* out) {
  copy_slices<T>(
      share, terms.ranks, terms.rank, [&](int r) { return terms.staging(r) + slices.staged[r]; },
      [&](int r) { return out + slices.begin[r]; }, [&](int r) { return slices.length[r]; });
}

}  // namespace tp_native::kernels::cuda
