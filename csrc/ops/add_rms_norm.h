// SPDX-License-Identifier: Apache-2.0
// Residual and RMS norm as torch's own steps, for where row_parallel_linear_add_rms_norm cannot
// take them in one pass: gradients, and operands of several dtypes under autocast.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace tp_native::ops {

/// (normed, hidden); each step has its own backward, dtypes are promoted as torch does.
inline std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& y,
                                                       const at::Tensor& residual,
                                                       const at::Tensor& norm_weight, double eps) {
  const at::Tensor hidden = residual.add(y);
  const bool is_half = hidden.scalar_type() == at::kHalf || hidden.scalar_type() == at::kBFloat16;
  const at::Tensor wide = is_half ? hidden.to(at::kFloat) : hidden;
  const at::Tensor scale = wide.square().mean(-1, true).add(eps).rsqrt();
  return {wide.mul(scale).to(hidden.scalar_type()).mul(norm_weight), hidden};
}

}  // namespace tp_native::ops
