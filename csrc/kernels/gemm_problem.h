// SPDX-License-Identifier: Apache-2.0
// One product in cuBLASLt's words: which handle, which descriptors, which alignments. Column-major:
// cuBLASLt computes C^T = op(B)^T op(A)^T, so its A is our B and its rows are our columns.
#pragma once

#include <vector>

#include "core/unique.h"
#include "kernels/cublaslt_api.h"
#include "kernels/gemm.h"

namespace tp_native::kernels {

/// A device as cuBLASLt sees it. Never released.
struct LtDevice {
  int index = -1;
  int compute_capability = 0;  ///< 90 for 9.0
  int multiprocessors = 0;
  int64_t workspace_bytes = 0;  ///< what an algorithm may ask for
  cublaslt::Context* handle = nullptr;
};
/// That of the context that is current on this thread.
const LtDevice& current_lt_device();

/// cuBLASLt's value of an epilogue.
uint32_t lt_value(GemmEpilogue epilogue);

/// Values in bias_grad; 0 where the epilogue has none.
int64_t bias_grad_size(const Gemm& product);
/// Raises for sizes, leading dimensions, dtypes and pointers that make no product.
void check(const Gemm& product);
/// The largest power of two up to 256 that divides the address; 0 for none.
int alignment_of(const void* pointer);
bool is_aligned(const Gemm& product);
/// Why cuBLASLt cannot fuse the epilogue, as far as its header says; null if it may.
const char* why_not_fusible(const Gemm& product);

inline int destroy(cublaslt::MatmulDescription* it) {
  return cublaslt::api().MatmulDescDestroy(it);
}
inline int destroy(cublaslt::MatrixLayout* it) { return cublaslt::api().MatrixLayoutDestroy(it); }
inline int destroy(cublaslt::MatmulPreference* it) {
  return cublaslt::api().MatmulPreferenceDestroy(it);
}
template <class T>
int close(T* it) {
  return destroy(it);
}
template <class T>
using LtOwned = Unique<T*, close<T>, static_cast<T*>(nullptr)>;

/// Made for every call: 0.1 us on a server core for a description and three layouts, less than a
/// cache would need for its lock.
class LtProblem {
 public:
  /// `is_fused`: with the epilogue; else the plain product. `product` outlives this.
  LtProblem(const LtDevice& device, const Gemm& product, bool is_fused);

  /// The heuristic's answers, best first. Empty where cuBLASLt has no algorithm; raises for
  /// anything else.
  std::vector<cublaslt::HeuristicResult> candidates(int count) const;
  /// cublasLtMatmulAlgoCheck's status; fills the workspace's size.
  int check(const cublaslt::Algorithm& algorithm, int64_t& workspace_bytes) const;
  int enqueue(const cublaslt::Algorithm& algorithm, void* workspace, int64_t workspace_bytes,
              cuda::StreamHandle stream) const;

 private:
  template <class T>
  void set(cublaslt::DescriptionAttribute attribute, const T& value);

  const LtDevice& device_;
  const Gemm& product_;
  LtOwned<cublaslt::MatmulDescription> description_;
  LtOwned<cublaslt::MatrixLayout> a_, b_, c_;  // in our words: a_ is cuBLASLt's B
};

}  // namespace tp_native::kernels
