// SPDX-License-Identifier: Apache-2.0
// Gradients. Every rank computes the same loss, so cotangents of replicated tensors are replicated
// (DESIGN.md 7). The functions call ops only, never the communicator: compilers trace through them.
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/add_rms_norm.h"
#include "ops/autograd_state.h"
#include "ops/schema.h"
#include "ops/tensors.h"

namespace tp_native::ops {
namespace {

using torch::autograd::Function;
using torch::autograd::variable_list;

/// Where rank `rank`'s part begins. `rank` is an argument of the op, never looked up: a look-up
/// here would be traced into a graph that other ranks find in the compiler's cache.
c10::SymInt offset_of(int64_t rank, const std::vector<c10::SymInt>& sizes) {
  c10::SymInt first = 0;
  for (int64_t r = 0; r < rank; ++r) first = first + sizes.at(r);
  return first;
}

/// The whole gradient of what `forward` cut along "dim" into "sizes".
Tensor gathered(AutogradContext* ctx, const Tensor& grad) {
  static const auto kOp = find_op<AllGather>("tp_native::all_gather");
  return kOp.call(grad, order_of(ctx), ctx->saved_data["sizes"].toSymIntVector(),
                  ctx->saved_data["dim"].toInt(), "replicated", ctx->saved_data["rank"].toInt(),
                  group_of(ctx));
}

struct AllReduceFunction : Function<AllReduceFunction> {
  static Tensor forward(AutogradContext*, const Tensor& t, const Tensor& order, std::string op,
                        std::string group) {
    static const auto kOp = find_op<AllReduce>("tp_native::all_reduce");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(t, order, op, group);
  }
  static variable_list backward(AutogradContext*, variable_list grads) {
    return {grads[0], none(), none(), none()};
  }
};

struct CopyToRanksFunction : Function<CopyToRanksFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& t, const Tensor& order,
                        std::string group) {
    save_order(ctx, order, group);
    static const auto kOp = find_op<CopyToRanks>("tp_native::copy_to_ranks");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(t, order, group);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto kOp = find_op<AllReduce>("tp_native::all_reduce");
    return {kOp.call(grads[0], order_of(ctx), "sum", group_of(ctx)), none(), none()};
  }
};

struct BroadcastFunction : Function<BroadcastFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& t, const Tensor& order, int64_t src,
                        int64_t rank, std::string group) {
    save_order(ctx, order, group);
    ctx->saved_data["is_src"] = rank == src;
    static const auto kOp = find_op<Broadcast>("tp_native::broadcast");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(t, order, src, rank, group);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto kOp = find_op<AllReduce>("tp_native::all_reduce");
    const Tensor sum = kOp.call(grads[0], order_of(ctx), "sum", group_of(ctx));
    return {ctx->saved_data["is_src"].toBool() ? sum : at::zeros_like(sum), none(), none(), none(),
            none()};
  }
};

struct AllGatherFunction : Function<AllGatherFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& t, const Tensor& order,
                        std::vector<c10::SymInt> sizes, int64_t dim, std::string grad, int64_t rank,
                        std::string group) {
    save_order(ctx, order, group);
    dim = dim < 0 ? dim + t.dim() : dim;
    ctx->saved_data["rank"] = rank;
    ctx->saved_data["is_partial"] = grad == "partial";
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["first"] = offset_of(rank, sizes);
    ctx->saved_data["local"] = t.sym_size(dim);
    ctx->saved_data["sizes"] = c10::IValue(sizes);
    static const auto kOp = find_op<AllGather>("tp_native::all_gather");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(t, order, sizes, dim, grad, rank, group);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const int64_t dim = ctx->saved_data["dim"].toInt();
    Tensor grad;
    if (ctx->saved_data["is_partial"].toBool()) {
      static const auto kOp = find_op<ReduceScatter>("tp_native::reduce_scatter");
      const auto sizes = ctx->saved_data["sizes"].toSymIntVector();
      grad = kOp.call(grads[0], order_of(ctx), sizes, dim, "sum", ctx->saved_data["rank"].toInt(),
                      group_of(ctx));
    } else {
      grad = grads[0].narrow_symint(dim, ctx->saved_data["first"].toSymInt(),
                                    ctx->saved_data["local"].toSymInt());
    }
    return {grad, none(), none(), none(), none(), none(), none()};
  }
};

