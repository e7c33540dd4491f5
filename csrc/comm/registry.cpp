// SPDX-License-Identifier: Apache-2.0
#include "comm/registry.h"

#include <map>
#include <mutex>
#include <shared_mutex>

#include "core/error.h"

namespace tp_native::comm {
namespace {

struct Registry {
  std::shared_mutex mutex;
  std::map<std::string, std::shared_ptr<Communicator>, std::less<>> by_name;
};

Registry& registry() {
  static auto* const kRegistry =
      new Registry;  // never destroyed: ops may run while the interpreter exits
  return *kRegistry;
}

}  // namespace

void register_communicator(const std::string& name, std::shared_ptr<Communicator> communicator) {
  std::unique_lock lock(registry().mutex);
  TPN_CHECK(registry().by_name.emplace(name, std::move(communicator)).second, "group \"", name,
            "\" exists already: names are never reused");
}

void unregister_communicator(const std::string& name) {
  std::shared_ptr<Communicator> last;  // destroyed after the lock is gone
  std::unique_lock lock(registry().mutex);
  if (const auto it = registry().by_name.find(name); it != registry().by_name.end()) {
    last = std::move(it->second);
    registry().by_name.erase(it);
  }
}

std::shared_ptr<Communicator> find_communicator(std::string_view name) {
  std::shared_lock lock(registry().mutex);
  const auto it = registry().by_name.find(name);
  TPN_CHECK(it != registry().by_name.end(), "no group \"", name,
            "\" in this process: it was closed, or init_tensor_parallel() has not run here");
  return it->second;
}

}  // namespace tp_native::comm
