// SPDX-License-Identifier: Apache-2.0
// Which algorithm computes a GEMM, on test doubles of the driver and of cuBLASLt: the heuristic's,
// the fastest of those that were timed, another rank's.
// TSan: no processes.
#include <bit>
#include <cmath>
#include <cstring>

#include "gemm_scene.h"

namespace {

/// A choice that says something else at `offset`, its checksum made to fit.
template <class T>
std::vector<std::byte> patched(std::vector<std::byte> choice, size_t offset, T value) {
  std::memcpy(&choice[offset], &value, sizeof(value));
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t at = 0; at + 8 < choice.size(); at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, &choice[at], 8);
    hash = std::rotl((hash ^ word) * 0x100000001b3u, 29);
  }
  std::memcpy(&choice[choice.size() - 8], &hash, 8);
  return choice;
}

}  // namespace

TEST(the_heuristic_is_asked_once_for_what_is_alike) {
  const Scene scene;
  const int before = calls("MatmulAlgoGetHeuristic");
  Trial trial(small(GemmEpilogue::kBias), scene.stream());
  for (int i = 0; i < 3; ++i) CHECK(trial.run().source == GemmPlan::Source::kHeuristic);
  (void)Trial(small(GemmEpilogue::kBias), scene.stream(), 50).run();
  CHECK_EQ(calls("MatmulAlgoGetHeuristic"), before + 1);
  const auto is_asked = [&](auto change) {
    const int asked = calls("MatmulAlgoGetHeuristic");
    Gemm g = trial.gemm();
    change(g);
    (void)kernels::plan(g);
    return calls("MatmulAlgoGetHeuristic") > asked;
  };
  CHECK(!is_asked([](Gemm&) {}));
  CHECK(is_asked([](Gemm& g) { g.m = 15; }));
  CHECK(is_asked([](Gemm& g) { g.ldc += 1; }));
  CHECK(is_asked([](Gemm& g) { g.accumulates = true; }));
  CHECK(is_asked([](Gemm& g) { g.allows_tf32 = true; }));
  CHECK(is_asked([](Gemm& g) { g.sm_target = 2; }));
  CHECK(is_asked([](Gemm& g) { g.epilogue = GemmEpilogue::kReluBias; }));
  CHECK(is_asked([](Gemm& g) { g.c = static_cast<float*>(g.c) + 1; }));
  CHECK(is_asked([](Gemm& g) { g.bias = static_cast<const float*>(g.bias) + 1; }));
  const cuda::Device other(1);
  const cuda::Current current(other);
  CHECK(is_asked([](Gemm&) {}));
}

TEST(shapes_without_end_do_not_fill_the_memory) {
  const Scene scene;
  Trial trial(small(), scene.stream());
  Gemm g = trial.gemm();
  (void)tune(g, scene.stream());
  for (int i = 1; i <= 20000; ++i) {
    g.ldc = 24 + i;
    (void)kernels::plan(g);
  }
  CHECK(trial.run().source == GemmPlan::Source::kTuned);  // what was tuned is kept
  const int before = calls("MatmulAlgoGetHeuristic");
  g.ldc = 25;
  (void)kernels::plan(g);
  CHECK_EQ(calls("MatmulAlgoGetHeuristic"), before + 1);  // what was not, is asked again
}

TEST(sm_target_and_precision_reach_the_library) {
  const Scene scene;
  Case c = small();
  c.sm_target = 120;
  c.allows_tf32 = true;
  (void)Trial(c, scene.stream()).run();
  CHECK_EQ(last_sm_target(), 120);
}

TEST(tuning_finds_the_fastest_and_harms_nothing) {
  const Scene scene;
  const Setting speeds("FAKE_CUBLASLT_US", "1000,1000,100,1000,1000,1000,1000,1000,1");
  for (const GemmEpilogue epilogue :
       {GemmEpilogue::kGeluTanhAuxBias, GemmEpilogue::kReluAux, GemmEpilogue::kDGeluTanhBiasGrad}) {
    Case c = small(epilogue, DType::kFloat32);
    c.accumulates = true;
    Trial trial(c, scene.stream());
    const std::vector<char> before = trial.outputs();
    const GemmTuning tuning = tune(trial.gemm(), scene.stream());
    CHECK(trial.outputs() == before);
    CHECK_EQ(tuning.us.size(), size_t{8});
    CHECK_EQ(tuning.best, 2);
    CHECK(tuning.plan.source == GemmPlan::Source::kTuned);
    CHECK(tuning.us[2] < tuning.us[0]);
    CHECK(trial.run().source == GemmPlan::Source::kTuned);
    CHECK_EQ(last_algorithm(), 2);
  }
}

