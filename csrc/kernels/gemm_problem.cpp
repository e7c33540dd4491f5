// SPDX-License-Identifier: Apache-2.0
#include "kernels/gemm_problem.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>

namespace tp_native::kernels {
namespace {

using cublaslt::api;
using cublaslt::EpilogueValue;

enum class Aux : uint8_t { kNone, kMask, kArgument };

struct EpilogueTraits {
  const char* name;
  EpilogueValue value;
  bool has_bias;
  bool has_bias_grad;
  Aux aux;
};

// In the order of GemmEpilogue. BiasGradA and B change places: cuBLASLt's A is our B.
constexpr EpilogueTraits kEpilogues[] = {
    {"none", EpilogueValue::kDefault, false, false, Aux::kNone},
    {"bias", EpilogueValue::kBias, true, false, Aux::kNone},
    {"relu", EpilogueValue::kRelu, false, false, Aux::kNone},
    {"relu_bias", EpilogueValue::kReluBias, true, false, Aux::kNone},
    {"relu_aux", EpilogueValue::kReluAux, false, false, Aux::kMask},
    {"relu_aux_bias", EpilogueValue::kReluAuxBias, true, false, Aux::kMask},
    {"gelu_tanh", EpilogueValue::kGelu, false, false, Aux::kNone},
    {"gelu_tanh_bias", EpilogueValue::kGeluBias, true, false, Aux::kNone},
    {"gelu_tanh_aux", EpilogueValue::kGeluAux, false, false, Aux::kArgument},
    {"gelu_tanh_aux_bias", EpilogueValue::kGeluAuxBias, true, false, Aux::kArgument},
    {"drelu", EpilogueValue::kDRelu, false, false, Aux::kMask},
    {"drelu_bias_grad", EpilogueValue::kDReluBiasGrad, false, true, Aux::kMask},
    {"dgelu_tanh", EpilogueValue::kDGelu, false, false, Aux::kArgument},
    {"dgelu_tanh_bias_grad", EpilogueValue::kDGeluBiasGrad, false, true, Aux::kArgument},
    {"bias_grad_a", EpilogueValue::kBiasGradB, false, true, Aux::kNone},
    {"bias_grad_b", EpilogueValue::kBiasGradA, false, true, Aux::kNone},
};
static_assert(std::size(kEpilogues) == static_cast<size_t>(GemmEpilogue::kBiasGradB) + 1);

const EpilogueTraits& traits(GemmEpilogue epilogue) {
  const auto index = static_cast<size_t>(epilogue);
  TPN_CHECK(index < std::size(kEpilogues), "unknown GEMM epilogue ", index);
  return kEpilogues[index];
}

int64_t aux_granule(GemmEpilogue epilogue) {
  return traits(epilogue).aux == Aux::kMask ? 128 : traits(epilogue).aux == Aux::kArgument ? 8 : 1;
}

int lt_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return cublaslt::kReal64F;
    case DType::kFloat16:
      return cublaslt::kReal16F;
    case DType::kBFloat16:
      return cublaslt::kReal16BF;
    default:
      return cublaslt::kReal32F;
  }
}

void check_operand(const char* which, const GemmOperand& operand, int64_t rows, int64_t columns) {
  const int64_t width = operand.is_transposed ? rows : columns;
  TPN_CHECK(operand.ld >= width, "GEMM: ", which, " has rows of ", width,
            " values, and a leading dimension of ", operand.ld);
  TPN_CHECK(operand.data || rows == 0 || columns == 0, "GEMM: ", which, " is null");
}

LtOwned<cublaslt::MatrixLayout> layout(DType dtype, int64_t stored_rows, int64_t width,
                                       int64_t ld) {
  cublaslt::MatrixLayout* made = nullptr;
  TPN_CUBLASLT(
      api(), MatrixLayoutCreate,
      (&made, lt_type(dtype), static_cast<uint64_t>(width), static_cast<uint64_t>(stored_rows), ld),
      "describing a matrix [", stored_rows, ", ", width, "]");
  return LtOwned<cublaslt::MatrixLayout>(made);
}

