// SPDX-License-Identifier: Apache-2.0
// What this process may still take of the machine: so that a limit is an error with figures and not
// a kill.
#pragma once

#include <cstdint>
#include <string>

namespace tp_native::comm {

/// Bytes that can be taken before the control group's memory limit is met (memory.max of this
/// process's group and its parents, reclaimable page cache counted as free); INT64_MAX without a
/// limit. `root`: where the control group file system is mounted.
int64_t memory_headroom(const std::string& root = "/sys/fs/cgroup",
                        const std::string& self = "/proc/self/cgroup");

/// "needs 12 descriptors, 1020 of 1024 are open; ..." for EMFILE and the like.
std::string describe_descriptor_limit(int needed);

}  // namespace tp_native::comm
