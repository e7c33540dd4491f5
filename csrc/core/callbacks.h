// SPDX-License-Identifier: Apache-2.0
// What the core asks of its host without knowing it: Python installs these from bind/, C++ tests
// leave them empty.
#pragma once

#include <string>

#include "core/error.h"

namespace tp_native {

struct Callbacks {
  void (*raise)(const FailureRecord&) = nullptr;  ///< throws the host's typed error
  void (*check_signals)() = nullptr;  ///< throws if a signal handler raised; called every <= 50 ms
  void (*warn)(const std::string&) = nullptr;
  void (*warn_later)(const std::string&) = nullptr;  ///< from any thread, without waiting
};

/// While one lives on a thread, what is raised there is an Error, not the host's: for code that
/// catches it, and for threads that the host does not know.
class PlainErrors {
 public:
  PlainErrors();
  ~PlainErrors();
  PlainErrors(const PlainErrors&) = delete;
  PlainErrors& operator=(const PlainErrors&) = delete;
};

void install_callbacks(const Callbacks& callbacks);
const Callbacks& callbacks();
void warn(const std::string& message);
/// For threads that must not wait for the host: it is told as soon as it listens.
void warn_later(const std::string& message);

}  // namespace tp_native
