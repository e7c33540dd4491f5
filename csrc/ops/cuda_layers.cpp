// SPDX-License-Identifier: Apache-2.0
// The sharded layers on CUDA tensors: cuBLASLt's GEMM with its epilogue, rows cut so that one
// chunk's collective runs under the next chunk's GEMM. Every op forks and joins inside itself.
#include <ATen/Context.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <map>
#include <memory>
#include <mutex>

#include "kernels/cuda.h"
#include "kernels/gemm.h"
#include "ops/layer_checks.h"
#include "overlap/pipeline.h"

namespace tp_native::ops {
namespace {

using comm::OpCode;
using comm::Signature;
using kernels::GemmEpilogue;

cuda::StreamHandle handle_of(const comm::Stream& stream) {
  return static_cast<cuda::StreamHandle>(stream.handle);
}

/// What a process keeps for each of its GPUs.
struct Gpu {
  explicit Gpu(int index)
      : device(index), multiprocessors(device.multiprocessors()), pipeline(device) {}
  cuda::Device device;
  int multiprocessors;
  overlap::Pipeline pipeline;
};

Gpu& gpu_of(int index) {
  static std::mutex mutex;
  static auto* const all = new std::map<int, std::unique_ptr<Gpu>>;  // streams outlive static ends
  std::lock_guard lock(mutex);
  auto& gpu = (*all)[index];
  if (!gpu) gpu = std::make_unique<Gpu>(index);
  return *gpu;
}

/// How a row-parallel product is cut. Planned once for each shape.
std::shared_ptr<const overlap::Schedule> schedule_of(const Partial& p, at::IntArrayRef sizes,
                                                     DType dtype, double beside_flop,
                                                     const Gpu& gpu) {
  const auto key =
      std::tuple(p.rows, p.columns, sizes.vec(), dtype, beside_flop, gpu.multiprocessors);
  static std::mutex mutex;
  static std::map<std::decay_t<decltype(key)>, std::shared_ptr<const overlap::Schedule>> known;
  std::lock_guard lock(mutex);
  auto& schedule = known[key];
  if (!schedule) {
    overlap::Problem problem;
    problem.pattern = overlap::Pattern::kGemmAllReduce;
    problem.rows = p.rows;
    problem.columns = p.columns;
    problem.inner = *std::ranges::max_element(sizes);  // of all ranks: all cut alike
    problem.dtype = dtype;
    problem.ranks = static_cast<int>(sizes.size());
    problem.multiprocessors = gpu.multiprocessors;
    problem.beside_flop = beside_flop;
    problem.tile = overlap::default_tile(dtype);
    schedule =
        std::make_shared<overlap::Schedule>(overlap::plan(problem, overlap::default_costs(dtype)));
  }
  return schedule;
}

/// A matrix whose rows or columns are runs of memory, as a GEMM takes it.
struct Matrix {
  explicit Matrix(const Tensor& t) : tensor(t) {
    const auto fits = [&](int run, int other) {
      return tensor.stride(run) == 1 &&
             tensor.stride(other) >= std::max<int64_t>(1, tensor.size(run));
    };
    is_transposed = !fits(1, 0) && fits(0, 1);
    if (!is_transposed && !fits(1, 0)) tensor = tensor.contiguous();
    ld = std::max<int64_t>(1, tensor.stride(is_transposed ? 1 : 0));
  }
  const char* row(int64_t i) const {
    return static_cast<const char*>(tensor.const_data_ptr()) +
           i * (is_transposed ? 1 : ld) * tensor.element_size();
  }
  Tensor tensor;
  bool is_transposed = false;
  int64_t ld = 1;
};

bool is_gemm_type(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kFloat16 ||
         dtype == DType::kBFloat16;
}

/// y = f(x w^T + bias), row by row.
class Linear {
 public:
  Linear(const Tensor& x, const Tensor& weight, const Tensor& bias, GemmEpilogue epilogue)
      : x_(x), weight_(weight), bias_(bias), epilogue_(epilogue), dtype_(dtype_of(x)) {
    TORCH_CHECK_TYPE(is_gemm_type(dtype_), "linear layers on a GPU: ", x.scalar_type(),
                     ": expected float32, float64, float16 or bfloat16");
  }

