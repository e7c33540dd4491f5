// SPDX-License-Identifier: Apache-2.0
#include "ops/layer_checks.h"

namespace tp_native::ops {
namespace {

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

}  // namespace

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

void check_add_rms_norm(const char* op, const Tensor& x, const Tensor& residual,
                        const Tensor& norm_weight, const Partial& p) {
  TORCH_CHECK_VALUE(residual.sizes().equals(p.shape), op, ": residual of shape ",
                    text_of(residual.sizes()), ": expected ", text_of(p.shape));
  TORCH_CHECK_VALUE(norm_weight.dim() == 1 && norm_weight.size(0) == p.columns, op,
                    ": norm_weight of shape ", text_of(norm_weight.sizes()), ": expected [",
                    p.columns, "]");
  TORCH_CHECK_TYPE(
      residual.scalar_type() == x.scalar_type() && norm_weight.scalar_type() == x.scalar_type(), op,
      ": input, residual and norm_weight are ", x.scalar_type(), ", ", residual.scalar_type(),
      " and ", norm_weight.scalar_type(), ": expected one dtype");
}

void check_column_parallel(const char* op, const Tensor& x, const Tensor& weight,
                           const OptionalTensor& bias, at::IntArrayRef sizes,
                           const comm::Identity& self) {
  check_linear(op, x, weight, bias);
  check_sizes(op, sizes, self);
  TORCH_CHECK_VALUE(weight.size(0) == sizes[self.rank], op, ": the weight has ", weight.size(0),
                    " rows, expected ", sizes[self.rank], ", rank ", self.rank,
                    "'s share of the partition ", text_of(sizes));
  TORCH_CHECK_VALUE(
      x.size(-1) == weight.size(1), op, ": the input's last dimension is ", x.size(-1),
      ", expected ", weight.size(1),
      ": ColumnParallelLinear splits out_features and takes the whole in_features on every "
      "rank; RowParallelLinear is the one that takes a sharded input");
}

void check_vocab_parallel(const char* op, const Tensor& ids, const Tensor& weight,
                          at::IntArrayRef sizes, int64_t rank, const comm::Identity& self) {
  check_rank(op, rank, self);
  check_sizes(op, sizes, self);
  check_device(op, ids, weight);
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, op,
                   ": ids are ", ids.scalar_type(), ": expected int64 or int32");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == sizes[self.rank], op,
                    ": weight of shape ", text_of(weight.sizes()), " on rank ", self.rank,
                    ": expected [", sizes[self.rank], ", embedding_dim] by the partition ",
                    text_of(sizes));
}

void check_cross_entropy(const char* op, const Tensor& logits, const Tensor& target,
                         at::IntArrayRef sizes, int64_t rank, const comm::Identity& self) {
  check_rank(op, rank, self);
  if (!sizes.empty()) check_sizes(op, sizes, self);
  TORCH_CHECK_TYPE(logits.is_floating_point(), op, ": the logits are ", logits.scalar_type(),
                   ": expected a floating dtype");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong || target.scalar_type() == at::kInt, op,
                   ": the target is ", target.scalar_type(), ": expected int64 or int32");
  TORCH_CHECK_VALUE(logits.device() == target.device(), op, ": the logits are on ", logits.device(),
                    ", the target on ", target.device());
  TORCH_CHECK_VALUE(
      logits.dim() >= 1 && target.sizes().equals(logits.sizes().slice(0, logits.dim() - 1)), op,
      ": logits of shape ", text_of(logits.sizes()), " and target of shape ",
      text_of(target.sizes()), ": expected (..., local_vocab) and (...)");
}

std::vector<int64_t> TokenCut::rows(at::IntArrayRef sizes) const {
  std::vector<int64_t> rows;
  for (const int64_t n : sizes) rows.push_back(n * outer * inner);
  return rows;
}

TokenCut check_tokens(const char* op, const Tensor& t, int64_t dim, at::IntArrayRef sizes,
                      bool is_local, int64_t rank, const comm::Identity& self) {
  check_rank(op, rank, self);
  check_sizes(op, sizes, self);
  const int64_t wrapped = dim < 0 ? dim + t.dim() : dim;
  TORCH_CHECK_INDEX(wrapped >= 0 && wrapped < t.dim() - 1, op, ": dim ", dim,
                    " does not count tokens of an input of shape ", text_of(t.sizes()),
                    ": expected one before the last");
  const int64_t tokens = c10::sum_integers(sizes);
  const int64_t expected = is_local ? sizes[self.rank] : tokens;
  TORCH_CHECK_VALUE(t.size(wrapped) == expected, op, ": dimension ", wrapped, " is ",
                    t.size(wrapped), " on rank ", self.rank, ", expected ", expected, ", ",
                    is_local ? "its share of the tokens " : "the sum of the tokens ",
                    text_of(sizes));
  const auto product = [&](int64_t from, int64_t to) {
    return c10::multiply_integers(t.sizes().begin() + from, t.sizes().begin() + to);
  };
  return {wrapped, product(0, wrapped), product(wrapped + 1, t.dim() - 1), tokens,
          sizes[self.rank]};
}

void check_fused_activation(const char* op, std::string_view activation) {
  TORCH_CHECK_VALUE(activation == "relu" || activation == "gelu_tanh", op, ": activation \"",
                    activation,
                    "\": expected \"relu\" or \"gelu_tanh\"; others follow the layer on their own");
}

kernels::Activation check_glu(const Tensor& gate_up, std::string_view activation) {
  TORCH_CHECK_VALUE(gate_up.dim() >= 1 && gate_up.size(-1) % 2 == 0, "glu: input of shape ",
                    text_of(gate_up.sizes()),
                    ": expected (..., 2 * width), the gate's values and then the other ones");
  TORCH_CHECK_TYPE(gate_up.is_floating_point(), "glu: the input is ", gate_up.scalar_type(),
                   ": expected a floating dtype");
  if (activation == "silu") return kernels::Activation::kSilu;
  if (activation == "gelu") return kernels::Activation::kGeluErf;
  if (activation == "gelu_tanh") return kernels::Activation::kGeluTanh;
  C10_THROW_ERROR(ValueError, c10::str("glu: activation \"", activation,
                                       "\": expected \"silu\", \"gelu\" or \"gelu_tanh\""));
}

}  // namespace tp_native::ops
