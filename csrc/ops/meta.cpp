// SPDX-License-Identifier: Apache-2.0
// Shapes without data. No group is looked up here: compilers and planners run these in processes
// that have none.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "ops/schema.h"

namespace tp_native::ops {
namespace {

Tensor with_last(const Tensor& x, c10::SymInt width, const at::TensorOptions& options) {
  std::vector<c10::SymInt> shape = x.sym_sizes().vec();
  shape.back() = std::move(width);
  return at::empty_symint(shape, options);
}

Tensor same(const Tensor& t) { return at::empty_like(t, at::MemoryFormat::Contiguous); }

c10::SymInt sum(Sizes sizes) {
  c10::SymInt total = 0;
  for (const c10::SymInt& n : sizes) total = total + n;
  return total;
}

void all_reduce_in_place(const Tensor&, const Tensor&, std::string_view, std::string_view) {}
void broadcast_in_place(const Tensor&, const Tensor&, int64_t, std::string_view) {}
void move_into(const Tensor&, const Tensor&, const Tensor&, Sizes, int64_t, std::string_view) {}
Tensor all_reduce(const Tensor& t, const Tensor&, std::string_view, std::string_view) {
  return same(t);
}
Tensor copy_to_ranks(const Tensor& t, const Tensor&, std::string_view) { return at::empty_like(t); }
Tensor broadcast(const Tensor& t, const Tensor&, int64_t, int64_t, std::string_view) {
  return same(t);
}

Tensor all_gather(const Tensor& t, const Tensor&, Sizes sizes, int64_t dim, std::string_view,
                  int64_t, std::string_view) {
  std::vector<c10::SymInt> shape = t.sym_sizes().vec();
  shape.at(dim < 0 ? dim + t.dim() : dim) = sum(sizes);
  return at::empty_symint(shape, t.options());
}

Tensor reduce_scatter(const Tensor& t, const Tensor&, Sizes sizes, int64_t dim, std::string_view,
                      int64_t rank, std::string_view) {
  std::vector<c10::SymInt> shape = t.sym_sizes().vec();
  shape.at(dim < 0 ? dim + t.dim() : dim) = sizes.vec().at(rank);
  return at::empty_symint(shape, t.options());
}

Tensor scatter_to_ranks(const Tensor& t, const Tensor& order, Sizes sizes, int64_t dim,
                        int64_t rank, std::string_view group) {
  return reduce_scatter(t, order, sizes, dim, "sum", rank, group);
}

Tensor empty_shared(const Tensor& order, Sizes shape, at::ScalarType dtype, std::string_view) {
  return at::empty_symint(shape, order.options().dtype(dtype));
}

Tensor parallel_linear(const Tensor& x, const Tensor& weight, const OptionalTensor&, const Tensor&,
                       Sizes, std::string_view) {
  check_device("parallel linear", x, weight);
  return with_last(x, weight.sym_size(0), x.options());
}

std::tuple<Tensor, Tensor> linear_add_rms_norm(const Tensor& x, const Tensor& weight,
                                               const OptionalTensor&, const Tensor&, const Tensor&,
                                               double, const Tensor&, Sizes, std::string_view) {
  check_device("row_parallel_linear_add_rms_norm", x, weight);
  return {with_last(x, weight.sym_size(0), x.options()),
          with_last(x, weight.sym_size(0), x.options())};
}

Tensor parallel_linear_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           std::string_view, const Tensor& order, Sizes sizes,
                           std::string_view group) {
  return parallel_linear(x, weight, bias, order, sizes, group);
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& weight, bool has_bias,
                                                   const Tensor&, Sizes, std::string_view) {
  return {same(x), same(weight),
          at::empty_symint({has_bias ? weight.sym_size(0) : c10::SymInt(0)}, grad.options())};
}

Tensor linear_scatter(const Tensor& x, const Tensor& weight, const OptionalTensor&, const Tensor&,
                      Sizes, Sizes token_sizes, int64_t dim, int64_t rank, std::string_view) {
  check_device("row_parallel_linear_scatter", x, weight);
  std::vector<c10::SymInt> shape = x.sym_sizes().vec();
  shape.at(dim < 0 ? dim + x.dim() : dim) = token_sizes.vec().at(rank);
  shape.back() = weight.sym_size(0);
  return at::empty_symint(shape, x.options());
}

std::tuple<Tensor, Tensor> gathered_linear(const Tensor& x, const Tensor& weight,
                                           const OptionalTensor&, const Tensor&, Sizes,
                                           Sizes token_sizes, int64_t dim, int64_t,
                                           std::string_view) {
  check_device("gathered_column_parallel_linear", x, weight);
  std::vector<c10::SymInt> shape = x.sym_sizes().vec();
  shape.at(dim < 0 ? dim + x.dim() : dim) = sum(token_sizes);
  const Tensor gathered = at::empty_symint(shape, x.options());
  return {with_last(gathered, weight.sym_size(0), x.options()), gathered};
}

Tensor glu(const Tensor& gate_up, std::string_view) {
  return with_last(gate_up, gate_up.sym_size(-1) / 2, gate_up.options());
}

Tensor glu_backward(const Tensor&, const Tensor& gate_up, std::string_view) {
  return same(gate_up);
}

Tensor vocab_parallel_embedding(const Tensor& ids, const Tensor& weight, const Tensor&, Sizes,
                                int64_t, int64_t, std::string_view) {
  check_device("vocab_parallel_embedding", ids, weight);
  std::vector<c10::SymInt> shape = ids.sym_sizes().vec();
  shape.push_back(weight.sym_size(1));
  return at::empty_symint(shape, weight.options());
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const Tensor&, Sizes, std::optional<int64_t>,
                                                 int64_t, double, int64_t, std::string_view) {
  const at::TensorOptions options = logits.options().dtype(wide_type(logits));
  std::vector<c10::SymInt> shape = target.sym_sizes().vec();
  const Tensor loss = at::empty_symint(shape, options);
  shape.insert(shape.begin(), 2);
  return {loss, at::empty_symint(shape, options), at::empty({2}, options.dtype(at::kLong))};
}

Tensor cross_entropy_backward(const Tensor&, const Tensor& logits, const Tensor&, const Tensor&,
                              const Tensor&, int64_t, double) {
  return same(logits);
}

TORCH_LIBRARY_IMPL(tp_native, Meta, m) {
  m.impl("all_reduce_", &all_reduce_in_place);
  m.impl("broadcast_", &broadcast_in_place);
  m.impl("all_reduce", &all_reduce);
  m.impl("copy_to_ranks", &copy_to_ranks);
  m.impl("scatter_to_ranks", &scatter_to_ranks);
  m.impl("broadcast", &broadcast);
  m.impl("all_gather", &all_gather);
  m.impl("reduce_scatter", &reduce_scatter);
  m.impl("gather_into", &move_into);
  m.impl("scatter_into", &move_into);
  m.impl("empty_shared", &empty_shared);
  m.impl("row_parallel_linear", &parallel_linear);
  m.impl("column_parallel_linear", &parallel_linear);
  m.impl("column_parallel_linear_act", &parallel_linear_act);
  m.impl("column_parallel_linear_backward", &linear_backward);
  m.impl("row_parallel_linear_scatter", &linear_scatter);
  m.impl("gathered_column_parallel_linear", &gathered_linear);
  m.impl("glu", &glu);
  m.impl("glu_backward", &glu_backward);
  m.impl("row_parallel_linear_add_rms_norm", &linear_add_rms_norm);
  m.impl("vocab_parallel_embedding", &vocab_parallel_embedding);
  m.impl("vocab_parallel_cross_entropy", &cross_entropy);
  m.impl("vocab_parallel_cross_entropy_backward", &cross_entropy_backward);
}

}  // namespace
}  // namespace tp_native::ops
