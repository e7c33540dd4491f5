// SPDX-License-Identifier: Apache-2.0
// GEMM on test doubles of the driver and of cuBLASLt: results, refusals, faults, threads.
// TSan: no processes.
#include <unistd.h>

#include <filesystem>
#include <memory>

#include "gemm_scene.h"

namespace {

/// Makes gemm() use the heuristic's second answer for this shape: one that needs a workspace.
void take_the_second(const Gemm& g, cuda::StreamHandle stream) {
  const Setting speeds("FAKE_CUBLASLT_US", "3000,1");
  CHECK_EQ(tune(g, stream, 2).best, 1);
}

}  // namespace

TEST(no_library_is_told_with_the_way_out) {
  cuda::use_driver(TPN_DOUBLES "/libfake_cuda.so");
  (void)cuda::driver();
  cublaslt::use_library("libcublasLt_of_no_machine.so.13");
  cublaslt::search_in({"/no/such/folder"});
  const std::string error = error_of([] { (void)cublaslt::api(); });
  expect_error(error, {"cuBLASLt is not on this machine", "libcublasLt_of_no_machine.so.13",
                       "/no/such/folder", "nvidia-cublas-cu12"});
  std::string why;
  CHECK(!cublaslt::is_available(why));
  CHECK_EQ(why, error);
}

TEST(versions_that_are_not_known_are_refused_by_file_and_number) {
  cublaslt::use_library(kFake);
  for (const auto& [version, shown] : {std::pair{"110500", "11.5.0"}, {"140001", "14.0.1"}}) {
    const Setting setting("FAKE_CUBLASLT_VERSION", version);
    expect_error(error_of([] { (void)cublaslt::api(); }),
                 {kFake, shown, "expected 12 to 13", "nvidia-cublas"});
  }
}

TEST(a_file_that_is_no_cublaslt_is_refused) {
  cublaslt::use_library(TPN_DOUBLES "/libfake_cuda.so");
  expect_error(error_of([] { (void)cublaslt::api(); }), {"no cublasLtGetVersion"});
}

TEST(the_library_is_found_in_a_folder_of_the_list) {
  const auto folder =
      std::filesystem::temp_directory_path() / ("tpn_test_gemm_" + std::to_string(::getpid()));
  std::filesystem::create_directory(folder);
  std::filesystem::create_symlink(kFake, folder / "libcublasLt_of_a_wheel.so.13");
  cublaslt::use_library("libcublasLt_of_a_wheel.so.13");
  cublaslt::search_in({"/no/such/folder", folder.string()});
  std::string why;
  const bool is_found = cublaslt::is_available(why);
  std::filesystem::remove_all(folder);
  if (!is_found) check::fail(__FILE__, __LINE__, why);
  CHECK_EQ(cublaslt::api().version, size_t{130100});
  expect_error(error_of([] { cublaslt::use_library("another"); }),
               {"use_library() after", "was loaded"});
  expect_error(error_of([] { cublaslt::search_in({}); }), {"was loaded"});
}

TEST(a_thread_without_a_gpu_is_told) {
  Gemm g;
  g.m = g.n = g.k = g.a.ld = g.b.ld = g.ldc = 1;
  float value = 1;
  g.a.data = g.b.data = g.c = &value;
  expect_error(error_of([&] { (void)gemm(g, nullptr); }), {"no GPU is current", "CtxGetDevice"});
}

TEST(failing_to_start_is_told_and_tried_again) {
  const Scene scene;
  Trial trial(small(), scene.stream());
  {
    const Setting fail("FAKE_CUBLASLT_FAIL", "Create:1:1");
    expect_error(error_of([&] { (void)gemm(trial.gemm(), scene.stream()); }), {"cublasLtCreate"});
  }
  CHECK(trial.run().is_fused);
}

TEST(products_are_right_in_all_dtypes_transposed_and_with_gaps) {
  const Scene scene;
  for (const DType dtype : kDTypes) {
    const Case c{.m = 9, .n = 16, .k = 33, .dtype = dtype, .out_dtype = dtype};
    for (const Case& layout : layouts_of(c)) CHECK(Trial(layout, scene.stream()).run().is_fused);
  }
}

