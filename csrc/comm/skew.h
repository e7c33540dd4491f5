// SPDX-License-Identifier: Apache-2.0
// Who keeps the others waiting: the share of the time between two collectives that went by between
// the first rank's arrival and each other's.
#pragma once

#include <algorithm>
#include <cstdint>

#include "comm/protocol.h"

namespace tp_native::comm {

class Skew {
 public:
  /// Arrivals less than `floor` stamps late count as prompt; all do until that is set.
  void set_floor(uint64_t floor) { floor_ = floor; }
  bool has_floor() const { return floor_ != kNoFloor; }

  /// `arrived[r]`: the stamp that rank r announced this collective with. Returns a rank that has
  /// become slow, else -1: on average over some 16 collectives it took a quarter more of the time
  /// than the next slowest, 16 collectives in a row. Told once, and again after it has recovered.
  int add(const uint64_t* arrived, int size) {
    uint64_t first = arrived[0];
    for (int r = 1; r < size; ++r) first = std::min(first, arrived[r]);
    // what ranks came late last time is part of the interval that ends now: a share is at most 1,
    // so one long pause is not taken for a slow rank
    const uint64_t interval = first - last_;
    const double scale = interval > 0 ? 1 / static_cast<double>(interval) : 0;
    int slowest = 0;
    double second = 0;
    for (int r = 0; r < size; ++r) {
      share_[r] += kWeight * (std::min(1.0, static_cast<double>(late_[r]) * scale) - share_[r]);
      const uint64_t late = arrived[r] - first;
      late_[r] = late > floor_ ? late : 0;
      if (r == 0) continue;
      if (share_[r] > share_[slowest]) {
        second = share_[slowest];
        slowest = r;
      } else {
        second = std::max(second, share_[r]);
      }
    }
    last_ = first;
    if (share_[slowest] - second <= kSlow) [[likely]] {
      if (share_[slowest] < kSlow / 2) told_ = -1;
      streak_ = 0;
      return -1;
    }
    streak_ = slowest == candidate_ ? streak_ + 1 : 1;
    candidate_ = slowest;
    if (streak_ < 16 || slowest == told_) return -1;
    return told_ = slowest;
  }

  /// Of the time between collectives, 0 to 1.
  double share(int rank) const { return share_[rank]; }

 private:
  static constexpr double kWeight = 1.0 / 16;
  static constexpr double kSlow = 0.25;  // a rank half as fast as the others has 0.5

  static constexpr uint64_t kNoFloor = UINT64_MAX;

  uint64_t floor_ = kNoFloor;
  uint64_t late_[kMaxRanks] = {};
  double share_[kMaxRanks] = {};
  uint64_t last_ = 0;
  int candidate_ = -1;
  int streak_ = 0;
  int told_ = -1;
};

}  // namespace tp_native::comm
