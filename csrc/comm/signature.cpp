// SPDX-License-Identifier: Apache-2.0
#include "comm/signature.h"

#include <sstream>

namespace tp_native::comm {

const char* name(OpCode op) {
  constexpr const char* kNames[] = {"barrier",
                                    "all_reduce",
                                    "all_gather",
                                    "reduce_scatter",
                                    "broadcast",
                                    "copy_to_ranks",
                                    "row_parallel_linear",
                                    "column_parallel_linear",
                                    "vocab_parallel_embedding",
                                    "gather",
                                    "scatter",
                                    "row_parallel_linear_add_rms_norm",
                                    "init",
                                    "vocab_parallel_cross_entropy",
                                    "empty_shared",
                                    "row_parallel_linear_scatter",
                                    "gathered_column_parallel_linear"};
  const auto index = static_cast<size_t>(op);
  return index < sizeof(kNames) / sizeof(kNames[0]) ? kNames[index] : "unknown operation";
}

uint64_t hash_text(const std::string& text) {
  uint64_t hash = text.size();
  for (const char c : text) hash = mix(hash, static_cast<uint8_t>(c));
  return hash;
}

uint64_t hash_signature(const Signature& s) {
  uint64_t hash = mix(0, static_cast<uint64_t>(s.op) | static_cast<uint64_t>(s.dtype) << 8 |
                             static_cast<uint64_t>(s.reduce) << 16 |
                             static_cast<uint64_t>(static_cast<uint16_t>(s.root)) << 24 |
                             static_cast<uint64_t>(static_cast<uint16_t>(s.dim)) << 40);
  hash = mix(hash, s.shape.size());
  for (const int64_t n : s.shape) hash = mix(hash, static_cast<uint64_t>(n));
  hash = mix(hash, s.sizes.size());
  for (const int64_t n : s.sizes) hash = mix(hash, static_cast<uint64_t>(n));
  if (!s.whole) return hash;
  // the step in between: a part that equals its whole would cancel it
  return mix(mix(hash, 1), hash_signature(*s.whole));
}

std::string describe(const Announcement& a) {
  if (!a.is_known) return "an operation that it has not noted yet";
  std::ostringstream text;
  const auto code = static_cast<OpCode>(a.op);
  text << name(code);
  if (code == OpCode::kBarrier || code == OpCode::kInit) return text.str();
  text << '(';
  if (code == OpCode::kAllReduce || code == OpCode::kReduceScatter)
    text << name(static_cast<ReduceOp>(a.reduce)) << ", ";
  text << name(static_cast<DType>(a.dtype)) << " [";
  for (size_t i = 0; i < a.shape.size(); ++i) text << (i ? ", " : "") << a.shape[i];
  text << ']';
  if (a.root >= 0) text << (code == OpCode::kGather ? ", dst " : ", src ") << a.root;
  if (a.dim >= 0) text << ", dim " << a.dim;
  text << ')';
  return text.str();
}

std::string describe(const Signature& signature) {
  const Signature& s = named(signature);
  return describe({0, static_cast<uint8_t>(s.op), static_cast<uint8_t>(s.dtype),
                   static_cast<uint8_t>(s.reduce), s.root, s.dim, s.shape});
}

Mismatch find_mismatch(std::span<const Announcement> ranks) {
  size_t votes_best = 0;
  uint64_t model = 0;  // what most ranks entered; of equals the lowest rank's
  for (const Announcement& candidate : ranks) {
    size_t votes = 0;
    for (const Announcement& other : ranks) votes += other.fingerprint == candidate.fingerprint;
    if (votes > votes_best) {
      votes_best = votes;
      model = candidate.fingerprint;
    }
  }
  Mismatch found;
  bool is_hidden = false;
  std::ostringstream text;
  text << "the ranks entered different collectives:";
  for (size_t r = 0; r < ranks.size(); ++r) {
    if (found.culprit < 0 && ranks[r].fingerprint != model) found.culprit = static_cast<int>(r);
    const std::string own = describe(ranks[r]);
    text << (r ? "; " : " ") << "rank " << r << " " << own;
    for (size_t other = 0; other < r; ++other) {
      is_hidden = is_hidden || (ranks[other].fingerprint != ranks[r].fingerprint &&
                                describe(ranks[other]) == own);
    }
  }
  if (is_hidden) text << " (what reads alike differs in its partition or options)";
  text
      << ". All ranks must call the same operation with the same dtype, global shape and partition";
  found.text = text.str();
  return found;
}

}  // namespace tp_native::comm