LtOwned<cublaslt::MatrixLayout> layout(DType dtype, const GemmOperand& operand, int64_t rows,
                                       int64_t columns) {
  return operand.is_transposed ? layout(dtype, columns, rows, operand.ld)
                               : layout(dtype, rows, columns, operand.ld);
}

}  // namespace

const char* name(GemmEpilogue epilogue) { return traits(epilogue).name; }
bool has_bias(GemmEpilogue epilogue) { return traits(epilogue).has_bias; }
bool has_bias_grad(GemmEpilogue epilogue) { return traits(epilogue).has_bias_grad; }
bool has_aux(GemmEpilogue epilogue) { return traits(epilogue).aux != Aux::kNone; }
uint32_t lt_value(GemmEpilogue epilogue) { return traits(epilogue).value; }

int64_t bias_grad_size(const Gemm& g) {
  if (!has_bias_grad(g.epilogue)) return 0;
  return g.epilogue == GemmEpilogue::kBiasGradA ? g.m : g.n;
}

int64_t aux_ld(GemmEpilogue epilogue, int64_t n) {
  const int64_t granule = aux_granule(epilogue);
  return (n + granule - 1) / granule * granule;
}

int64_t aux_bytes(GemmEpilogue epilogue, DType out_dtype, int64_t m, int64_t ld) {
  switch (traits(epilogue).aux) {
    case Aux::kMask:
      return (m * ld + 7) / 8;
    case Aux::kArgument:
      return m * ld * static_cast<int64_t>(item_bytes(out_dtype));
    default:
      return 0;
  }
}

const LtDevice& current_lt_device() {
  static std::mutex mutex;
  static auto* const devices = new std::map<int, LtDevice>;
  int index = -1;
  TPN_CUDA(cuda::driver().CtxGetDevice(&index), "GEMM: no GPU is current on this thread");
  std::lock_guard lock(mutex);
  if (const auto found = devices->find(index); found != devices->end()) return found->second;
  LtDevice device;
  device.index = index;
  const auto attribute = [&](int number) {
    int value = 0;
    TPN_CUDA(cuda::driver().DeviceGetAttribute(&value, number, index), "cuda:", index);
    return value;
  };
  device.compute_capability = attribute(75) * 10 + attribute(76);
  device.multiprocessors = attribute(16);
  // What the cuBLAS guide recommends for cublasSetWorkspace: 32 MiB from Hopper on, before it 4
  // MiB.
  device.workspace_bytes = int64_t{device.compute_capability >= 90 ? 32 : 4} << 20;
  TPN_CUBLASLT(api(), Create, (&device.handle), "starting cuBLASLt ", api().path,
               " on cuda:", index);
  return devices->emplace(index, device).first->second;
}

