// SPDX-License-Identifier: Apache-2.0
// Sole owner of a C handle; every raw handle we hold lives in one of these.
#pragma once

#include <unistd.h>

#include <utility>

namespace tp_native {

template <class Handle, auto Close, Handle kNone>
class Unique {
 public:
  Unique() noexcept = default;
  explicit Unique(Handle handle) noexcept : handle_(handle) {}
  Unique(Unique&& other) noexcept : handle_(other.release()) {}
  Unique& operator=(Unique other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Unique() {
    if (handle_ != kNone) (void)Close(handle_);  // a destructor cannot report a failure
  }
  Handle release() noexcept { return std::exchange(handle_, kNone); }
  Handle get() const noexcept { return handle_; }
  explicit operator bool() const noexcept { return handle_ != kNone; }

 private:
  Handle handle_ = kNone;
};

using Fd = Unique<int, ::close, -1>;

}  // namespace tp_native
