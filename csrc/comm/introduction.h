// SPDX-License-Identifier: Apache-2.0
// What ranks tell each other before a backend starts, so that a rank that cannot take part is an
// error on all of them and not a wait.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "comm/communicator.h"
#include "core/error.h"

namespace tp_native::comm {

/// Every rank's `mine`. T has `char error[...]`: why that rank cannot. The bytes come from other
/// processes: any text among them is ended by who reads it.
template <class T>
std::vector<T> introduce_all(Communicator& control, const T& mine) {
  static_assert(std::is_trivially_copyable_v<T>);
  const auto size = static_cast<size_t>(control.identity().size);
  std::vector<T> all(size);
  const std::vector<int64_t> columns(size, sizeof(T));
  const int64_t shape[] = {static_cast<int64_t>(size * sizeof(T))};
  control.all_gather({.op = OpCode::kInit, .shape = shape}, &mine, all.data(), 1, columns, {});
  for (T& each : all) each.error[sizeof(each.error) - 1] = '\0';
  return all;
}

/// "rank 1: ...; rank 2: ...", or nothing.
template <class T>
std::string errors_of(const std::vector<T>& ranks) {
  std::string errors;
  for (size_t r = 0; r < ranks.size(); ++r) {
    if (ranks[r].error[0] != '\0')
      errors += concat(errors.empty() ? "" : "; ", "rank ", r, ": ", ranks[r].error);
  }
  return errors;
}

}  // namespace tp_native::comm
