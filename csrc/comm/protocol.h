// SPDX-License-Identifier: Apache-2.0
// What lies in front of each rank's arena. Only the owner writes its header, but for the verdict in
// rank 0's, which whoever notices a failure first sets. Everything read here comes from another
// process: copy, check, then use.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace tp_native::comm {

constexpr int kMaxRanks = 16;
constexpr uint64_t kMagic = 0x3176'6974'616e'7074;  // "tpnativ1", little endian
constexpr uint32_t kProtocolVersion = 3;

/// Collectives a fast writer may be ahead before it overwrites a line is 1 (every collective begins
/// with a full meet); four lines leave room for backends that post several operations at once.
constexpr int kRing = 4;
constexpr int kMaxDims = 6;

/// Staging: a rank writes slot g % kSlots for its g-th chunk. When it does, it has waited for all
/// peers' posts of chunk g-2, which they make after they finished reading chunk g-4: four slots
/// need no "consumed" flag.
constexpr int kSlots = 4;
constexpr size_t kChunkBytes =
    256u << 10;  // flat from 64 KiB to 2 MiB; glibc copies slower from 1 MiB on

constexpr uint64_t kNoBlock = ~uint64_t{0};

/// Payloads up to this ride in the announcing line: two adjacent cache lines, fetched as a pair.
constexpr size_t kInlineBytes = 96;

/// One announced collective.
struct alignas(128) Line {
  std::atomic<uint64_t> tick;  ///< steps this rank has posted since the group began; release, pairs
                               ///< with the waiter's acquire
  uint64_t fingerprint;
  uint64_t block;  ///< offset of the shared operand in this rank's arena, or kNoBlock
  uint64_t stamp;  ///< when this rank came (core/clock.h)
  unsigned char payload[kInlineBytes];
};
static_assert(sizeof(Line) == 128);

/// One operation of one rank, for error messages and the flight record. Other ranks may read while
/// the owner writes: `seq` is 0 meanwhile, and set last.
struct FlightEntry {
  std::atomic<uint64_t> seq;        ///< 0: never used, or being written
  std::atomic<uint64_t> signature;  ///< hash of what all ranks must agree on
  std::atomic<uint64_t> chain;      ///< hash of all signatures up to this one
  std::atomic<uint64_t> code;       ///< operation, dtype, reduction, root, dim, dims: a byte each
  std::atomic<uint64_t> bytes;      ///< payload of this rank
  std::atomic<uint64_t> start;      ///< stamps
  std::atomic<uint64_t> end;        ///< 0: not finished
  std::atomic<int64_t> shape[kMaxDims];
};
static_assert(sizeof(FlightEntry) == 104);
constexpr uint64_t kFlightEntries = 1024;

/// One rank's last operations. Only that rank writes; nobody waits.
struct FlightRing {
  /// The last one in `entries`. Release, after its entry is complete.
  alignas(128) std::atomic<uint64_t> noted;
  alignas(128) FlightEntry entries[kFlightEntries];
};

enum class RankState : uint32_t { kJoining = 0, kActive = 1, kLeft = 2 };

constexpr size_t kAbortTextBytes = 1536;
constexpr size_t kOfferBytes = 64;

/// What a rank has to say about a failure. Complete before the verdict names it: a rank that dies
/// or stops while it writes leaves the verdict free for the next.
struct AbortRecord {
  uint8_t kind;  ///< FailureKind
  int32_t culprit;
  char text[kAbortTextBytes];
};

struct RankHeader {
  uint64_t magic;
  uint32_t version;
  int32_t rank;
  int32_t size;
  int32_t pid;
  uint64_t group;  ///< hash of the group's name and address
  uint64_t capacity;
  char offer[kOfferBytes];  ///< what this rank can and wants to be, in its host language's words
  alignas(128) std::atomic<uint32_t> state;     ///< RankState
  alignas(128) std::atomic<uint32_t> sleepers;  ///< peers in a futex wait on one of the ticks
  alignas(128) std::atomic<uint64_t> pulse;     ///< heartbeats; stands still while frozen
  Line lines[kRing];
  /// In rank 0's header only: 0, then once and for all 1 + the rank whose record counts. Release,
  /// pairs with the acquire of whoever reads that record.
  alignas(128) std::atomic<uint32_t> verdict;
  alignas(128) AbortRecord abort;  ///< this rank's
  FlightRing flight;
};

constexpr size_t kHeaderBytes = 128u << 10;
static_assert(sizeof(RankHeader) <= kHeaderBytes);
static_assert(std::atomic<uint64_t>::is_always_lock_free &&
              std::atomic<uint32_t>::is_always_lock_free);
constexpr size_t kReservedBytes = kHeaderBytes + kSlots * kChunkBytes;

}  // namespace tp_native::comm
