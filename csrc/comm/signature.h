// SPDX-License-Identifier: Apache-2.0
// What ranks compare before a byte moves, in numbers and in words, whatever carries it.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "comm/communicator.h"

namespace tp_native::comm {

/// One step of a hash: order matters.
inline uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
  return hash ^ (hash >> 32);
}

/// What messages name: the collective, not its step.
inline const Signature& named(const Signature& s) { return s.whole ? *s.whole : s; }

uint64_t hash_text(const std::string& text);
uint64_t hash_signature(const Signature& signature);

/// One rank's operation as it came from a peer; `shape` may be cut short.
struct Announcement {
  uint64_t fingerprint = 0;
  uint8_t op = 0;
  uint8_t dtype = 0;
  uint8_t reduce = 0;
  int root = -1;
  int dim = -1;
  std::span<const int64_t> shape = {};
  bool is_known = true;  ///< false: only the fingerprint is
};

/// "all_reduce(sum, float32 [6])"
std::string describe(const Announcement& announcement);
std::string describe(const Signature& signature);

struct Mismatch {
  int culprit = -1;  ///< the first rank that differs from what most ranks entered
  std::string text;  ///< names every rank and its operation
};

/// `ranks[r]` is what rank r announced; at least two fingerprints differ.
Mismatch find_mismatch(std::span<const Announcement> ranks);

}  // namespace tp_native::comm
