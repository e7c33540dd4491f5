// SPDX-License-Identifier: Apache-2.0
// One thread's work on whole rows: the sum over ranks, the squares, the norm. Between the steps of
// a row its block synchronises.
#pragma once

#include <cstdint>

#include "kernels/cuda/flat.h"
#include "kernels/reduce.h"

namespace tp_native::kernels::cuda {

/// Rows up to this size stay in shared memory between the sum and the norm.
constexpr int64_t kKeptRowBytes = 40 * 1024;

/// One row, where it begins in everything that has rows. `h` is in shared memory where a row is
/// kept, otherwise where h goes anyway: `hidden`, or `out` until the norm overwrites it.
template <class T>
struct Row {
  int64_t begin;
  T* out;
  T* hidden;  ///< or null
  T* h;

  static TPN_HOST_DEVICE Row at(int64_t row, const After<T>& after, T* out, T* kept) {
    const int64_t begin = row * after.columns;
    T* const hidden = after.hidden ? after.hidden + begin : nullptr;
    return {begin, out + begin, hidden, kept ? kept : hidden ? hidden : out + begin};
  }
};

/// The packs of a row that a thread takes: `first`, then every `step`.
template <int N>
struct Columns {
  int64_t first;
  int64_t step;

  static TPN_HOST_DEVICE Columns of(int thread, int threads) {
    return {int64_t{thread} * N, int64_t{threads} * N};
  }
};

/// h = the sum with bias and residual, also into `hidden`.
template <int N, int kBatch, int kDepth, bool kIsKept, class T, class Terms>
TPN_HOST_DEVICE void sum_row(const Columns<N>& mine, const Terms& terms, const After<T>& after,
                             const Row<T>& row) {
  TPN_UNROLL_BY(1)
  for (int64_t c = mine.first; c < after.columns; c += kDepth * mine.step) {
    const auto at = [&](int u) { return c + u * mine.step; };
    const auto is_in = [&](int u) { return u == 0 || at(u) < after.columns; };
    Term<T, N> bias[kDepth];
    Term<T, N> residual[kDepth];
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      bias[u] = fetch_term<N>(is_in(u) ? after.bias : nullptr, at(u));
      residual[u] = fetch_term<N>(is_in(u) ? after.residual : nullptr, row.begin + at(u));
    }
    Wide<T, N> acc[kDepth]{};
    reduce_ranks<OpFamily::kSums, kBatch>(ReduceOp::kSum, terms.size(), acc, [&](int u, int rank) {
      Pack<T, N> term{};
      if (is_in(u)) term = load<N>(terms.of(rank) + row.begin + at(u));
      return term;
    });
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      if (!is_in(u)) break;
      const Pack<T, N> x = finished(acc[u], bias[u], residual[u]);
      if constexpr (kIsKept) {
        *reinterpret_cast<Pack<T, N>*>(row.h + at(u)) = x;
        if (row.hidden) store(row.hidden + at(u), x);
      } else {
        store(row.h + at(u), x);
      }
    }
  }
}

/// Partial sum k of the squares, in the order of reduce.h.
template <class T>
TPN_HOST_DEVICE Value<T> sum_of_squares(const T* h, int64_t columns, int k) {
  Value<T> sum = 0;
  TPN_UNROLL_BY(8)
  for (int64_t c = k; c < columns; c += kPartialSums) sum = plus_square(sum, widen(h[c]));
  return sum;
}

template <int N, bool kIsKept, class T>
TPN_HOST_DEVICE void normalise_row(const Columns<N>& mine, const After<T>& after, const Row<T>& row,
                                   Value<T> scale) {
  TPN_UNROLL_BY(1)
  for (int64_t c = mine.first; c < after.columns; c += mine.step) {
    const Pack<T, N> weight = load<N>(after.norm_weight + c);
    const Pack<T, N> x =
        kIsKept ? *reinterpret_cast<const Pack<T, N>*>(row.h + c) : load<N>(row.h + c);
    store(row.out + c, normalised(x, scale, weight));
  }
}

}  // namespace tp_native::kernels::cuda
