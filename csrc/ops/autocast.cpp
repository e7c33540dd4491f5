// SPDX-License-Identifier: Apache-2.0
// Under torch.autocast the linear layers compute in its dtype, as F.linear does: the operands are
// cast here, above autograd, so that forward, backward and fake kernels see one dtype. The cross
// entropy computes in float32 whatever the logits are, so nothing is to be cast. The other ops keep
// their input's dtype, as torch's copies and look-ups do.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/add_rms_norm.h"
#include "ops/schema.h"

namespace tp_native::ops {
namespace {

template <at::DeviceType kDevice>
class Autocast {
 public:
  /// A parameter's cast is kept until the outermost autocast ends.
  template <class T>
  T cast(const T& t) const {
    return at::autocast::cached_cast(dtype_, t, kDevice);
  }

 private:
  c10::impl::ExcludeDispatchKeyGuard below_{
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)};
  at::ScalarType dtype_ = at::autocast::get_autocast_dtype(kDevice);
};

template <at::DeviceType kDevice, bool kReduced>
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
              const Tensor& order, Sizes sizes, std::string_view group) {
  static const auto kOp = find_op<ParallelLinear>(kReduced ? "tp_native::row_parallel_linear"
                                                           : "tp_native::column_parallel_linear");
  const Autocast<kDevice> autocast;
  return kOp.call(autocast.cast(x), autocast.cast(weight), autocast.cast(bias), order, sizes,
                  group);
}

template <at::DeviceType kDevice>
Tensor linear_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  std::string_view activation, const Tensor& order, Sizes sizes,
                  std::string_view group) {
  static const auto kOp = find_op<ParallelLinearAct>("tp_native::column_parallel_linear_act");
  const Autocast<kDevice> autocast;
  return kOp.call(autocast.cast(x), autocast.cast(weight), autocast.cast(bias), activation, order,
                  sizes, group);
}

template <at::DeviceType kDevice>
Tensor linear_scatter(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const Tensor& order, Sizes in_sizes, Sizes token_sizes, int64_t dim,
                      int64_t rank, std::string_view group) {
  static const auto kOp = find_op<LinearScatter>("tp_native::row_parallel_linear_scatter");
  const Autocast<kDevice> autocast;
  return kOp.call(autocast.cast(x), autocast.cast(weight), autocast.cast(bias), order, in_sizes,
                  token_sizes, dim, rank, group);
}

template <at::DeviceType kDevice>
std::tuple<Tensor, Tensor> gathered_linear(const Tensor& x, const Tensor& weight,
                                           const OptionalTensor& bias, const Tensor& order,
                                           Sizes out_sizes, Sizes token_sizes, int64_t dim,
                                           int64_t rank, std::string_view group) {
  static const auto kOp = find_op<GatheredLinear>("tp_native::gathered_column_parallel_linear");
  const Autocast<kDevice> autocast;
  return kOp.call(autocast.cast(x), autocast.cast(weight), autocast.cast(bias), order, out_sizes,
                  token_sizes, dim, rank, group);
}

/// The linear is cast; residual and norm are not, as in a dense block: a float32 residual stream
/// stays one. Then the dtypes differ and the steps run one by one.
template <at::DeviceType kDevice>
std::tuple<Tensor, Tensor> linear_add_rms_norm(const Tensor& x, const Tensor& weight,
                                               const OptionalTensor& bias, const Tensor& residual,
                                               const Tensor& norm_weight, double eps,
                                               const Tensor& order, Sizes sizes,
                                               std::string_view group) {
  static const auto kFused =
      find_op<LinearAddRmsNorm>("tp_native::row_parallel_linear_add_rms_norm");
  static const auto kLinear = find_op<ParallelLinear>("tp_native::row_parallel_linear");
  const Autocast<kDevice> autocast;
  const Tensor input = autocast.cast(x);
  const Tensor matrix = autocast.cast(weight);
  const OptionalTensor offset = autocast.cast(bias);
  if (residual.scalar_type() == input.scalar_type() &&
      norm_weight.scalar_type() == input.scalar_type()) {
    return kFused.call(input, matrix, offset, residual, norm_weight, eps, order, sizes, group);
  }
  const Tensor y = kLinear.call(input, matrix, offset, order, sizes, group);
  return add_rms_norm(y, residual, norm_weight, eps);
}

template <at::DeviceType kDevice>
void implement(torch::Library& m) {
  m.impl("row_parallel_linear", &linear<kDevice, true>);
  m.impl("column_parallel_linear", &linear<kDevice, false>);
  m.impl("column_parallel_linear_act", &linear_act<kDevice>);
  m.impl("row_parallel_linear_add_rms_norm", &linear_add_rms_norm<kDevice>);
  m.impl("row_parallel_linear_scatter", &linear_scatter<kDevice>);
  m.impl("gathered_column_parallel_linear", &gathered_linear<kDevice>);
}

TORCH_LIBRARY_IMPL(tp_native, AutocastCPU, m) { implement<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(tp_native, AutocastCUDA, m) { implement<at::kCUDA>(m); }

}  // namespace
}  // namespace tp_native::ops
