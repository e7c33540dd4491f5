// SPDX-License-Identifier: Apache-2.0
#include "kernels/gemm_choice.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <unordered_map>

namespace tp_native::kernels {
namespace {

// Shapes follow the batch: a server that has seen each length once would keep a table without end.
constexpr size_t kMostChoices = 8192;

static_assert(std::has_unique_object_representations_v<GemmKey> && sizeof(GemmKey) % 8 == 0);

/// FNV-1a over words rather than bytes: a quick mix for a table, and enough to notice damage.
uint64_t hash_of(const void* data, size_t bytes) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t at = 0; at + 8 <= bytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, static_cast<const char*>(data) + at, 8);
    hash = std::rotl((hash ^ word) * 0x100000001b3u, 29);
  }
  return hash;
}

struct KeyHash {
  size_t operator()(const GemmKey& key) const { return hash_of(&key, sizeof(key)); }
};

struct Choices {
  std::mutex mutex;
  std::unordered_map<GemmKey, GemmChoice, KeyHash> by_key;
};
Choices& choices() {
  static auto* const one = new Choices;
  return *one;
}

void keep(Choices& all, const GemmKey& key, const GemmChoice& choice) {
  if (all.by_key.size() >= kMostChoices) {
    std::erase_if(all.by_key, [](const auto& entry) {
      return entry.second.source == GemmPlan::Source::kHeuristic;
    });
  }
  all.by_key.insert_or_assign(key, choice);
}

/// A choice on its way to another rank.
struct Parcel {
  char magic[8] = {'T', 'P', 'N', 'g', 'e', 'm', 'm', '1'};
  uint64_t library_version = 0;
  int32_t compute_capability = 0;
  int32_t multiprocessors = 0;
  GemmKey key{};  // of device 0: ranks number theirs as they like
  cublaslt::Algorithm algorithm{};
  int64_t workspace_bytes = 0;
  int64_t is_fused = 0;
  uint64_t checksum = 0;  // last
};
static_assert(std::has_unique_object_representations_v<Parcel> && sizeof(Parcel) % 8 == 0);

uint64_t checksum_of(const Parcel& parcel) {
  return hash_of(&parcel, sizeof(parcel) - sizeof(parcel.checksum));
}

}  // namespace

GemmKey key_of(const LtDevice& device, const Gemm& g) {
  const bool has_aux_matrix = has_aux(g.epilogue);
  const void* const bias = has_bias(g.epilogue)        ? g.bias
                           : has_bias_grad(g.epilogue) ? g.bias_grad
                                                       : nullptr;
  const auto alignment = [](const void* p) { return static_cast<int16_t>(alignment_of(p)); };
  return {.m = g.m,
          .n = g.n,
          .k = g.k,
          .lda = g.a.ld,
          .ldb = g.b.ld,
          .ldc = g.ldc,
          .aux_ld = has_aux_matrix ? g.aux_ld : 0,
          .device = device.index,
          .sm_target = g.sm_target,
          .a_alignment = alignment(g.a.data),
          .b_alignment = alignment(g.b.data),
          .c_alignment = alignment(g.c),
          .bias_alignment = alignment(bias),
          .aux_alignment = alignment(has_aux_matrix ? g.aux : nullptr),
          .dtype = static_cast<uint8_t>(g.dtype),
          .out_dtype = static_cast<uint8_t>(g.out_dtype),
          .epilogue = static_cast<uint8_t>(g.epilogue),
          .a_is_transposed = g.a.is_transposed,
          .b_is_transposed = g.b.is_transposed,
          .accumulates = g.accumulates,
          .allows_tf32 = g.allows_tf32,
          .reserved = {}};
}

std::string text_of(const GemmKey& k) {
  return concat(
      tp_native::name(static_cast<DType>(k.dtype)), " into ",
      tp_native::name(static_cast<DType>(k.out_dtype)), " [", k.m, ", ", k.n, ", ", k.k, "]",
      k.a_is_transposed ? ", A transposed" : "", k.b_is_transposed ? ", B transposed" : "",
      k.accumulates ? ", accumulating" : "", k.allows_tf32 ? ", TF32" : "", ", epilogue ",
      name(static_cast<GemmEpilogue>(k.epilogue)), ", leading dimensions ", k.lda, " ", k.ldb, " ",
      k.ldc, " ", k.aux_ld, ", aligned to ", k.a_alignment, " ", k.b_alignment, " ", k.c_alignment,
      " ", k.bias_alignment, " ", k.aux_alignment, " bytes, for ", k.sm_target, " multiprocessors");
}