  /// Rows [first, first + rows) of x into `out`, which is [rows of x, columns], contiguous.
  void run(const Tensor& out, int64_t first, int64_t rows, cuda::StreamHandle stream) const {
    const int64_t columns = weight_.tensor.size(0);
    auto* const to = static_cast<char*>(out.mutable_data_ptr()) +
                     first * columns * static_cast<int64_t>(item_bytes(dtype_));
    kernels::Gemm product;
    product.m = rows;
    product.n = columns;
    product.k = x_.tensor.size(1);
    product.dtype = product.out_dtype = dtype_;
    product.a = {x_.row(first), x_.ld, x_.is_transposed};
    product.b = {weight_.row(0), weight_.ld, !weight_.is_transposed};  // [n, k]
    product.c = to;
    product.ldc = columns;
    product.epilogue = epilogue_;
    product.bias = bias_.defined() ? bias_.const_data_ptr() : nullptr;
    product.allows_tf32 = at::globalContext().allowTF32CuBLAS();
    const kernels::GemmPlan plan = kernels::gemm(product, stream);
    if (!plan.is_fused) finish(out.view({-1, columns}).narrow(0, first, rows));
  }

 private:
  /// What cuBLASLt would not take, on torch's current stream, which is the GEMM's.
  void finish(Tensor y) const {
    if (bias_.defined()) y.add_(bias_);
    if (epilogue_ == GemmEpilogue::kRelu || epilogue_ == GemmEpilogue::kReluBias) y.relu_();
    if (epilogue_ == GemmEpilogue::kGeluTanh || epilogue_ == GemmEpilogue::kGeluTanhBias)
      at::gelu_(y, "tanh");
  }

