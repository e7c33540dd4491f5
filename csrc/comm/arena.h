// SPDX-License-Identifier: Apache-2.0
// One rank's memory that its peers can reach: a large sparse mapping, its header and staging slots
// in front, then blocks handed out by the owner. Only the owner allocates; peers see offsets.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "comm/communicator.h"
#include "core/unique.h"

namespace tp_native::comm {

/// Tells a child of fork(), which shares mappings but owns nothing, from the process that made
/// them.
class Owner {
 public:
  Owner();
  bool is_elsewhere() const;  ///< this process was forked from the owner

 private:
  int forks_;
};

/// A mapped region; unmapped when the last block or communicator that needs it is gone.
class Mapping {
 public:
  /// Shared mapping of `fd`, or with fd < 0 anonymous memory of this process.
  Mapping(int fd, size_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  char* base() const { return base_; }
  size_t bytes() const { return bytes_; }
  const Owner& owner() const { return owner_; }

 private:
  Owner owner_;
  char* base_;
  size_t bytes_;
};

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  /// A sealed memfd of `capacity` bytes, of which the first `reserved` are backed at once.
  static std::shared_ptr<Arena> shared(size_t capacity, size_t reserved);
  /// The same in anonymous memory, for ranks that are threads.
  static std::shared_ptr<Arena> anonymous(size_t capacity, size_t reserved);

  Arena(Fd fd, size_t capacity, size_t reserved);

  int fd() const { return fd_.get(); }
  const std::shared_ptr<Mapping>& mapping() const { return mapping_; }
  char* base() const { return mapping_->base(); }
  size_t capacity() const { return mapping_->bytes(); }

  /// Null data when memory or the arena is exhausted, or after retire().
  Block allocate(int64_t bytes);
  /// Nothing is handed out any more: after a failure a slow peer may still write into a block it
  /// was told of, which must not have become somebody else's.
  void retire() { is_retired_.store(true, std::memory_order_release); }
  /// Whether all of [data, data + bytes) lies among the blocks.
  bool owns(const void* data, int64_t bytes) const;

  int64_t bytes_in_use() const { return in_use_.load(std::memory_order_relaxed); }
  int64_t bytes_peak() const { return peak_.load(std::memory_order_relaxed); }

 private:
  struct Free {
    size_t offset;
    bool is_backed;
  };
  bool back(size_t offset, size_t bytes);  ///< memory behind the range, or false
  void release(size_t offset, size_t bytes);

  Fd fd_;
  std::shared_ptr<Mapping> mapping_;
  size_t reserved_;
  std::mutex mutex_;
  std::map<size_t, std::vector<Free>> free_;  ///< by size class
  size_t next_;                               ///< end of what was ever handed out
  size_t backed_;                             ///< end of what was ever backed
  size_t cached_ = 0;                         ///< bytes of free blocks that keep their memory
  std::atomic<bool> is_retired_{false};
  std::atomic<int64_t> in_use_{0};
  std::atomic<int64_t> peak_{0};
};

}  // namespace tp_native::comm
