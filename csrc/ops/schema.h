// SPDX-License-Identifier: Apache-2.0
// The C++ types of the schemas in schema.cpp, and one call per op through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string_view>

namespace tp_native::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = c10::SymIntArrayRef;

using AllReduceInPlace = void(const Tensor& t, const Tensor& order, std::string_view op,
                              std::string_view group);
using BroadcastInPlace = void(const Tensor& t, const Tensor& order, int64_t src,
                              std::string_view group);
using AllReduce = Tensor(const Tensor& t, const Tensor& order, std::string_view op,
                         std::string_view group);
using CopyToRanks = Tensor(const Tensor& t, const Tensor& order, std::string_view group);
using Broadcast = Tensor(const Tensor& t, const Tensor& order, int64_t src, int64_t rank,
                         std::string_view group);
using AllGather = Tensor(const Tensor& t, const Tensor& order, Sizes sizes, int64_t dim,
                         std::string_view grad, int64_t rank, std::string_view group);
using ScatterToRanks = Tensor(const Tensor& t, const Tensor& order, Sizes sizes, int64_t dim,
                              int64_t rank, std::string_view group);
using ReduceScatter = Tensor(const Tensor& t, const Tensor& order, Sizes sizes, int64_t dim,
                             std::string_view op, int64_t rank, std::string_view group);
using ParallelLinear = Tensor(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                              const Tensor& order, Sizes sizes, std::string_view group);
using ParallelLinearAct = Tensor(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                 std::string_view activation, const Tensor& order, Sizes sizes,
                                 std::string_view group);
using ParallelLinearBackward = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& grad, const Tensor& x, const Tensor& weight, bool has_bias, const Tensor& order,
    Sizes sizes, std::string_view group);
using LinearScatter = Tensor(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                             const Tensor& order, Sizes in_sizes, Sizes token_sizes, int64_t dim,
                             int64_t rank, std::string_view group);
using GatheredLinear = std::tuple<Tensor, Tensor>(const Tensor& x, const Tensor& weight,
                                                  const OptionalTensor& bias, const Tensor& order,
                                                  Sizes out_sizes, Sizes token_sizes, int64_t dim,
                                                  int64_t rank, std::string_view group);
using Glu = Tensor(const Tensor& gate_up, std::string_view activation);
using GluBackward = Tensor(const Tensor& grad, const Tensor& gate_up, std::string_view activation);
using LinearAddRmsNorm = std::tuple<Tensor, Tensor>(const Tensor& x, const Tensor& weight,
                                                    const OptionalTensor& bias,
                                                    const Tensor& residual,
                                                    const Tensor& norm_weight, double eps,
                                                    const Tensor& order, Sizes sizes,
                                                    std::string_view group);
using VocabParallelEmbedding = Tensor(const Tensor& ids, const Tensor& weight, const Tensor& order,
                                      Sizes sizes, int64_t padding_idx, int64_t rank,
                                      std::string_view group);

/// `sizes` empty: the ranks tell each other. `statistics`: of every row the maximum and the sum of
/// exponentials that the gradient needs; `place`: this rank's first column and the vocabulary.
using CrossEntropy = std::tuple<Tensor, Tensor, Tensor>(const Tensor& logits, const Tensor& target,
                                                        const Tensor& order, Sizes sizes,
                                                        std::optional<int64_t> vocab_size,
                                                        int64_t ignore_index,
                                                        double label_smoothing, int64_t rank,
                                                        std::string_view group);
using CrossEntropyBackward = Tensor(const Tensor& grad, const Tensor& logits, const Tensor& target,
                                    const Tensor& statistics, const Tensor& place,
                                    int64_t ignore_index, double label_smoothing);

/// float64 for float64 logits, else float32.
inline at::ScalarType wide_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// Raises ValueError where a layer's input and weight lie on different devices, fake and meta ones
/// included.
inline void check_device(const char* op, const Tensor& input, const Tensor& weight) {
  TORCH_CHECK_VALUE(input.device() == weight.device(), op, ": the input is on ", input.device(),
                    ", the weight on ", weight.device(),
                    ": move the input with x.to(weight.device)");
}

/// [..., n] as [m, n]; not reshape({-1, n}), which is ambiguous for n = 0.
inline Tensor flat(const Tensor& t) {
  if (t.dim() == 2) return t;
  return t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2);
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace tp_native::ops