TEST(sizes_of_zero_and_one_and_odd_ones_work) {
  const Scene scene;
  for (const int64_t m : {0, 1, 7})
    for (const int64_t n : {0, 1, 40})
      for (const int64_t k : {0, 1, 13})
        for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
          for (const GemmEpilogue epilogue : kEpilogues) {
            Case c{.m = m, .n = n, .k = k, .dtype = dtype, .out_dtype = dtype};
            c.epilogue = epilogue;
            c.b_is_transposed = true;
            c.accumulates = k == 0;
            Trial trial(c, scene.stream());
            const GemmPlan plan = trial.run();
            const bool is_left = (m == 0 || n == 0) && k > 0 &&
                                 ((epilogue == GemmEpilogue::kBiasGradA && m > 0) ||
                                  (epilogue == GemmEpilogue::kBiasGradB && n > 0));
            CHECK_EQ(plan.is_fused, !is_left);
            CHECK_EQ(kernels::plan(trial.gemm()).is_fused, plan.is_fused);
          }
}

TEST(sixteen_bit_factors_can_have_a_float32_product) {
  const Scene scene;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const GemmEpilogue epilogue : kEpilogues) {
      Case c = small(epilogue, dtype);
      c.out_dtype = DType::kFloat32;
      c.accumulates = true;
      c.a_is_transposed = true;
      (void)Trial(c, scene.stream()).run();
    }
  }
}

TEST(every_epilogue_is_cublaslts_of_that_name) {
  const Scene scene;
  const std::pair<GemmEpilogue, int> kValues[] = {
      {GemmEpilogue::kNone, 1},          {GemmEpilogue::kBias, 4},
      {GemmEpilogue::kRelu, 2},          {GemmEpilogue::kReluBias, 6},
      {GemmEpilogue::kReluAux, 130},     {GemmEpilogue::kReluAuxBias, 134},
      {GemmEpilogue::kGeluTanh, 32},     {GemmEpilogue::kGeluTanhBias, 36},
      {GemmEpilogue::kGeluTanhAux, 160}, {GemmEpilogue::kGeluTanhAuxBias, 164},
      {GemmEpilogue::kDRelu, 136},       {GemmEpilogue::kDReluBiasGrad, 152},
      {GemmEpilogue::kDGeluTanh, 192},   {GemmEpilogue::kDGeluTanhBiasGrad, 208},
      {GemmEpilogue::kBiasGradA, 512},  // cuBLASLt's B is our A
      {GemmEpilogue::kBiasGradB, 256},
  };
  CHECK_EQ(std::size(kValues), std::size(kEpilogues));
  for (const auto& [epilogue, value] : kValues) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      CHECK(Trial(small(epilogue, dtype), scene.stream()).run().is_fused);
      CHECK_EQ(last_epilogue(), value);
    }
  }
}

TEST(epilogues_are_right_with_transposes_gaps_and_accumulation) {
  const Scene scene;
  for (const GemmEpilogue epilogue : kEpilogues) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const bool is_transposed : {false, true}) {
        Case c = small(epilogue, dtype);
        c.n = 19;
        c.pad = 3;
        c.a_is_transposed = is_transposed;
        c.b_is_transposed = !is_transposed;
        c.accumulates = is_transposed;
        CHECK(Trial(c, scene.stream()).run().is_fused);
      }
    }
  }
}

TEST(aux_has_the_room_that_cublaslt_asks_for) {
  CHECK_EQ(aux_ld(GemmEpilogue::kGeluTanhAux, 17), 24);
  CHECK_EQ(aux_ld(GemmEpilogue::kDRelu, 129), 256);
  CHECK_EQ(aux_ld(GemmEpilogue::kBias, 17), 17);
  CHECK_EQ(aux_bytes(GemmEpilogue::kGeluTanhAux, DType::kBFloat16, 3, 24), 144);
  CHECK_EQ(aux_bytes(GemmEpilogue::kReluAux, DType::kBFloat16, 3, 256), 96);
  CHECK_EQ(aux_bytes(GemmEpilogue::kBias, DType::kBFloat16, 3, 256), 0);
}

TEST(pointers_that_are_not_aligned_cost_speed_and_say_so) {
  const Scene scene;
  for (const DType dtype : kDTypes) {
    for (const int64_t shift : {0, 1, 3, 4, 8}) {
      for (const int64_t n : {16, 17}) {
        for (const int shifted : {1, 2, 4, 7}) {
          Case c{.m = 8, .n = n, .k = 16, .dtype = dtype, .out_dtype = dtype};
          c.shift = shift;
          c.shifted = shifted;
          const bool is_good =
              (static_cast<size_t>(shift) * item_bytes(dtype)) % 16 == 0 && n == 16;
          CHECK_EQ(Trial(c, scene.stream()).run().is_aligned, is_good);
        }
      }
    }
  }
}

