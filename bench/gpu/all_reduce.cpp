// SPDX-License-Identifier: Apache-2.0
// Our own all-reduce with all ranks on one device, in one launch: what the kernels and their
// barrier take of the device's memory (B11). No link between devices is in these figures.
#include <cstring>

#include "gpu/report.h"

namespace tp_native::bench::gpu {
namespace {

using kernels::AllReduceKind;
using kernels::cuda::AllReduce;
using kernels::cuda::Peers;

constexpr int64_t kColumns = 4096;  // of a row, where a norm follows

/// Ranks with operands, results and the memory where they meet.
class Ranks {
 public:
  Ranks(Scene& scene, int size, int64_t bytes)
      : scene_(scene),
        size_(size),
        count_(bytes / 2),
        abort_(sizeof(uint32_t)),
        flags_(size * kernels::cuda::flag_bytes()),
        in_(size, count_, 1, 1, scene.stream()),
        staging_(size, kernels::cuda::staging_bytes(bytes) / 2, 1, 100, scene.stream()),
        out_(1, size * count_, 0, 0, scene.stream()),
        other_out_(1, size * count_, 0, 0, scene.stream()),
        hidden_(1, size * count_, 0, 0, scene.stream()),
        other_hidden_(1, size * count_, 0, 0, scene.stream()),
        weight_(1, kColumns, 1, 7, scene.stream()) {
    TPN_CHECK(bytes % 256 == 0, bytes, " bytes, expected a multiple of 256");
    TPN_CUDA(cuda::driver().MemsetD8Async(cuda::address(flags_.data()), 0,
                                          static_cast<size_t>(size * kernels::cuda::flag_bytes()),
                                          scene.stream()),
             "clearing flags");
    peers_.size = size;
    peers_.buffer_bytes = kernels::cuda::staged_bytes(bytes);
    peers_.abort = reinterpret_cast<const uint32_t*>(abort_.data());
    for (int r = 0; r < size; ++r) {
      peers_.data[r] = staging_.of(r);
      peers_.flags[r] =
          reinterpret_cast<uint32_t*>(flags_.data() + r * kernels::cuda::flag_bytes());
    }
    residual_ = std::make_unique<Turns>(1, size * count_, 1, 9, scene.stream());
    for (int r = 1; r < size; ++r)  // the same for all ranks
      cuda::copy(residual_->of(0) + r * bytes, residual_->of(0), bytes, scene.stream());
  }

  /// `is_staged`: operands are copied to where peers read them; else they lie there.
  Case reduce(const std::string& name, AllReduceKind kind, bool is_staged, int blocks) {
    return {name, [=, this](int64_t) { launch(kind, calls(is_staged, blocks)); },
            [=, this](uint32_t* wrong) {
              const void* terms[kernels::cuda::kMaxRanks] = {};
              for (int r = 0; r < size_; ++r)
                terms[r] = is_staged ? in_.of(r) : static_cast<const char*>(peers_.data[r]);
              for (int r = 0; r < size_; ++r)
                count_wrong_sums(terms, size_, at(out_, r), count_, wrong, scene_.stream());
            }};
  }

  Case meet(const std::string& name, int blocks, int meetings) {
    return {name,
            [=, this](int64_t) { meet_in_one_launch(peers_, blocks, meetings, scene_.stream()); }};
  }

  /// Residual and RMS norm in the same kernel; bitwise what separate() gives.
  Case fused(const std::string& name, int blocks) {
    return {name, [=, this](int64_t) { launch_fused(blocks); },
            [=, this](uint32_t* wrong) {
              launch_separate(blocks);
              launch_fused(blocks);
              const int64_t bytes = 2 * size_ * count_;
              count_different(out_.of(0), other_out_.of(0), bytes, wrong, scene_.stream());
              count_different(hidden_.of(0), other_hidden_.of(0), bytes, wrong, scene_.stream());
            }};
  }
  Case separate(const std::string& name, int blocks) {
    return {name, [=, this](int64_t) { launch_separate(blocks); }};
  }

 private:
  char* at(const Turns& all, int rank) const { return all.of(0) + 2 * rank * count_; }

  std::vector<AllReduce> calls(bool is_staged, int blocks) const {
    std::vector<AllReduce> all(static_cast<size_t>(size_));
    for (int r = 0; r < size_; ++r) {
      all[r].dtype = DType::kBFloat16;
      all[r].in = is_staged ? in_.of(r) : nullptr;
      all[r].out = at(out_, r);
      all[r].columns = count_;
      all[r].blocks = blocks;
    }
    return all;
  }

  void launch(AllReduceKind kind, const std::vector<AllReduce>& all) const {
    kernels::cuda::all_reduce_in_one_launch(kind, peers_, all, scene_.stream());
  }

  void launch_fused(int blocks) const {
    std::vector<AllReduce> all = calls(true, blocks);
    for (int r = 0; r < size_; ++r) {
      all[r].rows = count_ / kColumns;
      all[r].columns = kColumns;
      all[r].residual = at(*residual_, r);
      all[r].norm_weight = weight_.of(0);
      all[r].eps = 1e-6;
      all[r].hidden = at(hidden_, r);
    }
    launch(AllReduceKind::kOneShot, all);
  }

