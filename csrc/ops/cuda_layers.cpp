// SPDX-License-Identifier: Apache-2.0
// The sharded layers on CUDA tensors: cuBLASLt's GEMM with its epilogue, rows cut so that one
// chunk's collective runs under the next chunk's GEMM. Every op forks and joins inside itself.
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "kernels/cuda.h"
#include "ops/cuda_linear.h"
#include "ops/layer_checks.h"

namespace tp_native::ops {
namespace {

using comm::OpCode;
using comm::Signature;
using kernels::GemmEpilogue;

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
  const auto schedule = all_reduce_schedule(gpu, p, sizes, whole.dtype, beside.flop);
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
    const kernels::GemmPlan plan = kernels::gemm(weight_gradient(dy, input, dw, db), on);
    if (has_bias && !plan.is_fused) db.copy_(dy.tensor.sum(0));
  };
  reduce_product(*communicator, signature, grad, turned, std::nullopt, dx, p, sizes,
                 {.columns = p.columns}, placed, {weight_gradient_flop(p, sizes), make_dw});
  return {dx, dw, db};
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
