// SPDX-License-Identifier: Apache-2.0
#include "kernels/gemm.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "core/clock.h"
#include "kernels/gemm_choice.h"

namespace tp_native::kernels {
namespace {

constexpr int64_t kZeroDepth = 8;  // rows of 16 bytes and more: any epilogue can be fused
constexpr int kTuningRounds = 5;
constexpr int kTuningRepeats = 10;
constexpr double kTuningTimeout_s = 60;
// Another candidate must be faster than the heuristic's by more than repeated timings of one
// differ.
constexpr double kTuningGain = 0.99;
constexpr double kNever_us = std::numeric_limits<double>::infinity();
constexpr const char* kRefused = "cuBLASLt offered algorithms that it then refused to run";

/// A workspace is memory of a stream: what follows on the stream may write it again. The mutex
/// keeps the kernels of one product together, which may be several.
struct KeptWorkspace {
  std::mutex mutex;
  std::optional<cuda::Workspace> memory;
};
struct KeptWorkspaces {
  std::mutex mutex;
  std::map<std::pair<int, cuda::StreamHandle>, std::shared_ptr<KeptWorkspace>> by_stream;
};
KeptWorkspaces& kept_workspaces() {
  static auto* const all = new KeptWorkspaces;  // never ends: the driver may go first
  return *all;
}

std::shared_ptr<KeptWorkspace> kept_workspace(int device, cuda::StreamHandle stream) {
  KeptWorkspaces& all = kept_workspaces();
  std::lock_guard lock(all.mutex);
  auto& kept = all.by_stream[{device, stream}];
  if (!kept) kept = std::make_shared<KeptWorkspace>();
  return kept;
}

/// A graph outlives its capture and runs on any stream, and one handle stands for every thread's
/// own default stream: these get memory of their own.
bool may_keep_workspace(cuda::StreamHandle stream) {
  const auto per_thread = reinterpret_cast<cuda::StreamHandle>(2);  // CU_STREAM_PER_THREAD
  return stream != per_thread && !cuda::is_capturing(stream);
}

int enqueue(const LtDevice& device, const LtProblem& problem, const GemmChoice& choice,
            cuda::StreamHandle stream) {
  constexpr const char* kWhat = "the workspace of matrix products";
  const int64_t bytes = choice.workspace_bytes;
  if (bytes == 0) return problem.enqueue(choice.algorithm, nullptr, 0, stream);
  if (!may_keep_workspace(stream)) {
    const cuda::Workspace workspace(bytes, stream, kWhat);
    return problem.enqueue(choice.algorithm, workspace.data(), bytes, stream);
  }
  const std::shared_ptr<KeptWorkspace> kept = kept_workspace(device.index, stream);
  std::lock_guard lock(kept->mutex);
  if (!kept->memory) kept->memory.emplace(device.workspace_bytes, stream, kWhat);
  return problem.enqueue(choice.algorithm, kept->memory->data(), device.workspace_bytes, stream);
}

GemmPlan plan_of(const Gemm& product, const GemmChoice& choice) {
  return {.is_fused = choice.is_fused,
          .is_aligned = is_aligned(product),
          .source = choice.source,
          .workspace_bytes = choice.workspace_bytes,
          .why_not_fused = choice.why_not_fused};
}

/// The product where k = 0: zeros, so that every epilogue comes out as it would.
Gemm of_zeros(Gemm product, const void* zeros) {
  product.k = kZeroDepth;
  product.a = {zeros, kZeroDepth, false};
  product.b = {zeros, kZeroDepth, true};
  return product;
}

bool is_empty(const Gemm& g) { return g.m == 0 || g.n == 0; }

/// Of a product without values: BiasGradA and BiasGradB may still be sums over something.
GemmPlan plan_of_nothing(const Gemm& g) {
  const bool sums_operand =
      g.epilogue == GemmEpilogue::kBiasGradA || g.epilogue == GemmEpilogue::kBiasGradB;
  GemmPlan nothing{.source = GemmPlan::Source::kNoKernel};
  nothing.is_fused = !sums_operand || bias_grad_size(g) == 0 || g.k == 0;
  if (!nothing.is_fused) nothing.why_not_fused = "the product is empty, the bias gradient is not";
  return nothing;
}

GemmPlan gemm_of_nothing(const Gemm& g, cuda::StreamHandle stream) {
  const GemmPlan plan = plan_of_nothing(g);
  if (const int64_t size = bias_grad_size(g); plan.is_fused && size > 0) {
    TPN_CUDA(
        cuda::driver().MemsetD8Async(cuda::address(g.bias_grad), 0,
                                     static_cast<size_t>(size) * item_bytes(g.out_dtype), stream),
        "zeroing a bias gradient");
  }
  return plan;
}

void wait_for(const cuda::Event& event) {
  const double deadline_s = now_s() + kTuningTimeout_s;
  while (!event.is_reached()) {
    TPN_CHECK(now_s() < deadline_s, "tuning a GEMM: the stream did not come so far in ",
              kTuningTimeout_s, " s; what was enqueued before it may be stuck");
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

/// The product with outputs of its own, so that timing it changes nothing.
class Rehearsal {
 public:
  Rehearsal(const Gemm& g, cuda::StreamHandle stream)
      : c_(c_bytes(g), stream, kWhat),
        aux_(writes_aux(g) ? aux_bytes(g.epilogue, g.out_dtype, g.m, g.aux_ld) : 0, stream, kWhat),
        bias_grad_(bias_grad_size(g) * static_cast<int64_t>(item_bytes(g.out_dtype)), stream,
                   kWhat),
        product_(g) {
    if (g.accumulates) cuda::copy(c_.data(), g.c, c_bytes(g), stream);
    product_.c = c_.data();
    if (aux_.data()) product_.aux = aux_.data();
    if (bias_grad_.data()) product_.bias_grad = bias_grad_.data();
  }
  const Gemm& product() const { return product_; }

 private:
  static constexpr const char* kWhat = "tuning a GEMM";
  static int64_t c_bytes(const Gemm& g) {
    return ((g.m - 1) * g.ldc + g.n) * static_cast<int64_t>(item_bytes(g.out_dtype));
  }
  static bool writes_aux(const Gemm& g) { return g.epilogue < GemmEpilogue::kDRelu; }

  cuda::Workspace c_, aux_, bias_grad_;
  Gemm product_;
};

/// Microseconds of one product; infinite where it is refused.
double time_us(const LtDevice& device, const LtProblem& problem, const GemmChoice& choice,
               cuda::StreamHandle stream, const cuda::Event& begin, const cuda::Event& end) {
  begin.record(stream);
  for (int i = 0; i < kTuningRepeats; ++i) {
    const int status = enqueue(device, problem, choice, stream);
    if (status == cublaslt::kNotSupported || status == cublaslt::kInvalidValue) return kNever_us;
    if (status != cublaslt::kSuccess)
      cublaslt::fail(cublaslt::api(), status, "cublasLtMatmul", "tuning a GEMM");
  }
  end.record(stream);
  wait_for(end);
  float ms = 0;
  TPN_CUDA(cuda::driver().EventElapsedTime(&ms, begin.get(), end.get()), "tuning a GEMM");
  return 1e3 * ms / kTuningRepeats;
}

}  // namespace

GemmPlan plan(const Gemm& product) {
  check(product);
  if (is_empty(product)) return plan_of_nothing(product);
  const Gemm g =
      product.k > 0 ? product : of_zeros(product, reinterpret_cast<const void*>(uintptr_t{256}));
  return plan_of(g, choice_for(current_lt_device(), g));
}

GemmPlan gemm(const Gemm& g, cuda::StreamHandle stream) {
  check(g);
  if (is_empty(g)) return gemm_of_nothing(g, stream);
  if (g.k == 0) {
    const int64_t bytes =
        std::max(g.m, g.n) * kZeroDepth * static_cast<int64_t>(item_bytes(g.dtype));
    const cuda::Workspace zeros(bytes, stream, "the factors of a product of zeros");
    TPN_CUDA(cuda::driver().MemsetD8Async(cuda::address(zeros.data()), 0,
                                          static_cast<size_t>(bytes), stream),
             "zeroing ", bytes, " bytes");
    return gemm(of_zeros(g, zeros.data()), stream);
  }
  const LtDevice& device = current_lt_device();
  GemmChoice choice = choice_for(device, g);
  int status = enqueue(device, LtProblem(device, g, choice.is_fused), choice, stream);
  if (status == cublaslt::kNotSupported && choice.is_fused && g.epilogue != GemmEpilogue::kNone &&
      choice.source == GemmPlan::Source::kHeuristic) {
    choice = heuristic_choices(device, g, 1, kRefused).front();
    keep_choice(device, g, choice);
    status = enqueue(device, LtProblem(device, g, false), choice, stream);
  }
  if (status != cublaslt::kSuccess) [[unlikely]] {
    cublaslt::fail(cublaslt::api(), status, "cublasLtMatmul",
                   concat("GEMM of ", text_of(key_of(device, g))));
  }
  return plan_of(g, choice);
}

GemmTuning tune(const Gemm& g, cuda::StreamHandle stream, int candidates) {
  check(g);
  TPN_CHECK(candidates > 0, "tuning a GEMM among ", candidates, " candidates");
  TPN_CHECK(!cuda::is_capturing(stream),
            "a GEMM cannot be tuned while its stream is captured: tune before the capture");
  if (is_empty(g) || g.k == 0) return {.plan = plan(g), .best = 0, .us = {}};
  const LtDevice& device = current_lt_device();
  const Rehearsal rehearsal(g, stream);
  std::vector<GemmChoice> all = heuristic_choices(device, g, candidates);
  const LtProblem problem(device, rehearsal.product(), all.front().is_fused);
  const cuda::Event begin(true), end(true);
  std::vector<double> us(all.size(), kNever_us);
  std::vector<bool> is_refused(all.size());
  // Round by round, so that a clock that changes meanwhile changes for all; the first one warms up.
  for (int round = 0; round <= kTuningRounds; ++round) {
    for (size_t i = 0; i < all.size(); ++i) {
      if (is_refused[i]) continue;
      const double took_us = time_us(device, problem, all[i], stream, begin, end);
      is_refused[i] = took_us == kNever_us;
      if (round > 0) us[i] = is_refused[i] ? kNever_us : std::min(us[i], took_us);
    }
  }
  const size_t fastest = static_cast<size_t>(std::ranges::min_element(us) - us.begin());
  const size_t best = us[fastest] < us[0] * kTuningGain ? fastest : 0;
  if (us[best] == kNever_us && all[best].is_fused)
    all[best] = heuristic_choices(device, g, 1, kRefused).front();
  all[best].source = GemmPlan::Source::kTuned;
  keep_choice(device, g, all[best]);
  return {.plan = plan_of(g, all[best]), .best = static_cast<int>(best), .us = std::move(us)};
}

void forget_stream(cuda::StreamHandle stream) {
  KeptWorkspaces& all = kept_workspaces();
  std::lock_guard lock(all.mutex);
  std::erase_if(all.by_stream, [stream](const auto& kept) { return kept.first.second == stream; });
}

}  // namespace tp_native::kernels
