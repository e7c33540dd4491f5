// SPDX-License-Identifier: Apache-2.0
// The collectives under test, each with the check of its result. Producer/consumer mode: a local
// write of the whole input, the collective, a local read of the whole output; the copies alone are
// a candidate of their own, to be subtracted.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

#include "comm/communicator.h"
#include "rounds.h"

namespace tp_native::bench {

class Buffer {
 public:
  explicit Buffer(size_t bytes)
      : data_(static_cast<float*>(::operator new(bytes, std::align_val_t{128}))) {
    std::memset(data_.get(), 1, bytes);  // backed before the clock runs
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { ::operator delete(data, std::align_val_t{128}); }
  };
  std::unique_ptr<float, Free> data_;
};

/// One message size: every rank's random input, known to all of them, and the buffers to work on.
class Cases {
 public:
  Cases(World& world, comm::Communicator& communicator, int64_t bytes)
      : world_(world),
        communicator_(communicator),
        bytes_(static_cast<size_t>(bytes)),
        count_(bytes / 4),
        buffer_(bytes_),
        sink_(bytes_ * static_cast<size_t>(world.size)),
        gathered_(bytes_ * static_cast<size_t>(world.size)),
        shared_(communicator.allocate(bytes)),
        columns_(static_cast<size_t>(world.size), count_),
        sums_(static_cast<size_t>(count_)),
        magnitudes_(static_cast<size_t>(count_)) {
    for (int r = 0; r < world.size; ++r) {
      sources_.emplace_back(bytes_);
      std::minstd_rand random(static_cast<unsigned>(r + 1));
      std::uniform_real_distribution<float> uniform(-1, 1);
      for (size_t i = 0; i < sums_.size(); ++i) {
        const float value = sources_.back().get()[i] = uniform(random);
        sums_[i] += value;
        magnitudes_[i] += std::fabs(value);
      }
    }
    if (shared_.data) std::memset(shared_.data, 1, bytes_);
  }
  Cases(const Cases&) = delete;  // candidates point at it
  Cases& operator=(const Cases&) = delete;

  /// False where the size is too small for shared blocks to differ from ordinary memory.
  bool has_shared() const { return shared_.data != nullptr; }

  void add_all_reduce(const std::string& path, std::vector<Candidate>& to) {
    float* const data = path == "shared" ? static_cast<float*>(shared_.data) : buffer_.get();
    const auto all_reduce = [this, data] {
      const comm::Signature signature{
          .op = comm::OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = std::span(&count_, 1)};
      communicator_.all_reduce(signature, data, data, count_, {}, {});
    };
    add("all_reduce/" + path, data, data, bytes_, all_reduce, [this] { check_sum(1); }, to);
    to.push_back({"all_reduce/" + path + "/bare", bare(data, all_reduce), [this, data] {
                    std::memcpy(sink_.get(), data, bytes_);
                    check_sum(repeated_);
                  }});
  }

  void add_all_gather(std::vector<Candidate>& to) {
    const auto all_gather = [this] {
      const comm::Signature signature{.op = comm::OpCode::kAllGather,
                                      .dtype = DType::kFloat32,
                                      .dim = 0,
                                      .shape = std::span(&count_, 1),
                                      .sizes = columns_};
      communicator_.all_gather(signature, buffer_.get(), gathered_.get(), 1, columns_, {});
    };
    const size_t whole = bytes_ * static_cast<size_t>(world_.size);
    const auto check = [this] {
      for (int r = 0; r < world_.size; ++r) check_equal("all_gather", sink_.get() + r * count_, r);
    };
    add("all_gather/private", buffer_.get(), gathered_.get(), whole, all_gather, check, to);
  }

  void add_broadcast(std::vector<Candidate>& to) {
    const auto broadcast = [this] {
      const comm::Signature signature{.op = comm::OpCode::kBroadcast,
                                      .dtype = DType::kFloat32,
                                      .root = 0,
                                      .shape = std::span(&count_, 1)};
      communicator_.broadcast(signature, buffer_.get(), count_, {});
    };
    const auto check = [this] { check_equal("broadcast", sink_.get(), 0); };
    add("broadcast/private", buffer_.get(), buffer_.get(), bytes_, broadcast, check, to);
  }

