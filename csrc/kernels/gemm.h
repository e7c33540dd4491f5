// SPDX-License-Identifier: Apache-2.0
// Matrix products on a GPU with what follows them in the same kernel: cuBLASLt behind row-major
// words. Knows no torch and no ranks. The device's context is current on every call (cuda::Current
// or torch's guard), and pointers and stream belong to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/cuda_driver.h"
#include "core/dtype.h"

namespace tp_native::kernels {

/// What happens to P = op(A) op(B) (+ C) before it is stored as C. GELU is the tanh form and there
/// is no erf form here, because cuBLASLt has none: nn.GELU() is a GEMM and a kernel of its own.
///   bias       a value per column of C, added before the activation
///   aux out    what the backward pass needs: GELU's argument, or ReLU's mask
///   DRelu, DGeluTanh   C = P * f'(aux), with the aux of the forward pass; C is [tokens, features]
///   BiasGrad   of DRelu and DGeluTanh: bias_grad[n] = the sum of C's column n;
///              BiasGradA: bias_grad[m] = the sum over k of op(A)[m, k], which is the gradient of
///              the bias where A is dy^T; BiasGradB: bias_grad[n] = the sum over k of op(B)[k, n]
enum class GemmEpilogue : uint8_t {
  kNone,
  kBias,
  kRelu,
  kReluBias,
  kReluAux,
  kReluAuxBias,
  kGeluTanh,
  kGeluTanhBias,
  kGeluTanhAux,
  kGeluTanhAuxBias,
  kDRelu,
  kDReluBiasGrad,
  kDGeluTanh,
  kDGeluTanhBiasGrad,
  kBiasGradA,
  kBiasGradB,
};
const char* name(GemmEpilogue epilogue);
bool has_bias(GemmEpilogue epilogue);
bool has_bias_grad(GemmEpilogue epilogue);
bool has_aux(GemmEpilogue epilogue);

/// The smallest leading dimension of aux for rows of `n` values that can be fused: n rounded up to
/// 8 values for GELU, to 128 bits for ReLU.
int64_t aux_ld(GemmEpilogue epilogue, int64_t n);
/// Bytes of aux: GELU's has C's dtype, ReLU's is a bit per value in an order that only cuBLASLt
/// knows, so that what kReluAux wrote is for kDRelu alone.
int64_t aux_bytes(GemmEpilogue epilogue, DType out_dtype, int64_t m, int64_t ld);

struct GemmOperand {
  const void* data = nullptr;
  int64_t ld = 0;              ///< values from one stored row to the next
  bool is_transposed = false;  ///< stored as [k, m] for A, as [n, k] for B
};

/// C[m, n] = epilogue(op(A)[m, k] op(B)[k, n] + (accumulates ? C : 0)), all row-major.
/// y = x w^T: B is w, transposed. dx = dy w: none. dw = dy^T x: A is dy, transposed.
/// Sums in float32, in float64 for float64; 16-bit inputs may have a float32 C. Sizes may be 0:
/// without a k the product is zeros, and its epilogue runs.
struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  DType dtype = DType::kFloat32;      ///< of A and B
  DType out_dtype = DType::kFloat32;  ///< of C, bias, bias_grad and GELU's aux
  GemmOperand a, b;
  void* c = nullptr;
  int64_t ldc = 0;
  bool accumulates = false;
  GemmEpilogue epilogue = GemmEpilogue::kNone;
  const void* bias = nullptr;
  void* bias_grad = nullptr;  ///< overwritten, also where C accumulates
  void* aux = nullptr;        ///< written by the forward epilogues, read by the backward ones
  int64_t aux_ld = 0;         ///< in values, for ReLU in bits
  bool allows_tf32 = false;   ///< float32 only: factors rounded to 10 bits of mantissa
  int sm_target = 0;          ///< multiprocessors to plan for, 0: all; leaves the rest to others
};

/// How a product is computed, and what of it is left to the caller.
struct GemmPlan {
  enum class Source : uint8_t { kHeuristic, kTuned, kImported, kNoKernel };
  /// False: C holds the product (with the old C where it accumulates) and nothing else was done.
  /// The caller runs the epilogue on it, or the result is wrong.
  bool is_fused = true;
  /// False: a pointer or a row is no multiple of 16 bytes, which costs cuBLASLt its fast kernels.
  bool is_aligned = true;
  Source source = Source::kHeuristic;
  int64_t workspace_bytes = 0;
  const char* why_not_fused = "";
};

/// Enqueues the product. The first call of a shape asks cuBLASLt's heuristic, later ones use its
/// answer again. May be captured into a graph, from the device's second product on. Raises for what
/// cannot be computed at all.
[[nodiscard]] GemmPlan gemm(const Gemm& product, cuda::StreamHandle stream);

/// What gemm() would do; enqueues nothing. `aux` and `bias` need their true pointers: alignment
/// decides.
GemmPlan plan(const Gemm& product);

struct GemmTuning {
  GemmPlan plan;
  int best = 0;            ///< index into `us`; 0 is the heuristic's choice
  std::vector<double> us;  ///< microseconds by candidate; infinite where cuBLASLt refused to run
};

/// Times the heuristic's first `candidates` on the real operands, and lets gemm() use the fastest
/// from now on. Outputs go to scratch memory: C, aux and bias_grad stay as they are. Waits for the
/// stream. Not under capture.
GemmTuning tune(const Gemm& product, cuda::StreamHandle stream, int candidates = 8);

/// The choice for this shape as bytes for other ranks: results are equal bit by bit only where the
/// algorithm is. Bytes of one library version and one kind of GPU.
std::vector<std::byte> export_choice(const Gemm& product);
/// Lets gemm() use that choice for this shape. Raises where it was damaged, is for another shape,
/// alignment, library or kind of GPU, or does not run here.
void import_choice(const Gemm& product, std::span<const std::byte> choice);

/// Tunes those of `products` that compute something, each once where several are alike.
struct GemmTunings {
  std::vector<std::byte> choices;    ///< of all of them, for import_all() of the same products
  std::vector<double> heuristic_us;  ///< by product: with the heuristic's choice
  std::vector<double> best_us;       ///< with the one that is used from now on
};
GemmTunings tune_all(std::span<const Gemm> products, cuda::StreamHandle stream, int candidates = 8);
/// Choices of another rank's tune_all() of products that are alike, one by one and in its order.
/// Raises as import_choice() does; then some of them may be in use.
void import_all(std::span<const Gemm> products, std::span<const std::byte> choices);

/// Gives back what is kept for a stream, in its order. Before the stream is destroyed: another may
/// get its handle.
void forget_stream(cuda::StreamHandle stream);
/// Forgets all choices.
void forget_choices();

}  // namespace tp_native::kernels
