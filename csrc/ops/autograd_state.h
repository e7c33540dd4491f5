// SPDX-License-Identifier: Apache-2.0
// What the ops' autograd functions keep from forward to backward.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <string>

#include "ops/schema.h"

namespace tp_native::ops {

using torch::autograd::AutogradContext;

template <class... Tensors>
bool needs_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

/// `order` is written by every later op: a saved variable would trip over its version.
inline void save_order(AutogradContext* ctx, const Tensor& order, std::string_view group) {
  ctx->saved_data["order"] = order;
  ctx->saved_data["group"] = std::string(group);
}
inline Tensor order_of(AutogradContext* ctx) { return ctx->saved_data["order"].toTensor(); }
inline std::string group_of(AutogradContext* ctx) { return ctx->saved_data["group"].toStringRef(); }
inline Tensor none() { return {}; }

}  // namespace tp_native::ops
