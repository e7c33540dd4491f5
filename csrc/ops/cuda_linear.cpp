// SPDX-License-Identifier: Apache-2.0
#include "ops/cuda_linear.h"

#include <ATen/Context.h>
#include <ATen/ops/gelu.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

namespace tp_native::ops {

using kernels::GemmEpilogue;

Gpu::Gpu(int index) : device(index), multiprocessors(device.multiprocessors()), pipeline(device) {}

Gpu& gpu_of(int index) {
  static std::mutex mutex;
  static auto* const all = new std::map<int, std::unique_ptr<Gpu>>;  // streams outlive static ends
  std::lock_guard lock(mutex);
  auto& gpu = (*all)[index];
  if (!gpu) gpu = std::make_unique<Gpu>(index);
  return *gpu;
}

std::shared_ptr<const overlap::Schedule> schedule_of(const Gpu& gpu, overlap::Pattern pattern,
                                                     int64_t rows, int64_t columns, int64_t inner,
                                                     DType dtype, int ranks,
                                                     at::IntArrayRef token_sizes,
                                                     double beside_flop) {
  const auto key = std::tuple(pattern, rows, columns, inner, dtype, ranks, token_sizes.vec(),
                              beside_flop, gpu.multiprocessors);
  static std::mutex mutex;
  static std::map<std::decay_t<decltype(key)>, std::shared_ptr<const overlap::Schedule>> known;
  std::lock_guard lock(mutex);
  auto& schedule = known[key];
  if (!schedule) {
    overlap::Problem problem;
    problem.pattern = pattern;
    problem.rows = rows;
    problem.columns = columns;
    problem.inner = inner;
    problem.dtype = dtype;
    problem.ranks = ranks;
    problem.sizes = token_sizes.vec();
    problem.multiprocessors = gpu.multiprocessors;
    problem.beside_flop = beside_flop;
    problem.tile = overlap::default_tile(dtype);
    schedule =
        std::make_shared<overlap::Schedule>(overlap::plan(problem, overlap::default_costs(dtype)));
  }
  return schedule;
}

Matrix::Matrix(const Tensor& t) : tensor(t) {
  const auto fits = [&](int run, int other) {
    return tensor.stride(run) == 1 &&
           tensor.stride(other) >= std::max<int64_t>(1, tensor.size(run));
  };
  is_transposed = !fits(1, 0) && fits(0, 1);
  if (!is_transposed && !fits(1, 0)) tensor = tensor.contiguous();
  ld = std::max<int64_t>(1, tensor.stride(is_transposed ? 1 : 0));
}

Linear::Linear(const Tensor& x, const Tensor& weight, const Tensor& bias, GemmEpilogue epilogue)
    : x_(x), weight_(weight), bias_(bias), epilogue_(epilogue), dtype_(dtype_of(x)) {
  TORCH_CHECK_TYPE(dtype_ == DType::kFloat32 || dtype_ == DType::kFloat64 ||
                       dtype_ == DType::kFloat16 || dtype_ == DType::kBFloat16,
                   "linear layers on a GPU: ", x.scalar_type(),
                   ": expected float32, float64, float16 or bfloat16");
}

kernels::Gemm Linear::product(const Tensor& out, int64_t to, int64_t first, int64_t rows) const {
  const int64_t columns = weight_.tensor.size(0);
  kernels::Gemm product;
  product.m = rows;
  product.n = columns;
  product.k = x_.tensor.size(1);
  product.dtype = product.out_dtype = dtype_;
  product.a = {x_.row(first), x_.ld, x_.is_transposed};
  product.b = {weight_.row(0), weight_.ld, !weight_.is_transposed};  // [n, k]
  product.c = static_cast<char*>(out.mutable_data_ptr()) +
              to * columns * static_cast<int64_t>(item_bytes(dtype_));
  product.ldc = columns;
  product.epilogue = epilogue_;
  product.bias = bias_.defined() ? bias_.const_data_ptr() : nullptr;
  product.allows_tf32 = at::globalContext().allowTF32CuBLAS();
  return product;
}

void Linear::run(const Tensor& out, int64_t to, int64_t first, int64_t rows,
                 cuda::StreamHandle stream) const {
  const kernels::GemmPlan plan = kernels::gemm(product(out, to, first, rows), stream);
  if (!plan.is_fused) finish(out.view({-1, weight_.tensor.size(0)}).narrow(0, to, rows));
}

/// What cuBLASLt would not take, on torch's current stream, which is the GEMM's.
void Linear::finish(Tensor y) const {
  if (bias_.defined()) y.add_(bias_);
  if (epilogue_ == GemmEpilogue::kRelu || epilogue_ == GemmEpilogue::kReluBias) y.relu_();
  if (epilogue_ == GemmEpilogue::kGeluTanh || epilogue_ == GemmEpilogue::kGeluTanhBias)
    at::gelu_(y, "tanh");
}

kernels::Gemm weight_gradient(const Matrix& dy, const Matrix& x, const Tensor& dw,
                              const Tensor& db) {
  const bool has_bias = db.numel() > 0;
  kernels::Gemm product;
  product.m = dw.size(0);
  product.n = dw.size(1);
  product.k = dy.tensor.size(0);
  product.dtype = product.out_dtype = dtype_of(dw);
  product.a = {dy.row(0), dy.ld, !dy.is_transposed};  // dy^T
  product.b = {x.row(0), x.ld, x.is_transposed};
  product.c = dw.mutable_data_ptr();
  product.ldc = dw.size(1);
  product.epilogue = has_bias ? GemmEpilogue::kBiasGradA : GemmEpilogue::kNone;
  product.bias_grad = has_bias ? db.mutable_data_ptr() : nullptr;
  product.allows_tf32 = at::globalContext().allowTF32CuBLAS();
  return product;
}

GemmEpilogue epilogue_of(std::string_view activation, bool has_bias) {
  if (activation == "relu") return has_bias ? GemmEpilogue::kReluBias : GemmEpilogue::kRelu;
  return has_bias ? GemmEpilogue::kGeluTanhBias : GemmEpilogue::kGeluTanh;
}

}  // namespace tp_native::ops
