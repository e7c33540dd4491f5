// SPDX-License-Identifier: Apache-2.0
// The sharded layers on CPU tensors: torch's GEMM or a gather of rows straight into a shared block,
// then one all-reduce.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <torch/library.h>

#include <cstring>

#include "ops/layer_checks.h"
#include "ops/schema.h"
#include "ops/tensors.h"

namespace tp_native::ops {
namespace {

using comm::OpCode;
using comm::Signature;

/// out = x weight^T; no view where there are two dimensions already.
void multiply(const Tensor& x, const Tensor& weight, const Tensor& out, const Partial& p) {
  const bool is_flat = x.dim() == 2;
  Tensor flat_out = is_flat ? out : out.view({p.rows, p.columns});
  at::cpu::mm_out(flat_out, is_flat ? x : x.reshape({p.rows, weight.size(1)}), weight.t());
}

Tensor row_parallel_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const Tensor&, Sizes symbolic, std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  const Partial p =
      check_row_parallel("row_parallel_linear", x, weight, bias, sizes, communicator->identity());
  const Tensor out = empty_shared(*communicator, p.shape, x.options());
  multiply(x, weight, out, p);
  const Tensor whole_bias = bias ? bias->contiguous() : Tensor();
  const Signature signature{.op = OpCode::kRowParallelLinear,
                            .dtype = dtype_of(x),
                            .shape = p.shape,
                            .sizes = span_of(sizes)};
  communicator->all_reduce(
      signature, out.const_data_ptr(), out.mutable_data_ptr(), out.numel(),
      {.bias = bias ? whole_bias.const_data_ptr() : nullptr, .columns = p.columns}, {});
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
  const auto [normed, hidden] = empty_shared_pair(*communicator, p.shape, x.options());
  multiply(x, weight, normed, p);
  const Tensor whole_bias = bias ? bias->contiguous() : Tensor();
  const Tensor whole_residual = residual.contiguous();
  const Tensor scale = norm_weight.contiguous();
  const Signature signature{.op = OpCode::kRowParallelLinearAddRmsNorm,
                            .dtype = dtype_of(x),
                            .shape = p.shape,
                            .sizes = span_of(sizes)};
  communicator->all_reduce(signature, normed.const_data_ptr(), normed.mutable_data_ptr(),
                           normed.numel(),
                           {.bias = bias ? whole_bias.const_data_ptr() : nullptr,
                            .columns = p.columns,
                            .residual = whole_residual.const_data_ptr(),
                            .norm_weight = scale.const_data_ptr(),
                            .eps = eps,
                            .hidden = hidden.mutable_data_ptr()},
                           {});
  return {normed, hidden};
}

Tensor column_parallel_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                              const Tensor&, Sizes symbolic, std::string_view group) {
  constexpr const char* kOp = "column_parallel_linear";
  const auto communicator = comm::find_communicator(group);
  check_column_parallel(kOp, x, weight, bias, C10_AS_INTARRAYREF_SLOW(symbolic),
                        communicator->identity());
  return at::linear(x, weight, bias);
}

Tensor column_parallel_linear_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  std::string_view activation, const Tensor& order, Sizes sizes,
                                  std::string_view group) {
  check_fused_activation("column_parallel_linear_act", activation);
  Tensor y = column_parallel_linear(x, weight, bias, order, sizes, group);
  return activation == "relu" ? y.relu_() : at::gelu_(y, "tanh");
}

/// What a column-parallel linear's gradient sends back: each rank's dx is a partial sum, so it is a
/// row-parallel product with the weight turned around. One after the other: on a CPU the collective
/// has no engine of its own to run on beside a GEMM.
std::tuple<Tensor, Tensor, Tensor> column_parallel_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, bool has_bias, const Tensor& order,
    Sizes sizes, std::string_view group) {
  const Tensor dx = row_parallel_linear(grad, weight.t(), std::nullopt, order, sizes, group);
  return {dx, flat(grad).t().mm(flat(x)), has_bias ? flat(grad).sum(0) : grad.new_empty({0})};
}

/// In float32 where the values are shorter, as the kernel for GPUs does: rounded once.
Tensor activated(const Tensor& gate, std::string_view activation) {
  return activation == "silu" ? at::silu(gate)
                              : at::gelu(gate, activation == "gelu" ? "none" : "tanh");
}