TEST(sums_of_sixteen_bit_products_are_not_split_in_sixteen_bits) {
  const Scene scene;  // of the double's algorithms the fourth adds parts in the output's dtype
  const Setting speeds("FAKE_CUBLASLT_US", "1000,1000,1000,1,1000");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    Trial trial(small(GemmEpilogue::kNone, dtype), scene.stream());
    (void)tune(trial.gemm(), scene.stream(), 4);
    (void)trial.run();
    CHECK_EQ(last_algorithm() == 3, dtype == DType::kFloat32);
  }
}

TEST(a_gain_within_the_noise_keeps_the_heuristics_choice) {
  const Scene scene;
  const Setting speeds("FAKE_CUBLASLT_US", "300,900,900");
  Trial trial(small(), scene.stream());
  CHECK_EQ(tune(trial.gemm(), scene.stream(), 3).best, 0);
  CHECK_EQ(trial.run().is_fused, true);
  CHECK_EQ(last_algorithm(), 0);
}

TEST(tuning_passes_over_what_does_not_run) {
  const Scene scene;
  Trial trial(small(), scene.stream());
  const Setting speeds("FAKE_CUBLASLT_US", "400,100,300");
  {
    const Setting fail("FAKE_CUBLASLT_FAIL", "Matmul:11:15");  // the second one, once
    const GemmTuning tuning = tune(trial.gemm(), scene.stream(), 3);
    CHECK_EQ(tuning.best, 2);
    CHECK(std::isinf(tuning.us[1]));
  }
  const Setting fail("FAKE_CUBLASLT_FAIL", "Matmul:3:13");
  expect_error(error_of([&] { (void)tune(trial.gemm(), scene.stream()); }), {"cublasLtMatmul"});
}

TEST(nothing_is_tuned_under_capture_or_where_nothing_is_computed) {
  const Scene scene;
  Trial trial(small(), scene.stream());
  expect_error(error_of([&] { (void)tune(trial.gemm(), scene.stream(), 0); }), {"0 candidates"});
  Trial empty({.m = 4, .n = 8, .k = 0}, scene.stream());
  CHECK(tune(empty.gemm(), scene.stream()).us.empty());
  const Setting capturing("FAKE_CUDA_CAPTURING", "1");
  expect_error(error_of([&] { (void)tune(trial.gemm(), scene.stream()); }), {"captured"});
}

TEST(a_choice_travels_to_another_device) {
  const Setting speeds("FAKE_CUBLASLT_US", "500,500,500,500,50,500");
  std::vector<std::byte> choice;
  {
    const Scene scene(0);
    Trial trial(small(GemmEpilogue::kBias, DType::kFloat32), scene.stream());
    CHECK_EQ(tune(trial.gemm(), scene.stream()).best, 4);
    choice = export_choice(trial.gemm());
  }
  const Scene scene(1);
  Trial trial(small(GemmEpilogue::kBias, DType::kFloat32), scene.stream(), 9);
  (void)trial.run();
  CHECK_EQ(last_algorithm(), 0);
  import_choice(trial.gemm(), choice);
  Trial again(small(GemmEpilogue::kBias, DType::kFloat32), scene.stream(), 10);
  CHECK(again.run().source == GemmPlan::Source::kImported);
  CHECK_EQ(last_algorithm(), 4);
}

TEST(an_unfused_choice_stays_unfused) {
  const Scene scene;
  Trial trial(small(GemmEpilogue::kRelu, DType::kFloat64), scene.stream());
  const std::vector<std::byte> choice = export_choice(trial.gemm());
  forget_choices();
  import_choice(trial.gemm(), choice);
  const GemmPlan plan = trial.run();
  CHECK(!plan.is_fused);
  CHECK(plan.source == GemmPlan::Source::kImported);
}

