// SPDX-License-Identifier: Apache-2.0
#include "gpu/scene.h"

#include <cstring>

namespace tp_native::bench::gpu {
namespace {

constexpr int64_t kGraphTurns = 16;  // repetitions in one graph
constexpr int kHeadStart_us = 300;   // what the host needs to stay ahead of the device
constexpr int64_t kMostRepetitions = 4096;

}  // namespace

Memory::Memory(int64_t bytes) {
  TPN_CUDA(cuda::driver().MemAlloc(&base_, static_cast<size_t>(std::max<int64_t>(bytes, 1))), bytes,
           " bytes for a benchmark");
}

Memory::~Memory() {
  if (base_) (void)cuda::driver().MemFree(base_);
}

Pinned::Pinned(int64_t bytes) {
  // portable and mapped
  TPN_CUDA(cuda::driver().MemHostAlloc(&base_, static_cast<size_t>(bytes), 1 | 2), bytes,
           " bytes of pinned memory");
  std::memset(base_, 0, static_cast<size_t>(bytes));
}

Pinned::~Pinned() {
  if (base_) (void)cuda::driver().MemFreeHost(base_);
}

Turns::Turns(int64_t copies, int64_t count, float scale, uint32_t seed, StreamHandle stream)
    : copies_(copies), bytes_((2 * count + 255) / 256 * 256), memory_(copies * bytes_) {
  for (int64_t i = 0; i < copies; ++i)
    fill(of(i), count, scale, seed + static_cast<uint32_t>(i), stream);
}

Scene::Scene(int device, bool is_quick)
    : device_(device),
      current_(device_),
      start_(/*is_timed=*/true),
      stop_(/*is_timed=*/true),
      wrong_(sizeof(uint32_t)),
      is_quick_(is_quick),
      plan_(is_quick ? Plan{5, 5e-3} : Plan{11, 20e-3}) {}

void Scene::wait() const { TPN_CUDA(cuda::driver().StreamSynchronize(stream()), "a benchmark"); }

int64_t Scene::copies_beyond_cache(int64_t bytes) const {
  const int64_t cache = device_.attribute(38);  // CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
  return std::clamp<int64_t>((4 * cache + bytes - 1) / bytes, 2, 64);
}

void Scene::verify(const Case& c) {
  if (!c.check) return;
  auto* const wrong = reinterpret_cast<uint32_t*>(wrong_.data());
  *wrong = 0;
  c.enqueue(0);
  c.check(wrong);
  wait();
  TPN_CHECK(*wrong == 0, c.name, ": ", *wrong, " values are wrong");
}

double Scene::batch_s(const Case& c, const Graph* graph, int64_t repetitions) {
  hold(kHeadStart_us, stream());
  start_.record(stream());
  if (graph) {
    for (int64_t i = 0; i < repetitions / kGraphTurns; ++i) graph->launch(stream());
  } else {
    for (int64_t i = 0; i < repetitions; ++i) c.enqueue(i);
  }
  stop_.record(stream());
  wait();
  float ms = 0;
  TPN_CUDA(cuda::driver().EventElapsedTime(&ms, start_.get(), stop_.get()), c.name);
  return static_cast<double>(ms) * 1e-3;
}

std::vector<Timing> Scene::measure(const std::vector<Case>& cases, Mode mode) {
  std::vector<std::unique_ptr<Graph>> graphs;
  std::vector<int64_t> repetitions;
  for (const Case& c : cases) {
    verify(c);
    c.enqueue(1);  // warm: a graph is captured after its first run
    wait();
    graphs.push_back(mode == Mode::kGraph
                         ? std::make_unique<Graph>(stream(),
                                                   [&] {
                                                     for (int64_t i = 0; i < kGraphTurns; ++i)
                                                       c.enqueue(i);
                                                   })
                         : nullptr);
    const int64_t unit = mode == Mode::kGraph ? kGraphTurns : 1;
    int64_t n = 2 * unit;
    for (int step = 0; step < 2; ++step) {  // the first one is cold and counts too few
      const double each = batch_s(c, graphs.back().get(), n) / static_cast<double>(n);
      n = static_cast<int64_t>(plan_.batch_s / std::max(each, 1e-9));
      n = std::clamp<int64_t>(n / unit * unit, unit, kMostRepetitions);
    }
    repetitions.push_back(n);
  }
  std::vector<std::vector<double>> seconds(cases.size());
  for (int round = 0; round < plan_.rounds; ++round) {
    for (size_t k = 0; k < cases.size(); ++k) {
      const size_t c = (k + static_cast<size_t>(round)) % cases.size();
      seconds[c].push_back(batch_s(cases[c], graphs[c].get(), repetitions[c]) /
                           static_cast<double>(repetitions[c]));
    }
  }
  for (const Case& c : cases) verify(c);
  std::vector<Timing> timings;
  for (std::vector<double>& s : seconds) timings.push_back(summarise(std::move(s)));
  return timings;
}

double Scene::copy_bytes_per_s() {
  if (!copy_bytes_per_s_) {
    constexpr int64_t kBytes = int64_t{1} << 30;
    const Memory from(kBytes), to(kBytes);
    fill(from.data(), kBytes / 2, 1, 1, stream());
    const Case copy{
        "copy", [&](int64_t) { cuda::copy(to.data(), from.data(), kBytes, stream()); },
        [&](uint32_t* wrong) { count_different(to.data(), from.data(), kBytes, wrong, stream()); }};
    copy_bytes_per_s_ = 2.0 * kBytes / measure({copy})[0].median_s;
  }
  return *copy_bytes_per_s_;
}

double ratio(const Timing& a, const Timing& b) {
  std::vector<double> ratios;
  for (size_t r = 0; r < a.rounds_s.size(); ++r) ratios.push_back(a.rounds_s[r] / b.rounds_s[r]);
  return median_of(std::move(ratios));
}

}  // namespace tp_native::bench::gpu
