// SPDX-License-Identifier: Apache-2.0
// cuBLASLt reached by dlsym, with declarations of our own for the part of cublasLt.h that is
// called: the same build runs beside a torch for CUDA 12, for CUDA 13, or for no CUDA at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/cuda_driver.h"
#include "core/error.h"

namespace tp_native::cublaslt {

// Opaque: only pointers to these cross the interface.
struct Context;
struct MatmulDescription;
struct MatrixLayout;
struct MatmulPreference;

/// cublasLtMatmulAlgo_t: plain bytes, to be stored and used again with the same library version.
struct Algorithm {
  uint64_t data[8];
};

/// cublasLtMatmulHeuristicResult_t
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Algorithm) == 64 && sizeof(HeuristicResult) == 96);

enum Status : int {
  kSuccess = 0,
  kInvalidValue = 7,
  kArchMismatch = 8,
  kNotSupported = 15,
};

enum ComputeType : int { kCompute32F = 68, kCompute64F = 70, kCompute32FFastTf32 = 77 };
enum DataType : int { kReal32F = 0, kReal64F = 1, kReal16F = 2, kReal16BF = 14 };
enum Operation : int32_t { kPlain = 0, kTransposed = 1 };

/// cublasLtMatmulDescAttributes_t
enum DescriptionAttribute : int {
  kTransA = 3,          // int32_t
  kTransB = 4,          // int32_t
  kEpilogue = 7,        // uint32_t
  kBiasPointer = 8,     // void*
  kAuxPointer = 11,     // void*
  kAuxLd = 12,          // int64_t
  kSmCountTarget = 15,  // int32_t
};

/// cublasLtMatmulPreferenceAttributes_t
enum PreferenceAttribute : int {
  kMaxWorkspaceBytes = 1,    // uint64_t
  kReductionSchemeMask = 3,  // uint32_t
  kMinAlignmentA = 5,        // uint32_t, this and the next three
  kMinAlignmentB = 6,
  kMinAlignmentC = 7,
  kMinAlignmentD = 8,
};

/// cublasLtReductionScheme_t
enum ReductionScheme : uint32_t {
  kReduceInPlace = 1,  // in the output's type
  kReduceInComputeType = 2,
  kReduceInOutputType = 4,
  kReduceAny = 7,
};

/// cublasLtEpilogue_t. Its GELU is the tanh form.
enum EpilogueValue : uint32_t {
  kDefault = 1,
  kRelu = 2,
  kBias = 4,
  kReluBias = 6,
  kGelu = 32,
  kGeluBias = 36,
  kReluAux = 130,
  kReluAuxBias = 134,
  kDRelu = 136,
  kDReluBiasGrad = 152,
  kGeluAux = 160,
  kGeluAuxBias = 164,
  kDGelu = 192,
  kDGeluBiasGrad = 208,
  kBiasGradA = 256,
  kBiasGradB = 512,
};

#define TPN_CUBLASLT_API(X)                                                                        \
  X(Create, int, (Context**))                                                                      \
  X(GetVersion, size_t, ())                                                                        \
  X(GetStatusName, const char*, (int))                                                             \
  X(GetStatusString, const char*, (int))                                                           \
  X(MatmulDescCreate, int, (MatmulDescription**, int compute_type, int scale_type))                \
  X(MatmulDescSetAttribute, int, (MatmulDescription*, int, const void*, size_t))                   \
  X(MatmulDescDestroy, int, (MatmulDescription*))                                                  \
  X(MatrixLayoutCreate, int, (MatrixLayout**, int type, uint64_t rows, uint64_t cols, int64_t ld)) \
  X(MatrixLayoutDestroy, int, (MatrixLayout*))                                                     \
  X(MatmulPreferenceCreate, int, (MatmulPreference**))                                             \
  X(MatmulPreferenceSetAttribute, int, (MatmulPreference*, int, const void*, size_t))              \
  X(MatmulPreferenceDestroy, int, (MatmulPreference*))                                             \
  X(MatmulAlgoGetHeuristic, int,                                                                   \
    (Context*, MatmulDescription*, MatrixLayout * a, MatrixLayout * b, MatrixLayout * c,           \
     MatrixLayout * d, MatmulPreference*, int wanted, HeuristicResult*, int* found))               \
  X(MatmulAlgoCheck, int,                                                                          \
    (Context*, MatmulDescription*, MatrixLayout * a, MatrixLayout * b, MatrixLayout * c,           \
     MatrixLayout * d, const Algorithm*, HeuristicResult*))                                        \
  X(Matmul, int,                                                                                   \
    (Context*, MatmulDescription*, const void* alpha, const void* a, MatrixLayout*, const void* b, \
     MatrixLayout*, const void* beta, const void* c, MatrixLayout*, void* d, MatrixLayout*,        \
     const Algorithm*, void* workspace, size_t workspace_bytes, cuda::StreamHandle))

struct Api {
#define TPN_DECLARE(name, result, arguments) result(*name) arguments = nullptr;
  TPN_CUBLASLT_API(TPN_DECLARE)
#undef TPN_DECLARE
  size_t version = 0;  ///< 130100 for 13.1.0
  std::string path;
};

/// The process's cuBLASLt: the copy that torch has mapped, else what the system's search finds,
/// else the places of search_in(). Raises if there is none or it is of another major version: the
/// file, what was found, and the way out.
const Api& api();
/// Whether api() works; `why` says why not.
bool is_available(std::string& why);
/// Files, or folders that hold libcublasLt.so.13 or .12, to try last: the wheels' folders. Before
/// the first api().
void search_in(const std::vector<std::string>& places);
/// Tests: the one name to look for in place of libcublasLt.so.13 and .12. Before the first api().
void use_library(const std::string& name);

[[noreturn]] void fail(const Api& lt, int status, const char* call, const std::string& what);

/// TPN_CUBLASLT(lt, Matmul, (arguments), what...)
#define TPN_CUBLASLT(lt, name, arguments, ...)                                      \
  do {                                                                              \
    if (const int tpn_status_ = (lt).name arguments; tpn_status_ != 0) [[unlikely]] \
      ::tp_native::cublaslt::fail(lt, tpn_status_, "cublasLt" #name,                \
                                  ::tp_native::concat(__VA_ARGS__));                \
  } while (false)

}  // namespace tp_native::cublaslt
