// SPDX-License-Identifier: Apache-2.0
// What a call costs the host, and a launch the device: kernels, products, and an all-reduce of one
// rank over NCCL, by our communicator and by NCCL alone (B6).
#include "comm/backends.h"
#include "gpu/report.h"
#include "kernels/gemm.h"

namespace tp_native::bench::gpu {
namespace {

using Calls = std::vector<std::pair<std::string, std::function<void()>>>;

constexpr int kCalls = 500;  // well below what a stream takes before a launch waits

/// Host time of one call, the device idle at first.
std::vector<Timing> time_calls(const Scene& scene, const Calls& calls) {
  std::vector<std::vector<double>> seconds(calls.size());
  const int rounds = 2 * scene.plan().rounds;
  for (int round = -1; round < rounds; ++round) {  // the first one is cold
    for (size_t k = 0; k < calls.size(); ++k) {
      const size_t c = (k + static_cast<size_t>(round + 1)) % calls.size();
      const double start = now_s();
      for (int i = 0; i < kCalls; ++i) calls[c].second();
      const double each = (now_s() - start) / kCalls;
      scene.wait();
      if (round >= 0) seconds[c].push_back(each);
    }
  }
  std::vector<Timing> timings;
  for (std::vector<double>& s : seconds) timings.push_back(summarise(std::move(s)));
  return timings;
}

/// NCCL's own communicator of one rank.
class RawNccl {
 public:
  explicit RawNccl(const comm::nccl::Api& api) : api_(api) {
    comm::nccl::UniqueId id;
    comm::nccl::Config config;
    config.blocking = 1;
    expect("GetUniqueId", api_.GetUniqueId(&id));
    expect("CommInitRankConfig", api_.CommInitRankConfig(&handle_, 1, id, 0, &config));
  }
  ~RawNccl() {
    if (handle_) (void)api_.CommDestroy(handle_);
  }
  RawNccl(const RawNccl&) = delete;
  RawNccl& operator=(const RawNccl&) = delete;

  void all_reduce(const void* in, void* out, int64_t count, StreamHandle stream) const {
    expect("AllReduce",
           api_.AllReduce(in, out, static_cast<size_t>(count),
                          comm::nccl::reduced_type(DType::kFloat32),
                          comm::nccl::reduction(DType::kFloat32, ReduceOp::kSum), handle_, stream));
  }

 private:
  void expect(const char* name, int result) const {
    TPN_CHECK(result == comm::nccl::kSuccess, "nccl", name, ": ",
              comm::nccl::text_of(api_, result, handle_));
  }

  const comm::nccl::Api& api_;
  comm::nccl::Handle handle_ = nullptr;
};

void run_nccl(Scene& scene, Report& report, const Options& options) {
  comm::nccl::Search search;
  for (const std::string& folder : options.libraries)
    search.wheel_files.push_back(folder + "/libnccl.so.2");
  const comm::nccl::Api* api = nullptr;
  try {
    api = &comm::nccl::api(search);
  } catch (const Error& error) {
    std::printf("  NCCL is left out: %s\n", error.what());
    return;
  }
  const RawNccl raw(*api);
  const auto control = comm::make_local({0, 1, "tp:microbench", "local", 0, 60})[0];
  const auto ours = comm::make_nccl({.device = scene.device().index(), .search = search}, control);
  constexpr int64_t kCount = 256;
  const Memory in(4 * kCount), out(4 * kCount);
  const int64_t shape[] = {kCount};
  const comm::Signature signature{
      .op = comm::OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape};
  const Calls calls = {
      {"NCCL alone, all-reduce of 1 KiB, one rank",
       [&] { raw.all_reduce(in.data(), out.data(), kCount, scene.stream()); }},
      {"our communicator, all-reduce of 1 KiB, one rank",
       [&] { ours->all_reduce(signature, in.data(), out.data(), kCount, {}, {scene.stream()}); }}};
  const std::vector<Timing> t = time_calls(scene, calls);
  const double version = api->version;
  for (size_t i = 0; i < calls.size(); ++i)
    report.add(calls[i].first, t[i], {{"nccl_version", version}});
  ours->close();
}

}  // namespace

void run_host(Scene& scene, Report& report, const Options& options) {
  constexpr int64_t kEdge = 64;
  const Turns x(1, kEdge * kEdge, 1, 1, scene.stream());
  const Turns y(1, kEdge * kEdge, 0, 0, scene.stream());
  kernels::Gemm product;
  product.m = product.n = product.k = kEdge;
  product.dtype = product.out_dtype = DType::kBFloat16;
  product.a = {x.of(0), kEdge, false};
  product.b = {x.of(0), kEdge, true};
  product.c = y.of(0);
  product.ldc = kEdge;
  const Calls calls = {
      {"host: launch of an empty kernel", [&] { empty(scene.stream()); }},
      {"host: GEMM 64 x 64 x 64", [&] { (void)kernels::gemm(product, scene.stream()); }}};
  const std::vector<Timing> t = time_calls(scene, calls);
  for (size_t i = 0; i < calls.size(); ++i) report.add(calls[i].first, t[i]);
  const Case launch{"empty", [&](int64_t) { empty(scene.stream()); }};
  report.add("device: one empty kernel behind the other", scene.measure({launch})[0]);
  report.add("device: the same in a graph", scene.measure({launch}, Mode::kGraph)[0]);
  run_nccl(scene, report, options);
}

}  // namespace tp_native::bench::gpu
