// SPDX-License-Identifier: Apache-2.0
// Products and what they must come out as, in float64, row by row: for the test double of cuBLASLt
// and for the library itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/cuda_driver.h"
#include "kernels/cpu/convert.h"
#include "kernels/gemm.h"

namespace gemm_cases {

using namespace tp_native;           // NOLINT
using namespace tp_native::kernels;  // NOLINT

using Values = std::vector<double>;

inline double decode(DType dtype, const char* at) {
  const auto read = [at](auto value) {
    std::memcpy(&value, at, sizeof(value));
    return value;
  };
  switch (dtype) {
    case DType::kFloat64:
      return read(double{});
    case DType::kFloat16:
      return to_float(read(Float16{}));
    case DType::kBFloat16:
      return to_float(read(BFloat16{}));
    default:
      return read(float{});
  }
}

inline void encode(DType dtype, char* at, double x) {
  const auto write = [at](auto value) { std::memcpy(at, &value, sizeof(value)); };
  const auto f = static_cast<float>(x);
  switch (dtype) {
    case DType::kFloat64:
      return write(x);
    case DType::kFloat16:
      return write(to_float16(f));
    case DType::kBFloat16:
      return write(to_bfloat16(f));
    default:
      return write(f);
  }
}

/// Half the distance of two neighbours, relative.
inline double rounding(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-53;
    case DType::kFloat16:
      return 0x1p-11;
    case DType::kBFloat16:
      return 0x1p-8;
    default:
      return 0x1p-24;
  }
}

/// Device memory whose data begins `shift_bytes` behind a multiple of 256.
class Memory {
 public:
  Memory(int64_t bytes, int64_t shift_bytes = 0) : bytes_(bytes), shift_(shift_bytes) {
    TPN_CUDA(cuda::driver().MemAlloc(&base_, static_cast<size_t>(bytes + shift_bytes + 256)),
             "a test's memory");
  }
  ~Memory() { (void)cuda::driver().MemFree(base_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() const { return reinterpret_cast<void*>(base_ + static_cast<uint64_t>(shift_)); }
  std::vector<char> read(cuda::StreamHandle stream) const {
    std::vector<char> bytes(static_cast<size_t>(bytes_));
    cuda::copy(bytes.data(), data(), bytes_, stream);
    TPN_CUDA(cuda::driver().StreamSynchronize(stream), "reading");
    return bytes;
  }
  void write(const std::vector<char>& bytes, cuda::StreamHandle stream) const {
    cuda::copy(data(), bytes.data(), static_cast<int64_t>(bytes.size()), stream);
    TPN_CUDA(cuda::driver().StreamSynchronize(stream), "writing");
  }

 private:
  cuda::DevicePointer base_ = 0;
  int64_t bytes_, shift_;
};

/// Random values that the dtype holds, in device memory and as numbers.
class Matrix {
 public:
  Matrix(DType dtype, int64_t rows, int64_t columns, int64_t pad, int64_t shift, unsigned seed,
         cuda::StreamHandle stream)
      : dtype_(dtype),
        rows_(rows),
        columns_(columns),
        ld_(columns + pad),
        memory_(rows * ld_ * item(), shift * item()) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> draw(-1, 1);
    std::vector<char> bytes(static_cast<size_t>(rows * ld_ * item()));
    for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(item()))
      encode(dtype, &bytes[at], draw(random));
    memory_.write(bytes, stream);
    values_ = read(stream);
  }

  int64_t ld() const { return ld_; }
  void* data() const { return memory_.data(); }
  /// As written; its gaps included.
  double at(int64_t row, int64_t column) const {
    return values_[static_cast<size_t>(row * ld_ + column)];
  }
  /// What is there now.
  Values read(cuda::StreamHandle stream) const {
    const std::vector<char> bytes = memory_.read(stream);
    Values values;
    for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(item()))
      values.push_back(decode(dtype_, &bytes[at]));
    return values;
  }
  std::vector<char> bytes(cuda::StreamHandle stream) const { return memory_.read(stream); }
  /// Other values, the same gaps.
  void spoil(cuda::StreamHandle stream) const {
    std::vector<char> bytes = memory_.read(stream);
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t column = 0; column < columns_; ++column)
        encode(dtype_, &bytes[static_cast<size_t>((row * ld_ + column) * item())], -77);
    memory_.write(bytes, stream);
  }
  bool has_kept_its_gaps(const Values& now) const {
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t gap = row * ld_ + columns_; gap < (row + 1) * ld_; ++gap)
        if (now[static_cast<size_t>(gap)] != values_[static_cast<size_t>(gap)]) return false;
    return true;
  }

 private:
  int64_t item() const { return static_cast<int64_t>(item_bytes(dtype_)); }

  DType dtype_;
  int64_t rows_, columns_, ld_;
  Memory memory_;
  Values values_;
};

