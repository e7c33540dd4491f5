// SPDX-License-Identifier: Apache-2.0
// What tests on a device need: memory with guards, streams, inputs with their sums from the CPU,
// sums with what follows them. A test program without a GPU exits with status 77.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "kernels/cuda.h"
#include "kernels/reduce.h"
#include "random_values.h"

#define CUDA_OK(call)                                                                        \
  do {                                                                                       \
    if (const cudaError_t error_ = (call); error_ != cudaSuccess)                            \
      check::fail(__FILE__, __LINE__, std::string(#call ": ") + cudaGetErrorString(error_)); \
  } while (false)

namespace tp_native::kernels {

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

inline std::vector<int> epilogues() {
  std::vector<int> all;
  for (int flags = 1; flags < 32; ++flags) {
    if (!(flags & 8) || ((flags & 6) == 6)) all.push_back(flags);
  }
  return all;
}

inline int run_all_on_device() {
  if (!cuda::is_built()) {  // both twins were linked, or the wrong one
    std::printf("FAILED: a build with nvcc has no CUDA kernels\n");
    return EXIT_FAILURE;
  }
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

}  // namespace tp_native::kernels
