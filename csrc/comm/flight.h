// SPDX-License-Identifier: Apache-2.0
// The last operations of every rank: written into its header as they happen, so that they outlive
// its process, and into a file when the group fails.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "comm/protocol.h"
#include "comm/signature.h"
#include "core/clock.h"
#include "core/error.h"

namespace tp_native::comm {

/// The owner's notes: begin before the announcement, end when the call returns.
void begin_flight(FlightRing& ring, uint64_t seq, const Signature& signature, uint64_t hash,
                  uint64_t chain, int64_t bytes, uint64_t start);
inline void end_flight(FlightRing& ring, uint64_t seq) noexcept {
  FlightEntry& entry = ring.entries[seq % kFlightEntries];
  if (entry.seq.load(std::memory_order_relaxed) == seq)  // else it ran so long that it is forgotten
    entry.end.store(stamp(), std::memory_order_relaxed);
}

/// A copy that does not change any more; seq 0 where the entry was never used or is being replaced.
struct FlightCopy {
  uint64_t seq = 0;
  uint64_t signature = 0;
  uint64_t chain = 0;
  OpCode op = OpCode::kBarrier;
  DType dtype = DType::kUInt8;
  ReduceOp reduce = ReduceOp::kSum;
  int root = -1;
  int dim = -1;
  std::vector<int64_t> shape;
  uint64_t bytes = 0;
  uint64_t start = 0;
  uint64_t end = 0;
};
FlightCopy copy_flight(const FlightRing& ring, uint64_t seq);
FlightCopy last_flight(const FlightRing& ring);
std::vector<FlightCopy> all_flight(const FlightRing& ring);  ///< oldest first

/// For describe() and find_mismatch(); points into `entry`.
Announcement announcement_of(const FlightCopy& entry, uint64_t fingerprint = 0);

/// What differs in what the ranks noted after `compared`, as far as all of them have come. Where
/// nothing does, `compared` moves there.
std::optional<Mismatch> compare_flights(std::span<const FlightRing* const> ranks,
                                        uint64_t& compared);

/// Writes FILE of `tp-native blame FILE` (JSON) for this failure into identity.flight_folder, mode
/// 0600. Does nothing without a folder, where the file exists, or on any error.
void write_flight_record(const Identity& identity, std::span<RankHeader* const> headers,
                         FailureKind kind, int culprit, const std::string& text,
                         const StampClock& clock) noexcept;

/// Where that file is for this group: the same on all ranks. Empty without a folder.
std::string flight_path(const Identity& identity, const RankHeader& first);

}  // namespace tp_native::comm
