// SPDX-License-Identifier: Apache-2.0
// The one exception type, and what a failed collective tells: who, in which operation, why.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <exception>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace tp_native {

enum class FailureKind : uint8_t {
  kError = 0,        ///< anything else: bad argument, system call, closed group
  kPeerLost = 1,     ///< a peer died or left
  kMismatch = 2,     ///< ranks entered different operations
  kTimeout = 3,      ///< a living peer did not come in time
  kAborted = 4,      ///< somebody called abort()
  kInterrupted = 5,  ///< a signal handler of this process raised
};

/// What every rank of a failed group reports; equal in kind and culprit on all of them.
struct FailureRecord {
  FailureKind kind = FailureKind::kError;
  int rank = -1;  ///< the rank that reports
  int peer = -1;  ///< the culprit, -1 where there is none
  std::string op;
  uint64_t seq = 0;
  double elapsed_s = 0;
  std::string message;
};

class Error : public std::runtime_error {
 public:
  explicit Error(FailureRecord record)
      : std::runtime_error(record.message), record_(std::move(record)) {}
  const FailureRecord& record() const noexcept { return record_; }

 private:
  FailureRecord record_;
};

/// "bad allocation": what it says; for reports to others while it goes on.
inline std::string text_of(const std::exception_ptr& thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "an exception of an unknown kind";
  }
}

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

/// `text` and its end; what does not fit is cut off, between two characters of UTF-8.
inline void copy_text(std::span<char> to, std::string_view text) {
  size_t length = std::min(text.size(), to.size() - 1);
  if (length < text.size()) {
    while (length > 0 && (static_cast<unsigned char>(text[length]) & 0xc0) == 0x80) --length;
  }
  std::memcpy(to.data(), text.data(), length);
  to[length] = '\0';
}

/// Throws `record` as the host language's typed error (callbacks.h), or as Error where there is no
/// host.
[[noreturn]] void raise(FailureRecord record);
[[noreturn]] void fail(const std::string& message);

#define TPN_CHECK(cond, ...)                               \
  do {                                                     \
    if (!(cond)) [[unlikely]]                              \
      ::tp_native::fail(::tp_native::concat(__VA_ARGS__)); \
  } while (false)

/// For calls that return -1 and set errno.
#define TPN_SYS(call, ...)                                                                     \
  do {                                                                                         \
    if ((call) == -1) [[unlikely]]                                                             \
      ::tp_native::fail(                                                                       \
          ::tp_native::concat(__VA_ARGS__, ": `", #call, "` failed: ", std::strerror(errno))); \
  } while (false)

}  // namespace tp_native