  Matrix x_;
  Matrix weight_;
  Tensor bias_;
  GemmEpilogue epilogue_;
  DType dtype_;
};

/// The product of this rank's share, summed over the ranks chunk by chunk. The bias rides in rank
/// 0's GEMM: it is in the sum once and costs nothing. `epilogue` is what follows the sum, given for
/// row 0. `beside`: work of the caller's stream that needs none of it, for while the last sums are
/// under way, and how much it is.
struct Beside {
  double flop = 0;
  std::function<void(cuda::StreamHandle)> run = nullptr;
};
void reduce_product(comm::Communicator& communicator, const Signature& whole, const Tensor& x,
                    const Tensor& weight, const OptionalTensor& bias, const Tensor& out,
                    const Partial& p, at::IntArrayRef sizes, const comm::Epilogue& epilogue,
                    const comm::Stream& stream, const Beside& beside = {}) {
  const bool adds_bias = bias && communicator.identity().rank == 0;
  const Linear linear(flat(x), weight, adds_bias ? bias->contiguous() : Tensor(),
                      adds_bias ? GemmEpilogue::kBias : GemmEpilogue::kNone);
  Gpu& gpu = gpu_of(x.device().index());
  const auto schedule = schedule_of(p, sizes, whole.dtype, beside.flop, gpu);
  const auto width = static_cast<int64_t>(item_bytes(whole.dtype)) * p.columns;
  const auto at_row = [&](const void* base, int64_t row) {
    return base ? static_cast<const char*>(base) + row * width : nullptr;
  };
  gpu.pipeline.run(
      *schedule, handle_of(stream),
      {.gemm = [&](const overlap::Chunk& chunk,
                   cuda::StreamHandle on) { linear.run(out, chunk.pieces[0].row, chunk.rows, on); },
       .communicate =
           [&](const overlap::Chunk& chunk, cuda::StreamHandle on) {
             const int64_t row = chunk.pieces[0].row;
             const int64_t shape[] = {chunk.rows, p.columns};
             Signature part = whole;
             part.whole = &whole;
             part.shape = shape;
             comm::Epilogue rest = epilogue;
             rest.residual = at_row(epilogue.residual, row);
             rest.hidden = const_cast<char*>(at_row(epilogue.hidden, row));
             auto* const data = const_cast<char*>(at_row(out.mutable_data_ptr(), row));
             communicator.all_reduce(schedule->chunks.size() == 1 ? whole : part, data, data,
                                     chunk.rows * p.columns, rest, {on});
           },
       .beside = beside.run});
  if (beside.run && beside.flop == 0) beside.run(handle_of(stream));  // no rows: it makes zeros
}

Tensor row_parallel_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const Tensor&, Sizes symbolic, std::string_view group) {
  constexpr const char* kOp = "row_parallel_linear";
  const auto communicator = comm::find_communicator(group);
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  const Partial p = check_row_parallel(kOp, x, weight, bias, sizes, communicator->identity());
  const Placed placed(kOp, x, communicator->identity());
  const Tensor out = at::empty(p.shape, x.options());
  const Signature signature{.op = OpCode::kRowParallelLinear,
                            .dtype = dtype_of(x),
                            .shape = p.shape,
                            .sizes = span_of(sizes)};
  reduce_product(*communicator, signature, x, weight, bias, out, p, sizes, {.columns = p.columns},
                 placed);
  return out;
}

std::tuple<Tensor, Tensor> row_parallel_linear_add_rms_norm(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual,
    const Tensor& norm_weight, double eps, const Tensor&, Sizes symbolic, std::string_view group) {
  constexpr const char* kOp = "row_parallel_linear_add_rms_norm";
  const auto communicator = comm::find_communicator(group);
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  const Partial p = check_row_parallel(kOp, x, weight, bias, sizes, communicator->identity());
  check_add_rms_norm(kOp, x, residual, norm_weight, p);
  const Placed placed(kOp, x, communicator->identity());
  const Tensor normed = at::empty(p.shape, x.options());
  const Tensor hidden = at::empty(p.shape, x.options());
  const Tensor whole_residual = residual.contiguous();
  const Tensor scale = norm_weight.contiguous();
  const Signature signature{.op = OpCode::kRowParallelLinearAddRmsNorm,
                            .dtype = dtype_of(x),
                            .shape = p.shape,
                            .sizes = span_of(sizes)};
  reduce_product(*communicator, signature, x, weight, bias, normed, p, sizes,
                 {.columns = p.columns,
                  .residual = whole_residual.const_data_ptr(),
                  .norm_weight = scale.const_data_ptr(),
                  .eps = eps,
                  .hidden = hidden.mutable_data_ptr()},
                 placed);
  return {normed, hidden};
}

/// The sum of dx runs beside the GEMM of dW, whose epilogue makes db.
std::tuple<Tensor, Tensor, Tensor> column_parallel_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, bool has_bias, const Tensor&,
    Sizes symbolic, std::string_view group) {
  constexpr const char* kOp = "column_parallel_linear_backward";
  const auto communicator = comm::find_communicator(group);
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  const Tensor turned = weight.t();
  const Partial p =
      check_row_parallel(kOp, grad, turned, std::nullopt, sizes, communicator->identity());
  const Placed placed(kOp, grad, communicator->identity());
  const Tensor dx = at::empty(p.shape, grad.options());
  const Tensor dw = at::empty(weight.sizes(), weight.options());
  const Tensor db = at::empty({has_bias ? weight.size(0) : 0}, grad.options());
  const Matrix dy(flat(grad));
  const Matrix input(flat(x));
  const Signature signature{.op = OpCode::kRowParallelLinear,
                            .dtype = dtype_of(grad),
                            .shape = p.shape,
                            .sizes = span_of(sizes)};
  const auto make_dw = [&](cuda::StreamHandle on) {
    kernels::Gemm product;
    product.m = dw.size(0);
    product.n = dw.size(1);
    product.k = p.rows;
    product.dtype = product.out_dtype = signature.dtype;
    product.a = {dy.row(0), dy.ld, !dy.is_transposed};  // dy^T
    product.b = {input.row(0), input.ld, input.is_transposed};
    product.c = dw.mutable_data_ptr();
    product.ldc = dw.size(1);
    product.epilogue = has_bias ? GemmEpilogue::kBiasGradA : GemmEpilogue::kNone;
    product.bias_grad = has_bias ? db.mutable_data_ptr() : nullptr;
    product.allows_tf32 = at::globalContext().allowTF32CuBLAS();
    const kernels::GemmPlan plan = kernels::gemm(product, on);
    if (has_bias && !plan.is_fused) db.copy_(dy.tensor.sum(0));
  };
  // the largest share of all ranks: they must cut alike
  const double flop = 2.0 * static_cast<double>(p.rows) * static_cast<double>(p.columns) *
                      static_cast<double>(*std::ranges::max_element(sizes));
  reduce_product(*communicator, signature, grad, turned, std::nullopt, dx, p, sizes,
                 {.columns = p.columns}, placed, {flop, make_dw});
  return {dx, dw, db};
}

GemmEpilogue epilogue_of(std::string_view activation, bool has_bias) {
  if (activation == "relu") return has_bias ? GemmEpilogue::kReluBias : GemmEpilogue::kRelu;
  return has_bias ? GemmEpilogue::kGeluTanhBias : GemmEpilogue::kGeluTanh;
}

Tensor column_parallel_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                              const Tensor&, Sizes symbolic, std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  check_column_parallel("column_parallel_linear", x, weight, bias,
                        C10_AS_INTARRAYREF_SLOW(symbolic), communicator->identity());
  return at::linear(x, weight, bias);  // torch's has the bias in its epilogue already
}

Tensor column_parallel_linear_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  std::string_view activation, const Tensor&, Sizes symbolic,
                                  std::string_view group) {
  constexpr const char* kOp = "column_parallel_linear_act";
  const auto communicator = comm::find_communicator(group);
  check_column_parallel(kOp, x, weight, bias, C10_AS_INTARRAYREF_SLOW(symbolic),
                        communicator->identity());
  check_fused_activation(kOp, activation);
  const Placed placed(kOp, x, communicator->identity());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  const int64_t rows = c10::multiply_integers(shape.begin(), shape.end() - 1);
  const Tensor out = at::empty(shape, x.options());
  const Linear linear(flat(x), weight, bias ? bias->contiguous() : Tensor(),
                      epilogue_of(activation, bias.has_value()));
  linear.run(out, 0, rows, handle_of(placed));
  return out;
}

