// SPDX-License-Identifier: Apache-2.0
// The device that GPU benchmarks run on, and their timer: candidates of one comparison in turn, one
// batch each per round, the order rotated, between two events of the stream. Operands are used in
// turn and together exceed the L2 cache several times where memory is what is timed, so that each
// repetition finds them in memory as a deep model does.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/cuda_driver.h"
#include "gpu/kernels.h"
#include "rounds.h"

namespace tp_native::bench::gpu {

/// Device memory.
class Memory {
 public:
  explicit Memory(int64_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept : base_(std::exchange(other.base_, 0)) {}
  Memory& operator=(Memory&&) = delete;
  char* data() const { return reinterpret_cast<char*>(base_); }

 private:
  cuda::DevicePointer base_ = 0;
};

/// Memory of the host that the device reaches.
class Pinned {
 public:
  explicit Pinned(int64_t bytes);
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  char* data() const { return static_cast<char*>(base_); }

 private:
  void* base_ = nullptr;
};

/// Random bf16 operands that take turns.
class Turns {
 public:
  /// `copies` operands of `count` values in [-scale, scale).
  Turns(int64_t copies, int64_t count, float scale, uint32_t seed, StreamHandle stream);
  char* of(int64_t turn) const { return memory_.data() + turn % copies_ * bytes_; }

 private:
  int64_t copies_, bytes_;
  Memory memory_;
};

struct Case {
  std::string name;
  /// One repetition, on the scene's stream, of operands number `turn`.
  std::function<void(int64_t turn)> enqueue;
  /// Adds to `wrong` for what is not right in operands 0, after enqueue(0).
  std::function<void(uint32_t* wrong)> check = nullptr;
};

enum class Mode : uint8_t {
  kStream,  ///< launched one by one
  kGraph,   ///< replayed: what takes less than its launch
};

class Scene {
 public:
  Scene(int device, bool is_quick);

  /// One Timing for each, of one repetition. Every result is verified, before and after.
  std::vector<Timing> measure(const std::vector<Case>& cases, Mode mode = Mode::kStream);
  /// Bytes read and written per second by a copy within the device's memory, of 1 GiB.
  double copy_bytes_per_s();
  /// How many operands of so many bytes exceed the L2 cache four times over.
  int64_t copies_beyond_cache(int64_t bytes) const;
  void wait() const;
  StreamHandle stream() const { return stream_.get(); }
  const cuda::Device& device() const { return device_; }
  int multiprocessors() const { return device_.multiprocessors(); }
  bool is_quick() const { return is_quick_; }
  const Plan& plan() const { return plan_; }

 private:
  void verify(const Case& c);
  double batch_s(const Case& c, const Graph* graph, int64_t repetitions);

  cuda::Device device_;
  cuda::Current current_;
  cuda::Stream stream_;
  cuda::Event start_, stop_;
  Pinned wrong_;
  bool is_quick_;
  Plan plan_;
  std::optional<double> copy_bytes_per_s_;
};

/// Time of `a` over time of `b`: the median of the rounds' own ratios.
double ratio(const Timing& a, const Timing& b);

}  // namespace tp_native::bench::gpu
