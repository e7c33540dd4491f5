// SPDX-License-Identifier: Apache-2.0
// The steps of a row's RMSNorm and their roundings; the order of the squares is in reduce.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/element.h"

namespace tp_native::kernels {

template <class V>
TPN_HOST_DEVICE V plus_square(V sum, V x) {
  return sum + times(x, x);
}

/// 1 / sqrt(mean of the squares + eps)
template <class V>
TPN_HOST_DEVICE V inverse_rms(V squares, int64_t columns, double eps) {
  return 1 / std::sqrt(squares / static_cast<V>(columns) + static_cast<V>(eps));
}

template <class T>
TPN_HOST_DEVICE T normalised(T h, Value<T> scale, T weight) {
  return rounded<T>(times(widen(rounded<T>(times(widen(h), scale))), widen(weight)));
}

}  // namespace tp_native::kernels
