// SPDX-License-Identifier: Apache-2.0
// Which all-reduce a message of a given size takes. Pure; equal on all ranks by construction.
#pragma once

#include <cstdint>
#include <span>

namespace tp_native::kernels {

enum class AllReduceKind : uint8_t {
  kOneShot,  ///< every rank reads all of every rank's data: least latency, P times the traffic
  kTwoShot,  ///< every rank reduces a slice, then reads the others' slices
  kLibrary   ///< not ours: NCCL
};

/// Messages up to this many bytes, above those of the range before it.
struct AllReduceRange {
  int64_t up_to_bytes;
  AllReduceKind kind;
};

/// Where nothing was measured on the machine at hand. The limits are those of vLLM's own kernels of
/// this form on NVLink (one-shot for 2 ranks at any size; below 512 KiB for up to 4 and 256 KiB for
/// up to 8; the library above 8 MiB).
inline std::span<const AllReduceRange> default_ranges(int size) {
  constexpr int64_t kKiB = 1024;
  static constexpr AllReduceRange kPair[] = {{8192 * kKiB, AllReduceKind::kOneShot}};
  static constexpr AllReduceRange kFew[] = {{512 * kKiB, AllReduceKind::kOneShot},
                                            {8192 * kKiB, AllReduceKind::kTwoShot}};
  static constexpr AllReduceRange kMany[] = {{256 * kKiB, AllReduceKind::kOneShot},
                                             {8192 * kKiB, AllReduceKind::kTwoShot}};
  if (size <= 2) return kPair;
  return size <= 4 ? std::span(kFew) : std::span(kMany);
}

/// The kind of the first range that holds `bytes`, of `ranges` or, where there are none, of
/// default_ranges(); kLibrary beyond the last. Ranges and not one threshold: on some machines the
/// library wins at both ends.
inline AllReduceKind choose_all_reduce(int64_t bytes, int size,
                                       std::span<const AllReduceRange> ranges = {}) {
  if (ranges.empty()) ranges = default_ranges(size);
  for (const AllReduceRange& range : ranges) {
    if (bytes <= range.up_to_bytes) return range.kind;
  }
  return AllReduceKind::kLibrary;
}

/// Whether the RMSNorm joins the all-reduce. Every rank normalises all rows in the one-shot form,
/// on few blocks: at 256-512 KiB on 8 H200 that lost 2 to 4 us to a norm of its own (vLLM issue
/// 44079).
inline bool fuses_norm(AllReduceKind kind, int64_t bytes, int64_t up_to_bytes = 128 * 1024) {
  return kind == AllReduceKind::kOneShot && bytes <= up_to_bytes;
}

}  // namespace tp_native::kernels
