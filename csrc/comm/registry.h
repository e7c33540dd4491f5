// SPDX-License-Identifier: Apache-2.0
// Group name -> this rank's communicator. Ops know groups by name only.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "comm/communicator.h"

namespace tp_native::comm {

void register_communicator(const std::string& name, std::shared_ptr<Communicator> communicator);
void unregister_communicator(const std::string& name);
/// Raises if there is none: closed, or never made in this process.
std::shared_ptr<Communicator> find_communicator(std::string_view name);

}  // namespace tp_native::comm
