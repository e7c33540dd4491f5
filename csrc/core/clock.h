// SPDX-License-Identifier: Apache-2.0
// Two clocks: seconds for deadlines, stamps for what every operation records.
#pragma once

#include <time.h>

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <x86intrin.h>
#endif

namespace tp_native {

/// Seconds of CLOCK_MONOTONIC: the same in all processes of a host.
inline double now_s() {
  timespec t;
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// A clock that costs some nanoseconds and ticks alike on all cores of a host: the time stamp
/// counter, constant and synchronised on every x86-64 server of the last decade; elsewhere
/// nanoseconds of CLOCK_MONOTONIC.
inline uint64_t stamp() {
#if defined(__x86_64__) || defined(__i386__)
  return __rdtsc();
#else
  timespec t;
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(t.tv_nsec);
#endif
}

/// Relates stamps to seconds by two readings of both clocks, the first when it is made.
class StampClock {
 public:
  StampClock() : first_stamp_(stamp()), first_s_(now_s()) {}

  /// Seconds per stamp; exact to some parts in a million after a millisecond.
  double period_s() const {
    const double elapsed_s = age_s();
    const double ticks = static_cast<double>(stamp() - first_stamp_);
    return ticks > 0 && elapsed_s > 0 ? elapsed_s / ticks : 1e-9;
  }
  double age_s() const { return now_s() - first_s_; }
  /// `at` on the clock of now_s().
  double seconds(uint64_t at) const {
    return first_s_ + static_cast<double>(static_cast<int64_t>(at - first_stamp_)) * period_s();
  }

 private:
  uint64_t first_stamp_;
  double first_s_;
};

}  // namespace tp_native
