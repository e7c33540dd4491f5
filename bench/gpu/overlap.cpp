// SPDX-License-Identifier: Apache-2.0
// How much of a collective the schedule hides under a GEMM, on one GPU with stand-ins for the
// collective: copies to the host and back, which a real second engine and link carry (B9), and a
// copy on 8 thread blocks, which takes multiprocessors as NCCL's kernels do (B10). What it says is
// how well the scheduler works; no figure here is one of several GPUs.
#include "overlap/pipeline.h"

#include <cmath>

#include "gpu/report.h"
#include "kernels/gemm.h"
#include "overlap/schedule.h"

namespace tp_native::bench::gpu {
namespace {

constexpr int64_t kColumns = 8192;
constexpr int kCopyBlocks = 8;

struct Work {
  int64_t rows, inner;
  int64_t bytes() const { return 2 * rows * kColumns; }
};

/// The collective of one chunk, on a stream.
using Communicate = std::function<void(const overlap::Chunk&, StreamHandle)>;

class Overlap {
 public:
  Overlap(Scene& scene, const Work& work)
      : scene_(scene),
        work_(work),
        pipeline_(scene.device()),
        x_(1, work.rows * work.inner, 1, 1, scene.stream()),
        w_(1, kColumns * work.inner, std::sqrt(3.0f / static_cast<float>(work.inner)), 2,
           scene.stream()),
        y_(1, work.rows * kColumns, 1, 3, scene.stream()) {}

  overlap::Schedule cut(int chunks) const {
    overlap::Problem problem;
    problem.rows = work_.rows;
    problem.columns = kColumns;
    problem.inner = work_.inner;
    problem.ranks = 2;
    problem.multiprocessors = scene_.multiprocessors();
    problem.tile = overlap::default_tile(DType::kBFloat16);
    problem.chunks = chunks;
    overlap::Schedule made = overlap::plan(problem, overlap::default_costs(DType::kBFloat16));
    TPN_CHECK(made.is_overlapped(), chunks, " chunks of ", work_.rows, " rows do not overlap");
    return made;
  }

  kernels::Gemm product(int64_t first, int64_t rows) const {
    kernels::Gemm g;
    g.m = rows;
    g.n = kColumns;
    g.k = work_.inner;
    g.dtype = g.out_dtype = DType::kBFloat16;
    g.a = {x_.of(0) + 2 * first * work_.inner, work_.inner, false};
    g.b = {w_.of(0), work_.inner, true};
    g.c = y(first);
    g.ldc = kColumns;
    return g;
  }
  int64_t rows() const { return work_.rows; }
  char* y(int64_t row) const { return y_.of(0) + 2 * row * kColumns; }
  void multiply(int64_t first, int64_t rows, StreamHandle on) const {
    (void)kernels::gemm(product(first, rows), on);
  }
  void multiply(const overlap::Chunk& chunk, StreamHandle on) const {
    multiply(chunk.pieces[0].row, chunk.rows, on);
  }
  void multiply_all(const overlap::Schedule& schedule) const {
    for (const overlap::Chunk& chunk : schedule.chunks) multiply(chunk, scene_.stream());
  }

  void run(const overlap::Schedule& schedule, const Communicate& communicate) {
    pipeline_.run(schedule, scene_.stream(),
                  {.gemm = [&](const overlap::Chunk& c, StreamHandle on) { multiply(c, on); },
                   .communicate = communicate});
  }

  /// Another result in y, which the next run has to replace.
  void spoil() const { fill(y(0), work_.rows * kColumns, 1, 77, scene_.stream()); }
  void check(uint32_t* wrong) const {
    count_wrong_products(product(0, work_.rows), kernels::GemmEpilogue::kNone, 1, 512, wrong,
                         scene_.stream());
  }

  /// The GEMMs' own time while `communicate` runs beside them, over their time alone.
  double slowdown(const overlap::Schedule& schedule, const Communicate& communicate) {
    const cuda::Event first(/*is_timed=*/true), last(/*is_timed=*/true);
    const auto elapsed_s = [&] {
      scene_.wait();
      float ms = 0;
      TPN_CUDA(cuda::driver().EventElapsedTime(&ms, first.get(), last.get()), "a GEMM");
      return static_cast<double>(ms) * 1e-3;
    };
    std::vector<double> ratios;
    for (int round = 0; round < 2 * scene_.plan().rounds; ++round) {
      hold(200, scene_.stream());
      first.record(scene_.stream());
      multiply_all(schedule);
      last.record(scene_.stream());
      const double alone_s = elapsed_s();
      hold(200, scene_.stream());
      pipeline_.run(schedule, scene_.stream(),
                    {.gemm =
                         [&](const overlap::Chunk& chunk, StreamHandle on) {
                           if (&chunk == &schedule.chunks.front()) first.record(on);
                           multiply(chunk, on);
                           if (&chunk == &schedule.chunks.back()) last.record(on);
                         },
                     .communicate = communicate});
      ratios.push_back(elapsed_s() / alone_s);
    }
    return median_of(std::move(ratios));
  }

