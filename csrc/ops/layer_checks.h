// SPDX-License-Identifier: Apache-2.0
// What the sharded layers refuse, the same on every device.
#pragma once

#include <vector>

#include "kernels/activation.h"
#include "ops/schema.h"
#include "ops/tensors.h"

namespace tp_native::ops {

/// A row-parallel linear's result, and this rank's product on its way to the sum.
struct Partial {
  std::vector<int64_t> shape;  ///< of the result
  int64_t rows;
  int64_t columns;
};

// All raise ValueError, or TypeError where it is a dtype's fault.
Partial check_row_parallel(const char* op, const Tensor& x, const Tensor& weight,
                           const OptionalTensor& bias, at::IntArrayRef sizes,
                           const comm::Identity& self);
void check_add_rms_norm(const char* op, const Tensor& x, const Tensor& residual,
                        const Tensor& norm_weight, const Partial& p);
void check_column_parallel(const char* op, const Tensor& x, const Tensor& weight,
                           const OptionalTensor& bias, at::IntArrayRef sizes,
                           const comm::Identity& self);
void check_vocab_parallel(const char* op, const Tensor& ids, const Tensor& weight,
                          at::IntArrayRef sizes, int64_t rank, const comm::Identity& self);
/// What one rank can know. What only the ranks together can is checked later: on CPUs behind their
/// exchange, so that all of them raise.
void check_cross_entropy(const char* op, const Tensor& logits, const Tensor& target,
                         at::IntArrayRef sizes, int64_t rank, const comm::Identity& self);

/// Which ranks own the rows of a [..., tokens, ..., width] tensor that is cut along `dim`.
struct TokenCut {
  int64_t dim;    ///< counted from 0
  int64_t outer;  ///< rows before one token's and the next one's lie this often apart: 1, then each
                  ///< rank's rows are one run
  int64_t inner;  ///< rows of a token
  int64_t tokens;
  int64_t local_tokens;
  /// Rows of each rank.
  std::vector<int64_t> rows(at::IntArrayRef sizes) const;
};
/// `t` holds all tokens, or this rank's where `is_local`.
TokenCut check_tokens(const char* op, const Tensor& t, int64_t dim, at::IntArrayRef sizes,
                      bool is_local, int64_t rank, const comm::Identity& self);

/// Only those that a GEMM's epilogue has: "relu", "gelu_tanh".
void check_fused_activation(const char* op, std::string_view activation);
/// The activation of the gate: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU).
kernels::Activation check_glu(const Tensor& gate_up, std::string_view activation);

}  // namespace tp_native::ops
