// SPDX-License-Identifier: Apache-2.0
// Products with what follows them: in the epilogue beside a pass of its own (B1), how much of the
// device the product itself reaches (B3), the gated activation (B4), what chunks cost (B8).
#include <cmath>

#include "gpu/report.h"
#include "kernels/gemm.h"
#include "overlap/schedule.h"

namespace tp_native::bench::gpu {
namespace {

using kernels::Gemm;
using kernels::GemmEpilogue;

constexpr int kSamples = 512;

struct Shape {
  int64_t m, k, n;
  std::string text() const { return concat("M=", m, " K=", k, " N=", n); }
  double flop() const { return 2.0 * static_cast<double>(m) * static_cast<double>(k * n); }
};

/// y = x w^T of one shape; weights, and where they are few also rows, take turns.
class Layer {
 public:
  Layer(Scene& scene, const Shape& shape)
      : scene_(scene),
        shape_(shape),
        copies_(scene.copies_beyond_cache(2 * shape.n * shape.k)),
        x_(1, shape.m * shape.k, 1, 1, scene.stream()),
        w_(copies_, shape.n * shape.k, std::sqrt(3.0f / static_cast<float>(shape.k)), 100,
           scene.stream()),
        bias_(1, shape.n, 1, 50, scene.stream()),
        y_(1, shape.m * shape.n, 0, 0, scene.stream()) {}

  Gemm product(int64_t turn, GemmEpilogue epilogue, int64_t first = 0, int64_t rows = -1) const {
    Gemm g;
    g.m = rows < 0 ? shape_.m : rows;
    g.n = shape_.n;
    g.k = shape_.k;
    g.dtype = g.out_dtype = DType::kBFloat16;
    g.a = {x_.of(0) + 2 * first * shape_.k, shape_.k, false};
    g.b = {w_.of(turn), shape_.k, true};
    g.c = y_.of(0) + 2 * first * shape_.n;
    g.ldc = shape_.n;
    g.epilogue = epilogue;
    g.bias = bias_.of(0);
    return g;
  }

  void multiply(int64_t turn, GemmEpilogue epilogue, int64_t first = 0, int64_t rows = -1) const {
    const Gemm g = product(turn, epilogue, first, rows);
    const kernels::GemmPlan plan = kernels::gemm(g, scene_.stream());
    TPN_CHECK(plan.is_fused, shape_.text(), ", epilogue ", kernels::name(epilogue),
              ": not fused: ", plan.why_not_fused);
  }

  Case fused(const std::string& name, GemmEpilogue epilogue) const {
    return {name, [=, this](int64_t turn) { multiply(turn, epilogue); }, checked(epilogue, 1)};
  }
  Case separate(const std::string& name) const {
    return {name,
            [this](int64_t turn) {
              multiply(turn, GemmEpilogue::kNone);
              bias_gelu(y_.of(0), bias_.of(0), shape_.m, shape_.n, scene_.stream());
            },
            checked(GemmEpilogue::kGeluTanhBias, 2)};
  }
  Case in_chunks(const std::string& name, const overlap::Schedule& schedule) const {
    return {name,
            [=, this](int64_t turn) {
              for (const overlap::Chunk& chunk : schedule.chunks)
                multiply(turn, GemmEpilogue::kNone, chunk.pieces[0].row, chunk.rows);
            },
            checked(GemmEpilogue::kNone, 1)};
  }

 private:
  std::function<void(uint32_t*)> checked(GemmEpilogue epilogue, int passes) const {
    return [=, this](uint32_t* wrong) {
      count_wrong_products(product(0, epilogue), epilogue, passes, kSamples, wrong,
                           scene_.stream());
    };
  }