 private:
  Scene& scene_;
  Work work_;
  overlap::Pipeline pipeline_;
  Turns x_, w_, y_;
};

struct Times {
  double gemm_s, link_s, overlapped_s, slowdown;
};

/// `check`: what `communicate` left, after a run.
Times time_overlap(Scene& scene, Report& report, Overlap& overlap, int chunks,
                   const std::string& text, const Communicate& communicate,
                   const std::function<void(uint32_t*)>& check) {
  const overlap::Schedule schedule = overlap.cut(chunks);
  const auto all = [&](int64_t) {
    for (const overlap::Chunk& chunk : schedule.chunks) communicate(chunk, scene.stream());
  };
  const auto both = [&](int64_t) { overlap.run(schedule, communicate); };
  const auto whole = [&](int64_t) { overlap.multiply(0, overlap.rows(), scene.stream()); };
  const auto is_right = [&](uint32_t* wrong) { overlap.check(wrong); };
  const auto is_ordered = [&](uint32_t* wrong) {
    overlap.spoil();
    both(0);
    overlap.check(wrong);
    check(wrong);
  };
  const std::vector<Case> cases = {
      {"GEMM", whole, is_right},
      {"GEMM in chunks", [&](int64_t) { overlap.multiply_all(schedule); }, is_right},
      {"stand-in alone", all},
      {"overlapped", both, is_ordered}};
  const std::vector<Timing> t = scene.measure(cases);
  for (size_t i = 0; i < cases.size(); ++i) report.add(concat(text, " ", cases[i].name), t[i]);
  return {t[0].median_s, t[2].median_s, t[3].median_s, overlap.slowdown(schedule, communicate)};
}

/// K for which the GEMM takes as long as `link_s`.
int64_t balanced_inner(Scene& scene, int64_t rows, double link_s) {
  constexpr int64_t kInner = 8192;
  const Overlap probe(scene, {rows, kInner});
  const Timing t =
      scene.measure({{"probe", [&](int64_t) { probe.multiply(0, rows, scene.stream()); }}})[0];
  const double inner = kInner * link_s / t.median_s;
  return std::clamp<int64_t>(static_cast<int64_t>(inner / 256) * 256, 512, 65536);
}

void run_host_copies(Scene& scene, Report& report, int64_t rows) {
  const int64_t bytes = 2 * rows * kColumns;
  const Pinned host(bytes);
  double link_s = 0;
  {
    const Memory device(bytes);
    link_s = scene
                 .measure({{"there and back",
                            [&](int64_t) {
                              cuda::copy(host.data(), device.data(), bytes, scene.stream());
                              cuda::copy(device.data(), host.data(), bytes, scene.stream());
                            }}})[0]
                 .median_s;
  }
  Overlap overlap(scene, {rows, balanced_inner(scene, rows, link_s)});
  const Communicate communicate = [&](const overlap::Chunk& chunk, StreamHandle on) {
    const int64_t first = chunk.pieces[0].row;
    char* const at = host.data() + 2 * first * kColumns;
    cuda::copy(at, overlap.y(first), 2 * chunk.rows * kColumns, on);
    cuda::copy(overlap.y(first), at, 2 * chunk.rows * kColumns, on);
  };
  for (const int chunks : {4, 8}) {
    const std::string text =
        concat("copies to the host and back, M=", rows, ", ", chunks, " chunks");
    const Times t =
        time_overlap(scene, report, overlap, chunks, text, communicate, [&](uint32_t* wrong) {
          count_different(host.data(), overlap.y(0), bytes, wrong, scene.stream());
        });
    const double efficiency = (t.gemm_s + t.link_s - t.overlapped_s) / std::min(t.gemm_s, t.link_s);
    report.at_least("B9", text + ": hidden share of the shorter", efficiency,
                    chunks == 4 ? 0.68 : 0.79);
    report.at_most("B9", text + ": GEMM beside copies / alone", t.slowdown, 1.05);
  }
}

void run_block_copies(Scene& scene, Report& report, int64_t rows) {
  constexpr int64_t kInner = 8192;
  Overlap overlap(scene, {rows, kInner});
  constexpr int64_t kProbeBytes = int64_t{64} << 20;
  const auto measure_s = [&](const std::function<void(int64_t)>& enqueue) {
    return scene.measure({{"probe", enqueue}})[0].median_s;
  };
  int64_t row_bytes = 0;  // of the stand-in, for each row of the GEMM
  {
    const Memory from(kProbeBytes), to(kProbeBytes);
    const double copy_s = measure_s([&](int64_t) {
      copy_in_blocks(to.data(), from.data(), kProbeBytes, kCopyBlocks, scene.stream());
    });
    const double gemm_s = measure_s([&](int64_t) { overlap.multiply(0, rows, scene.stream()); });
    const double all = static_cast<double>(kProbeBytes) * gemm_s / copy_s;
    row_bytes = std::max<int64_t>(1, static_cast<int64_t>(all) / rows / 16) * 16;
  }
  const int64_t bytes = row_bytes * rows;
  const Turns from(1, bytes / 2, 1, 5, scene.stream());
  const Memory to(bytes);
  const Communicate communicate = [&](const overlap::Chunk& chunk, StreamHandle on) {
    const int64_t at = chunk.pieces[0].row * row_bytes;
    copy_in_blocks(to.data() + at, from.of(0) + at, chunk.rows * row_bytes, kCopyBlocks, on);
  };
  for (const int chunks : {4, 8}) {
    const std::string text = concat("copy on 8 blocks, M=", rows, ", ", chunks, " chunks");
    const Times t =
        time_overlap(scene, report, overlap, chunks, text, communicate, [&](uint32_t* wrong) {
          count_different(from.of(0), to.data(), bytes, wrong, scene.stream());
        });
    const double left = scene.multiprocessors() - kCopyBlocks;
    const double bound_s =
        1.08 * std::max(t.gemm_s * scene.multiprocessors() / left, t.link_s) + t.link_s / chunks;
    report.at_most("B10", text + ": time over what contention allows", t.overlapped_s / bound_s,
                   1.0);
  }
}

}  // namespace

void run_overlap(Scene& scene, Report& report) {
  const int64_t rows = scene.is_quick() ? 4096 : 8192;
  run_host_copies(scene, report, rows);
  run_block_copies(scene, report, rows);
}

}  // namespace tp_native::bench::gpu
