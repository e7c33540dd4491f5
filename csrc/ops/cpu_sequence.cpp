// SPDX-License-Identifier: Apache-2.0
// The linear layers between which tokens are cut, on CPU tensors: torch's GEMM and one collective,
// one after the other (chunks under one another were measured to lose on a CPU).
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include "ops/layer_checks.h"

namespace tp_native::ops {
namespace {

using comm::OpCode;
using comm::Signature;

Tensor row_parallel_linear_scatter(const Tensor& x, const Tensor& weight,
                                   const OptionalTensor& bias, const Tensor&, Sizes in_symbolic,
                                   Sizes token_symbolic, int64_t dim, int64_t rank,
                                   std::string_view group) {
  constexpr const char* kOp = "row_parallel_linear_scatter";
  const auto communicator = comm::find_communicator(group);
  const comm::Identity& self = communicator->identity();
  const at::IntArrayRef in_sizes = C10_AS_INTARRAYREF_SLOW(in_symbolic);
  const at::IntArrayRef token_sizes = C10_AS_INTARRAYREF_SLOW(token_symbolic);
  const Partial p = check_row_parallel(kOp, x, weight, bias, in_sizes, self);
  const TokenCut cut = check_tokens(kOp, x, dim, token_sizes, false, rank, self);
  const Tensor by_token =
      x.movedim(cut.dim, 0);  // each rank's rows of the product are one run then
  std::vector<int64_t> shape = by_token.sizes().vec();
  shape.back() = p.columns;
  const Tensor product = empty_shared(*communicator, {p.rows, p.columns}, x.options());
  Tensor flat_product = product;
  at::cpu::mm_out(flat_product, by_token.reshape({p.rows, weight.size(1)}), weight.t());
  shape[0] = cut.local_tokens;
  const Tensor out = at::empty(shape, x.options());
  std::vector<int64_t> counts = cut.rows(token_sizes);
  for (int64_t& n : counts) n *= p.columns;
  const Signature whole{.op = OpCode::kRowParallelLinearScatter,
                        .dtype = dtype_of(x),
                        .dim = static_cast<int>(cut.dim),
                        .shape = p.shape,
                        .sizes = span_of(in_sizes)};
  Signature part = whole;
  part.sizes = span_of(token_sizes);
  part.whole = &whole;
  communicator->reduce_scatter(part, product.const_data_ptr(), out.mutable_data_ptr(), counts, {});
  if (bias) out.add_(*bias);
  return out.movedim(0, cut.dim).contiguous();
}

std::tuple<Tensor, Tensor> gathered_column_parallel_linear(const Tensor& x, const Tensor& weight,
                                                           const OptionalTensor& bias,
                                                           const Tensor&, Sizes out_symbolic,
                                                           Sizes token_symbolic, int64_t dim,
                                                           int64_t rank, std::string_view group) {
  constexpr const char* kOp = "gathered_column_parallel_linear";
  const auto communicator = comm::find_communicator(group);
  const comm::Identity& self = communicator->identity();
  const at::IntArrayRef out_sizes = C10_AS_INTARRAYREF_SLOW(out_symbolic);
  const at::IntArrayRef token_sizes = C10_AS_INTARRAYREF_SLOW(token_symbolic);
  check_column_parallel(kOp, x, weight, bias, out_sizes, self);
  const TokenCut cut = check_tokens(kOp, x, dim, token_sizes, true, rank, self);
  std::vector<int64_t> shape = x.sizes().vec();
  shape[cut.dim] = cut.tokens;
  std::vector<int64_t> columns;
  for (const int64_t n : token_sizes) columns.push_back(n * cut.inner * x.size(-1));
  const Tensor in = x.contiguous();
  const Tensor gathered = empty_shared(*communicator, shape, x.options());
  const Signature whole{.op = OpCode::kGatheredColumnParallelLinear,
                        .dtype = dtype_of(x),
                        .dim = static_cast<int>(cut.dim),
                        .shape = shape,
                        .sizes = span_of(out_sizes)};
  Signature part = whole;
  part.sizes = span_of(token_sizes);
  part.whole = &whole;
  communicator->all_gather(part, in.const_data_ptr(), gathered.mutable_data_ptr(), cut.outer,
                           columns, {});
  return {at::linear(gathered, weight, bias), gathered};
}

TORCH_LIBRARY_IMPL(tp_native, CPU, m) {
  m.impl("row_parallel_linear_scatter", &row_parallel_linear_scatter);
  m.impl("gathered_column_parallel_linear", &gathered_column_parallel_linear);
}

}  // namespace
}  // namespace tp_native::ops