/// Rows of other ranks are zero, so the sum over ranks is exact.
Tensor vocab_parallel_embedding(const Tensor& ids, const Tensor& weight, const Tensor&,
                                Sizes symbolic, int64_t, int64_t rank, std::string_view group) {
  constexpr const char* kOp = "vocab_parallel_embedding";
  const auto communicator = comm::find_communicator(group);
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  check_vocab_parallel(kOp, ids, weight, sizes, rank, communicator->identity());
  const Placed placed(kOp, weight, communicator->identity());
  const int64_t first = c10::sum_integers(sizes.begin(), sizes.begin() + rank);
  const int64_t vocabulary = c10::sum_integers(sizes);
  at::_assert_async(ids.ge(0).logical_and(ids.lt(vocabulary)).all(),
                    "vocab_parallel_embedding: an id is outside the vocabulary");
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  Tensor out;
  if (weight.size(0) == 0) {
    out = weight.new_zeros(shape);
  } else {
    const Tensor row = ids.reshape({-1}).sub(first);
    const Tensor is_foreign = row.lt(0).logical_or(row.ge(weight.size(0)));
    out = at::index_select(weight, 0, row.masked_fill(is_foreign, 0))
              .masked_fill_(is_foreign.unsqueeze(1), 0)
              .view(shape);
  }
  const Signature signature{.op = OpCode::kVocabParallelEmbedding,
                            .dtype = dtype_of(weight),
                            .shape = shape,
                            .sizes = span_of(sizes)};
  communicator->all_reduce(signature, out.const_data_ptr(), out.mutable_data_ptr(), out.numel(), {},
                           placed);
  return out;
}

Tensor glu(const Tensor& gate_up, std::string_view activation) {
  const kernels::Activation kind = check_glu(gate_up, activation);
  const c10::DeviceGuard guard(gate_up.device());
  std::vector<int64_t> shape = gate_up.sizes().vec();
  shape.back() /= 2;
  const Tensor out = at::empty(shape, gate_up.options());
  if (out.numel() == 0) return out;
  const Tensor in = gate_up.reshape({-1, gate_up.size(-1)}).contiguous();
  kernels::cuda::glu({.dtype = dtype_of(in),
                      .activation = kind,
                      .gate_up = in.const_data_ptr(),
                      .out = out.mutable_data_ptr(),
                      .rows = in.size(0),
                      .columns = shape.back(),
                      .gate_up_stride = in.size(1),
                      .out_stride = shape.back()},
                     handle_of(stream_of(gate_up)));
  return out;
}

Tensor glu_backward(const Tensor& grad, const Tensor& gate_up, std::string_view activation) {
  const kernels::Activation kind = check_glu(gate_up, activation);
  const c10::DeviceGuard guard(gate_up.device());
  const Tensor out = at::empty(gate_up.sizes(), gate_up.options());
  if (out.numel() == 0) return out;
  const Tensor in = gate_up.reshape({-1, gate_up.size(-1)}).contiguous();
  const Tensor d_out = grad.to(gate_up.scalar_type()).contiguous();
  kernels::cuda::glu_backward({.dtype = dtype_of(in),
                               .activation = kind,
                               .d_out = d_out.const_data_ptr(),
                               .gate_up = in.const_data_ptr(),
                               .d_gate_up = out.mutable_data_ptr(),
                               .rows = in.size(0),
                               .columns = in.size(1) / 2,
                               .d_out_stride = in.size(1) / 2,
                               .gate_up_stride = in.size(1),
                               .d_gate_up_stride = in.size(1)},
                              handle_of(stream_of(gate_up)));
  return out;
}

TORCH_LIBRARY_IMPL(tp_native, CUDA, m) {
  m.impl("row_parallel_linear", &row_parallel_linear);
  m.impl("row_parallel_linear_add_rms_norm", &row_parallel_linear_add_rms_norm);
  m.impl("column_parallel_linear", &column_parallel_linear);
  m.impl("column_parallel_linear_act", &column_parallel_linear_act);
  m.impl("vocab_parallel_embedding", &vocab_parallel_embedding);
  m.impl("column_parallel_linear_backward", &column_parallel_linear_backward);
  m.impl("glu", &glu);
  m.impl("glu_backward", &glu_backward);
}

}  // namespace
}  // namespace tp_native::ops