std::vector<GemmChoice> heuristic_choices(const LtDevice& device, const Gemm& g, int count,
                                          const char* why_not_fused) {
  if (!why_not_fused) why_not_fused = why_not_fusible(g);
  std::vector<cublaslt::HeuristicResult> results;
  if (!why_not_fused) results = LtProblem(device, g, true).candidates(count);
  if (results.empty() && g.epilogue != GemmEpilogue::kNone) {
    if (!why_not_fused)
      why_not_fused =
          "cuBLASLt has no algorithm with this epilogue for these dtypes and alignments";
    results = LtProblem(device, g, false).candidates(count);
  }
  TPN_CHECK(!results.empty(), "cublasLtMatmulAlgoGetHeuristic of ", cublaslt::api().path,
            " knows no algorithm for GEMM of ", text_of(key_of(device, g)));
  std::vector<GemmChoice> all;
  for (const cublaslt::HeuristicResult& result : results) {
    all.push_back({.algorithm = result.algorithm,
                   .workspace_bytes = static_cast<int64_t>(result.workspace_bytes),
                   .is_fused = why_not_fused == nullptr,
                   .source = GemmPlan::Source::kHeuristic,
                   .why_not_fused = why_not_fused ? why_not_fused : ""});
  }
  return all;
}

GemmChoice choice_for(const LtDevice& device, const Gemm& product) {
  const GemmKey key = key_of(device, product);
  Choices& all = choices();
  std::lock_guard lock(all.mutex);  // during the heuristic too: it is asked once
  if (const auto found = all.by_key.find(key); found != all.by_key.end()) return found->second;
  const GemmChoice first = heuristic_choices(device, product, 1).front();
  keep(all, key, first);
  return first;
}

void keep_choice(const LtDevice& device, const Gemm& product, const GemmChoice& choice) {
  Choices& all = choices();
  std::lock_guard lock(all.mutex);
  keep(all, key_of(device, product), choice);
}

void forget_choices() {
  Choices& all = choices();
  std::lock_guard lock(all.mutex);
  all.by_key.clear();
}

std::vector<std::byte> export_choice(const Gemm& g) {
  check(g);
  TPN_CHECK(g.m > 0 && g.n > 0 && g.k > 0, "GEMM [", g.m, ", ", g.n, ", ", g.k,
            "] is computed without a choice");
  const LtDevice& device = current_lt_device();
  const GemmChoice choice = choice_for(device, g);
  Parcel parcel;
  parcel.library_version = cublaslt::api().version;
  parcel.compute_capability = device.compute_capability;
  parcel.multiprocessors = device.multiprocessors;
  parcel.key = key_of(device, g);
  parcel.key.device = 0;
  parcel.algorithm = choice.algorithm;
  parcel.workspace_bytes = choice.workspace_bytes;
  parcel.is_fused = choice.is_fused;
  parcel.checksum = checksum_of(parcel);
  std::vector<std::byte> bytes(sizeof(parcel));
  std::memcpy(bytes.data(), &parcel, sizeof(parcel));
  return bytes;
}

void import_choice(const Gemm& g, std::span<const std::byte> bytes) {
  check(g);
  const LtDevice& device = current_lt_device();
  Parcel parcel;
  TPN_CHECK(bytes.size() == sizeof(parcel), "a GEMM choice has ", sizeof(parcel), " bytes, got ",
            bytes.size(), ": it was cut, or written by another version of tp_native");
  std::memcpy(&parcel, bytes.data(), sizeof(parcel));
  TPN_CHECK(std::memcmp(parcel.magic, Parcel{}.magic, sizeof(parcel.magic)) == 0 &&
                parcel.checksum == checksum_of(parcel),
            "a GEMM choice of ", bytes.size(), " bytes is damaged: its checksum does not fit");
  TPN_CHECK(parcel.library_version == cublaslt::api().version,
            "a GEMM choice made with cuBLASLt version ", parcel.library_version,
            " cannot be used with version ", cublaslt::api().version, " (", cublaslt::api().path,
            "): install the same on all hosts");
  TPN_CHECK(parcel.compute_capability == device.compute_capability &&
                parcel.multiprocessors == device.multiprocessors,
            "a GEMM choice made on a GPU of compute capability ", parcel.compute_capability,
            " with ", parcel.multiprocessors, " multiprocessors does not fit cuda:", device.index,
            ", which has ", device.compute_capability, " and ", device.multiprocessors);
  GemmKey here = key_of(device, g);
  here.device = 0;
  TPN_CHECK(parcel.key == here, "a GEMM choice made for ", text_of(parcel.key),
            " does not fit GEMM of ", text_of(here));
  GemmChoice choice{.algorithm = parcel.algorithm,
                    .workspace_bytes = parcel.workspace_bytes,
                    .is_fused = parcel.is_fused != 0,
                    .source = GemmPlan::Source::kImported,
                    .why_not_fused = parcel.is_fused ? "" : "the imported choice does not"};
  int64_t workspace_bytes = 0;
  const int status = LtProblem(device, g, choice.is_fused).check(choice.algorithm, workspace_bytes);
  if (status != cublaslt::kSuccess) {
    cublaslt::fail(cublaslt::api(), status, "cublasLtMatmulAlgoCheck",
                   concat("a GEMM choice for ", text_of(here), " on cuda:", device.index));
  }
  choice.workspace_bytes = std::max(choice.workspace_bytes, workspace_bytes);
  TPN_CHECK(choice.workspace_bytes <= device.workspace_bytes, "a GEMM choice needs ",
            choice.workspace_bytes, " bytes of workspace, at most ", device.workspace_bytes,
            " are given");
  keep_choice(device, g, choice);
}

}  // namespace tp_native::kernels