TEST(an_epilogue_that_is_refused_is_left_to_the_caller) {
  const Scene scene;
  for (const GemmEpilogue epilogue : kEpilogues) {
    if (epilogue == GemmEpilogue::kNone) continue;
    Trial of_doubles(small(epilogue, DType::kFloat64), scene.stream());
    CHECK(!of_doubles.run().is_fused);
    CHECK_EQ(last_epilogue(), 1);
    forget_choices();
    Trial trial(small(epilogue), scene.stream());
    trial.run();
    const std::string value = std::to_string(last_epilogue());
    forget_choices();
    const Setting refuse("FAKE_CUBLASLT_NO_EPILOGUE", value);
    const GemmPlan plan = kernels::plan(trial.gemm());
    CHECK(!plan.is_fused);
    expect_error(plan.why_not_fused, {"no algorithm with this epilogue"});
  }
}

TEST(an_aux_with_odd_rows_is_not_fused) {
  const Scene scene;
  Case c = small(GemmEpilogue::kGeluTanhAuxBias, DType::kBFloat16);
  c.n = 13;
  Trial gelu(c, scene.stream());
  gelu.gemm().aux_ld = 13;
  const GemmPlan plan = gelu.run();
  CHECK(!plan.is_fused);
  expect_error(plan.why_not_fused, {"no multiple of 8"});
  c.epilogue = GemmEpilogue::kReluAux;
  Trial relu(c, scene.stream());
  relu.gemm().aux_ld = 64;
  expect_error(relu.run().why_not_fused, {"128 bits"});
}

TEST(an_algorithm_that_does_not_run_after_all_is_replaced_by_the_plain_product) {
  const Scene scene;
  Trial trial(small(GemmEpilogue::kGeluTanhBias), scene.stream());
  {
    const Setting fail("FAKE_CUBLASLT_FAIL", "Matmul:1:15");
    const GemmPlan plan = trial.run();
    CHECK(!plan.is_fused);
    expect_error(plan.why_not_fused, {"refused to run"});
  }
  CHECK(!trial.run().is_fused);  // and remembered: ranks must not change their minds
}

TEST(every_call_that_fails_is_named_and_leaves_nothing) {
  const Scene scene;
  const std::pair<const char*, int> kCalls[] = {{"MatmulDescCreate", 1},
                                                {"MatmulDescSetAttribute", 7},
                                                {"MatrixLayoutCreate", 3},
                                                {"MatmulPreferenceCreate", 1},
                                                {"MatmulPreferenceSetAttribute", 6},
                                                {"MatmulAlgoGetHeuristic", 1},
                                                {"Matmul", 1}};
  Case c = small(GemmEpilogue::kGeluTanhAuxBias, DType::kBFloat16);
  c.sm_target = 3;
  Trial trial(c, scene.stream());
  for (const auto& [name, times] : kCalls) {
    for (int nth = 1; nth <= times; ++nth) {
      for (const int status : {1, 3, 7, 8, 13, 14, 15}) {
        const bool is_refusal = status == 7 || status == 15;
        if (is_refusal && name == std::string("MatmulAlgoGetHeuristic")) continue;  // falls back
        if (status == 15 && name == std::string("Matmul")) continue;                // likewise
        forget_choices();
        const Setting fail("FAKE_CUBLASLT_FAIL", concat(name, ":", nth, ":", status));
        const std::string error = error_of([&] { (void)gemm(trial.gemm(), scene.stream()); });
        expect_error(error,
                     {(std::string("cublasLt") + name).c_str(), concat("(", status, ")").c_str()});
        CHECK_EQ(live(), 0);
      }
    }
  }
  for (const char* const name :
       {"MatmulDescDestroy", "MatrixLayoutDestroy", "MatmulPreferenceDestroy"}) {
    forget_choices();
    const Setting fail("FAKE_CUBLASLT_FAIL", concat(name, ":1:14"));
    CHECK(trial.run().is_fused);
  }
  forget_choices();
  trial.gemm().epilogue = GemmEpilogue::kNone;
  const Setting fail("FAKE_CUBLASLT_FAIL", "MatmulAlgoGetHeuristic:1:15");
  expect_error(
      error_of([&] { (void)gemm(trial.gemm(), scene.stream()); }),
      {"cublasLtMatmulAlgoGetHeuristic", "knows no algorithm", "bfloat16", "[16, 24, 32]"});
}

