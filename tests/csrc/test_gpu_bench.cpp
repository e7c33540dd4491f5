// SPDX-License-Identifier: Apache-2.0
// tpn_microbench's GPU part from end to end over the driver's double. The kernels are doubles that
// take time and compute nothing: what is tested is which operands they get, in what order, and what
// is reported. The times mean nothing.
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <thread>

#include "check.h"
#include "core/shared_library.h"
#include "gpu/kernels.h"
#include "gpu/run.h"
#include "kernels/cublaslt_api.h"
#include "kernels/gemm.h"

using namespace tp_native;  // NOLINT

namespace {

constexpr const char* kDriver = TPN_DOUBLES "/libfake_cuda.so";
uint32_t g_wrong = 0;  // values that every check finds wrong

void enqueue(cuda::StreamHandle stream, double us) {
  using Append = void(cuda::StreamHandle, void (*)(void*), void*);
  static auto* const append =
      reinterpret_cast<Append*>(SharedLibrary::mapped(kDriver).find("fake_cuda_enqueue"));
  append(
      stream,
      [](void* argument) {
        const std::unique_ptr<double> owned(static_cast<double*>(argument));
        std::this_thread::sleep_for(std::chrono::duration<double, std::micro>(*owned));
      },
      new double(us));
}

void check_product(const kernels::Gemm& g) {
  TPN_CHECK(g.a.data && g.b.data && g.c && g.a.ld >= g.k && g.b.ld >= g.k && g.ldc >= g.n,
            "a product without operands");
}

}  // namespace

namespace tp_native::kernels {

GemmPlan gemm(const Gemm& g, cuda::StreamHandle stream) {
  check_product(g);
  enqueue(stream, 20 + 2e-8 * static_cast<double>(g.m) * static_cast<double>(g.n * g.k));
  return {};
}
GemmTuning tune(const Gemm& g, cuda::StreamHandle, int) {
  check_product(g);
  return {};
}
const char* name(GemmEpilogue) { return "any"; }

namespace cuda {
bool is_built() { return true; }
void glu(const Glu& g, StreamHandle stream) {
  TPN_CHECK(g.gate_up && g.out && g.gate_up_stride == 2 * g.columns, "glu");
  enqueue(stream, 60);
}
void apply_epilogue(const SumEpilogue& e, StreamHandle stream) {
  TPN_CHECK(e.sum && e.out && e.residual && e.norm_weight && e.hidden, "apply_epilogue");
  enqueue(stream, 60);
}
void all_reduce_in_one_launch(AllReduceKind, const Peers& p, std::span<const AllReduce> ranks,
                              StreamHandle stream) {
  TPN_CHECK(static_cast<int>(ranks.size()) == p.size && p.abort, "ranks");
  for (int r = 0; r < p.size; ++r) {
    TPN_CHECK(p.data[r] && p.flags[r] && ranks[r].out, "rank ", r);
    TPN_CHECK(2 * ranks[r].rows * ranks[r].columns <= p.buffer_bytes, "rank ", r);
    TPN_CHECK(ranks[r].in || ranks[r].out != p.data[r], "rank ", r);
  }
  enqueue(stream, 60);
}
void all_reduce(AllReduceKind, const Peers&, const AllReduce&, StreamHandle) {}
void reduce_scatter(const Peers&, const ReduceScatter&, StreamHandle) {}
void all_gather(const Peers&, const AllGather&, StreamHandle) {}
void broadcast(const Peers&, const Broadcast&, StreamHandle) {}
}  // namespace cuda

}  // namespace tp_native::kernels

namespace tp_native::bench::gpu {

void fill(void*, int64_t, float, uint32_t, StreamHandle) {}
void copy_in_blocks(void*, const void*, int64_t bytes, int, StreamHandle stream) {
  TPN_CHECK(bytes > 0 && bytes % 16 == 0, bytes);
  enqueue(stream, static_cast<double>(bytes) / 10e3);
}
void bias_gelu(void*, const void*, int64_t, int64_t, StreamHandle stream) { enqueue(stream, 60); }
void empty(StreamHandle stream) { enqueue(stream, 0); }
void hold(int, StreamHandle) {}
void meet_in_one_launch(const kernels::cuda::Peers&, int, int, StreamHandle stream) {
  enqueue(stream, 60);
}
void count_wrong_products(const kernels::Gemm& g, kernels::GemmEpilogue, int, int, uint32_t* wrong,
                          StreamHandle) {
  check_product(g);
  *wrong += g_wrong;
}
void count_wrong_sums(const void* const* in, int ranks, const void* out, int64_t, uint32_t* wrong,
                      StreamHandle) {
  for (int r = 0; r < ranks; ++r) TPN_CHECK(in[r] && in[r] != out, "rank ", r);
  *wrong += g_wrong;
}
void count_wrong_swiglu(const void*, const void*, int64_t, int64_t, uint32_t* wrong, StreamHandle) {
  *wrong += g_wrong;
}
void count_different(const void*, const void*, int64_t, uint32_t* wrong, StreamHandle) {
  *wrong += g_wrong;
}

Graph::Graph(StreamHandle, const std::function<void()>& body)
    : graph_(new std::function<void()>(body)) {}
Graph::~Graph() { delete static_cast<std::function<void()>*>(graph_); }
void Graph::launch(StreamHandle) const { (*static_cast<std::function<void()>*>(graph_))(); }

}  // namespace tp_native::bench::gpu

namespace {

std::string run(const char* parts, int expected) {
  const std::string path = std::filesystem::temp_directory_path() /
                           ("test_gpu_bench." + std::to_string(::getpid()) + ".json");
  std::vector<std::string> words = {"tpn_microbench", "--gpu", "--quick",  "--json",      path,
                                    "--only",         parts,   "--commit", "a \"commit\""};
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  const int status = bench::gpu::run(static_cast<int>(argv.size()), argv.data());
  std::ifstream file(path);
  const std::string json{std::istreambuf_iterator<char>(file), {}};
  std::filesystem::remove(path);
  CHECK_EQ(status, expected);
  return json;
}

bool has(const std::string& json, const std::string& text) {
  return json.find(text) != std::string::npos;
}

}  // namespace

TEST(every_part_gives_its_bars) {
  const std::string json = run("memory,host,gemm,swiglu,chunks,overlap,all_reduce", 0);
  for (const char* bar : {"B1", "B3", "B4", "B8", "B9", "B10", "B11"})
    CHECK(has(json, concat("{\"bar\": \"", bar, "\"")));
  CHECK(has(json, "\"commit\": \"a \\\"commit\\\"\""));
  CHECK(has(json, "\"verified\": true") && has(json, "\"failures\": [\n  ]"));
}

TEST(a_wrong_result_is_a_failure_of_its_part_alone) {
  g_wrong = 3;
  const std::string json = run("swiglu,host", 1);
  g_wrong = 0;
  CHECK(has(json, "{\"part\": \"swiglu\", \"why\": ") && has(json, "SwiGLU: 3 values are wrong"));
  CHECK(has(json, "\"verified\": false") && has(json, "launch of an empty kernel"));
}

int main() {
  ::setenv("FAKE_CUDA_MEMORY", "80000000000", 1);
  cuda::use_driver(kDriver);
  cublaslt::use_library(TPN_DOUBLES "/libfake_cublaslt.so");
  return check::run_all();
}
