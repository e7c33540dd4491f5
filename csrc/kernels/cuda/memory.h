// SPDX-License-Identifier: Apache-2.0
// Memory as kernels read and write it: packs in one access, and the words through which ranks meet.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "kernels/cuda/pack.h"

namespace tp_native::kernels::cuda {

TPN_HOST_DEVICE inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kPackBytes == 0;
}

/// N elements of global memory: one access, where they are a pack. (A struct copied as such may
/// become many: seen in SASS.)
template <int N, class T>
TPN_HOST_DEVICE Pack<T, N> load(const T* at) {
#ifdef __CUDA_ARCH__
  if constexpr (N * sizeof(T) == kPackBytes) {
    __builtin_assume(__isGlobal(at));
    const uint4 words = *reinterpret_cast<const uint4*>(at);
    return {{words.x, words.y, words.z, words.w}};
  } else {
    static_assert(N == 1);
    return {{*at}};
  }
#else
  Pack<T, N> x;
  __builtin_memcpy(&x, at, sizeof(x));
  return x;
#endif
}

/// The same for stores. The compiler cuts some of uint4 into four of 4 bytes (seen in SASS): not
/// this one.
template <class T, int N>
TPN_HOST_DEVICE void store(T* at, const Pack<T, N>& x) {
#ifdef __CUDA_ARCH__
  if constexpr (N * sizeof(T) == kPackBytes) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)),
                 "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
                 : "memory");
  } else {
    static_assert(N == 1);
    *at = x.word[0];
  }
#else
  __builtin_memcpy(at, &x, sizeof(x));
#endif
}

/// Everything that this block did before a sync_block() comes first, on every device.
TPN_HOST_DEVICE inline void store_release(uint32_t* word, uint32_t value) {
#ifdef __CUDA_ARCH__
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(word)),
               "r"(value)
               : "memory");
#else
  std::atomic_ref(*word).store(value, std::memory_order_release);
#endif
}

/// What the writer released with the value is seen by this thread and, past a sync_block(), by its
/// block.
TPN_HOST_DEVICE inline uint32_t load_acquire(const uint32_t* word) {
#ifdef __CUDA_ARCH__
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(word))
               : "memory");
  return value;
#else
  return std::atomic_ref(*const_cast<uint32_t*>(word)).load(std::memory_order_acquire);
#endif
}

/// Read anew each time; orders nothing.
TPN_HOST_DEVICE inline uint32_t load_relaxed(const uint32_t* word) {
#ifdef __CUDA_ARCH__
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(word)));
  return value;
#else
  return std::atomic_ref(*const_cast<uint32_t*>(word)).load(std::memory_order_relaxed);
#endif
}

/// Between two looks at a word that another processor will write.
TPN_HOST_DEVICE inline void relax() {
#ifndef __CUDA_ARCH__
  std::this_thread::yield();
#endif
}

/// On the host a block is one thread.
TPN_HOST_DEVICE inline void sync_block() {
#ifdef __CUDA_ARCH__
  __syncthreads();
#endif
}

/// In all threads: whether it is true in all.
TPN_HOST_DEVICE inline bool sync_block_and(bool is_true) {
#ifdef __CUDA_ARCH__
  return __syncthreads_and(is_true) != 0;
#else
  return is_true;
#endif
}

}  // namespace tp_native::kernels::cuda
