// SPDX-License-Identifier: Apache-2.0
// Ranks as threads with a GPU each, on the driver's test double: settings, memory on the device,
// and what every GPU backend's collectives must do.
#pragma once

#include <chrono>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "comm/communicator.h"
#include "core/clock.h"
#include "core/cuda_driver.h"
#include "core/shared_library.h"
#include "thread_ranks.h"

using namespace tp_native;        // NOLINT
using namespace tp_native::comm;  // NOLINT

constexpr const char* kDriver = TPN_DOUBLES "/libfake_cuda.so";

template <class Function>
Function* symbol(const char* file, const char* name) {
  auto* const found = SharedLibrary::mapped(file).find(name);
  CHECK(found != nullptr);
  return reinterpret_cast<Function*>(found);
}
/// An environment variable while it lives.
class Setting {
 public:
  Setting(const char* name, const std::string& value) : name_(name) {
    if (const char* const before = std::getenv(name)) before_ = before;
    ::setenv(name, value.c_str(), 1);
  }
  ~Setting() {
    if (before_) {
      ::setenv(name_, before_->c_str(), 1);
    } else {
      ::unsetenv(name_);
    }
  }

 private:
  const char* name_;
  std::optional<std::string> before_;
};

inline void use_doubles() {
  static const bool once = [] {
    cuda::use_driver(kDriver);
    return true;
  }();
  (void)once;
}

/// A rank's stream and device memory that holds `values`.
template <class T>
class OnDevice {
 public:
  OnDevice(cuda::StreamHandle stream, std::vector<T> values)
      : stream_(stream),
        host_(std::move(values)),
        memory_(static_cast<int64_t>(std::max<size_t>(1, host_.size()) * sizeof(T)), stream,
                "a test") {
    cuda::copy(memory_.data(), host_.data(), bytes(), stream_);
    TPN_CUDA(cuda::driver().StreamSynchronize(stream_), "writing");
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  std::vector<T> read() {
    cuda::copy(host_.data(), memory_.data(), bytes(), stream_);
    TPN_CUDA(cuda::driver().StreamSynchronize(stream_), "reading");
    return host_;
  }

 private:
  int64_t bytes() const { return static_cast<int64_t>(host_.size() * sizeof(T)); }
  cuda::StreamHandle stream_;
  std::vector<T> host_;
  cuda::Workspace memory_;
};

/// fn(communicator, stream) on a rank's GPU.
using OnStream = std::function<void(Communicator&, cuda::StreamHandle)>;
inline std::function<void(Communicator&)> on_gpu(const OnStream& fn) {
  return [fn](Communicator& c) {
    const cuda::Device device(c.identity().rank);
    const cuda::Current current(device);
    const cuda::Stream stream;
    fn(c, stream.get());
  };
}

inline std::vector<float> ramp(size_t count, float scale) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = scale * static_cast<float>(i % 97);
  return values;
}

inline int64_t sum(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

inline void check_all_told(const std::vector<FailureRecord>& failures, FailureKind kind, int peer,
                           const std::string& text) {
  for (const FailureRecord& failure : failures) {
    if (failure.kind != kind || failure.peer != peer ||
        failure.message.find(text) == std::string::npos)
      throw std::runtime_error(concat("kind ", static_cast<int>(failure.kind), " peer ",
                                      failure.peer, ": ", failure.message));
  }
}

/// Launches all-reduces until something is raised.
inline void loop(Communicator& c) {
  on_gpu([](Communicator& group, cuda::StreamHandle stream) {
    const OnDevice<float> x(stream, ramp(64, 1));
    const int64_t shape[] = {64};
    for (const double end = now_s() + 20; now_s() < end;) {
      group.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                       x.data(), x.data(), 64, {}, {stream});
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  })(c);
}

/// Gather, scatter, broadcast, all-gather and reduce-scatter of parts as in `cut`, one for each
/// rank.
inline void check_parts(const Ranks& ranks, const std::vector<int64_t>& cut) {
  const int size = static_cast<int>(cut.size());
  for (const int64_t rows : {0, 1, 3}) {
    run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
                const int rank = c.identity().rank;
                const int64_t width = sum(cut);
                const int64_t first = std::accumulate(cut.begin(), cut.begin() + rank, int64_t{0});
                const int64_t shape[] = {rows, width};
                const auto whole = ramp(static_cast<size_t>(rows * width), 1);
                std::vector<float> part;
                for (int64_t row = 0; row < rows; ++row) {
                  part.insert(part.end(), whole.begin() + row * width + first,
                              whole.begin() + row * width + first + cut[rank]);
                }
                OnDevice<float> x(stream, part);
                OnDevice<float> y(stream, std::vector<float>(whole.size(), -1));
                c.all_gather({.op = OpCode::kAllGather,
                              .dtype = DType::kFloat32,
                              .dim = 1,
                              .shape = shape,
                              .sizes = cut},
                             x.data(), y.data(), rows, cut, {stream});
                CHECK(y.read() == whole);
              }));
  }
  run_clean(
      ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
        const int rank = c.identity().rank;
        const auto whole = ramp(static_cast<size_t>(sum(cut)), 1);
        const int64_t shape[] = {sum(cut)};
        const int64_t first = std::accumulate(cut.begin(), cut.begin() + rank, int64_t{0});
        const std::vector<float> mine(whole.begin() + first, whole.begin() + first + cut[rank]);
        std::vector<float> tripled;
        for (const float value : mine) tripled.push_back(value * static_cast<float>(size));
        OnDevice<float> x(stream, whole);
        OnDevice<float> part(stream, std::vector<float>(mine.size(), -1));
        Signature s{
            .op = OpCode::kReduceScatter, .dtype = DType::kFloat32, .shape = shape, .sizes = cut};
        c.reduce_scatter(s, x.data(), part.data(), cut, {stream});
        CHECK(part.read() == tripled);
        for (s.root = 0; s.root < size; ++s.root) {
          OnDevice<float> gathered(stream, std::vector<float>(whole.size(), -1));
          OnDevice<float> given(stream, mine);
          s.op = OpCode::kGather;
          c.gather(s, given.data(), rank == s.root ? gathered.data() : nullptr, cut, {stream});
          if (rank == s.root) CHECK(gathered.read() == whole);
          OnDevice<float> got(stream, std::vector<float>(mine.size(), -1));
          s.op = OpCode::kScatter;
          c.scatter(s, rank == s.root ? x.data() : nullptr, got.data(), cut, {stream});
          CHECK(got.read() == mine);
          OnDevice<float> all(stream, rank == s.root ? whole : std::vector<float>(whole.size()));
          s.op = OpCode::kBroadcast;
          c.broadcast(s, all.data(), sum(cut), {stream});
          CHECK(all.read() == whole);
        }
        c.barrier(0, {});
      }));
}
