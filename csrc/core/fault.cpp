// SPDX-License-Identifier: Apache-2.0
#include "core/fault.h"

#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <vector>

#include "core/error.h"

namespace tp_native::fault {

std::atomic<uint64_t> g_armed{0};

namespace {

// every TPN_FAULT in the tree; tests/test_fault_points.py compares
constexpr std::string_view kSites[] = {
    "meet.listen", "meet.hello",  "meet.welcome", "arena.back",    "collective.enter", "announce",
    "announced",   "await",       "sleep",        "check",         "stage.put",        "stage.post",
    "stage.take",  "shared.push", "shared.post",  "abort.publish", "flight.write",     "leave",
};

enum class Action { kKill, kStop, kDelay, kErrno };
Action g_action = Action::kKill;
int64_t g_argument = 0;
std::atomic<int64_t> g_left{0};

int64_t number(std::string_view text, const std::string& spec) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  TPN_CHECK(error == std::errc() && end == text.data() + text.size() && value >= 0, "fault \"",
            spec, "\": \"", text, "\" is not a number");
  return value;
}

}  // namespace

std::string sites() {
  std::string all;
  for (const std::string_view site : kSites) all += concat(all.empty() ? "" : ", ", site);
  return all;
}

void arm(const std::string& spec) {
  g_armed.store(0, std::memory_order_relaxed);
  if (spec.empty()) return;
  std::vector<std::string_view> parts;
  for (size_t from = 0; from <= spec.size();) {
    const size_t to = std::min(spec.find(':', from), spec.size());
    parts.push_back(std::string_view(spec).substr(from, to - from));
    from = to + 1;
  }
  TPN_CHECK(parts.size() == 3, "fault \"", spec,
            "\": expected site:nth:action, e.g. announce:3:kill");
  TPN_CHECK(std::ranges::find(kSites, parts[0]) != std::end(kSites), "fault \"", spec,
            "\": there is no site \"", parts[0], "\"; expected one of ", sites());
  const int64_t nth = number(parts[1], spec);
  TPN_CHECK(nth >= 1, "fault \"", spec, "\": visits are counted from 1");
  const std::string_view action = parts[2].substr(0, parts[2].find('='));
  const std::string_view argument =
      action.size() < parts[2].size() ? parts[2].substr(action.size() + 1) : "0";
  g_argument = number(argument, spec);
  if (action == "kill") {
    g_action = Action::kKill;
  } else if (action == "stop") {
    g_action = Action::kStop;
  } else if (action == "delay") {
    g_action = Action::kDelay;
  } else {
    TPN_CHECK(action == "errno", "fault \"", spec, "\": unknown action \"", action,
              "\"; expected kill, stop, delay=MILLISECONDS or errno=NUMBER");
    g_action = Action::kErrno;
  }
  g_left.store(nth, std::memory_order_relaxed);
  g_armed.store(site_id(parts[0]), std::memory_order_release);
}

bool reach() {
  if (g_left.fetch_sub(1, std::memory_order_acq_rel) != 1) return true;
  switch (g_action) {
    case Action::kKill:
      ::kill(::getpid(), SIGKILL);
      ::pause();
      return true;
    case Action::kStop:
      ::kill(::getpid(), SIGSTOP);
      return true;
    case Action::kDelay: {
      timespec left{static_cast<time_t>(g_argument / 1000), g_argument % 1000 * 1'000'000};
      while (::nanosleep(&left, &left) == -1 && errno == EINTR) {
      }
      return true;
    }
    case Action::kErrno:
      errno = static_cast<int>(g_argument);
      return false;
  }
  return true;
}

}  // namespace tp_native::fault