void check(const Gemm& g) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  for (const int64_t size : {g.m, g.n, g.k}) {
    TPN_CHECK(size >= 0 && size <= kMost, "GEMM [", g.m, ", ", g.n, ", ", g.k,
              "]: sizes go from 0 to ", kMost);
  }
  const bool is_half = g.dtype == DType::kFloat16 || g.dtype == DType::kBFloat16;
  TPN_CHECK(is_floating(g.dtype) &&
                (g.out_dtype == g.dtype || (is_half && g.out_dtype == DType::kFloat32)),
            "GEMM of ", tp_native::name(g.dtype), " into ", tp_native::name(g.out_dtype),
            ": the result has the factors' floating dtype, or float32 where they have 16 bits");
  TPN_CHECK(!g.allows_tf32 || g.dtype == DType::kFloat32, "GEMM of ", tp_native::name(g.dtype),
            ": TF32 is for float32");
  check_operand("A", g.a, g.m, g.k);
  check_operand("B", g.b, g.k, g.n);
  TPN_CHECK(g.ldc >= g.n && (g.c || g.m == 0 || g.n == 0), "GEMM: C has rows of ", g.n,
            " values, a leading dimension of ", g.ldc, g.c ? "" : ", and is null");
  TPN_CHECK(g.sm_target >= 0, "GEMM: planned for ", g.sm_target, " multiprocessors");
  const EpilogueTraits& epilogue = traits(g.epilogue);
  const bool is_empty = g.m == 0 || g.n == 0;
  TPN_CHECK(!epilogue.has_bias || g.bias || is_empty, "GEMM with epilogue ", epilogue.name,
            ": bias is null");
  TPN_CHECK(g.bias_grad || bias_grad_size(g) == 0, "GEMM with epilogue ", epilogue.name,
            ": bias_grad is null");
  TPN_CHECK(epilogue.aux == Aux::kNone || ((g.aux || is_empty) && g.aux_ld >= g.n),
            "GEMM with epilogue ", epilogue.name, ": aux has rows of ", g.n,
            " values, a leading dimension of ", g.aux_ld, g.aux ? "" : ", and is null");
}

int alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return static_cast<int>(std::min<uintptr_t>(address & (~address + 1), 256));
}

bool is_aligned(const Gemm& g) {
  const auto is_good = [](const void* data, int64_t ld, DType dtype) {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(ld) * item_bytes(dtype)) %
               16 ==
           0;
  };
  return is_good(g.a.data, g.a.ld, g.dtype) && is_good(g.b.data, g.b.ld, g.dtype) &&
         is_good(g.c, g.ldc, g.out_dtype);
}

const char* why_not_fusible(const Gemm& g) {
  if (g.aux_ld % aux_granule(g.epilogue) == 0 || !has_aux(g.epilogue)) return nullptr;
  return traits(g.epilogue).aux == Aux::kMask
             ? "the leading dimension of ReLU's mask is no multiple of 128 bits"
             : "the leading dimension of GELU's aux is no multiple of 8";
}

LtProblem::LtProblem(const LtDevice& device, const Gemm& g, bool is_fused)
    : device_(device), product_(g) {
  const bool is_double = g.dtype == DType::kFloat64;
  const cublaslt::ComputeType compute = is_double       ? cublaslt::kCompute64F
                                        : g.allows_tf32 ? cublaslt::kCompute32FFastTf32
                                                        : cublaslt::kCompute32F;
  cublaslt::MatmulDescription* description = nullptr;
  TPN_CUBLASLT(api(), MatmulDescCreate,
               (&description, compute, is_double ? cublaslt::kReal64F : cublaslt::kReal32F),
               "describing a GEMM");
  description_ = LtOwned<cublaslt::MatmulDescription>(description);
  set(cublaslt::kTransA, g.b.is_transposed ? cublaslt::kTransposed : cublaslt::kPlain);
  set(cublaslt::kTransB, g.a.is_transposed ? cublaslt::kTransposed : cublaslt::kPlain);
  if (g.sm_target > 0) set(cublaslt::kSmCountTarget, int32_t{g.sm_target});
  if (is_fused && g.epilogue != GemmEpilogue::kNone) {
    const EpilogueTraits& epilogue = traits(g.epilogue);
    set(cublaslt::kEpilogue, epilogue.value);
    if (epilogue.has_bias) set(cublaslt::kBiasPointer, g.bias);
    if (epilogue.has_bias_grad) set(cublaslt::kBiasPointer, g.bias_grad);
    if (epilogue.aux != Aux::kNone) {
      set(cublaslt::kAuxPointer, g.aux);
      set(cublaslt::kAuxLd, g.aux_ld);
    }
  }
  a_ = layout(g.dtype, g.a, g.m, g.k);
  b_ = layout(g.dtype, g.b, g.k, g.n);
  c_ = layout(g.out_dtype, g.m, g.n, g.ldc);
}