struct ScatterToRanksFunction : Function<ScatterToRanksFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& t, const Tensor& order,
                        std::vector<c10::SymInt> sizes, int64_t dim, int64_t rank,
                        std::string group) {
    save_order(ctx, order, group);
    ctx->saved_data["rank"] = rank;
    ctx->saved_data["dim"] = dim < 0 ? dim + t.dim() : dim;
    ctx->saved_data["sizes"] = c10::IValue(sizes);
    static const auto kOp = find_op<ScatterToRanks>("tp_native::scatter_to_ranks");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(t, order, sizes, dim, rank, group);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {gathered(ctx, grads[0]), none(), none(), none(), none(), none()};
  }
};

struct ReduceScatterFunction : Function<ReduceScatterFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& t, const Tensor& order,
                        std::vector<c10::SymInt> sizes, int64_t dim, std::string op, int64_t rank,
                        std::string group) {
    save_order(ctx, order, group);
    ctx->saved_data["rank"] = rank;
    ctx->saved_data["dim"] = dim < 0 ? dim + t.dim() : dim;
    ctx->saved_data["sizes"] = c10::IValue(sizes);
    ctx->saved_data["divisor"] = op == "avg" ? static_cast<int64_t>(sizes.size()) : 1;
    static const auto kOp = find_op<ReduceScatter>("tp_native::reduce_scatter");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(t, order, sizes, dim, op, rank, group);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const int64_t divisor = ctx->saved_data["divisor"].toInt();
    const Tensor whole = gathered(ctx, grads[0]);
    return {
        divisor == 1 ? whole : whole.div(divisor), none(), none(), none(), none(), none(), none()};
  }
};

/// y = x W^T + b. With `kReduced` each rank holds columns of W and y is summed over ranks: dx stays
/// local. Without, each rank holds rows of W and every rank's dx is a partial sum: the same
/// product, turned around.
template <bool kReduced>
struct LinearFunction : Function<LinearFunction<kReduced>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const Tensor& order,
                        std::vector<c10::SymInt> sizes, std::string group) {
    save_order(ctx, order, group);
    ctx->saved_data["sizes"] = c10::IValue(sizes);
    // a frozen weight needs no input, a first layer no weight
    ctx->save_for_backward(
        {weight.requires_grad() ? x : Tensor(), x.requires_grad() ? weight : Tensor()});
    ctx->saved_data["has_bias_grad"] = bias.has_value() && bias->requires_grad();
    static const auto kOp = find_op<ParallelLinear>(kReduced ? "tp_native::row_parallel_linear"
                                                             : "tp_native::column_parallel_linear");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(x, weight, bias, order, sizes, group);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto kRow = find_op<ParallelLinear>("tp_native::row_parallel_linear");
    const auto saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const Tensor& weight = saved[1];
    const Tensor& grad = grads[0];
    Tensor dx;
    Tensor dw;
    Tensor db;
    if (!kReduced && weight.defined() && x.defined()) {
      static const auto kBackward =
          find_op<ParallelLinearBackward>("tp_native::column_parallel_linear_backward");
      const bool has_bias = ctx->saved_data["has_bias_grad"].toBool();
      std::tie(dx, dw, db) =
          kBackward.call(grad, x, weight, has_bias, order_of(ctx),
                         ctx->saved_data["sizes"].toSymIntVector(), group_of(ctx));
      return {dx, dw, has_bias ? db : Tensor(), none(), none(), none()};
    }
    if (weight.defined()) {
      dx = kReduced ? grad.matmul(weight)
                    : kRow.call(grad, weight.t(), std::nullopt, order_of(ctx),
                                ctx->saved_data["sizes"].toSymIntVector(), group_of(ctx));
    }
    if (x.defined()) dw = flat(grad).t().mm(flat(x));
    if (ctx->saved_data["has_bias_grad"].toBool()) db = flat(grad).sum(0);
    return {dx, dw, db, none(), none(), none()};
  }
};