  /// The sum, then one pass over all ranks' rows: each rank would have its own device.
  void launch_separate(int blocks) const {
    std::vector<AllReduce> all = calls(true, blocks);
    for (int r = 0; r < size_; ++r) all[r].out = at(other_out_, r);
    launch(AllReduceKind::kOneShot, all);
    kernels::cuda::apply_epilogue({.dtype = DType::kBFloat16,
                                   .sum = other_out_.of(0),
                                   .out = other_out_.of(0),
                                   .rows = size_ * count_ / kColumns,
                                   .columns = kColumns,
                                   .residual = residual_->of(0),
                                   .norm_weight = weight_.of(0),
                                   .eps = 1e-6,
                                   .hidden = other_hidden_.of(0)},
                                  scene_.stream());
  }

  Scene& scene_;
  int size_;
  int64_t count_;
  Pinned abort_;
  Memory flags_;
  Turns in_, staging_, out_, other_out_, hidden_, other_hidden_, weight_;
  std::unique_ptr<Turns> residual_;
  Peers peers_;
};

/// Blocks of one rank, all ranks' resident at once: the kernels ask for two on a multiprocessor.
int most_blocks(const Scene& scene, int ranks) {
  return std::min(kernels::cuda::kMaxBlocks, 2 * scene.multiprocessors() / ranks);
}

void run_large(Scene& scene, Report& report, int size, int64_t bytes) {
  Ranks ranks(scene, size, bytes);
  const int blocks = most_blocks(scene, size);
  const double payload = static_cast<double>(bytes);
  const struct {
    Case what;
    double traffic;
    double at_least;
  } all[] = {{ranks.reduce("one-shot", AllReduceKind::kOneShot, false, blocks),
              size * (size + 1) * payload, 0.70},
             {ranks.reduce("one-shot, staged", AllReduceKind::kOneShot, true, blocks),
              size * (size + 2) * payload, 0},
             {ranks.reduce("two-shot, staged", AllReduceKind::kTwoShot, true, blocks),
              4 * size * payload, 0.70}};
  std::vector<Case> cases;
  for (const auto& one : all) cases.push_back(one.what);
  const std::vector<Timing> t = scene.measure(cases);
  for (size_t i = 0; i < cases.size(); ++i) {
    const std::string text = concat(size, " ranks, ", bytes >> 20, " MiB, ", cases[i].name);
    const double rate = all[i].traffic / t[i].median_s;
    report.add(text, t[i], {{"traffic_gb_per_s", rate * 1e-9}, {"blocks", blocks}});
    if (all[i].at_least > 0)
      report.at_least("B11", text + ": traffic / s over the copy's",
                      rate / scene.copy_bytes_per_s(), all[i].at_least);
  }
}

/// With as many blocks as are best for it.
void run_small(Scene& scene, Report& report, int size, int64_t bytes) {
  Ranks ranks(scene, size, bytes);
  const struct {
    const char* name;
    AllReduceKind kind;
    int meetings;
  } kinds[] = {{"one-shot", AllReduceKind::kOneShot, 1}, {"two-shot", AllReduceKind::kTwoShot, 2}};
  for (const auto& kind : kinds) {
    Timing best, barrier;
    int blocks = 0;
    for (const int tried : {1, 2, 4, 8, 16}) {
      const std::vector<Timing> t = scene.measure({ranks.reduce(kind.name, kind.kind, true, tried),
                                                   ranks.meet("meeting", tried, kind.meetings)},
                                                  Mode::kGraph);
      if (blocks == 0 || t[0].median_s < best.median_s) {
        best = t[0];
        barrier = t[1];
        blocks = tried;
      }
    }
    const std::string text = concat(size, " ranks, ", bytes >> 10, " KiB, ", kind.name);
    report.add(text, best, {{"blocks", blocks}});
    report.add(text + ": its meetings alone", barrier, {{"blocks", blocks}});
    report.at_most("B11", text + " / its meetings alone", ratio(best, barrier), 1.5);
  }
}

void run_norm(Scene& scene, Report& report, int size, int64_t rows) {
  const int64_t bytes = 2 * rows * kColumns;
  Ranks ranks(scene, size, bytes);
  const int blocks = static_cast<int>(std::min<int64_t>(16, std::max<int64_t>(rows, 4)));
  const std::vector<Timing> t = scene.measure(
      {ranks.fused("fused", blocks), ranks.separate("separate", blocks)}, Mode::kGraph);
  const std::string text = concat(size, " ranks, ", bytes >> 10, " KiB");
  report.add(text + ", all-reduce, residual and RMS norm in one", t[0], {{"blocks", blocks}});
  report.add(text + ", all-reduce, then a pass of ours", t[1], {{"blocks", blocks}});
  report.at_most("B11", text + ", with residual and RMS norm / then a pass of ours",
                 ratio(t[0], t[1]), 0.75);
}

}  // namespace

void run_all_reduce(Scene& scene, Report& report) {
  for (const int size : {4, 8}) {
    run_large(scene, report, size, int64_t{16} << 20);
    if (!scene.is_quick()) run_large(scene, report, size, int64_t{64} << 20);
    run_small(scene, report, size, 8 << 10);
    run_small(scene, report, size, 64 << 10);
    run_norm(scene, report, size, 8);
    run_norm(scene, report, size, 32);
  }
}

}  // namespace tp_native::bench::gpu