  Scene& scene_;
  Shape shape_;
  int64_t copies_;
  Turns x_, w_, bias_, y_;
};

void run_epilogues(Scene& scene, Report& report, const Shape& shape) {
  const Layer layer(scene, shape);
  const Mode mode = shape.m <= 256 ? Mode::kGraph : Mode::kStream;
  for (const bool is_tuned : {false, true}) {
    if (is_tuned) {
      (void)kernels::tune(layer.product(0, GemmEpilogue::kNone), scene.stream());
      (void)kernels::tune(layer.product(0, GemmEpilogue::kGeluTanhBias), scene.stream());
    }
    const std::string how = is_tuned ? ", tuned" : "";
    const std::vector<Case> cases = {
        layer.fused("plain", GemmEpilogue::kNone), layer.fused("bias", GemmEpilogue::kBias),
        layer.fused("bias + GELU", GemmEpilogue::kGeluTanhBias), layer.separate("then a pass")};
    const std::vector<Timing> t = scene.measure(cases, mode);
    for (size_t i = 0; i < cases.size(); ++i)
      report.add(concat(shape.text(), " ", cases[i].name, how), t[i],
                 {{"tflop_per_s", shape.flop() / t[i].median_s * 1e-12}});
    report.at_most("B1", concat(shape.text(), " fused / GEMM and a pass", how), ratio(t[2], t[3]),
                   shape.m <= 256 ? 0.92 : 0.96);
    if (shape.m <= 64 && !is_tuned) {
      const double bytes = 2.0 * static_cast<double>(shape.n * shape.k);
      report.at_least("B3", concat(shape.text(), " weight bytes / s over the copy's"),
                      bytes / t[0].median_s / scene.copy_bytes_per_s(), 0.75);
    }
  }
}

}  // namespace

void run_gemm(Scene& scene, Report& report) {
  constexpr int64_t kEdge = 8192;
  const Shape square{kEdge, kEdge, kEdge};
  {
    const Layer layer(scene, square);
    const Timing t = scene.measure({layer.fused("plain", GemmEpilogue::kNone)})[0];
    report.add(concat(square.text(), " plain"), t,
               {{"tflop_per_s", square.flop() / t.median_s * 1e-12}});
  }
  std::vector<Shape> shapes = {{8, 8192, 3584}, {1024, 8192, 3584}, {4096, 8192, 3584}};
  if (!scene.is_quick()) {
    for (const Shape& shape : std::vector<Shape>{
             {64, 8192, 3584}, {256, 8192, 3584}, {4096, 3584, 8192}, {4096, 4096, 14336}})
      shapes.push_back(shape);
  }
  for (const Shape& shape : shapes) run_epilogues(scene, report, shape);
}

void run_swiglu(Scene& scene, Report& report) {
  std::vector<std::pair<int64_t, int64_t>> sizes = {{4096, 3584}};
  if (!scene.is_quick()) sizes.insert(sizes.end(), {{256, 3584}, {1024, 14336}, {4096, 14336}});
  for (const auto& [rows, columns] : sizes) {
    const int64_t count = rows * columns;
    const int64_t copies = scene.copies_beyond_cache(6 * count);
    const Turns in(copies, 2 * count, 4, 1, scene.stream());
    const Turns out(copies, count, 0, 0, scene.stream());
    const Turns half(copies, count + count / 2, 1, 9, scene.stream());  // of the copy's bytes
    const auto swiglu = [&, rows = rows, columns = columns](int64_t turn) {
      kernels::cuda::glu({.dtype = DType::kBFloat16,
                          .activation = kernels::Activation::kSilu,
                          .gate_up = in.of(turn),
                          .out = out.of(turn),
                          .rows = rows,
                          .columns = columns,
                          .gate_up_stride = 2 * columns,
                          .out_stride = columns},
                         scene.stream());
    };
    const auto check = [&, rows = rows, columns = columns](uint32_t* wrong) {
      count_wrong_swiglu(in.of(0), out.of(0), rows, columns, wrong, scene.stream());
    };
    const auto copy = [&](int64_t turn) {  // the first half of `in` is as long as `half`
      cuda::copy(half.of(turn), in.of(turn), 3 * count, scene.stream());
    };
    const std::vector<Timing> t =
        scene.measure({{"SwiGLU", swiglu, check}, {"copy of as many bytes", copy}});
    const double bytes = 6.0 * static_cast<double>(count);
    const std::string text = concat("rows=", rows, " columns=", columns);
    report.add(concat(text, " SwiGLU"), t[0], {{"gb_per_s", bytes / t[0].median_s * 1e-9}});
    report.add(concat(text, " copy of as many bytes"), t[1],
               {{"gb_per_s", bytes / t[1].median_s * 1e-9}});
    if (bytes >= 64e6)
      report.at_least("B4", concat(text, " SwiGLU's rate over the copy's"), ratio(t[1], t[0]),
                      0.90);
  }
}

void run_chunks(Scene& scene, Report& report) {
  std::vector<int64_t> rows = {2048, 4096};
  if (!scene.is_quick()) rows.push_back(8192);
  for (const int64_t m : rows) {
    const Shape shape{m, 3584, 8192};
    const Layer layer(scene, shape);
    std::vector<Case> cases = {layer.fused("one GEMM", GemmEpilogue::kNone)};
    const std::vector<int> counts = {2, 4, 8};
    for (const int chunks : counts) {
      overlap::Problem problem;
      problem.rows = m;
      problem.columns = shape.n;
      problem.inner = shape.k;
      problem.ranks = 2;
      problem.multiprocessors = scene.multiprocessors();
      problem.tile = overlap::default_tile(DType::kBFloat16);
      problem.chunks = chunks;
      cases.push_back(
          layer.in_chunks(concat(chunks, " chunks"),
                          overlap::plan(problem, overlap::default_costs(DType::kBFloat16))));
    }
    const std::vector<Timing> t = scene.measure(cases);
    for (size_t i = 0; i < cases.size(); ++i) {
      const double tax = ratio(t[i], t[0]);
      report.add(concat(shape.text(), " ", cases[i].name), t[i], {{"of_one", tax}});
      if (i > 0 && counts[i - 1] == 4)
        report.at_most("B8", concat(shape.text(), " 4 chunks / one GEMM"), tax,
                       m >= 4096 ? 1.03 : 1.08);
    }
  }
}

}  // namespace tp_native::bench::gpu
