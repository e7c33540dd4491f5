// SPDX-License-Identifier: Apache-2.0
#include "comm/arena.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include <algorithm>
#include <bit>

#include "comm/limits.h"
#include "core/error.h"
#include "core/fault.h"

namespace tp_native::comm {
namespace {

constexpr size_t kAlignment = 128;           // two cache lines: the prefetcher's pair
constexpr size_t kGrowthBytes = 8u << 20;    // backed at a time, so that fallocate is rare
constexpr size_t kCachedBytes = 256u << 20;  // freed memory kept for the next blocks
constexpr size_t kPunchBytes = 1u << 20;     // smaller free blocks always keep their memory

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

std::atomic<int> g_forks{0};  // of this process's ancestors since the first owner

/// Eight classes per power of two: at most 12.5 % lost.
size_t size_class(size_t bytes) {
  bytes = std::max(bytes, kAlignment);
  const size_t step = std::max(std::bit_floor(bytes) / 8, kAlignment);
  return (bytes + step - 1) / step * step;
}

Fd make_memfd(size_t capacity) {
  int raw = static_cast<int>(
      ::syscall(SYS_memfd_create, "tp_native", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL));
  if (raw < 0 && errno == EINVAL) {  // kernels before 6.3
    raw =
        static_cast<int>(::syscall(SYS_memfd_create, "tp_native", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  }
  if (raw < 0 && (errno == EMFILE || errno == ENFILE))
    fail("shared memory: " + describe_descriptor_limit(1));
  TPN_SYS(raw, "making shared memory");
  Fd fd(raw);
  TPN_SYS(::ftruncate(fd.get(), static_cast<off_t>(capacity)), "sizing ", capacity,
          " bytes of shared memory");
  TPN_SYS(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL),
          "sealing shared memory");
  return fd;
}

}  // namespace

Owner::Owner() : forks_(g_forks.load(std::memory_order_relaxed)) {
  static const int kWatched =
      pthread_atfork(nullptr, nullptr, [] { g_forks.fetch_add(1, std::memory_order_relaxed); });
  TPN_CHECK(kWatched == 0, "cannot watch for fork(): ", std::strerror(kWatched));
}

bool Owner::is_elsewhere() const { return g_forks.load(std::memory_order_relaxed) != forks_; }

Mapping::Mapping(int fd, size_t bytes) : bytes_(bytes) {
  const int flags = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  void* const base = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, fd, 0);
  TPN_CHECK(base != MAP_FAILED, "cannot map ", bytes,
            " bytes of address space: ", std::strerror(errno),
            "; raise the limit (ulimit -v) or set TP_NATIVE_ARENA_BYTES lower");
  base_ = static_cast<char*>(base);
}

Mapping::~Mapping() {
  if (!owner_.is_elsewhere()) ::munmap(base_, bytes_);
}

std::shared_ptr<Arena> Arena::shared(size_t capacity, size_t reserved) {
  return std::make_shared<Arena>(make_memfd(capacity), capacity, reserved);
}

std::shared_ptr<Arena> Arena::anonymous(size_t capacity, size_t reserved) {
  return std::make_shared<Arena>(Fd(), capacity, reserved);
}

Arena::Arena(Fd fd, size_t capacity, size_t reserved)
    : fd_(std::move(fd)),
      mapping_(std::make_shared<Mapping>(fd_.get(), capacity)),
      reserved_(reserved),
      next_(reserved),
      backed_(reserved) {
  TPN_CHECK(capacity >= reserved, "an arena of ", capacity,
            " bytes is too small: expected at least ", reserved, "; raise TP_NATIVE_ARENA_BYTES");
  if (!back(0, reserved)) {
    const int why = errno;
    fail(concat("shared memory: this rank needs ", reserved, " bytes for staging, ",
                memory_headroom(), " may be taken (", std::strerror(why),
                "): raise the memory limit of this container (docker run --memory, Kubernetes "
                "resources.limits.memory) or start fewer ranks"));
  }
}

bool Arena::back(size_t offset, size_t bytes) {
  if (!fd_) return true;  // anonymous memory comes on first touch
  if (!TPN_FAULT("arena.back")) return false;
  // shared memory beyond a control group's limit is not an error of fallocate but a kill
  if (static_cast<int64_t>(bytes) > memory_headroom()) {
    errno = ENOMEM;
    return false;
  }
  int rc;
  do {
    rc = ::fallocate(fd_.get(), 0, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  } while (rc == -1 && errno == EINTR);
  return rc == 0;
}

Block Arena::allocate(int64_t bytes) {
  if (is_retired_.load(std::memory_order_acquire)) return {};
  if (bytes < 0 || static_cast<size_t>(bytes) > capacity()) return {};
  const size_t size = size_class(static_cast<size_t>(bytes));
  size_t offset = 0;
  {
    std::lock_guard lock(mutex_);
    auto& list = free_[size];
    if (!list.empty()) {
      const Free block = list.back();
      if (!block.is_backed && !back(block.offset, size)) return {};
      if (block.is_backed) cached_ -= size;
      list.pop_back();
      offset = block.offset;
    } else {
      if (size > capacity() - next_) return {};
      if (next_ + size > backed_) {
        const size_t grow =
            std::min(std::max(next_ + size - backed_, kGrowthBytes), capacity() - backed_);
        if (!back(backed_, grow)) return {};
        backed_ += grow;
      }
      offset = next_;
      next_ += size;
    }
  }
  const int64_t now = in_use_.fetch_add(static_cast<int64_t>(size), std::memory_order_relaxed) +
                      static_cast<int64_t>(size);
  int64_t peak = peak_.load(std::memory_order_relaxed);
  while (now > peak && !peak_.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
  }
  Block block;
  block.data = base() + offset;
  block.owner = std::shared_ptr<void>(block.data, [self = shared_from_this(), offset, size](void*) {
    if (!self->mapping_->owner().is_elsewhere()) self->release(offset, size);
  });
  return block;
}

void Arena::release(size_t offset, size_t bytes) {
  in_use_.fetch_sub(static_cast<int64_t>(bytes), std::memory_order_relaxed);
  std::lock_guard lock(mutex_);
  bool is_backed = true;
  if (bytes >= kPunchBytes && cached_ + bytes > kCachedBytes) {
    // whole pages only; at worst the memory stays
    const size_t page = 4096;
    const size_t first = (offset + page - 1) / page * page;
    const size_t last = (offset + bytes) / page * page;
    is_backed = fd_ ? ::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                  static_cast<off_t>(first), static_cast<off_t>(last - first)) != 0
                    : ::madvise(base() + first, last - first, MADV_DONTNEED) != 0;
  }
  if (is_backed) cached_ += bytes;
  free_[bytes].push_back({offset, is_backed});
}

bool Arena::owns(const void* data, int64_t bytes) const {
  const auto* const p = static_cast<const char*>(data);
  return p >= base() + reserved_ && p + bytes <= base() + capacity();
}

}  // namespace tp_native::comm