inline double gelu_tanh(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
inline double gelu_tanh_slope(double x) {
  const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  const double du = std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
  const double t = std::tanh(u);
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du;
}

struct Case {
  int64_t m = 0, n = 0, k = 0;
  DType dtype = DType::kFloat32;
  DType out_dtype = DType::kFloat32;
  GemmEpilogue epilogue = GemmEpilogue::kNone;
  bool a_is_transposed = false, b_is_transposed = false;
  bool accumulates = false, allows_tf32 = false;
  int64_t pad = 0;    ///< gaps between rows, in values
  int64_t shift = 0;  ///< how far from alignment a matrix begins, in values
  int shifted = 7;    ///< which: 1 for A, 2 for B, 4 for C, added
  int sm_target = 0;
  double gelu_error = 0;  ///< of the library's tanh, relative to 1
};

inline std::string text_of(const Case& c) {
  return concat(tp_native::name(c.dtype), " into ", tp_native::name(c.out_dtype), " [", c.m, ", ",
                c.n, ", ", c.k, "], epilogue ", kernels::name(c.epilogue), ", transposed ",
                c.a_is_transposed, c.b_is_transposed, ", accumulates ", c.accumulates, ", pad ",
                c.pad, ", shift ", c.shift);
}

/// Operands, outputs and what the outputs must be.
class Trial {
 public:
  Trial(const Case& c, cuda::StreamHandle stream, unsigned seed = 1)
      : case_(c),
        stream_(stream),
        a_(c.dtype, c.a_is_transposed ? c.k : c.m, c.a_is_transposed ? c.m : c.k, c.pad,
           shift_of(c, 1), seed, stream),
        b_(c.dtype, c.b_is_transposed ? c.n : c.k, c.b_is_transposed ? c.k : c.n, c.pad,
           shift_of(c, 2), seed + 1, stream),
        c_(c.out_dtype, c.m, c.n, c.pad, shift_of(c, 4), seed + 2, stream),
        bias_(c.out_dtype, 1, c.n, 0, 0, seed + 3, stream),
        bias_grad_(c.out_dtype, 1, std::max(c.m, c.n), 0, 0, seed + 4, stream),
        argument_(c.out_dtype, c.m, c.n, aux_ld(GemmEpilogue::kDGeluTanh, c.n) - c.n, 0, seed + 5,
                  stream),
        mask_(std::max<int64_t>(16, mask_bytes(c))) {
    gemm_.m = c.m;
    gemm_.n = c.n;
    gemm_.k = c.k;
    gemm_.dtype = c.dtype;
    gemm_.out_dtype = c.out_dtype;
    gemm_.a = {a_.data(), a_.ld(), c.a_is_transposed};
    gemm_.b = {b_.data(), b_.ld(), c.b_is_transposed};
    gemm_.c = c_.data();
    gemm_.ldc = c_.ld();
    gemm_.accumulates = c.accumulates;
    gemm_.epilogue = c.epilogue;
    gemm_.allows_tf32 = c.allows_tf32;
    gemm_.sm_target = c.sm_target;
    if (has_bias(c.epilogue)) gemm_.bias = bias_.data();
    if (has_bias_grad(c.epilogue)) gemm_.bias_grad = bias_grad_.data();
    if (has_aux(c.epilogue)) {
      gemm_.aux = is_masked() ? mask_.data() : argument_.data();
      gemm_.aux_ld = aux_ld(c.epilogue, c.n);
    }
    if (is_masked() && c.m > 0 && c.n > 0) draw_mask(seed);
  }

  ~Trial() { (void)cuda::driver().StreamSynchronize(stream_); }  // whatever may still read it
  Trial(const Trial&) = delete;
  Trial& operator=(const Trial&) = delete;

  const Gemm& gemm() const { return gemm_; }
  Gemm& gemm() { return gemm_; }

  GemmPlan run() {
    const GemmPlan plan = kernels::gemm(gemm_, stream_);
    compare(plan);
    return plan;
  }

  /// C as it is now, gaps included.
  std::vector<char> c_bytes() const { return c_.bytes(stream_); }
  /// All that a product may write.
  std::vector<char> outputs() const {
    std::vector<char> all = c_bytes();
    for (const std::vector<char>& more :
         {argument_.bytes(stream_), bias_grad_.bytes(stream_), mask_.read(stream_)})
      all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  void spoil_c() const { c_.spoil(stream_); }

  /// The outputs against float64; of an unfused plan, against the plain product.
  void compare(const GemmPlan& plan) const {
    const Case& c = case_;
    const bool is_fused = plan.is_fused;
    const Values now = c_.read(stream_);
    const Values aux = argument_.read(stream_);
    if (!c_.has_kept_its_gaps(now)) fail("wrote between the rows of C");
    Values column_sums(static_cast<size_t>(c.n)), column_bounds(static_cast<size_t>(c.n));
    const double in_error = c.allows_tf32 ? 0x1p-10 : 0;
    const double sum_error = c.dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
    for (int64_t i = 0; i < c.m; ++i) {
      for (int64_t j = 0; j < c.n; ++j) {
        double sum = c.accumulates ? c_.at(i, j) : 0;
        double size = std::abs(sum);
        for (int64_t l = 0; l < c.k; ++l) {
          const double term = a(i, l) * b(l, j);
          sum += term;
          size += std::abs(term);
        }
        const double bound = (sum_error * static_cast<double>(c.k + 8) + in_error) * size + 1e-300;
        const double expected = is_fused ? finish(sum, i, j) : sum;
        const double limit = 2 * bound + 1.01 * rounding(c.out_dtype) * std::abs(expected) +
                             smallest() + activation_error(sum);
        expect("C", i, j, now[static_cast<size_t>(i * c_.ld() + j)], expected, limit);
        column_sums[static_cast<size_t>(j)] += expected;
        column_bounds[static_cast<size_t>(j)] += limit;
        if (is_fused && (c.epilogue == GemmEpilogue::kGeluTanhAux ||
                         c.epilogue == GemmEpilogue::kGeluTanhAuxBias)) {
          const double argument = has_bias(c.epilogue) ? sum + bias_.at(0, j) : sum;
          expect("aux", i, j, aux[static_cast<size_t>(i * gemm_.aux_ld + j)], argument,
                 2 * bound + 1.01 * rounding(c.out_dtype) * std::abs(argument) + smallest());
        }
      }
    }
    if (is_fused && has_bias_grad(c.epilogue)) compare_bias_grad(column_sums, column_bounds);
  }

  bool mask(int64_t i, int64_t j) const {
    return mask_values_[static_cast<size_t>(i * case_.n + j)];
  }

 private:
  static int64_t shift_of(const Case& c, int which) { return c.shifted & which ? c.shift : 0; }
  static int64_t mask_bytes(const Case& c) {
    return aux_bytes(GemmEpilogue::kDRelu, c.out_dtype, c.m, aux_ld(GemmEpilogue::kDRelu, c.n));
  }
  bool is_masked() const {
    const GemmEpilogue e = case_.epilogue;
    return e == GemmEpilogue::kReluAux || e == GemmEpilogue::kReluAuxBias ||
           e == GemmEpilogue::kDRelu || e == GemmEpilogue::kDReluBiasGrad;
  }
  double a(int64_t i, int64_t l) const { return case_.a_is_transposed ? a_.at(l, i) : a_.at(i, l); }
  double b(int64_t l, int64_t j) const { return case_.b_is_transposed ? b_.at(j, l) : b_.at(l, j); }
  double smallest() const { return case_.out_dtype == DType::kFloat16 ? 0x1p-24 : 1e-38; }

  /// A mask as cuBLASLt writes it: that of another product of the same shape.
  void draw_mask(unsigned seed) {
    Gemm forward = gemm_;
    const Matrix x(case_.dtype, case_.m, 16, 0, 0, seed + 10, stream_);
    const Matrix w(case_.dtype, case_.n, 16, 0, 0, seed + 11, stream_);
    const Matrix y(case_.out_dtype, case_.m, case_.n, 0, 0, seed + 12, stream_);
    forward.k = 16;
    forward.a = {x.data(), x.ld(), false};
    forward.b = {w.data(), w.ld(), true};
    forward.c = y.data();
    forward.ldc = y.ld();
    forward.accumulates = false;
    forward.epilogue = GemmEpilogue::kReluAux;
    has_mask_ = kernels::gemm(forward, stream_).is_fused;
    for (const double value : y.read(stream_)) mask_values_.push_back(value > 0);
  }

  double finish(double x, int64_t i, int64_t j) const {
    switch (case_.epilogue) {
      case GemmEpilogue::kBias:
        return x + bias_.at(0, j);
      case GemmEpilogue::kRelu:
      case GemmEpilogue::kReluAux:
        return std::max(x, 0.0);
      case GemmEpilogue::kReluBias:
      case GemmEpilogue::kReluAuxBias:
        return std::max(x + bias_.at(0, j), 0.0);
      case GemmEpilogue::kGeluTanh:
      case GemmEpilogue::kGeluTanhAux:
        return gelu_tanh(x);
      case GemmEpilogue::kGeluTanhBias:
      case GemmEpilogue::kGeluTanhAuxBias:
        return gelu_tanh(x + bias_.at(0, j));
      case GemmEpilogue::kDRelu:
      case GemmEpilogue::kDReluBiasGrad:
        if (!has_mask_) fail("fused the backward of a forward that is not fused");
        return mask(i, j) ? x : 0;
      case GemmEpilogue::kDGeluTanh:
      case GemmEpilogue::kDGeluTanhBiasGrad:
        return x * gelu_tanh_slope(argument_.at(i, j));
      default:
        return x;
    }
  }

  double activation_error(double x) const {
    const GemmEpilogue e = case_.epilogue;
    const bool is_gelu = (e >= GemmEpilogue::kGeluTanh && e <= GemmEpilogue::kGeluTanhAuxBias) ||
                         e == GemmEpilogue::kDGeluTanh || e == GemmEpilogue::kDGeluTanhBiasGrad;
    const double of_sums = case_.dtype == DType::kFloat64 ? 1e-15 : 1e-6;
    return is_gelu ? (case_.gelu_error + of_sums) * (1 + std::abs(x)) : 0;
  }

  void compare_bias_grad(const Values& column_sums, const Values& column_bounds) const {
    const Case& c = case_;
    const Values now = bias_grad_.read(stream_);
    const bool is_of_a = c.epilogue == GemmEpilogue::kBiasGradA;
    const bool is_of_b = c.epilogue == GemmEpilogue::kBiasGradB;
    for (int64_t j = 0; j < (is_of_a ? c.m : c.n); ++j) {
      double sum = is_of_a || is_of_b ? 0 : column_sums[static_cast<size_t>(j)];
      double bound = is_of_a || is_of_b ? 0 : column_bounds[static_cast<size_t>(j)];
      for (int64_t l = 0; l < c.k && (is_of_a || is_of_b); ++l) {
        const double term = is_of_a ? a(j, l) : b(l, j);
        sum += term;
        bound += 0x1p-20 * std::abs(term);
      }
      expect("bias_grad", 0, j, now[static_cast<size_t>(j)], sum,
             bound + 2 * rounding(c.out_dtype) * std::abs(sum) + smallest());
    }
  }

  void expect(const char* what, int64_t i, int64_t j, double got, double expected,
              double limit) const {
    if (!(std::abs(got - expected) <= limit)) {
      fail(concat(what, "[", i, ", ", j, "] is ", got, ", expected ", expected, " within ", limit));
    }
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(concat(text_of(case_), ": ", what));
  }

  Case case_;
  cuda::StreamHandle stream_;
  Matrix a_, b_, c_, bias_, bias_grad_, argument_;
  Memory mask_;
  std::vector<bool> mask_values_;
  bool has_mask_ = false;
  Gemm gemm_;
};

/// A case with each operand as it is and transposed, with and without gaps and an old C.
inline std::vector<Case> layouts_of(Case c) {
  std::vector<Case> all;
  for (const int transposed : {0, 1, 2, 3}) {
    for (const int64_t pad : {0, 5, 8}) {
      for (const bool accumulates : {false, true}) {
        c.a_is_transposed = transposed & 1;
        c.b_is_transposed = transposed & 2;
        c.pad = pad;
        c.accumulates = accumulates;
        all.push_back(c);
      }
    }
  }
  return all;
}

/// A thread per case, on `streams` in turn; each enqueues its product `repeats` times and checks
/// it, `rounds` times over. Throws what the first one found.
inline void run_threads(const cuda::Device& device, const std::vector<Case>& cases,
                        const std::vector<cuda::StreamHandle>& streams, int rounds, int repeats) {
  std::vector<std::thread> threads;
  std::vector<std::string> errors(cases.size());
  for (size_t t = 0; t < cases.size(); ++t) {
    threads.emplace_back([&, t] {
      try {
        const cuda::Current current(device);
        const cuda::StreamHandle stream = streams[t % streams.size()];
        Trial trial(cases[t], stream, static_cast<unsigned>(100 * t));
        for (int round = 0; round < rounds; ++round) {
          for (int i = 0; i < repeats; ++i) (void)kernels::gemm(trial.gemm(), stream);
          (void)trial.run();
        }
      } catch (const std::exception& error) {
        errors[t] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors)
    if (!error.empty()) throw std::runtime_error(error);
}

constexpr GemmEpilogue kEpilogues[] = {
    GemmEpilogue::kNone,        GemmEpilogue::kBias,
    GemmEpilogue::kRelu,        GemmEpilogue::kReluBias,
    GemmEpilogue::kReluAux,     GemmEpilogue::kReluAuxBias,
    GemmEpilogue::kGeluTanh,    GemmEpilogue::kGeluTanhBias,
    GemmEpilogue::kGeluTanhAux, GemmEpilogue::kGeluTanhAuxBias,
    GemmEpilogue::kDRelu,       GemmEpilogue::kDReluBiasGrad,
    GemmEpilogue::kDGeluTanh,   GemmEpilogue::kDGeluTanhBiasGrad,
    GemmEpilogue::kBiasGradA,   GemmEpilogue::kBiasGradB,
};
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

}  // namespace gemm_cases