TEST(arguments_that_make_no_product_are_refused) {
  const Scene scene;
  const auto error_with = [&](auto change, GemmEpilogue epilogue = GemmEpilogue::kNone) {
    Trial trial(small(epilogue), scene.stream());
    change(trial.gemm());
    return error_of([&] { (void)gemm(trial.gemm(), scene.stream()); });
  };
  expect_error(error_with([](Gemm& g) { g.m = -1; }), {"[-1, 24, 32]"});
  expect_error(error_with([](Gemm& g) { g.k = int64_t{1} << 31; }), {"2147483647"});
  expect_error(error_with([](Gemm& g) { g.a.ld = 31; }), {"A has rows of 32", "31"});
  expect_error(error_with([](Gemm& g) { g.b.ld = 23; }), {"B has rows of 24"});
  expect_error(error_with([](Gemm& g) { g.ldc = 23; }), {"C has rows of 24"});
  expect_error(error_with([](Gemm& g) { g.b.data = nullptr; }), {"B is null"});
  expect_error(error_with([](Gemm& g) { g.c = nullptr; }), {"and is null"});
  expect_error(error_with([](Gemm& g) { g.dtype = DType::kInt32; }), {"int32"});
  expect_error(error_with([](Gemm& g) { g.out_dtype = DType::kFloat16; }), {"float16"});
  expect_error(error_with([](Gemm& g) { g.sm_target = -1; }), {"-1 multiprocessors"});
  expect_error(error_with([](Gemm& g) { g.epilogue = static_cast<GemmEpilogue>(77); }),
               {"unknown GEMM epilogue 77"});
  expect_error(error_with([](Gemm& g) { g.bias = nullptr; }, GemmEpilogue::kReluBias),
               {"relu_bias", "bias is null"});
  expect_error(error_with([](Gemm& g) { g.bias_grad = nullptr; }, GemmEpilogue::kBiasGradA),
               {"bias_grad is null"});
  expect_error(error_with([](Gemm& g) { g.aux = nullptr; }, GemmEpilogue::kDGeluTanh),
               {"aux", "null"});
  expect_error(error_with([](Gemm& g) { g.aux_ld = 16; }, GemmEpilogue::kDGeluTanh), {"of 16"});
  Trial doubles(small(GemmEpilogue::kNone, DType::kFloat64), scene.stream());
  doubles.gemm().allows_tf32 = true;
  expect_error(error_of([&] { (void)gemm(doubles.gemm(), scene.stream()); }), {"TF32"});
}

TEST(products_that_need_a_workspace_share_one_per_stream) {
  const Scene scene;
  const int64_t before = device_bytes();
  {
    Trial trial(small(), scene.stream());
    take_the_second(trial.gemm(), scene.stream());
    CHECK(trial.run().workspace_bytes > 0);
  }
  CHECK_EQ(device_bytes() - before, int64_t{32} << 20);
  forget_stream(scene.stream());
  scene.synchronise();
  CHECK_EQ(device_bytes(), before);
}

TEST(a_captured_product_has_a_workspace_of_its_own) {
  const Scene scene;
  Trial trial(small(), scene.stream());
  take_the_second(trial.gemm(), scene.stream());
  forget_stream(scene.stream());
  scene.synchronise();
  const int64_t before = device_bytes();
  {
    const Setting capturing("FAKE_CUDA_CAPTURING", "1");
    CHECK(trial.run().workspace_bytes > 0);
  }
  CHECK_EQ(device_bytes(), before);  // nothing is kept: the graph has its memory
}

TEST(no_room_for_the_workspace_is_told) {
  const Scene scene;
  Trial trial(small(), scene.stream());
  take_the_second(trial.gemm(), scene.stream());
  forget_stream(scene.stream());
  scene.synchronise();
  {
    const Setting full("FAKE_CUDA_MEMORY", std::to_string(device_bytes() + 1000));
    expect_error(error_of([&] { (void)gemm(trial.gemm(), scene.stream()); }),
                 {"out of GPU memory", "workspace"});
  }
  CHECK(trial.run().is_fused);
}

TEST(threads_on_one_stream_and_on_several_do_not_disturb_each_other) {
  const Scene scene;
  {
    Trial trial(small(), scene.stream());
    take_the_second(trial.gemm(), scene.stream());
  }
  const cuda::Device device(0);
  const cuda::Stream second, third;
  std::vector<Case> cases(6, small());
  cases[3] = cases[5] = small(GemmEpilogue::kGeluTanhBias);
  run_threads(device, cases, {scene.stream(), second.get(), third.get()}, 20, 3);
  for (const cuda::Stream* const stream : {&second, &third}) {
    forget_stream(stream->get());
    TPN_CUDA(cuda::driver().StreamSynchronize(stream->get()), "a test's stream");
  }
}

int main() { return check::run_all(); }
