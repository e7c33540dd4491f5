// SPDX-License-Identifier: Apache-2.0
// What launchers need besides their kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "core/dtype.h"
#include "core/error.h"
#include "kernels/activation.h"
#include "kernels/cpu/convert.h"
#include "kernels/cuda/pack.h"

namespace tp_native::kernels::cuda {

/// Raises what the launch before it failed with.
void check_launch(const char* what);

/// Of the current device.
int multiprocessors();

/// Blocks for `parts` threads' work, and no more than fill the device: kernels go on in strides.
inline unsigned grid_for(int64_t parts, int threads, int blocks_per_multiprocessor) {
  const int64_t wanted = (parts + threads - 1) / threads;
  return static_cast<unsigned>(
      std::min<int64_t>(wanted, int64_t{multiprocessors()} * blocks_per_multiprocessor));
}

/// Whether rows of these pointers and strides can be read in packs; null pointers do not count.
template <class T>
bool has_packs(std::initializer_list<const void*> pointers,
               std::initializer_list<int64_t> columns_and_strides) {
  return std::ranges::all_of(
             pointers,
             [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0; }) &&
         std::ranges::all_of(columns_and_strides, [](int64_t n) { return n % kLanes<T> == 0; });
}

/// run(T{}) for a floating dtype's T.
template <class Run>
void with_floating(DType dtype, const char* what, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat64:
      return run(double{});
    case DType::kFloat16:
      return run(Float16{});
    case DType::kBFloat16:
      return run(BFloat16{});
    default:
      fail(concat(what, ": ", name(dtype), " is not supported: expected a floating dtype"));
  }
}

/// run(constant), where constant() is the activation at compile time.
template <class Run>
void with_activation(Activation activation, const Run& run) {
  switch (activation) {
    case Activation::kRelu:
      return run(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGeluTanh:
      return run(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kGeluErf:
      return run(std::integral_constant<Activation, Activation::kGeluErf>{});
    case Activation::kSilu:
      return run(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

}  // namespace tp_native::kernels::cuda
