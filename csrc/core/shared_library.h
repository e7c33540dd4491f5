// SPDX-License-Identifier: Apache-2.0
// Libraries that are found at run time: which file answered, and how many of a kind are mapped.
#pragma once

#include <set>
#include <string>

namespace tp_native {

/// A handle of dlopen, never closed: what a library started may outlive every caller.
class SharedLibrary {
 public:
  SharedLibrary() = default;
  /// Mapped already, or null.
  static SharedLibrary mapped(const char* name);
  /// Null where it cannot be opened; `why` then says so.
  static SharedLibrary open(const char* name, std::string& why);

  explicit operator bool() const { return handle_ != nullptr; }
  void* find(const char* symbol) const;  ///< or null

 private:
  explicit SharedLibrary(void* handle) : handle_(handle) {}
  void* handle_ = nullptr;
};

/// The file that `address` was mapped from; empty if none.
std::string file_of(const void* address);
/// The files mapped in this process whose name, without its folder, begins with `prefix`.
std::set<std::string> mapped_files(const std::string& prefix);

}  // namespace tp_native
