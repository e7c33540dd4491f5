// SPDX-License-Identifier: Apache-2.0
#include "core/callbacks.h"

#include <cstdio>

namespace tp_native {
namespace {
Callbacks g_callbacks;  // set once, while the module loads and before any group exists
thread_local int t_plain_errors = 0;
}  // namespace

void install_callbacks(const Callbacks& callbacks) { g_callbacks = callbacks; }
const Callbacks& callbacks() { return g_callbacks; }

void warn(const std::string& message) {
  if (g_callbacks.warn) {
    g_callbacks.warn(message);
  } else {
    std::fprintf(stderr, "tp_native: %s\n", message.c_str());
  }
}

void warn_later(const std::string& message) {
  if (g_callbacks.warn_later) {
    g_callbacks.warn_later(message);
  } else {
    warn(message);
  }
}

PlainErrors::PlainErrors() { ++t_plain_errors; }
PlainErrors::~PlainErrors() { --t_plain_errors; }

void raise(FailureRecord record) {
  if (g_callbacks.raise && t_plain_errors == 0) g_callbacks.raise(record);
  throw Error(std::move(record));
}

void fail(const std::string& message) {
  FailureRecord record;
  record.message = message;
  raise(std::move(record));
}

}  // namespace tp_native
