// SPDX-License-Identifier: Apache-2.0
// The sharded layers on CPU tensors: torch's GEMM or a gather of rows straight into a shared block,
// then one all-reduce.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include <cstring>

#include "ops/schema.h"
#include "ops/tensors.h"

namespace tp_native::ops {
namespace {

using comm::OpCode;
using comm::Signature;

void check_linear(const char* op, const Tensor& x, const Tensor& weight,
                  const OptionalTensor& bias) {
  check_device(op, x, weight);
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 2, op, ": input of shape ", text_of(x.sizes()),
                    " and weight of shape ", text_of(weight.sizes()),
                    ": expected (..., in_features) and (out_features, in_features)");
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), op, ": the input is ", x.scalar_type(),
                   ", the weight ", weight.scalar_type(),
                   ": convert one, with x.to(weight.dtype) or module.to(x.dtype)");
  TORCH_CHECK_TYPE(!bias || bias->scalar_type() == weight.scalar_type(), op, ": the bias is ",
                   bias->scalar_type(), ", the weight ", weight.scalar_type());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), op,
                    ": bias of shape ", text_of(bias->sizes()), ": expected [", weight.size(0),
                    "]");
}

/// This rank's product of a row-parallel linear, on its way to the sum.
struct Partial {
  std::vector<int64_t> shape;  ///< of the result
  int64_t rows;
  int64_t columns;
};

Partial check_row_parallel(const char* op, const Tensor& x, const Tensor& weight,
                           const OptionalTensor& bias, at::IntArrayRef sizes,
                           const comm::Identity& self) {
  check_linear(op, x, weight, bias);
  check_sizes(op, sizes, self);
  const int64_t width = sizes[self.rank];
  TORCH_CHECK_VALUE(weight.size(1) == width, op, ": the weight has ", weight.size(1),
                    " columns, expected ", width, ", rank ", self.rank,
                    "'s share of the partition ", text_of(sizes));
  TORCH_CHECK_VALUE(x.size(-1) == width, op, ": the input's last dimension is ", x.size(-1),
                    ", expected ", width, ": RowParallelLinear splits in_features, rank ",
                    self.rank, " holds ", width, " of ", c10::sum_integers(sizes), " (",
                    text_of(sizes),
                    "). Pass a sharded input, or input_is_parallel=False for a whole one; "
                    "ColumnParallelLinear is the one "
                    "that takes a whole input and splits out_features");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  const int64_t rows = c10::multiply_integers(shape.begin(), shape.end() - 1);
  return {std::move(shape), rows, weight.size(0)};
}

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
  TORCH_CHECK_VALUE(residual.sizes().equals(p.shape), kOp, ": residual of shape ",
                    text_of(residual.sizes()), ": expected ", text_of(p.shape));
  TORCH_CHECK_VALUE(norm_weight.dim() == 1 && norm_weight.size(0) == p.columns, kOp,
                    ": norm_weight of shape ", text_of(norm_weight.sizes()), ": expected [",
                    p.columns, "]");
  TORCH_CHECK_TYPE(
      residual.scalar_type() == x.scalar_type() && norm_weight.scalar_type() == x.scalar_type(),
      kOp, ": input, residual and norm_weight are ", x.scalar_type(), ", ", residual.scalar_type(),
      " and ", norm_weight.scalar_type(), ": expected one dtype");
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
  const comm::Identity& self = communicator->identity();
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  check_linear(kOp, x, weight, bias);
  check_sizes(kOp, sizes, self);
  TORCH_CHECK_VALUE(weight.size(0) == sizes[self.rank], kOp, ": the weight has ", weight.size(0),
                    " rows, expected ", sizes[self.rank], ", rank ", self.rank,
                    "'s share of the partition ", text_of(sizes));
  TORCH_CHECK_VALUE(
      x.size(-1) == weight.size(1), kOp, ": the input's last dimension is ", x.size(-1),
      ", expected ", weight.size(1),
      ": ColumnParallelLinear splits out_features and takes the whole in_features on every "
      "rank; RowParallelLinear is the one that takes a sharded input");
  return at::linear(x, weight, bias);
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
  check_rank(kOp, rank, self);
  check_sizes(kOp, sizes, self);
  check_device(kOp, ids, weight);
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, kOp,
                   ": ids are ", ids.scalar_type(), ": expected int64 or int32");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == sizes[self.rank], kOp,
                    ": weight of shape ", text_of(weight.sizes()), " on rank ", self.rank,
                    ": expected [", sizes[self.rank], ", embedding_dim] by the partition ",
                    text_of(sizes));
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
  m.impl("vocab_parallel_embedding", &vocab_parallel_embedding);
}

}  // namespace
}  // namespace tp_native::ops
