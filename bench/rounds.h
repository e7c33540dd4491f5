// SPDX-License-Identifier: Apache-2.0
// The timer: all candidates in the same processes, one batch each per round, the order rotated from
// round to round, the slowest rank's time. bench/timing.py does the same for Python.
#pragma once

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "probes.h"

namespace tp_native::bench {

inline double now_s() {
  timespec t;
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Timing {
  double best_s = 0;
  double median_s = 0;
  double spread = 0;                  ///< distance of the quartiles over the median
  std::vector<double> rounds_s = {};  ///< in the order they were run
};

struct Candidate {
  std::string name;
  std::function<double(int64_t repetitions)> run;  ///< the seconds that this rank took
  std::function<void()> check;  ///< throws unless the batch's last result is right
};

/// A batch of `once`, timed as a whole.
template <class Once>
std::function<double(int64_t)> batch_of(Once once) {
  return [once](int64_t repetitions) mutable {
    const double start = now_s();
    for (int64_t i = 0; i < repetitions; ++i) {
      once();
      keep_memory();
    }
    return now_s() - start;
  };
}

struct Plan {
  int rounds = 41;
  double batch_s = 1e-3;  ///< shorter than a scheduler's slice: some rounds run undisturbed
};

inline double median_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

inline Timing summarise(std::vector<double> seconds) {
  std::vector<double> sorted = seconds;
  std::sort(sorted.begin(), sorted.end());
  const size_t last = sorted.size() - 1;
  const double median = median_of(sorted);
  const double spread = (sorted[3 * last / 4] - sorted[last / 4]) / median;
  return {sorted.front(), median, spread, std::move(seconds)};
}

/// One Timing per candidate, per repetition; the same on all ranks.
inline std::vector<Timing> measure(World& world, std::vector<Candidate>& candidates,
                                   const Plan& plan) {
  const auto run = [&](Candidate& candidate, int64_t repetitions) {
    world.meet();
    const double each =
        world.slowest(candidate.run(repetitions)) / static_cast<double>(repetitions);
    if (candidate.check) candidate.check();
    return each;
  };
  std::vector<int64_t> repetitions;
  for (Candidate& candidate : candidates) {
    int64_t n = 4;
    for (int step = 0; step < 2; ++step) {  // the first one is cold and counts too few
      const double each = std::max(run(candidate, n), 1e-9);
      n = std::clamp<int64_t>(static_cast<int64_t>(plan.batch_s / each), 1, 100'000);
    }
    repetitions.push_back(n);
  }
  std::vector<std::vector<double>> seconds(candidates.size());
  for (int round = 0; round < plan.rounds; ++round) {
    for (size_t k = 0; k < candidates.size(); ++k) {
      const size_t c = (k + static_cast<size_t>(round)) % candidates.size();
      seconds[c].push_back(run(candidates[c], repetitions[c]));
    }
  }
  std::vector<Timing> timings;
  for (std::vector<double>& s : seconds) timings.push_back(summarise(std::move(s)));
  return timings;
}

}  // namespace tp_native::bench