TEST(choices_that_are_damaged_or_do_not_fit_are_refused) {
  const Scene scene;
  Trial trial(small(GemmEpilogue::kBias), scene.stream());
  const std::vector<std::byte> good = export_choice(trial.gemm());
  const auto error_with = [&](const std::vector<std::byte>& bytes) {
    return error_of([&] { import_choice(trial.gemm(), bytes); });
  };
  for (size_t at = 0; at < good.size(); ++at) {
    std::vector<std::byte> bad = good;
    bad[at] ^= std::byte{0x10};
    expect_error(error_with(bad), {"damaged"});
  }
  for (const size_t length : {size_t{0}, size_t{1}, good.size() - 1})
    expect_error(error_with({good.begin(), good.begin() + static_cast<long>(length)}),
                 {"a GEMM choice has", "got"});
  std::vector<std::byte> longer = good;
  longer.push_back({});
  expect_error(error_with(longer), {"got"});

  trial.gemm().m = 15;
  expect_error(error_with(good), {"[16, 24, 32]", "does not fit", "[15, 24, 32]"});
  trial.gemm().m = 16;
  trial.gemm().c = static_cast<float*>(trial.gemm().c) + 1;
  expect_error(error_with(good), {"does not fit", "aligned to"});
  trial.gemm().c = static_cast<float*>(trial.gemm().c) - 1;
  {
    const Setting fail("FAKE_CUBLASLT_FAIL", "MatmulAlgoCheck:1:8");
    expect_error(error_with(good), {"cublasLtMatmulAlgoCheck", "(8)"});
  }
  expect_error(error_with(patched(good, 8, uint64_t{120400})), {"version 120400", "130100"});
  expect_error(error_with(patched(good, 16, int32_t{80})), {"capability 80", "cuda:0", "90"});
  expect_error(error_with(patched(good, 20, int32_t{108})), {"108 multiprocessors", "and 4"});
  expect_error(error_with(patched(good, 176, int64_t{1} << 40)), {"1099511627776", "33554432"});
  expect_error(error_with(patched(good, 112, uint64_t{0})), {"cublasLtMatmulAlgoCheck", "(7)"});
  trial.gemm().k = 0;
  expect_error(error_of([&] { (void)export_choice(trial.gemm()); }), {"without a choice"});
}

TEST(several_products_are_tuned_once_each_and_travel_together) {
  const Setting speeds("FAKE_CUBLASLT_US", "500,500,50,500");
  GemmTunings tunings;
  {
    const Scene scene(0);
    Trial one(small(GemmEpilogue::kBias, DType::kFloat32), scene.stream());
    Trial two(small(GemmEpilogue::kNone, DType::kFloat32), scene.stream());
    Trial empty({.m = 4, .n = 8, .k = 0}, scene.stream());
    const std::vector<Gemm> products{one.gemm(), two.gemm(), one.gemm(), empty.gemm()};
    tunings = tune_all(products, scene.stream(), 4);
    CHECK_EQ(tunings.best_us.size(), size_t{2});
    CHECK_EQ(tunings.choices.size(), 2 * export_choice(one.gemm()).size());
    for (size_t i = 0; i < 2; ++i) CHECK(tunings.best_us[i] < tunings.heuristic_us[i]);
  }
  const Scene scene(1);  // of another rank, whose operands lie elsewhere
  Trial one(small(GemmEpilogue::kBias, DType::kFloat32), scene.stream(), 9);
  Trial two(small(GemmEpilogue::kNone, DType::kFloat32), scene.stream(), 10);
  const std::vector<Gemm> products{one.gemm(), two.gemm()};
  import_all(products, tunings.choices);
  for (Trial* const trial : {&one, &two}) {
    CHECK(trial->run().source == GemmPlan::Source::kImported);
    CHECK_EQ(last_algorithm(), 2);
  }
  const std::vector<Gemm> turned{two.gemm(), one.gemm()};
  expect_error(error_of([&] { import_all(turned, tunings.choices); }), {"does not fit"});
  const std::vector<Gemm> fewer{one.gemm(), one.gemm()};
  expect_error(error_of([&] { import_all(fewer, tunings.choices); }), {"a GEMM choice has"});
  import_all({}, {});
  expect_error(error_of([&] { import_all({}, tunings.choices); }), {"for 0 products"});
}

int main() {
  cuda::use_driver(TPN_DOUBLES "/libfake_cuda.so");
  cublaslt::use_library(kFake);
  return check::run_all();
}
