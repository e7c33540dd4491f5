// SPDX-License-Identifier: Apache-2.0
// Which algorithm computes a shape: found once, used for all later products that are alike in
// everything that decides it.
#pragma once

#include "kernels/gemm_problem.h"

namespace tp_native::kernels {

/// All that an algorithm may depend on. No padding: compared, hashed and sent as bytes.
struct GemmKey {
  int64_t m, n, k, lda, ldb, ldc, aux_ld;
  int32_t device, sm_target;
  int16_t a_alignment, b_alignment, c_alignment, bias_alignment, aux_alignment;
  uint8_t dtype, out_dtype, epilogue;
  uint8_t a_is_transposed, b_is_transposed, accumulates, allows_tf32;
  uint8_t reserved[7];
  bool operator==(const GemmKey&) const = default;
};

struct GemmChoice {
  cublaslt::Algorithm algorithm{};
  int64_t workspace_bytes = 0;
  bool is_fused = true;
  GemmPlan::Source source = GemmPlan::Source::kHeuristic;
  const char* why_not_fused = "";
};

GemmKey key_of(const LtDevice& device, const Gemm& product);
/// "float16 [4096, 1024, 1024] ...": for messages.
std::string text_of(const GemmKey& key);

/// What is known for this shape, or else the heuristic's first answer, which is kept.
GemmChoice choice_for(const LtDevice& device, const Gemm& product);
void keep_choice(const LtDevice& device, const Gemm& product, const GemmChoice& choice);
/// The heuristic's first answers, with the epilogue or, where there are none and `is_fused` allows
/// it no longer, without; never empty. All are fused or none is.
std::vector<GemmChoice> heuristic_choices(const LtDevice& device, const Gemm& product, int count,
                                          const char* why_not_fused = nullptr);

}  // namespace tp_native::kernels