Tensor widened(const Tensor& t) { return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat); }

Tensor glu(const Tensor& gate_up, std::string_view activation) {
  check_glu(gate_up, activation);
  const std::vector<Tensor> parts = widened(gate_up).chunk(2, -1);
  return activated(parts[0], activation).mul_(parts[1]).to(gate_up.scalar_type()).contiguous();
}

Tensor glu_backward(const Tensor& grad, const Tensor& gate_up, std::string_view activation) {
  check_glu(gate_up, activation);
  const std::vector<Tensor> parts = widened(gate_up).chunk(2, -1);
  const Tensor d_out = widened(grad);
  const Tensor d_act = d_out.mul(parts[1]);
  const Tensor d_gate =
      activation == "silu"
          ? at::silu_backward(d_act, parts[0])
          : at::gelu_backward(d_act, parts[0], activation == "gelu" ? "none" : "tanh");
  return at::cat({d_gate, d_out.mul(activated(parts[0], activation))}, -1)
      .to(gate_up.scalar_type());
}

/// Rows of other ranks are zero, so the sum over ranks is exact.
template <class Id>
void gather_rows(const Tensor& ids, const Tensor& weight, const Tensor& out, int64_t first,
                 int64_t vocabulary) {
  const auto row_bytes = static_cast<size_t>(weight.size(1)) * weight.element_size();
  const Id* const id = ids.const_data_ptr<Id>();
  const auto* const from = static_cast<const char*>(weight.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t local = weight.size(0);
  for (int64_t i = 0; i < ids.numel();
       ++i) {  // before anything is written or sent: every rank sees the same ids
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < vocabulary, "vocab_parallel_embedding: id ", id[i],
                      " at position ", i, " is outside the vocabulary: expected 0 to ",
                      vocabulary - 1);
  }
  for (int64_t i = 0; i < ids.numel(); ++i, to += row_bytes) {
    const int64_t row = static_cast<int64_t>(id[i]) - first;
    if (row_bytes == 0) continue;
    if (row >= 0 && row < local) {
      std::memcpy(to, from + static_cast<size_t>(row) * row_bytes, row_bytes);
    } else {
      std::memset(to, 0, row_bytes);
    }
  }
}

Tensor vocab_parallel_embedding(const Tensor& ids, const Tensor& weight, const Tensor&,
                                Sizes symbolic, int64_t, int64_t rank, std::string_view group) {
  constexpr const char* kOp = "vocab_parallel_embedding";
  const auto communicator = comm::find_communicator(group);
  const comm::Identity& self = communicator->identity();
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  check_vocab_parallel(kOp, ids, weight, sizes, rank, self);
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  const Tensor out = empty_shared(*communicator, shape, weight.options());
  const Tensor whole_ids = ids.contiguous();
  const Tensor table = weight.contiguous();
  const int64_t first = c10::sum_integers(sizes.begin(), sizes.begin() + self.rank);
  const int64_t vocabulary = c10::sum_integers(sizes);
  if (ids.scalar_type() == at::kLong) {
    gather_rows<int64_t>(whole_ids, table, out, first, vocabulary);
  } else {
    gather_rows<int32_t>(whole_ids, table, out, first, vocabulary);
  }
  const Signature signature{.op = OpCode::kVocabParallelEmbedding,
                            .dtype = dtype_of(weight),
                            .shape = shape,
                            .sizes = span_of(sizes)};
  communicator->all_reduce(signature, out.const_data_ptr(), out.mutable_data_ptr(), out.numel(), {},
                           {});
  return out;
}

TORCH_LIBRARY_IMPL(tp_native, CPU, m) {
  m.impl("row_parallel_linear", &row_parallel_linear);
  m.impl("row_parallel_linear_add_rms_norm", &row_parallel_linear_add_rms_norm);
  m.impl("column_parallel_linear", &column_parallel_linear);
  m.impl("column_parallel_linear_act", &column_parallel_linear_act);
  m.impl("column_parallel_linear_backward", &column_parallel_linear_backward);
  m.impl("glu", &glu);
  m.impl("glu_backward", &glu_backward);
  m.impl("vocab_parallel_embedding", &vocab_parallel_embedding);
}

}  // namespace
}  // namespace tp_native::ops
