// SPDX-License-Identifier: Apache-2.0
// Gradients of the linear layers between which tokens are cut: each one's backward is the other one
// turned around, one collective each way.
#include <torch/library.h>

#include "ops/autograd_state.h"

namespace tp_native::ops {
namespace {

using torch::autograd::Function;
using torch::autograd::variable_list;

struct Cut {
  std::vector<c10::SymInt> sizes, token_sizes;
  int64_t dim, rank;
};

void save_cut(AutogradContext* ctx, const Cut& cut) {
  ctx->saved_data["sizes"] = c10::IValue(cut.sizes);
  ctx->saved_data["token_sizes"] = c10::IValue(cut.token_sizes);
  ctx->saved_data["dim"] = cut.dim;
  ctx->saved_data["rank"] = cut.rank;
}
Cut cut_of(AutogradContext* ctx) {
  return {ctx->saved_data["sizes"].toSymIntVector(),
          ctx->saved_data["token_sizes"].toSymIntVector(), ctx->saved_data["dim"].toInt(),
          ctx->saved_data["rank"].toInt()};
}

void check_first_order(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), op,
                              " has no second derivative: use all_gather_tensor, "
                              "reduce_scatter_sum and a linear layer, one by one");
}

/// y = this rank's tokens of sum(x W^T) + b. dx and dW need dy of all tokens, and db comes with it.
struct LinearScatterFunction : Function<LinearScatterFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const Tensor& order, Cut cut,
                        std::string group) {
    save_order(ctx, order, group);
    save_cut(ctx, cut);
    ctx->save_for_backward(
        {weight.requires_grad() ? x : Tensor(), x.requires_grad() ? weight : Tensor()});
    ctx->saved_data["has_bias_grad"] = bias.has_value() && bias->requires_grad();
    static const auto kOp = find_op<LinearScatter>("tp_native::row_parallel_linear_scatter");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(x, weight, bias, order, cut.sizes, cut.token_sizes, cut.dim, cut.rank, group);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_first_order("row_parallel_linear_scatter");
    const auto saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const Tensor& weight = saved[1];
    const Cut cut = cut_of(ctx);
    Tensor dx;
    Tensor grad;  // of all tokens
    if (weight.defined()) {
      static const auto kOp = find_op<GatheredLinear>("tp_native::gathered_column_parallel_linear");
      std::tie(dx, grad) = kOp.call(grads[0], weight.t(), std::nullopt, order_of(ctx), cut.sizes,
                                    cut.token_sizes, cut.dim, cut.rank, group_of(ctx));
    } else {
      static const auto kOp = find_op<AllGather>("tp_native::all_gather");
      grad = kOp.call(grads[0], order_of(ctx), cut.token_sizes, cut.dim, "replicated", cut.rank,
                      group_of(ctx));
    }
    const Tensor dw = x.defined() ? flat(grad).t().mm(flat(x)) : Tensor();
    const Tensor db = ctx->saved_data["has_bias_grad"].toBool() ? flat(grad).sum(0) : Tensor();
    return {dx, dw, db, none(), none(), none()};
  }
};

/// y = x W^T + b of all ranks' tokens, and those, which dW needs.
struct GatheredLinearFunction : Function<GatheredLinearFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const OptionalTensor& bias, const Tensor& order, Cut cut,
                               std::string group) {
    save_order(ctx, order, group);
    save_cut(ctx, cut);
    ctx->saved_data["has_bias_grad"] = bias.has_value() && bias->requires_grad();
    static const auto kOp = find_op<GatheredLinear>("tp_native::gathered_column_parallel_linear");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, gathered] =
        kOp.call(x, weight, bias, order, cut.sizes, cut.token_sizes, cut.dim, cut.rank, group);
    ctx->mark_non_differentiable({gathered});
    ctx->save_for_backward(
        {weight.requires_grad() ? gathered : Tensor(), x.requires_grad() ? weight : Tensor()});
    return {y, gathered};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_first_order("gathered_column_parallel_linear");
    const auto saved = ctx->get_saved_variables();
    const Tensor& gathered = saved[0];
    const Tensor& weight = saved[1];
    const Tensor& grad = grads[0];
    const Cut cut = cut_of(ctx);
    Tensor dx;
    if (weight.defined()) {
      static const auto kOp = find_op<LinearScatter>("tp_native::row_parallel_linear_scatter");
      dx = kOp.call(grad, weight.t(), std::nullopt, order_of(ctx), cut.sizes, cut.token_sizes,
                    cut.dim, cut.rank, group_of(ctx));
    }
    const Tensor dw = gathered.defined() ? flat(grad).t().mm(flat(gathered)) : Tensor();
    const Tensor db = ctx->saved_data["has_bias_grad"].toBool() ? flat(grad).sum(0) : Tensor();
    return {dx, dw, db, none(), none(), none()};
  }
};

bool needs_no_grad(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return !needs_grad(x, weight) && !(bias && needs_grad(*bias));
}

Tensor linear_scatter(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const Tensor& order, Sizes in_sizes, Sizes token_sizes, int64_t dim,
                      int64_t rank, std::string_view group) {
  if (needs_no_grad(x, weight, bias)) {
    static const auto kOp = find_op<LinearScatter>("tp_native::row_parallel_linear_scatter");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(x, weight, bias, order, in_sizes, token_sizes, dim, rank, group);
  }
  return LinearScatterFunction::apply(
      x, weight, bias, order,
      Cut{in_sizes.vec(), token_sizes.vec(), dim < 0 ? dim + x.dim() : dim, rank},
      std::string(group));
}

std::tuple<Tensor, Tensor> gathered_linear(const Tensor& x, const Tensor& weight,
                                           const OptionalTensor& bias, const Tensor& order,
                                           Sizes out_sizes, Sizes token_sizes, int64_t dim,
                                           int64_t rank, std::string_view group) {
  if (needs_no_grad(x, weight, bias)) {
    static const auto kOp = find_op<GatheredLinear>("tp_native::gathered_column_parallel_linear");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(x, weight, bias, order, out_sizes, token_sizes, dim, rank, group);
  }
  const variable_list out = GatheredLinearFunction::apply(
      x, weight, bias, order,
      Cut{out_sizes.vec(), token_sizes.vec(), dim < 0 ? dim + x.dim() : dim, rank},
      std::string(group));
  return {out[0], out[1]};
}

TORCH_LIBRARY_IMPL(tp_native, Autograd, m) {
  m.impl("row_parallel_linear_scatter", &linear_scatter);
  m.impl("gathered_column_parallel_linear", &gathered_linear);
}

}  // namespace
}  // namespace tp_native::ops