struct EmbeddingFunction : Function<EmbeddingFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& ids, const Tensor& weight,
                        const Tensor& order, std::vector<c10::SymInt> sizes, int64_t padding_idx,
                        int64_t rank, std::string group) {
    ctx->save_for_backward({ids});
    ctx->saved_data["first"] = offset_of(rank, sizes);
    ctx->saved_data["local"] = weight.sym_size(0);
    ctx->saved_data["padding_idx"] = padding_idx;
    static const auto kOp = find_op<VocabParallelEmbedding>("tp_native::vocab_parallel_embedding");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(ids, weight, order, sizes, padding_idx, rank, group);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor ids = ctx->get_saved_variables()[0];
    const c10::SymInt local = ctx->saved_data["local"].toSymInt();
    // ids of other ranks and the padding id share one extra row, which gets no gradient
    const Tensor row = ids.sub(at::Scalar(ctx->saved_data["first"].toSymInt()));
    const Tensor is_foreign = row.lt(0)
                                  .logical_or(row.ge(local))
                                  .logical_or(ids.eq(ctx->saved_data["padding_idx"].toInt()));
    const Tensor index = row.masked_fill(is_foreign, local);
    const Tensor grad =
        at::embedding_dense_backward_symint(grads[0], index, local + 1, local, false);
    return {none(), grad.narrow_symint(0, 0, local), none(), none(), none(), none(), none()};
  }
};

struct GluFunction : Function<GluFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_up, std::string activation) {
    ctx->save_for_backward({gate_up});
    ctx->saved_data["activation"] = activation;
    static const auto kOp = find_op<Glu>("tp_native::glu");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(gate_up, activation);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto kOp = find_op<GluBackward>("tp_native::glu_backward");
    return {kOp.call(grads[0], ctx->get_saved_variables()[0],
                     ctx->saved_data["activation"].toStringRef()),
            none()};
  }
};

/// No softmax is kept: the logits, which autograd has anyway, and two numbers a row make it again.
struct CrossEntropyFunction : Function<CrossEntropyFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                               const Tensor& order, std::vector<c10::SymInt> sizes,
                               std::optional<int64_t> vocab_size, int64_t ignore_index,
                               double label_smoothing, int64_t rank, std::string group) {
    static const auto kOp = find_op<CrossEntropy>("tp_native::vocab_parallel_cross_entropy");
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [loss, statistics, place] = kOp.call(logits, target, order, sizes, vocab_size,
                                                    ignore_index, label_smoothing, rank, group);
    ctx->save_for_backward({logits, target, statistics, place});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->mark_non_differentiable({statistics, place});
    ctx->set_materialize_grads(false);
    return {loss, statistics, place};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto kOp =
        find_op<CrossEntropyBackward>("tp_native::vocab_parallel_cross_entropy_backward");
    const auto saved = ctx->get_saved_variables();
    Tensor d_logits;
    if (grads[0].defined()) {
      d_logits = kOp.call(grads[0], saved[0], saved[1], saved[2], saved[3],
                          ctx->saved_data["ignore_index"].toInt(),
                          ctx->saved_data["label_smoothing"].toDouble());
    }
    return {d_logits, none(), none(), none(), none(), none(), none(), none(), none()};
  }
};

void all_reduce_in_place(const Tensor& t, const Tensor& order, std::string_view op,
                         std::string_view group) {
  TORCH_CHECK(
      !needs_grad(t),
      "all_reduce_ works in place and has no gradient: use all_reduce_sum(t), or torch.no_grad()");
  static const auto kOp = find_op<AllReduceInPlace>("tp_native::all_reduce_");
  at::AutoDispatchBelowADInplaceOrView guard;
  kOp.call(t, order, op, group);
}

void broadcast_in_place(const Tensor& t, const Tensor& order, int64_t src, std::string_view group) {
  TORCH_CHECK(
      !needs_grad(t),
      "broadcast_ works in place and has no gradient: use broadcast_tensor(t), or torch.no_grad()");
  static const auto kOp = find_op<BroadcastInPlace>("tp_native::broadcast_");
  at::AutoDispatchBelowADInplaceOrView guard;
  kOp.call(t, order, src, group);
}

/// A string as a template argument: each op has a handle of its own, looked up once.
template <size_t kSize>
struct Name {
  char text[kSize];
  constexpr Name(const char (&from)[kSize]) { std::copy_n(from, kSize, text); }  // NOLINT
};

/// Straight to the kernel where nothing needs a gradient: recording costs microseconds.
template <class Signature, Name kName, class... Args>
Tensor below(const Args&... args) {
  static const auto kOp = find_op<Signature>(kName.text);
  at::AutoDispatchBelowADInplaceOrView guard;
  return kOp.call(args...);
}

