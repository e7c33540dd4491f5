// SPDX-License-Identifier: Apache-2.0
// What the hardware allows: the ranks' common ground beside the product (memory mapped before the
// fork, a meeting of their own) and the physical probes that run on it.
#pragma once

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "core/error.h"

// the machine's widest loads and stores, without asking for them in the build
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TPN_BENCH_WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TPN_BENCH_WIDEST
#endif

namespace tp_native::bench {

constexpr int kMostRanks = 16;

inline void cpu_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Keeps the compiler from merging one repetition with the next.
inline void keep_memory() { asm volatile("" ::: "memory"); }

struct alignas(128) Flag {
  std::atomic<uint64_t> value{0};
};

struct Common {
  Flag arrived[kMostRanks];
  Flag ping[2];
  double seconds[kMostRanks] = {};
};

/// Made before the fork; every rank then sets its own `rank`.
class World {
 public:
  World(int size, size_t block_bytes) : size(size), block_bytes_((block_bytes + 4095) & ~4095ul) {
    const size_t bytes = kCommonBytes + block_bytes_ * static_cast<size_t>(size);
    void* const base =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    TPN_CHECK(base != MAP_FAILED, "cannot map ", bytes, " bytes for the probes");
    common_ = new (base) Common;
  }

  /// Without a deadline: the parent kills every rank when one fails.
  void wait_for(const Flag& flag, uint64_t at_least) const {
    for (int i = 0; flag.value.load(std::memory_order_acquire) < at_least; ++i) {
      if (i < 64) continue;
      i < spins ? cpu_pause() : static_cast<void>(::sched_yield());
    }
  }

  /// Returns when all ranks have come.
  void meet() {
    common_->arrived[rank].value.store(++meetings_, std::memory_order_release);
    for (int i = 1; i < size; ++i) wait_for(common_->arrived[(rank + i) % size], meetings_);
  }

  /// The slowest rank's time, the same on all ranks.
  double slowest(double seconds) {
    common_->seconds[rank] = seconds;
    meet();
    const double most = *std::max_element(common_->seconds, common_->seconds + size);
    meet();  // nobody overwrites what another has still to read
    return most;
  }

  uint64_t* block(int of_rank) const {
    char* const blocks = reinterpret_cast<char*>(common_) + kCommonBytes;
    return reinterpret_cast<uint64_t*>(blocks + block_bytes_ * static_cast<size_t>(of_rank));
  }
  Flag* ping() const { return common_->ping; }
  int next() const { return (rank + 1) % size; }

  int size;
  int rank = 0;
  int spins = 4000;  ///< before a wait gives its core away

 private:
  static constexpr size_t kCommonBytes = 8192;
  static_assert(sizeof(Common) <= kCommonBytes);
  size_t block_bytes_;
  Common* common_;
  uint64_t meetings_ = 0;
};

TPN_BENCH_WIDEST inline void write_words(uint64_t* words, size_t count, uint64_t first) {
  for (size_t i = 0; i < count; ++i) words[i] = first + i;
}

TPN_BENCH_WIDEST inline uint64_t sum_words(const uint64_t* words, size_t count) {
  uint64_t sum = 0;
  for (size_t i = 0; i < count; ++i) sum += words[i];
  return sum;
}

inline void check_words(uint64_t sum, size_t count, uint64_t first) {
  const uint64_t expected = count * first + count * (count - 1) / 2;
  TPN_CHECK(sum == expected, "probe of ", count * 8, " bytes: read the sum ", sum, ", expected ",
            expected);
}

/// Rank 0 raises a flag, rank 1 answers; the others stand by.
class FlagRoundTrip {
 public:
  explicit FlagRoundTrip(const World& world) : world_(world) {}
  void operator()() {
    ++turn_;
    Flag* const ping = world_.ping();
    if (world_.rank == 0) {
      ping[0].value.store(turn_, std::memory_order_release);
      world_.wait_for(ping[1], turn_);
    } else if (world_.rank == 1) {
      world_.wait_for(ping[0], turn_);
      ping[1].value.store(turn_, std::memory_order_release);
    }
  }

 private:
  const World& world_;
  uint64_t turn_ = 0;
};

/// How the exchange moves its lines. Neither is faster everywhere: between core clusters of an AMD
/// EPYC, stores into lines that the peer holds take 8 ns each, memcpy's string moves 2 ns.
enum class Mover { kLoadsAndStores, kMemcpy };

/// Every rank writes its own block, meets, reads the next rank's, meets. Payload: `bytes` per rank.
class Exchange {
 public:
  Exchange(World& world, size_t bytes, Mover mover)
      : world_(world), count_(bytes / 8), mover_(mover), private_(count_) {}
  void operator()() {
    turn_ += 1'000'003;
    const int me = world_.rank;
    if (mover_ == Mover::kMemcpy) {
      private_[0] = turn_ + static_cast<uint64_t>(me);
      copy(world_.block(me), private_.data());
      world_.meet();
      copy(private_.data(), world_.block(world_.next()));
      world_.meet();
      TPN_CHECK(private_[0] == turn_ + static_cast<uint64_t>(world_.next()),
                "exchange: wrong data");
      return;
    }
    write_words(world_.block(me), count_, turn_ + static_cast<uint64_t>(me));
    world_.meet();
    const uint64_t sum = sum_words(world_.block(world_.next()), count_);
    world_.meet();
    check_words(sum, count_, turn_ + static_cast<uint64_t>(world_.next()));
  }

 private:
  /// In pieces: glibc leaves the string moves for plain stores at about 1 MiB.
  void copy(uint64_t* to, const uint64_t* from) const {
    constexpr size_t kPiece = (64 << 10) / 8;
    for (size_t i = 0; i < count_; i += kPiece)
      std::memcpy(to + i, from + i, std::min(kPiece, count_ - i) * 8);
  }

  World& world_;
  size_t count_;
  Mover mover_;
  std::vector<uint64_t> private_;
  uint64_t turn_ = 0;
};

/// Rank 0 writes a block, then rank 1 reads it; only the read is timed, by `clock`.
class ReadPeer {
 public:
  ReadPeer(World& world, size_t bytes, double (*clock)())
      : world_(world), count_(bytes / 8), clock_(clock) {}
  double operator()(int64_t repetitions) {
    double seconds = 0;
    for (int64_t i = 0; i < repetitions; ++i) {
      turn_ += 1'000'003;
      if (world_.rank == 0) write_words(world_.block(0), count_, turn_);
      world_.meet();
      if (world_.rank == 1) {
        const double start = clock_();
        const uint64_t sum = sum_words(world_.block(0), count_);
        check_words(sum, count_, turn_);  // also makes the clock wait for the last load
        seconds += clock_() - start;
      }
      world_.meet();
    }
    return seconds;
  }

 private:
  World& world_;
  size_t count_;
  double (*clock_)();
  uint64_t turn_ = 0;
};

}  // namespace tp_native::bench
