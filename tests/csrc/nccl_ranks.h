// SPDX-License-Identifier: Apache-2.0
// Ranks as threads over NCCL's and the driver's test doubles, one GPU each.
#pragma once

#include "comm/backends.h"
#include "device_ranks.h"

constexpr const char* kNccl = TPN_DOUBLES "/libfake_nccl.so";

inline int live_communicators() { return symbol<int()>(kNccl, "fake_nccl_live")(); }

inline NcclOptions options_of(int rank) {
  NcclOptions options;
  options.device = rank;
  options.init_timeout_s = 5;
  options.search.file = kNccl;
  return options;
}

/// `size` ranks as threads, one GPU each; what making them threw.
struct Made {
  Ranks ranks;
  std::vector<FailureRecord> failures;
};
inline Made make(int size, double timeout_s = 5,
                 const std::function<NcclOptions(int)>& options = options_of) {
  use_doubles();
  static int count = 0;
  const Ranks controls = make_local({0, size, concat("tp:", count++), "local", 0, timeout_s});
  Made made;
  made.ranks.resize(static_cast<size_t>(size));
  made.failures = run(controls, [&](Communicator& control) {
    const int rank = control.identity().rank;
    made.ranks[rank] = make_nccl(options(rank), controls[rank]);
  });
  return made;
}

inline Ranks make_clean(int size, double timeout_s = 5) {
  Made made = make(size, timeout_s);
  for (const FailureRecord& failure : made.failures) {
    if (!failure.message.empty()) throw std::runtime_error(failure.message);
  }
  return made.ranks;
}

inline void close_all(const Ranks& ranks) {
  run_clean(ranks, [](Communicator& c) { c.close(); });
}
