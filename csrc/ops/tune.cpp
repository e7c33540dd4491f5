// SPDX-License-Identifier: Apache-2.0
// Tuning of the products that a sharded linear layer runs on a GPU. No collective: what the ranks
// tell each other of it is the caller's business.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "ops/cuda_linear.h"

namespace tp_native::ops {
namespace {

using kernels::GemmEpilogue;

/// What the layers enqueue, and the memory that it points to.
struct Products {
  std::vector<kernels::Gemm> list;
  std::vector<Tensor> kept;
};

void add_chunks(Products& products, const Linear& linear, const Tensor& out,
                const overlap::Schedule& schedule) {
  for (const overlap::Chunk& chunk : schedule.chunks) {
    const int64_t row = chunk.pieces[0].row;
    products.list.push_back(linear.product(out, row, row, chunk.rows));
  }
}

/// `kind`: "row"; "column_relu", "column_gelu_tanh", which have their activation in the epilogue;
/// "column_backward", with dy in `grad`.
Products products_of(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& grad, std::string_view kind, at::IntArrayRef sizes,
                     const comm::Identity& self) {
  constexpr const char* kOp = "tune_linear";
  Products products;
  const Gpu& gpu = gpu_of(x.device().index());
  const DType dtype = dtype_of(weight);
  const auto empty = [&](at::IntArrayRef shape) {
    return products.kept.emplace_back(at::empty(shape, weight.options()));
  };
  if (kind == "row") {
    const Partial p = check_row_parallel(kOp, x, weight, bias, sizes, self);
    const bool adds_bias = bias && self.rank == 0;
    const Linear linear(flat(x), weight, adds_bias ? *bias : Tensor(),
                        adds_bias ? GemmEpilogue::kBias : GemmEpilogue::kNone);
    add_chunks(products, linear, empty({p.rows, p.columns}),
               *all_reduce_schedule(gpu, p, sizes, dtype, 0));
    return products;
  }
  check_column_parallel(kOp, x, weight, bias, sizes, self);
  const int64_t rows = flat(x).size(0);
  if (kind == "column_backward") {
    TORCH_CHECK_VALUE(grad.has_value(), kOp, ": \"column_backward\" needs grad");
    const Tensor turned = weight.t();
    const Partial p = check_row_parallel(kOp, *grad, turned, std::nullopt, sizes, self);
    add_chunks(products, Linear(flat(*grad), turned, Tensor(), GemmEpilogue::kNone),
               empty({p.rows, p.columns}),
               *all_reduce_schedule(gpu, p, sizes, dtype, weight_gradient_flop(p, sizes)));
    products.list.push_back(weight_gradient(Matrix(flat(*grad)), Matrix(flat(x)),
                                            empty(weight.sizes()),
                                            empty({bias ? weight.size(0) : 0})));
    return products;
  }
  TORCH_CHECK_VALUE(kind == "column_relu" || kind == "column_gelu_tanh", kOp, ": kind \"", kind,
                    "\": expected \"row\", \"column_relu\", \"column_gelu_tanh\" or "
                    "\"column_backward\"");
  const Linear linear(flat(x), weight, bias ? *bias : Tensor(),
                      epilogue_of(kind.substr(std::strlen("column_")), bias.has_value()));
  products.list.push_back(linear.product(empty({rows, weight.size(0)}), 0, 0, rows));
  return products;
}

std::tuple<Tensor, Tensor> tune_linear(const Tensor& x, const Tensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& grad,
                                       std::string_view kind, Sizes sizes, int64_t candidates,
                                       std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  const Placed placed("tune_linear", x, communicator->identity());
  const Products products = products_of(x, weight, bias, grad, kind, C10_AS_INTARRAYREF_SLOW(sizes),
                                        communicator->identity());
  const kernels::GemmTunings found =
      kernels::tune_all(products.list, handle_of(placed), static_cast<int>(candidates));
  const Tensor choices = at::empty({static_cast<int64_t>(found.choices.size())}, at::kByte);
  if (!found.choices.empty())
    std::memcpy(choices.mutable_data_ptr(), found.choices.data(), found.choices.size());
  const auto count = static_cast<int64_t>(found.best_us.size());
  const Tensor us = at::empty({count, 2}, at::kDouble);
  auto* const values = us.mutable_data_ptr<double>();
  for (int64_t i = 0; i < count; ++i) {
    values[2 * i] = found.heuristic_us[static_cast<size_t>(i)];
    values[2 * i + 1] = found.best_us[static_cast<size_t>(i)];
  }
  return {choices, us};
}

void import_linear_choices(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& grad, std::string_view kind, Sizes sizes,
                           const Tensor& choices, std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  const Placed placed("import_linear_choices", x, communicator->identity());
  TORCH_CHECK_VALUE(choices.is_cpu() && choices.scalar_type() == at::kByte,
                    "import_linear_choices: the choices are bytes on the CPU");
  const Products products = products_of(x, weight, bias, grad, kind, C10_AS_INTARRAYREF_SLOW(sizes),
                                        communicator->identity());
  const Tensor bytes = choices.contiguous();
  kernels::import_all(products.list, {static_cast<const std::byte*>(bytes.const_data_ptr()),
                                      static_cast<size_t>(bytes.numel())});
}

// Elsewhere torch's own products run, which have nothing to choose.
std::tuple<Tensor, Tensor> tune_nothing(const Tensor& x, const Tensor&, const OptionalTensor&,
                                        const OptionalTensor&, std::string_view, Sizes, int64_t,
                                        std::string_view) {
  return {at::empty({0}, x.options().dtype(at::kByte)),
          at::empty({0, 2}, x.options().dtype(at::kDouble))};
}
void import_nothing(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                    std::string_view, Sizes, const Tensor&, std::string_view) {}

TORCH_LIBRARY_IMPL(tp_native, CUDA, m) {
  m.impl("tune_linear", &tune_linear);
  m.impl("import_linear_choices", &import_linear_choices);
}
TORCH_LIBRARY_IMPL(tp_native, CPU, m) {
  m.impl("tune_linear", &tune_nothing);
  m.impl("import_linear_choices", &import_nothing);
}
TORCH_LIBRARY_IMPL(tp_native, Meta, m) {
  m.impl("tune_linear", &tune_nothing);
  m.impl("import_linear_choices", &import_nothing);
}

}  // namespace
}  // namespace tp_native::ops