template <class T>
void LtProblem::set(cublaslt::DescriptionAttribute attribute, const T& value) {
  TPN_CUBLASLT(api(), MatmulDescSetAttribute,
               (description_.get(), attribute, &value, sizeof(value)),
               "describing a GEMM with epilogue ", name(product_.epilogue), ", attribute ",
               static_cast<int>(attribute));
}

std::vector<cublaslt::HeuristicResult> LtProblem::candidates(int count) const {
  const Gemm& g = product_;
  cublaslt::MatmulPreference* made = nullptr;
  TPN_CUBLASLT(api(), MatmulPreferenceCreate, (&made), "asking for algorithms");
  const LtOwned<cublaslt::MatmulPreference> preference(made);
  const auto prefer = [&](cublaslt::PreferenceAttribute attribute, const auto& value) {
    TPN_CUBLASLT(api(), MatmulPreferenceSetAttribute,
                 (preference.get(), attribute, &value, sizeof(value)),
                 "asking for algorithms, attribute ", static_cast<int>(attribute));
  };
  prefer(cublaslt::kMaxWorkspaceBytes, static_cast<uint64_t>(device_.workspace_bytes));
  // Untold, cuBLASLt takes every pointer for a multiple of 256 bytes.
  prefer(cublaslt::kMinAlignmentA, static_cast<uint32_t>(alignment_of(g.b.data)));
  prefer(cublaslt::kMinAlignmentB, static_cast<uint32_t>(alignment_of(g.a.data)));
  prefer(cublaslt::kMinAlignmentC, static_cast<uint32_t>(alignment_of(g.c)));
  prefer(cublaslt::kMinAlignmentD, static_cast<uint32_t>(alignment_of(g.c)));
  // Parts of a sum over k that are rounded to 16 bits are no float32 accumulation.
  if (item_bytes(g.out_dtype) == 2)
    prefer(cublaslt::kReductionSchemeMask, uint32_t{cublaslt::kReduceInComputeType});

  std::vector<cublaslt::HeuristicResult> results(static_cast<size_t>(count));
  int found = 0;
  const int status =
      api().MatmulAlgoGetHeuristic(device_.handle, description_.get(), b_.get(), a_.get(), c_.get(),
                                   c_.get(), preference.get(), count, results.data(), &found);
  if (status == cublaslt::kNotSupported || status == cublaslt::kInvalidValue) return {};
  if (status != cublaslt::kSuccess)
    cublaslt::fail(api(), status, "cublasLtMatmulAlgoGetHeuristic", "asking for algorithms");
  results.resize(static_cast<size_t>(found));
  std::erase_if(results, [](const auto& result) { return result.status != cublaslt::kSuccess; });
  return results;
}

int LtProblem::check(const cublaslt::Algorithm& algorithm, int64_t& workspace_bytes) const {
  cublaslt::HeuristicResult result{};
  const int status = api().MatmulAlgoCheck(device_.handle, description_.get(), b_.get(), a_.get(),
                                           c_.get(), c_.get(), &algorithm, &result);
  workspace_bytes = static_cast<int64_t>(result.workspace_bytes);
  return status;
}

int LtProblem::enqueue(const cublaslt::Algorithm& algorithm, void* workspace,
                       int64_t workspace_bytes, cuda::StreamHandle stream) const {
  const Gemm& g = product_;
  const float one = 1, beta = g.accumulates ? 1 : 0;
  const double one64 = one, beta64 = beta;
  const bool is_double = g.dtype == DType::kFloat64;
  return api().Matmul(device_.handle, description_.get(),
                      is_double ? static_cast<const void*>(&one64) : &one, g.b.data, b_.get(),
                      g.a.data, a_.get(), is_double ? static_cast<const void*>(&beta64) : &beta,
                      g.c, c_.get(), g.c, c_.get(), &algorithm, workspace,
                      static_cast<size_t>(workspace_bytes), stream);
}

}  // namespace tp_native::kernels