Tensor all_reduce(const Tensor& t, const Tensor& order, std::string_view op,
                  std::string_view group) {
  if (!needs_grad(t)) return below<AllReduce, "tp_native::all_reduce">(t, order, op, group);
  TORCH_CHECK_NOT_IMPLEMENTED(op == "sum", "all_reduce \"", op,
                              "\" has no gradient: detach the input, or use \"sum\"");
  return AllReduceFunction::apply(t, order, std::string(op), std::string(group));
}

Tensor copy_to_ranks(const Tensor& t, const Tensor& order, std::string_view group) {
  if (!needs_grad(t)) return below<CopyToRanks, "tp_native::copy_to_ranks">(t, order, group);
  return CopyToRanksFunction::apply(t, order, std::string(group));
}

Tensor scatter_to_ranks(const Tensor& t, const Tensor& order, Sizes sizes, int64_t dim,
                        int64_t rank, std::string_view group) {
  if (!needs_grad(t)) {
    return below<ScatterToRanks, "tp_native::scatter_to_ranks">(t, order, sizes, dim, rank, group);
  }
  return ScatterToRanksFunction::apply(t, order, sizes.vec(), dim, rank, std::string(group));
}

Tensor broadcast(const Tensor& t, const Tensor& order, int64_t src, int64_t rank,
                 std::string_view group) {
  if (!needs_grad(t)) return below<Broadcast, "tp_native::broadcast">(t, order, src, rank, group);
  return BroadcastFunction::apply(t, order, src, rank, std::string(group));
}

Tensor all_gather(const Tensor& t, const Tensor& order, Sizes sizes, int64_t dim,
                  std::string_view grad, int64_t rank, std::string_view group) {
  TORCH_CHECK_VALUE(grad == "replicated" || grad == "partial", "all_gather: grad \"", grad,
                    "\": expected \"replicated\" or \"partial\"");
  if (!needs_grad(t))
    return below<AllGather, "tp_native::all_gather">(t, order, sizes, dim, grad, rank, group);
  return AllGatherFunction::apply(t, order, sizes.vec(), dim, std::string(grad), rank,
                                  std::string(group));
}

Tensor reduce_scatter(const Tensor& t, const Tensor& order, Sizes sizes, int64_t dim,
                      std::string_view op, int64_t rank, std::string_view group) {
  if (!needs_grad(t))
    return below<ReduceScatter, "tp_native::reduce_scatter">(t, order, sizes, dim, op, rank, group);
  TORCH_CHECK_NOT_IMPLEMENTED(op == "sum" || op == "avg", "reduce_scatter \"", op,
                              "\" has no gradient: detach the input");
  return ReduceScatterFunction::apply(t, order, sizes.vec(), dim, std::string(op), rank,
                                      std::string(group));
}

template <bool kReduced>
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
              const Tensor& order, Sizes sizes, std::string_view group) {
  if (!needs_grad(x, weight) && !(bias && needs_grad(*bias))) {
    static const auto kOp = find_op<ParallelLinear>(kReduced ? "tp_native::row_parallel_linear"
                                                             : "tp_native::column_parallel_linear");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(x, weight, bias, order, sizes, group);
  }
  return LinearFunction<kReduced>::apply(x, weight, bias, order, sizes.vec(), std::string(group));
}

/// Of a second order it is made of steps that have a derivative.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& weight, bool has_bias,
                                                   const Tensor& order, Sizes sizes,
                                                   std::string_view group) {
  if (!needs_grad(grad, x, weight)) {
    static const auto kOp =
        find_op<ParallelLinearBackward>("tp_native::column_parallel_linear_backward");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(grad, x, weight, has_bias, order, sizes, group);
  }
  return {linear<true>(grad, weight.t(), std::nullopt, order, sizes, group),
          flat(grad).t().mm(flat(x)), has_bias ? flat(grad).sum(0) : grad.new_empty({0})};
}

/// Fused where nothing needs a gradient; else the activation is torch's, with its own backward.
Tensor linear_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  std::string_view activation, const Tensor& order, Sizes sizes,
                  std::string_view group) {
  if (!needs_grad(x, weight) && !(bias && needs_grad(*bias))) {
    return below<ParallelLinearAct, "tp_native::column_parallel_linear_act">(
        x, weight, bias, activation, order, sizes, group);
  }
  const Tensor y = linear<false>(x, weight, bias, order, sizes, group);
  return activation == "relu" ? at::relu(y) : at::gelu(y, "tanh");
}

Tensor glu(const Tensor& gate_up, std::string_view activation) {
  if (!needs_grad(gate_up)) return below<Glu, "tp_native::glu">(gate_up, activation);
  return GluFunction::apply(gate_up, std::string(activation));
}