  void add_memcpy(std::vector<Candidate>& to) {
    const auto copy = [this] { std::memcpy(sink_.get(), mine(), bytes_); };
    const auto check = [this] { check_equal("memcpy", sink_.get(), world_.rank); };
    to.push_back({"memcpy/all", batch_of(copy), check});
    to.push_back({"memcpy/one",
                  [this, batch = batch_of(copy)](int64_t repetitions) {
                    return world_.rank == 0 ? batch(repetitions) : 0.0;
                  },
                  [this, check] {
                    if (world_.rank == 0) check();
                  }});
  }

 private:
  /// Adds `collective` in producer/consumer mode, and its two copies alone.
  template <class Collective, class Check>
  void add(const std::string& name, float* input, float* output, size_t output_bytes,
           Collective collective, Check check, std::vector<Candidate>& to) {
    to.push_back({name + "/producer_consumer", batch_of([=, this] {
                    std::memcpy(input, mine(), bytes_);
                    collective();
                    std::memcpy(sink_.get(), output, output_bytes);
                  }),
                  check});
    to.push_back({name + "/copies", batch_of([=, this] {
                    std::memcpy(input, mine(), bytes_);
                    keep_memory();
                    std::memcpy(sink_.get(), output, output_bytes);
                  }),
                  [=, this] {
                    if (input == output) check_equal("copies", sink_.get(), world_.rank);
                  }});
  }

  /// In place, again and again: sums grow by the number of ranks, so the input is renewed, off the
  /// clock, before they leave the range of float.
  template <class Collective>
  std::function<double(int64_t)> bare(float* data, Collective collective) {
    return [=, this](int64_t repetitions) {
      constexpr int64_t kBetweenRenewals = 24;  // 16^25 < 2^127
      double seconds = 0;
      while (repetitions > 0) {
        repeated_ = std::min(repetitions, kBetweenRenewals);
        repetitions -= repeated_;
        std::memcpy(data, mine(), bytes_);
        world_.meet();
        const double start = now_s();
        for (int64_t i = 0; i < repeated_; ++i) collective();
        seconds += now_s() - start;
      }
      return seconds;
    };
  }

  const float* mine() const { return sources_[static_cast<size_t>(world_.rank)].get(); }

  void check_equal(const char* what, const float* found, int source) const {
    TPN_CHECK(std::memcmp(found, sources_[static_cast<size_t>(source)].get(), bytes_) == 0, what,
              " of ", bytes_, " bytes: wrong data from rank ", source);
  }

  /// The sink holds the sum over the ranks, times size^(times - 1), against float64.
  void check_sum(int64_t times) const {
    const double growth = std::pow(world_.size, static_cast<double>(times - 1));
    const double unit = std::numeric_limits<float>::epsilon() * world_.size * times * growth;
    for (int64_t i = 0; i < count_; ++i) {
      const double sum = sums_[static_cast<size_t>(i)];
      const double magnitude = magnitudes_[static_cast<size_t>(i)];
      const double found = sink_.get()[i];
      TPN_CHECK(std::fabs(found - sum * growth) <= unit * magnitude, "all_reduce of ", bytes_,
                " bytes: element ", i, " is ", found, ", expected ", sum * growth);
    }
  }

  World& world_;
  comm::Communicator& communicator_;
  size_t bytes_;
  int64_t count_;
  Buffer buffer_;
  Buffer sink_;
  Buffer gathered_;
  comm::Block shared_;
  std::vector<int64_t> columns_;
  std::vector<Buffer> sources_;
  std::vector<double> sums_;  ///< over the ranks, in float64
  std::vector<double> magnitudes_;
  int64_t repeated_ = 0;
};

}  // namespace tp_native::bench
