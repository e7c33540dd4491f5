// SPDX-License-Identifier: Apache-2.0
// What one thread holds: N elements that are read and written in one access, and the arithmetic of
// sums over ranks on them.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "kernels/element.h"
#include "kernels/row_norm.h"

namespace tp_native::kernels::cuda {

using kernels::narrowed;  // overloaded below
using kernels::normalised;
using kernels::rounded;
using kernels::widen;

constexpr int kPackBytes = 16;
/// Elements in the widest access.
template <class T>
constexpr int kLanes = kPackBytes / static_cast<int>(sizeof(T));

template <class T, int N>
struct Lanes {
  T lane[N];
};

/// N elements as they lie in memory: words, not lanes, so that what waits in registers takes no
/// more of them than memory does.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  using Word = std::conditional_t<N * sizeof(T) == kPackBytes, uint32_t, T>;
  Word word[N * sizeof(T) / sizeof(Word)];
};

template <class T, int N>
TPN_HOST_DEVICE Lanes<T, N> unpacked(const Pack<T, N>& x) {
  Lanes<T, N> lanes;
  __builtin_memcpy(&lanes, &x, sizeof(x));
  return lanes;
}

template <class T, int N>
TPN_HOST_DEVICE Pack<T, N> packed(const Lanes<T, N>& lanes) {
  Pack<T, N> x;
  __builtin_memcpy(&x, &lanes, sizeof(x));
  return x;
}

/// N elements as they are computed.
template <class T, int N>
struct Wide {
  Value<T> lane[N];
};

/// Two kernels serve four operations: kSums adds and, for kAvg, divides; kOrders keeps an extreme.
enum class OpFamily : uint8_t { kSums, kOrders };

template <class T, int N>
TPN_HOST_DEVICE Wide<T, N> widen(const Pack<T, N>& x) {
  const Lanes<T, N> lanes = unpacked(x);
  Wide<T, N> wide;
  TPN_UNROLL
  for (int k = 0; k < N; ++k) wide.lane[k] = widen(lanes.lane[k]);
  return wide;
}

template <class T, int N, class Convert>
TPN_HOST_DEVICE Pack<T, N> converted(const Wide<T, N>& wide, const Convert& convert) {
  Lanes<T, N> lanes;
  TPN_UNROLL
  for (int k = 0; k < N; ++k) lanes.lane[k] = convert(wide.lane[k]);
  return packed(lanes);
}

template <class T, int N>
TPN_HOST_DEVICE Pack<T, N> rounded(const Wide<T, N>& wide) {
  return converted(wide, [](Value<T> x) { return rounded<T>(x); });
}

template <class T, int N>
TPN_HOST_DEVICE Pack<T, N> narrowed(const Wide<T, N>& wide) {
  return converted(wide, [](Value<T> x) { return narrowed<T>(x); });
}

template <OpFamily kFamily, class T, int N>
TPN_HOST_DEVICE void join(ReduceOp op, Wide<T, N>& acc, const Pack<T, N>& x) {
  const Wide<T, N> term = widen(x);
  TPN_UNROLL
  for (int k = 0; k < N; ++k) {
    const Value<T> a = acc.lane[k];
    const Value<T> b = term.lane[k];
    if constexpr (kFamily == OpFamily::kSums) {
      acc.lane[k] = combine<ReduceOp::kSum>(a, b);
    } else {
      acc.lane[k] =
          op == ReduceOp::kMin ? combine<ReduceOp::kMin>(a, b) : combine<ReduceOp::kMax>(a, b);
    }
  }
}

/// acc[u] = op over r = 0..size-1, ascending, of load(u, r). Of kBatch ranks all loads come before
/// the first addition, so that they travel together; load(u, r) may leave out what nobody reads.
template <OpFamily kFamily, int kBatch, int kDepth, class T, int N, class Load>
TPN_HOST_DEVICE void reduce_ranks(ReduceOp op, int size, Wide<T, N> (&acc)[kDepth],
                                  const Load& load) {
  TPN_UNROLL_BY(1)
  for (int first = 0; first < size; first += kBatch) {
    Pack<T, N> term[kDepth][kBatch];
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      TPN_UNROLL
      for (int k = 0; k < kBatch; ++k) {
        if (first + k < size) term[u][k] = load(u, first + k);
      }
    }
    TPN_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      if (first == 0) {
        acc[u] = widen(term[u][0]);
      } else {
        join<kFamily>(op, acc[u], term[u][0]);
      }
      TPN_UNROLL
      for (int k = 1; k < kBatch; ++k) {
        if (first + k < size) join<kFamily>(op, acc[u], term[u][k]);
      }
    }
  }
  if constexpr (kFamily == OpFamily::kSums && std::floating_point<Value<T>>) {
    if (op == ReduceOp::kAvg) {
      TPN_UNROLL
      for (int u = 0; u < kDepth; ++u) {
        TPN_UNROLL
        for (int k = 0; k < N; ++k) acc[u].lane[k] /= static_cast<Value<T>>(size);
      }
    }
  }
}

/// A term of an epilogue, if it is there.
template <class T, int N>
struct Term {
  bool is_there;
  Pack<T, N> values;
};

/// sum + bias, rounded, + residual, rounded
template <class T, int N>
TPN_HOST_DEVICE Pack<T, N> finished(Wide<T, N> sum, const Term<T, N>& bias,
                                    const Term<T, N>& residual) {
  if (bias.is_there) join<OpFamily::kSums>(ReduceOp::kSum, sum, bias.values);
  Pack<T, N> h = rounded(sum);
  if (residual.is_there) {
    sum = widen(h);
    join<OpFamily::kSums>(ReduceOp::kSum, sum, residual.values);
    h = rounded(sum);
  }
  return h;
}

template <class T, int N>
TPN_HOST_DEVICE Pack<T, N> normalised(const Pack<T, N>& h, Value<T> scale,
                                      const Pack<T, N>& weight) {
  const Lanes<T, N> from = unpacked(h);
  const Lanes<T, N> by = unpacked(weight);
  Lanes<T, N> x;
  TPN_UNROLL
  for (int k = 0; k < N; ++k) x.lane[k] = normalised(from.lane[k], scale, by.lane[k]);
  return packed(x);
}

}  // namespace tp_native::kernels::cuda
