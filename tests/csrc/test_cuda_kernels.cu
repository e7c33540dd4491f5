// SPDX-License-Identifier: Apache-2.0
// Every launcher of kernels/cuda.h on a device: bit for bit kernels::reduce where they must agree,
// against fp64 elsewhere. Ranks are virtual: streams of one process. Exit status 77: no GPU here.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "activation_oracle.h"
#include "check.h"
#include "core/error.h"
#include "kernels/cuda.h"
#include "kernels/cuda/slices.h"
#include "kernels/reduce.h"
#include "random_values.h"

#define CUDA_OK(call)                                                                        \
  do {                                                                                       \
    if (const cudaError_t error_ = (call); error_ != cudaSuccess)                            \
      check::fail(__FILE__, __LINE__, std::string(#call ": ") + cudaGetErrorString(error_)); \
  } while (false)

namespace tp_native::kernels {
namespace {

using enum AllReduceKind;

constexpr int kMostRanks = 4;
constexpr Activation kActivations[] = {Activation::kRelu, Activation::kGeluTanh,
                                       Activation::kGeluErf, Activation::kSilu};

/// Device memory that begins `shift` elements after an aligned address, with a marked element
/// behind.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values, int shift = 0) : count_(values.size()) {
    CUDA_OK(cudaMalloc(&memory_, (count_ + static_cast<size_t>(shift) + 1) * sizeof(T)));
    data_ = static_cast<T*>(memory_) + shift;
    put(values);
    CUDA_OK(cudaMemset(data_ + count_, 0x5a, sizeof(T)));
  }
  explicit OnDevice(int64_t count, int shift = 0)
      : OnDevice(std::vector<T>(static_cast<size_t>(count)), shift) {}
  ~OnDevice() { (void)cudaFree(memory_); }
  OnDevice(OnDevice&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), data_(other.data_), count_(other.count_) {}
  OnDevice& operator=(OnDevice&&) = delete;

  T* data() const { return data_; }
  void put(const std::vector<T>& values) {
    CUDA_OK(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  /// Checks that nothing was written behind.
  std::vector<T> get() const {
    std::vector<T> values(count_ + 1);
    CUDA_OK(cudaMemcpy(values.data(), data_, values.size() * sizeof(T), cudaMemcpyDeviceToHost));
    T mark;
    std::memset(&mark, 0x5a, sizeof(T));
    CHECK(std::memcmp(&values.back(), &mark, sizeof(T)) == 0);
    values.pop_back();
    return values;
  }

 private:
  void* memory_ = nullptr;
  T* data_ = nullptr;
  size_t count_;
};

template <class T>
bool is_equal(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

struct Stream {
  Stream() { CUDA_OK(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
  ~Stream() { (void)cudaStreamDestroy(handle); }
  Stream(const Stream&) = delete;
  cudaStream_t handle = nullptr;
};

/// Virtual ranks: staging, flags and a stream for each.
class Group {
 public:
  Group(int size, int64_t payload) : size_(size), streams_(static_cast<size_t>(size)) {
    CUDA_OK(cudaHostAlloc(&abort_, sizeof(uint32_t), cudaHostAllocMapped));
    *abort_ = 0;
    peers_.size = size;
    peers_.abort = abort_;
    peers_.buffer_bytes = cuda::staged_bytes(payload);
    for (int r = 0; r < size; ++r) {
      staging_.emplace_back(cuda::staging_bytes(payload));
      flags_.emplace_back(cuda::flag_bytes() / 4);
      peers_.data[r] = staging_.back().data();
      peers_.flags[r] = flags_.back().data();
    }
    CUDA_OK(cudaDeviceSynchronize());
  }
  ~Group() {
    *abort_ = 1;
    (void)cudaDeviceSynchronize();
    (void)cudaFreeHost(abort_);
  }
  Group(const Group&) = delete;

  int size() const { return size_; }
  cuda::Peers peers(int rank) const {
    cuda::Peers peers = peers_;
    peers.rank = rank;
    return peers;
  }
  cudaStream_t stream(int rank) const { return streams_[static_cast<size_t>(rank)].handle; }
  void abort() { *static_cast<volatile uint32_t*>(abort_) = 1; }

  /// launch(rank) for all, then waits; a group that hangs is aborted.
  void run(const std::function<void(int)>& launch) {
    for (int r = 0; r < size_; ++r) launch(r);
    wait();
  }
  void wait() {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    for (int r = 0; r < size_; ++r) {
      cudaError_t state;
      while ((state = cudaStreamQuery(stream(r))) == cudaErrorNotReady) {
        if (std::chrono::steady_clock::now() > end) {
          abort();
          check::fail(__FILE__, __LINE__, "rank " + std::to_string(r) + " hangs");
        }
        std::this_thread::yield();
      }
      CUDA_OK(state);
    }
  }

 private:
  int size_;
  std::vector<Stream> streams_;
  uint32_t* abort_ = nullptr;
  cuda::Peers peers_;
  std::vector<OnDevice<char>> staging_;
  std::vector<OnDevice<uint32_t>> flags_;
};

/// All ranks' inputs and what kernels::reduce makes of them.
template <class T>
struct Inputs {
  Inputs(DType dtype, int size, int64_t count, unsigned seed = 1) : dtype(dtype), count(count) {
    for (int r = 0; r < size; ++r) {
      values.push_back(random_values<T>(count, seed * 1000 + static_cast<unsigned>(r)));
    }
  }
  std::vector<T> reduced(ReduceOp op, const T* bias = nullptr, int64_t columns = 0,
                         const T* residual = nullptr) const {
    std::vector<T> out(static_cast<size_t>(count));
    void* const dst[] = {out.data()};
    const auto src = sources();
    reduce({dtype, op, static_cast<int>(src.size()), src.data(), 1, dst, count, bias, columns, 0,
            residual});
    return out;
  }
  std::vector<const void*> sources() const {
    std::vector<const void*> src;
    for (const auto& v : values) src.push_back(v.data());
    return src;
  }

  DType dtype;
  int64_t count;
  std::vector<std::vector<T>> values;
};

/// One all-reduce by all ranks. `how`: 0 aligned, 1 some ranks not aligned, 2 in place, 3 operands
/// in staging, 4 all ranks in one launch.
template <class T>
void check_all_reduce(Group& group, AllReduceKind kind, ReduceOp op, const Inputs<T>& inputs,
                      int how, int blocks = 0) {
  const int64_t count = inputs.count;
  std::vector<OnDevice<T>> in;
  std::vector<OnDevice<T>> out;
  std::vector<cuda::AllReduce> operands;
  auto unstaged = group.peers(0);
  for (int r = 0; r < group.size(); ++r) {
    const int shift = how == 1 && r % 2 == 1 ? 1 : 0;
    in.emplace_back(inputs.values[static_cast<size_t>(r)], shift);
    out.emplace_back(count, shift);
    unstaged.data[r] = in.back().data();
    operands.push_back({.dtype = inputs.dtype,
                        .op = op,
                        .in = how == 3 ? nullptr : in.back().data(),
                        .out = how == 2 ? in.back().data() : out.back().data(),
                        .columns = count,
                        .blocks = blocks});
  }
  if (how == 4) {
    cuda::all_reduce_in_one_launch(kind, group.peers(0), operands, group.stream(0));
    group.wait();
  } else {
    group.run([&](int r) {
      auto peers = how == 3 ? unstaged : group.peers(r);
      peers.rank = r;
      cuda::all_reduce(kind, peers, operands[static_cast<size_t>(r)], group.stream(r));
    });
  }
  const auto expected = inputs.reduced(op);
  for (int r = 0; r < group.size(); ++r) {
    const auto& result = how == 2 ? in[static_cast<size_t>(r)] : out[static_cast<size_t>(r)];
    CHECK(is_equal(result.get(), expected));
  }
}

/// Bias, residual and norm by flags 1, 2, 4; 8: `hidden` over the residual; 16: not aligned.
template <class T>
struct EpilogueCase {
  EpilogueCase(int64_t rows, int64_t columns, int flags)
      : rows(rows),
        columns(columns),
        flags(flags),
        bias(random_values<T>(columns, 71, true)),
        residual(random_values<T>(rows * columns, 72, true)),
        weight(random_values<T>(columns, 73, true)),
        bias_there(bias, (flags & 16) ? 1 : 0),
        residual_there(residual),
        weight_there(weight) {}

  template <class Descriptor>
  void fill(Descriptor& d) const {
    d.rows = rows;
    d.columns = columns;
    if (flags & 1) d.bias = bias_there.data();
    if (flags & 2) d.residual = residual_there.data();
    if (flags & 4) {
      d.norm_weight = weight_there.data();
      d.eps = kEps;
      if (flags & 8) d.hidden = residual_there.data();
    }
  }

  /// Of a sum over the ranks of `inputs`.
  void check(const Inputs<T>& inputs, const std::vector<T>& out) const {
    const T* const with_bias = (flags & 1) ? bias.data() : nullptr;
    const T* const with_residual = (flags & 2) ? residual.data() : nullptr;
    if (!(flags & 4)) {
      CHECK(is_equal(out, inputs.reduced(ReduceOp::kSum, with_bias, columns, with_residual)));
      return;
    }
    std::vector<T> normed(out.size());
    std::vector<T> hidden(out.size());
    void* const to[] = {normed.data()};
    void* const keep[] = {hidden.data()};
    const auto src = inputs.sources();
    reduce_rms_norm({inputs.dtype, static_cast<int>(src.size()), src.data(), 1, to, keep, rows,
                     columns, with_bias, with_residual, weight.data(), kEps});
    CHECK(is_equal(out, normed));
    if (flags & 8) CHECK(is_equal(residual_there.get(), hidden));
  }

  static constexpr double kEps = 1e-6;
  int64_t rows, columns;
  int flags;
  std::vector<T> bias, residual, weight;
  OnDevice<T> bias_there, residual_there, weight_there;
};

struct Shape {
  int64_t rows, columns;
};
constexpr Shape kRowShapes[] = {{1, 1},     {3, 7},     {5, 64},   {2, 4096},
                                {33, 1031}, {300, 512}, {2, 40000}};

std::vector<int> epilogues() {
  std::vector<int> all;
  for (int flags = 1; flags < 32; ++flags) {
    if (!(flags & 8) || ((flags & 6) == 6)) all.push_back(flags);
  }
  return all;
}

/// |x - exact| within `ulps` roundings to T and an absolute rest.
template <class T>
bool is_close(T x, double exact, double ulps) {
  constexpr double kUnit = std::same_as<T, double>    ? 0x1p-52
                           : std::same_as<T, float>   ? 0x1p-23
                           : std::same_as<T, Float16> ? 0x1p-10
                                                      : 0x1p-7;
  return std::abs(static_cast<double>(widen(x)) - exact) <= ulps * kUnit * (std::abs(exact) + 1e-3);
}

template <class T>
double at(const std::vector<T>& values, int64_t i) {
  return static_cast<double>(widen(values[static_cast<size_t>(i)]));
}

/// A row of gate and up has `pad` elements behind it.
template <class T>
void check_glu(DType dtype, Activation activation, Shape shape, int64_t pad, int shift) {
  const auto [rows, columns] = shape;
  const int64_t wide = 2 * columns + pad;
  const int64_t narrow_ = columns + pad;
  const auto gate_up = random_values<T>(rows * wide, 5, true);
  const auto d_out = random_values<T>(rows * narrow_, 6, true);
  const OnDevice<T> gate_up_there(gate_up, shift);
  const OnDevice<T> d_out_there(d_out);
  const OnDevice<T> out(rows * narrow_);
  const OnDevice<T> d_gate_up(gate_up, shift);  // backward in place
  const Stream stream;
  CUDA_OK(cudaDeviceSynchronize());
  cuda::glu({dtype, activation, gate_up_there.data(), out.data(), rows, columns, wide, narrow_},
            stream.handle);
  cuda::glu_backward({dtype, activation, d_out_there.data(), d_gate_up.data(), d_gate_up.data(),
                      rows, columns, narrow_, wide, wide},
                     stream.handle);
  CUDA_OK(cudaStreamSynchronize(stream.handle));
  const auto y = out.get();
  const auto d = d_gate_up.get();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < wide; ++c) {
      const int64_t i = row * wide + c;
      if (c >= 2 * columns) CHECK(at(d, i) == at(gate_up, i));  // the pad
    }
    for (int64_t c = 0; c < columns; ++c) {
      const double gate = at(gate_up, row * wide + c);
      const double up = at(gate_up, row * wide + columns + c);
      const double dy = at(d_out, row * narrow_ + c);
      const auto value = static_cast<double>(exact_activation(activation, gate));
      const auto slope = static_cast<double>(slope_of_activation(activation, gate));
      CHECK(is_close(y[static_cast<size_t>(row * narrow_ + c)], value * up, 8));
      CHECK(is_close(d[static_cast<size_t>(row * wide + columns + c)], value * dy, 8));
      if (activation == Activation::kRelu && gate == 0) continue;
      const double tolerance = std::same_as<T, double> ? 1e9 : 32;  // the difference errs by 1e-10
      CHECK(is_close(d[static_cast<size_t>(row * wide + c)], dy * up * slope, tolerance));
    }
  }
}

template <class T>
void check_activation_backward(DType dtype, Activation activation, int64_t count, int shift) {
  const auto x = random_values<T>(count, 8, true);
  const auto dy = random_values<T>(count, 9, true);
  const OnDevice<T> x_there(x, shift);
  const OnDevice<T> dx(dy);  // in place
  CUDA_OK(cudaDeviceSynchronize());
  const Stream stream;
  cuda::activation_backward({dtype, activation, dx.data(), x_there.data(), dx.data(), count},
                            stream.handle);
  CUDA_OK(cudaStreamSynchronize(stream.handle));
  const auto result = dx.get();
  for (int64_t i = 0; i < count; ++i) {
    if (activation == Activation::kRelu && at(x, i) == 0) continue;
    const auto slope = static_cast<double>(slope_of_activation(activation, at(x, i)));
    const double tolerance = std::same_as<T, double> ? 1e9 : 32;
    CHECK(is_close(result[static_cast<size_t>(i)], at(dy, i) * slope, tolerance));
  }
}

template <class T>
std::vector<T> column_sum(DType dtype, const std::vector<T>& values, Shape shape, int64_t stride,
                          int shift) {
  const OnDevice<T> in(values, shift);
  const OnDevice<T> out(shape.columns);
  const OnDevice<char> workspace(
      cuda::column_sum_workspace_bytes(dtype, shape.rows, shape.columns));
  CUDA_OK(cudaDeviceSynchronize());
  const Stream stream;
  cuda::column_sum(
      {dtype, in.data(), out.data(), shape.rows, shape.columns, stride, workspace.data()},
      stream.handle);
  CUDA_OK(cudaStreamSynchronize(stream.handle));
  return out.get();
}

template <class T>
void check_column_sum(DType dtype, Shape shape) {
  const int64_t stride = shape.columns + (shape.columns % 8 == 0 ? 8 : 3);
  const auto values = random_values<T>(shape.rows * stride, 4, true);
  const auto sums = column_sum(dtype, values, shape, stride, 0);
  CHECK(is_equal(column_sum(dtype, values, shape, stride, 1), sums));  // whatever the alignment
  for (int64_t c = 0; c < shape.columns; ++c) {
    double sum = 0;
    double magnitude = 0;
    for (int64_t row = 0; row < shape.rows; ++row) {
      sum += at(values, row * stride + c);
      magnitude += std::abs(at(values, row * stride + c));
    }
    const double in_float = std::same_as<T, double> ? 1e-13 : 1e-5;
    const double x = at(sums, c);
    CHECK(is_close(sums[static_cast<size_t>(c)], sum, 1) ||
          std::abs(x - sum) <= in_float * magnitude);
  }
}

void check_reduce_scatter(Group& group, const std::vector<int64_t>& counts) {
  const int64_t count = std::reduce(counts.begin(), counts.end());
  const Inputs<BFloat16> inputs(DType::kBFloat16, group.size(), count);
  std::vector<OnDevice<BFloat16>> in;
  std::vector<OnDevice<BFloat16>> out;
  for (int r = 0; r < group.size(); ++r) {
    in.emplace_back(inputs.values[static_cast<size_t>(r)]);
    out.emplace_back(counts[static_cast<size_t>(r)]);
  }
  group.run([&](int r) {
    const auto rank = static_cast<size_t>(r);
    cuda::reduce_scatter(
        group.peers(r),
        {DType::kBFloat16, ReduceOp::kSum, in[rank].data(), out[rank].data(), counts},
        group.stream(r));
  });
  const auto whole = inputs.reduced(ReduceOp::kSum);
  auto begin = whole.begin();
  for (size_t r = 0; r < counts.size(); ++r) {
    CHECK(is_equal(out[r].get(), std::vector<BFloat16>(begin, begin + counts[r])));
    begin += counts[r];
  }
}

void check_gathers(Group& group, const std::vector<int64_t>& bytes, int shift) {
  const int64_t count = std::reduce(bytes.begin(), bytes.end());
  const auto whole = random_values<uint8_t>(count, 3);
  std::vector<OnDevice<uint8_t>> in;
  std::vector<OnDevice<uint8_t>> out;
  int64_t begin = 0;
  for (int r = 0; r < group.size(); ++r) {
    const int64_t end = begin + bytes[static_cast<size_t>(r)];
    in.emplace_back(std::vector<uint8_t>(whole.begin() + begin, whole.begin() + end), shift);
    out.emplace_back(count, shift);
    begin = end;
  }
  group.run([&](int r) {
    const auto rank = static_cast<size_t>(r);
    cuda::all_gather(group.peers(r), {in[rank].data(), out[rank].data(), bytes}, group.stream(r));
  });
  for (const auto& result : out) CHECK(is_equal(result.get(), whole));
  for (int root = 0; root < group.size(); ++root) {
    const auto from = static_cast<size_t>(root);
    group.run([&](int r) {
      cuda::broadcast(group.peers(r),
                      {r == root ? in[from].data() : nullptr, out[static_cast<size_t>(r)].data(),
                       bytes[from], root},
                      group.stream(r));
    });
    const auto sent = in[from].get();
    for (const auto& result : out) {
      auto got = result.get();
      got.resize(sent.size());
      CHECK(is_equal(got, sent));
    }
  }
}

}  // namespace

TEST(epilogues_give_the_bits_of_the_cpu) {
  const Stream stream;
  each_floating([&]<class T>(T, DType dtype) {
    for (const Shape shape : kRowShapes) {
      const Inputs<T> inputs(dtype, 1, shape.rows * shape.columns);
      for (const int flags : epilogues()) {
        const EpilogueCase<T> epilogue(shape.rows, shape.columns, flags);
        const OnDevice<T> sum(inputs.values[0], (flags & 16) ? 1 : 0);
        const OnDevice<T> out(inputs.count);
        const bool in_place = flags % 3 == 0;
        cuda::SumEpilogue e{
            .dtype = dtype, .sum = sum.data(), .out = in_place ? sum.data() : out.data()};
        epilogue.fill(e);
        CUDA_OK(cudaDeviceSynchronize());
        cuda::apply_epilogue(e, stream.handle);
        CUDA_OK(cudaStreamSynchronize(stream.handle));
        epilogue.check(inputs, in_place ? sum.get() : out.get());
      }
    }
  });
}

TEST(gated_activations_and_their_gradients) {
  each_floating([&]<class T>(T, DType dtype) {
    for (const Activation activation : kActivations) {
      check_glu<T>(dtype, activation, {33, 256}, 0, 0);
      check_glu<T>(dtype, activation, {5, 1024}, 16, 0);  // strided
      check_glu<T>(dtype, activation, {7, 37}, 3, 0);
      check_glu<T>(dtype, activation, {3, 64}, 0, 1);  // not aligned
      check_glu<T>(dtype, activation, {1, 1}, 0, 0);
    }
  });
  check_glu<BFloat16>(DType::kBFloat16, Activation::kSilu, {1024, 1032}, 8, 0);
}

TEST(gradients_through_activations) {
  each_floating([&]<class T>(T, DType dtype) {
    for (const Activation activation : kActivations) {
      for (const int64_t count : {1, 7, 4099, 100003}) {
        check_activation_backward<T>(dtype, activation, count, 0);
      }
      check_activation_backward<T>(dtype, activation, 1000, 1);
    }
  });
}

TEST(column_sums_are_exact_enough_and_repeatable) {
  each_floating([&]<class T>(T, DType dtype) {
    for (const Shape shape :
         {Shape{0, 5}, {1, 1}, {7, 37}, {128, 256}, {129, 256}, {5000, 1032}, {20000, 33}}) {
      check_column_sum<T>(dtype, shape);
    }
  });
}

TEST(all_reduces_give_the_bits_of_the_cpu) {
  for (int size = 1; size <= kMostRanks; ++size) {
    Group group(size, 1 << 20);
    each_dtype([&]<class T>(T, DType dtype) {
      for (const int64_t count : {1, 7, 1000, 65539}) {
        const Inputs<T> inputs(dtype, size, count);
        for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin, ReduceOp::kAvg}) {
          if (!can_reduce(dtype, op)) continue;
          for (int how = 0; how < 5; ++how) {
            if (count > 1000 && how != 0) continue;
            check_all_reduce(group, kOneShot, op, inputs, how);
            check_all_reduce(group, kTwoShot, op, inputs, how);
          }
        }
      }
    });
  }
}

TEST(large_all_reduces) {
  constexpr int64_t kCount = 1000003;
  for (int size = 2; size <= kMostRanks; ++size) {
    Group group(size, kCount * 8);
    each_floating([&]<class T>(T, DType dtype) {
      const Inputs<T> inputs(dtype, size, kCount);
      for (int how = 0; how < 5; ++how) {
        check_all_reduce(group, kOneShot, ReduceOp::kSum, inputs, how);
        check_all_reduce(group, kTwoShot, ReduceOp::kSum, inputs, how);
      }
    });
  }
}

TEST(fused_epilogues_give_the_bits_of_the_cpu) {
  for (int size = 1; size <= kMostRanks; ++size) {
    Group group(size, 8 * 33 * 40000);
    each_floating([&]<class T>(T, DType dtype) {
      for (const Shape shape : kRowShapes) {
        const Inputs<T> inputs(dtype, size, shape.rows * shape.columns);
        for (const int flags : epilogues()) {
          std::vector<OnDevice<T>> in;
          std::vector<std::unique_ptr<EpilogueCase<T>>> epilogues;
          for (int r = 0; r < size; ++r) {
            in.emplace_back(inputs.values[static_cast<size_t>(r)], (flags & 16) && r == 1 ? 1 : 0);
            epilogues.push_back(std::make_unique<EpilogueCase<T>>(shape.rows, shape.columns,
                                                                  r == 0 ? flags & ~16 : flags));
          }
          group.run([&](int r) {  // in place
            const auto rank = static_cast<size_t>(r);
            cuda::AllReduce a{.dtype = dtype, .in = in[rank].data(), .out = in[rank].data()};
            epilogues[rank]->fill(a);
            cuda::all_reduce(kOneShot, group.peers(r), a, group.stream(r));
          });
          for (size_t r = 0; r < in.size(); ++r) epilogues[r]->check(inputs, in[r].get());
        }
      }
    });
  }
}

TEST(reduce_scatters_and_gathers_of_uneven_parts) {
  for (int size = 1; size <= kMostRanks; ++size) {
    Group group(size, 1 << 20);
    std::vector<int64_t> even(static_cast<size_t>(size), 4096);
    std::vector<int64_t> uneven;
    for (int r = 0; r < size; ++r) uneven.push_back(r == 1 ? 0 : 4096 + 1237 * r);
    for (const auto& counts : {even, uneven}) {
      check_reduce_scatter(group, counts);
      check_gathers(group, counts, 0);
      check_gathers(group, counts, 2);
      check_gathers(group, counts, 1);
    }
  }
}

TEST(nothing_to_do_is_done_without_a_launch) {
  Group group(2, 16);
  group.run([&](int r) {
    const std::vector<int64_t> none{0, 0};
    cuda::all_reduce(kOneShot, group.peers(r), {}, group.stream(r));
    cuda::reduce_scatter(group.peers(r), {.counts = none}, group.stream(r));
    cuda::all_gather(group.peers(r), {.bytes = none}, group.stream(r));
    cuda::broadcast(group.peers(r), {}, group.stream(r));
    cuda::apply_epilogue({}, group.stream(r));
    cuda::glu({}, group.stream(r));
    cuda::glu_backward({}, group.stream(r));
    cuda::activation_backward({}, group.stream(r));
    cuda::column_sum({}, group.stream(r));
  });
}

// Kinds, sizes, dtypes and blocks change from one to the next, so blocks sit out and come back.
TEST(two_hundred_collectives_in_a_row_with_data_of_their_own) {
  for (int size = 2; size <= kMostRanks; ++size) {
    Group group(size, 1 << 20);
    for (unsigned i = 0; i < 200; ++i) {
      const int64_t count = 1 + (i * 7919) % 60000;
      const int blocks = i % 3 == 0 ? 0 : 1 + static_cast<int>(i * 13 % 48);
      const Inputs<BFloat16> inputs(DType::kBFloat16, size, count, i + 2);
      check_all_reduce(group, i % 2 == 0 ? kOneShot : kTwoShot, ReduceOp::kSum, inputs,
                       static_cast<int>(i % 5), blocks);
    }
  }
}

// No rank waits for the host between its collectives: fast ranks run ahead as far as the protocol
// lets.
TEST(collectives_queued_without_waiting) {
  constexpr int64_t kCount = 5000;
  constexpr int kQueued = 200;
  for (int size = 2; size <= kMostRanks; ++size) {
    Group group(size, kCount * 4);
    std::vector<std::unique_ptr<Inputs<float>>> inputs;
    std::vector<OnDevice<float>> in;
    std::vector<OnDevice<float>> out;
    for (unsigned i = 0; i < kQueued; ++i) {
      inputs.push_back(std::make_unique<Inputs<float>>(DType::kFloat32, size, kCount, i + 1));
      for (const auto& values : inputs.back()->values) {
        in.emplace_back(values);
        out.emplace_back(kCount);
      }
    }
    CUDA_OK(cudaDeviceSynchronize());
    for (size_t i = 0; i < kQueued; ++i) {
      for (int r = 0; r < size; ++r) {
        const size_t at = i * static_cast<size_t>(size) + static_cast<size_t>(r);
        cuda::all_reduce(i % 3 == 0 ? kTwoShot : kOneShot, group.peers(r),
                         {.dtype = DType::kFloat32,
                          .in = in[at].data(),
                          .out = out[at].data(),
                          .columns = kCount,
                          .blocks = 1 + static_cast<int>(i * 5 % 7)},
                         group.stream(r));
      }
    }
    group.wait();
    for (size_t i = 0; i < kQueued; ++i) {
      const auto expected = inputs[i]->reduced(ReduceOp::kSum);
      for (size_t r = 0; r < static_cast<size_t>(size); ++r) {
        CHECK(is_equal(out[i * static_cast<size_t>(size) + r].get(), expected));
      }
    }
  }
}

TEST(a_thousand_replays_of_a_graph) {
  constexpr int64_t kCount = 20000;
  constexpr int kSize = 2;
  Group group(kSize, kCount * 2);
  std::vector<OnDevice<BFloat16>> in;
  std::vector<OnDevice<BFloat16>> out;
  cudaGraphExec_t graphs[kSize];
  for (int r = 0; r < kSize; ++r) {
    in.emplace_back(kCount);
    out.emplace_back(kCount);
    cudaGraph_t graph;
    CUDA_OK(cudaStreamBeginCapture(group.stream(r), cudaStreamCaptureModeThreadLocal));
    cuda::all_reduce(kOneShot, group.peers(r),
                     {.dtype = DType::kBFloat16,
                      .in = in.back().data(),
                      .out = out.back().data(),
                      .columns = kCount},
                     group.stream(r));
    CUDA_OK(cudaStreamEndCapture(group.stream(r), &graph));
    CUDA_OK(cudaGraphInstantiate(&graphs[r], graph, 0));
    CUDA_OK(cudaGraphDestroy(graph));
    CUDA_OK(cudaGraphUpload(graphs[r], group.stream(r)));
  }
  group.wait();
  for (unsigned round = 0; round < 10; ++round) {
    const Inputs<BFloat16> inputs(DType::kBFloat16, kSize, kCount, round + 1);
    for (size_t r = 0; r < kSize; ++r) in[r].put(inputs.values[r]);
    CUDA_OK(cudaDeviceSynchronize());
    for (int i = 0; i < 100; ++i) {
      for (int r = 0; r < kSize; ++r) CUDA_OK(cudaGraphLaunch(graphs[r], group.stream(r)));
    }
    group.wait();
    const auto expected = inputs.reduced(ReduceOp::kSum);
    for (const auto& result : out) CHECK(is_equal(result.get(), expected));
    check_all_reduce(group, kOneShot, ReduceOp::kSum, inputs, 0);  // eager in between
  }
  for (const auto graph : graphs) CUDA_OK(cudaGraphExecDestroy(graph));
}

TEST(an_abort_ends_a_wait_for_a_rank_that_never_comes) {
  Group group(2, 1 << 16);
  const OnDevice<float> in(1000);
  const OnDevice<float> out(1000);
  CUDA_OK(cudaDeviceSynchronize());
  cuda::all_reduce(kOneShot, group.peers(0),
                   {.dtype = DType::kFloat32, .in = in.data(), .out = out.data(), .columns = 1000},
                   group.stream(0));
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(cudaStreamQuery(group.stream(0)) == cudaErrorNotReady);
  const auto begin = std::chrono::steady_clock::now();
  group.abort();
  group.wait();
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(1));
}

TEST(what_does_not_fit_is_refused) {
  Group group(2, 64);
  const auto refuses = [](const std::function<void()>& call, const char* with) {
    try {
      call();
    } catch (const Error& error) {
      return std::string(error.what()).find(with) != std::string::npos;
    }
    return false;
  };
  const cuda::AllReduce large{
      .in = group.peers(0).data[0], .out = group.peers(0).data[0], .columns = 17};
  CHECK(
      refuses([&] { cuda::all_reduce(kOneShot, group.peers(0), large, group.stream(0)); }, "cut"));
  auto blind = group.peers(0);
  blind.abort = nullptr;
  CHECK(refuses([&] { cuda::all_reduce(kOneShot, blind, large, group.stream(0)); }, "abort"));
  CHECK(refuses(
      [&] { cuda::glu({.dtype = DType::kInt32, .rows = 1, .columns = 1}, group.stream(0)); },
      "int32"));
}

}  // namespace tp_native::kernels

int main() {
  // a kernel that is loaded while another rank's spins might wait for it
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    std::printf("skipped: no GPU (%s)\n",
                error == cudaSuccess ? "none found" : cudaGetErrorString(error));
    return 77;
  }
  return check::run_all();
}
