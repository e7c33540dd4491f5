// SPDX-License-Identifier: Apache-2.0
#include "comm/limits.h"

#include <dirent.h>
#include <sys/resource.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>

#include "core/error.h"

namespace tp_native::comm {
namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

/// The number in a file of one word; `otherwise` for "max", nonsense or no file.
int64_t read_number(const std::string& path, int64_t otherwise) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value && value >= 0 ? value : otherwise;
}

int64_t stat_of(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  int64_t value = 0;
  while (file >> name >> value) {
    if (name == key) return value;
  }
  return 0;
}

int64_t headroom(const std::string& folder, const char* limit, const char* used,
                 const char* reclaimable) {
  const int64_t most = read_number(folder + "/" + limit, kNone);
  if (most == kNone) return kNone;
  const int64_t taken = read_number(folder + "/" + used, 0);
  const int64_t cache = stat_of(folder + "/memory.stat", reclaimable);
  return std::max<int64_t>(0, most - std::max<int64_t>(0, taken - cache));
}

}  // namespace

int64_t memory_headroom(const std::string& root, const std::string& self) {
  int64_t least = kNone;
  std::ifstream groups(self);
  for (std::string entry; std::getline(groups, entry);) {  // hierarchy:controllers:path
    const size_t first = entry.find(':');
    const size_t second = entry.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = entry.substr(first + 1, second - first - 1);
    std::string path = entry.substr(second + 1);
    const bool is_v2 = controllers.empty();
    if (!is_v2 && controllers.find("memory") == std::string::npos) continue;
    for (;;) {  // a parent's limit binds too; inside a container the path may not exist: the root
      const std::string folder = root + (is_v2 ? "" : "/memory") + path;
      least =
          std::min(least, is_v2 ? headroom(folder, "memory.max", "memory.current", "inactive_file")
                                : headroom(folder, "memory.limit_in_bytes", "memory.usage_in_bytes",
                                           "total_inactive_file"));
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/'));
    }
  }
  return least;
}

std::string describe_descriptor_limit(int needed) {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  auto open = static_cast<int>(limit.rlim_cur);  // where none is left to look
  if (DIR* const folder = ::opendir("/proc/self/fd")) {
    open = 0;
    while (const dirent* const entry = ::readdir(folder)) open += entry->d_name[0] != '.';
    ::closedir(folder);
    --open;  // the folder's own
  }
  return concat("needs ", needed, " file descriptors, ", open, " of ", limit.rlim_cur,
                " are open: raise the limit (ulimit -n, LimitNOFILE=)");
}

}  // namespace tp_native::comm
