// SPDX-License-Identifier: Apache-2.0
// Faults on purpose: named points in the protocol where a test makes this process die, stop, sleep
// or see a system call fail. Always compiled in; a point that is not armed costs one load and a
// comparison.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

namespace tp_native::fault {

/// FNV-1a; evaluated while compiling at every point.
constexpr uint64_t site_id(std::string_view site) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : site) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
  return hash;
}

/// The armed site, 0 for none.
extern std::atomic<uint64_t> g_armed;

/// Counts down and acts at zero. Returns false where the action is to let the step fail, with errno
/// set.
bool reach();

/// `spec` is "site:nth:action": at the nth visit (from 1) of the site this process is killed
/// ("kill"), stopped ("stop"), delayed ("delay=MILLISECONDS") or told that the step failed
/// ("errno=NUMBER", where the site is a system call). "" disarms. Raises for anything else.
void arm(const std::string& spec);

/// The sites that `arm` knows.
std::string sites();

}  // namespace tp_native::fault

/// True unless the armed fault says that this step failed.
#define TPN_FAULT(site)                                                            \
  ([] {                                                                            \
    constexpr uint64_t kSite = ::tp_native::fault::site_id(site);                  \
    return ::tp_native::fault::g_armed.load(std::memory_order_relaxed) != kSite || \
           ::tp_native::fault::reach();                                            \
  }())