/// Not twice: the derivative of glu_backward is nowhere asked for.
Tensor glu_backward(const Tensor& grad, const Tensor& gate_up, std::string_view activation) {
  TORCH_CHECK_NOT_IMPLEMENTED(!needs_grad(grad, gate_up),
                              "glu has no second derivative: use torch's own chunk and activation");
  return below<GluBackward, "tp_native::glu_backward">(grad, gate_up, activation);
}

/// With gradients the steps run one by one, each with its own backward; the values are the same.
std::tuple<Tensor, Tensor> linear_add_rms_norm(const Tensor& x, const Tensor& weight,
                                               const OptionalTensor& bias, const Tensor& residual,
                                               const Tensor& norm_weight, double eps,
                                               const Tensor& order, Sizes sizes,
                                               std::string_view group) {
  if (!needs_grad(x, weight, residual, norm_weight) && !(bias && needs_grad(*bias))) {
    static const auto kOp =
        find_op<LinearAddRmsNorm>("tp_native::row_parallel_linear_add_rms_norm");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(x, weight, bias, residual, norm_weight, eps, order, sizes, group);
  }
  return add_rms_norm(linear<true>(x, weight, bias, order, sizes, group), residual, norm_weight,
                      eps);
}

Tensor vocab_parallel_embedding(const Tensor& ids, const Tensor& weight, const Tensor& order,
                                Sizes sizes, int64_t padding_idx, int64_t rank,
                                std::string_view group) {
  if (!needs_grad(weight)) {
    return below<VocabParallelEmbedding, "tp_native::vocab_parallel_embedding">(
        ids, weight, order, sizes, padding_idx, rank, group);
  }
  return EmbeddingFunction::apply(ids, weight, order, sizes.vec(), padding_idx, rank,
                                  std::string(group));
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const Tensor& order, Sizes sizes,
                                                 std::optional<int64_t> vocab_size,
                                                 int64_t ignore_index, double label_smoothing,
                                                 int64_t rank, std::string_view group) {
  if (!needs_grad(logits)) {
    static const auto kOp = find_op<CrossEntropy>("tp_native::vocab_parallel_cross_entropy");
    at::AutoDispatchBelowADInplaceOrView guard;
    return kOp.call(logits, target, order, sizes, vocab_size, ignore_index, label_smoothing, rank,
                    group);
  }
  const variable_list out =
      CrossEntropyFunction::apply(logits, target, order, sizes.vec(), vocab_size, ignore_index,
                                  label_smoothing, rank, std::string(group));
  return {out[0], out[1], out[2]};
}

Tensor cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                              const Tensor& statistics, const Tensor& place, int64_t ignore_index,
                              double label_smoothing) {
  TORCH_CHECK_NOT_IMPLEMENTED(!needs_grad(grad, logits),
                              "vocab_parallel_cross_entropy has no second derivative: use "
                              "F.cross_entropy on gathered logits");
  return below<CrossEntropyBackward, "tp_native::vocab_parallel_cross_entropy_backward">(
      grad, logits, target, statistics, place, ignore_index, label_smoothing);
}

TORCH_LIBRARY_IMPL(tp_native, Autograd, m) {
  m.impl("all_reduce_", &all_reduce_in_place);
  m.impl("broadcast_", &broadcast_in_place);
  m.impl("all_reduce", &all_reduce);
  m.impl("copy_to_ranks", &copy_to_ranks);
  m.impl("scatter_to_ranks", &scatter_to_ranks);
  m.impl("broadcast", &broadcast);
  m.impl("all_gather", &all_gather);
  m.impl("reduce_scatter", &reduce_scatter);
  m.impl("row_parallel_linear", &linear<true>);
  m.impl("row_parallel_linear_add_rms_norm", &linear_add_rms_norm);
  m.impl("column_parallel_linear", &linear<false>);
  m.impl("column_parallel_linear_act", &linear_act);
  m.impl("column_parallel_linear_backward", &linear_backward);
  m.impl("glu", &glu);
  m.impl("glu_backward", &glu_backward);
  m.impl("vocab_parallel_embedding", &vocab_parallel_embedding);
  m.impl("vocab_parallel_cross_entropy", &cross_entropy);
  m.impl("vocab_parallel_cross_entropy_backward", &cross_entropy_backward);
}

}  // namespace
}  // namespace tp_native::ops
