// SPDX-License-Identifier: Apache-2.0
// A linear layer's matrix products on a GPU: torch's tensors as cuBLASLt takes them, and how rows
// are cut for a collective. What is run and what is tuned are the same products.
#pragma once

#include <algorithm>
#include <memory>
#include <string_view>

#include "kernels/gemm.h"
#include "ops/layer_checks.h"
#include "overlap/pipeline.h"

namespace tp_native::ops {

inline cuda::StreamHandle handle_of(const comm::Stream& stream) {
  return static_cast<cuda::StreamHandle>(stream.handle);
}

/// What a process keeps for each of its GPUs.
struct Gpu {
  explicit Gpu(int index);
  cuda::Device device;
  int multiprocessors;
  overlap::Pipeline pipeline;
};
Gpu& gpu_of(int index);

/// How a product of `pattern` is cut; planned once for each shape. `rows`, `columns` and `inner`
/// are those of a rank's GEMM, the largest of all ranks', so that all cut alike. `token_sizes`:
/// each rank's rows, not for kGemmAllReduce.
std::shared_ptr<const overlap::Schedule> schedule_of(const Gpu& gpu, overlap::Pattern pattern,
                                                     int64_t rows, int64_t columns, int64_t inner,
                                                     DType dtype, int ranks,
                                                     at::IntArrayRef token_sizes,
                                                     double beside_flop);

/// Of a row-parallel product whose inner dimension is cut by `sizes`.
inline auto all_reduce_schedule(const Gpu& gpu, const Partial& p, at::IntArrayRef sizes,
                                DType dtype, double beside_flop) {
  return schedule_of(gpu, overlap::Pattern::kGemmAllReduce, p.rows, p.columns,
                     *std::ranges::max_element(sizes), dtype, static_cast<int>(sizes.size()), {},
                     beside_flop);
}
/// What dW beside the sum of dx takes: the largest share of all ranks, which must cut alike.
inline double weight_gradient_flop(const Partial& p, at::IntArrayRef sizes) {
  return 2.0 * static_cast<double>(p.rows) * static_cast<double>(p.columns) *
         static_cast<double>(*std::ranges::max_element(sizes));
}

/// A matrix whose rows or columns are runs of memory, as a GEMM takes it.
struct Matrix {
  explicit Matrix(const Tensor& t);
  const char* row(int64_t i) const {
    return static_cast<const char*>(tensor.const_data_ptr()) +
           i * (is_transposed ? 1 : ld) * tensor.element_size();
  }
  Tensor tensor;
  bool is_transposed = false;
  int64_t ld = 1;
};

/// y = f(x w^T + bias), row by row.
class Linear {
 public:
  Linear(const Tensor& x, const Tensor& weight, const Tensor& bias, kernels::GemmEpilogue epilogue);

  /// Rows [first, first + rows) of x into the same rows of `out`, which is [..., columns],
  /// contiguous.
  void run(const Tensor& out, int64_t first, int64_t rows, cuda::StreamHandle stream) const {
    run(out, first, first, rows, stream);
  }
  /// Into rows [to, to + rows) of `out`.
  void run(const Tensor& out, int64_t to, int64_t first, int64_t rows,
           cuda::StreamHandle stream) const;
  kernels::Gemm product(const Tensor& out, int64_t to, int64_t first, int64_t rows) const;

 private:
  void finish(Tensor y) const;

  Matrix x_;
  Matrix weight_;
  Tensor bias_;
  kernels::GemmEpilogue epilogue_;
  DType dtype_;
};

/// dw = dy^T x, and db, the sum of dy's rows, where it has values and the plan is fused.
kernels::Gemm weight_gradient(const Matrix& dy, const Matrix& x, const Tensor& dw,
                              const Tensor& db);

/// Of "relu" or "gelu_tanh".
kernels::GemmEpilogue epilogue_of(std::string_view activation, bool has_bias);

}  // namespace tp_native::ops
