// SPDX-License-Identifier: Apache-2.0
// GEMM on a GPU with the library itself: results, what is fused, choices, graphs, threads. Skipped
// (77) without a GPU or cuBLASLt; arguments are folders to look for the library in.
#include <cstdio>

#include "check.h"
#include "core/shared_library.h"
#include "gemm_cases.h"
#include "kernels/cublaslt_api.h"

using namespace gemm_cases;  // NOLINT

namespace {

constexpr int kSkipped = 77;
constexpr double kGeluError = 1e-3;  // tanh.approx.f32 is good to 2^-11

/// Device 0 and a stream of it.
struct Scene {
  cuda::Device device{0};
  cuda::Current current{device};
  cuda::Stream one;
  Scene() { forget_choices(); }
  ~Scene() { forget_stream(one.get()); }
  cuda::StreamHandle stream() const { return one.get(); }
};

/// The part of the driver's API that only this test needs.
struct Graphs {
  int (*begin)(cuda::StreamHandle, int) = nullptr;
  int (*end)(cuda::StreamHandle, void**) = nullptr;
  int (*instantiate)(void**, void*, unsigned long long) = nullptr;
  int (*launch)(void*, cuda::StreamHandle) = nullptr;
  int (*destroy_exec)(void*) = nullptr;
  int (*destroy)(void*) = nullptr;

  Graphs() {
    std::string why;
    const SharedLibrary library = SharedLibrary::open(cuda::driver().path.c_str(), why);
    const auto find = [&](auto& function, const char* symbol) {
      *reinterpret_cast<void**>(&function) = library.find(symbol);
      TPN_CHECK(function, "the driver has no ", symbol);
    };
    find(begin, "cuStreamBeginCapture_v2");
    find(end, "cuStreamEndCapture");
    find(instantiate, "cuGraphInstantiateWithFlags");
    find(launch, "cuGraphLaunch");
    find(destroy_exec, "cuGraphExecDestroy");
    find(destroy, "cuGraphDestroy");
  }
};

Case case_of(DType dtype, GemmEpilogue epilogue, int64_t m, int64_t n, int64_t k) {
  Case c{.m = m, .n = n, .k = k, .dtype = dtype, .out_dtype = dtype, .epilogue = epilogue};
  c.b_is_transposed = true;
  c.gelu_error = kGeluError;
  return c;
}

/// Few values summed over many: split over k, through the workspace.
Case deep(DType dtype, GemmEpilogue epilogue) { return case_of(dtype, epilogue, 32, 64, 16384); }

}  // namespace

TEST(products_are_right_in_all_dtypes_transposed_and_with_gaps) {
  const Scene scene;
  for (const DType dtype : kDTypes)
    for (const Case& c : layouts_of(case_of(dtype, GemmEpilogue::kNone, 40, 64, 72)))
      (void)Trial(c, scene.stream()).run();
}

TEST(sizes_of_zero_and_one_and_odd_ones_work) {
  const Scene scene;
  for (const int64_t m : {0, 1, 7, 130})
    for (const int64_t n : {0, 1, 9, 136})
      for (const int64_t k : {0, 1, 13, 64})
        for (const DType dtype : kDTypes)
          for (const GemmEpilogue epilogue : {GemmEpilogue::kNone, GemmEpilogue::kGeluTanhBias})
            (void)Trial(case_of(dtype, epilogue, m, n, k), scene.stream()).run();
}

TEST(every_epilogue_is_right_where_it_is_fused) {
  const Scene scene;
  for (const DType dtype : kDTypes) {
    std::string left;
    for (const GemmEpilogue epilogue : kEpilogues) {
      for (const int64_t n : {64, 61}) {
        for (const bool accumulates : {false, true}) {
          Case c = case_of(dtype, epilogue, 48, n, 80);
          c.accumulates = accumulates;
          c.a_is_transposed = epilogue == GemmEpilogue::kBiasGradA;
          c.b_is_transposed = !c.a_is_transposed;
          const bool is_fused = Trial(c, scene.stream()).run().is_fused;
          if (!is_fused)
            left += concat(" ", kernels::name(epilogue), "(n=", n, accumulates ? ",+C)" : ")");
        }
      }
    }
    std::printf("        not fused in %s:%s\n", tp_native::name(dtype),
                left.empty() ? " none" : left.c_str());
  }
  for (const DType dtype :
       {DType::kFloat16, DType::kBFloat16})  // what torch's own linear counts on
    CHECK(Trial(case_of(dtype, GemmEpilogue::kBias, 48, 64, 80), scene.stream()).run().is_fused);
}

TEST(sixteen_bit_factors_can_have_a_float32_product) {
  const Scene scene;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const GemmEpilogue epilogue :
         {GemmEpilogue::kNone, GemmEpilogue::kBias, GemmEpilogue::kBiasGradA}) {
      Case c = case_of(dtype, epilogue, 48, 64, 80);
      c.out_dtype = DType::kFloat32;
      c.accumulates = true;
      c.a_is_transposed = true;
      (void)Trial(c, scene.stream()).run();
    }
  }
}

TEST(pointers_that_are_not_aligned_still_give_results) {
  const Scene scene;
  for (const DType dtype : kDTypes) {
    for (const int64_t shift : {1, 2, 4}) {
      for (const GemmEpilogue epilogue : {GemmEpilogue::kNone, GemmEpilogue::kReluBias}) {
        Case c = case_of(dtype, epilogue, 33, 65, 47);
        c.shift = shift;
        (void)Trial(c, scene.stream()).run();
      }
    }
  }
}

TEST(tf32_and_fewer_multiprocessors_are_taken) {
  const Scene scene;
  Case c = case_of(DType::kFloat32, GemmEpilogue::kBias, 128, 256, 512);
  c.allows_tf32 = true;
  (void)Trial(c, scene.stream()).run();
  c = case_of(DType::kBFloat16, GemmEpilogue::kBias, 256, 256, 512);
  c.sm_target = std::max(1, scene.device.multiprocessors() - 8);
  (void)Trial(c, scene.stream()).run();
}

TEST(tuning_harms_nothing_and_is_used) {
  const Scene scene;
  for (const GemmEpilogue epilogue : {GemmEpilogue::kNone, GemmEpilogue::kGeluTanhAuxBias}) {
    for (Case c :
         {deep(DType::kBFloat16, epilogue), case_of(DType::kBFloat16, epilogue, 256, 512, 256)}) {
      c.accumulates = epilogue == GemmEpilogue::kNone;
      Trial trial(c, scene.stream());
      const GemmTuning tuning = tune(trial.gemm(), scene.stream());
      CHECK(trial.run().source == GemmPlan::Source::kTuned);
      std::string times;
      for (const double us : tuning.us) times += concat(" ", us);
      std::printf("        %s: us%s, best %d\n", text_of(c).c_str(), times.c_str(), tuning.best);
    }
  }
}

TEST(an_imported_choice_gives_the_same_bits) {
  const Scene scene;
  Trial trial(deep(DType::kBFloat16, GemmEpilogue::kBias), scene.stream());
  const GemmTuning tuning = tune(trial.gemm(), scene.stream());
  (void)trial.run();
  const std::vector<char> tuned = trial.c_bytes();
  const std::vector<std::byte> choice = export_choice(trial.gemm());
  forget_choices();
  import_choice(trial.gemm(), choice);
  CHECK(trial.run().source == GemmPlan::Source::kImported);
  CHECK(trial.c_bytes() == tuned);
  std::vector<std::byte> damaged = choice;
  damaged[100] ^= std::byte{1};
  bool is_refused = false;
  try {
    import_choice(trial.gemm(), damaged);
  } catch (const Error&) {
    is_refused = true;
  }
  CHECK(is_refused);
}

TEST(a_captured_product_replays_to_the_same_bits) {
  const Scene scene;
  const Graphs graphs;
  for (const GemmEpilogue epilogue : {GemmEpilogue::kNone, GemmEpilogue::kGeluTanhBias}) {
    for (const Case& c : {deep(DType::kBFloat16, epilogue), deep(DType::kFloat32, epilogue),
                          case_of(DType::kBFloat16, epilogue, 256, 512, 0)}) {
      Trial trial(c, scene.stream());
      const GemmPlan eager_plan = trial.run();
      const std::vector<char> eager = trial.c_bytes();
      Trial other(c, scene.stream(), 90);
      void* graph = nullptr;
      void* exec = nullptr;
      TPN_CUDA(graphs.begin(scene.stream(), 0), "capture");
      const GemmPlan plan = kernels::gemm(trial.gemm(), scene.stream());
      TPN_CUDA(graphs.end(scene.stream(), &graph), "capture");
      TPN_CUDA(graphs.instantiate(&exec, graph, 0), "capture");
      CHECK_EQ(plan.is_fused, eager_plan.is_fused);
      for (int replay = 0; replay < 20; ++replay) {
        trial.spoil_c();
        TPN_CUDA(graphs.launch(exec, scene.stream()), "replay");
        (void)kernels::gemm(other.gemm(), scene.stream());
        CHECK(trial.c_bytes() == eager);
      }
      std::printf("        %s: workspace %lld bytes\n", text_of(c).c_str(),
                  static_cast<long long>(plan.workspace_bytes));
      TPN_CUDA(graphs.destroy_exec(exec), "replay");
      TPN_CUDA(graphs.destroy(graph), "replay");
    }
  }
}

TEST(threads_on_one_stream_and_on_several_do_not_disturb_each_other) {
  const Scene scene;
  const cuda::Stream second, third;
  const std::vector<Case> cases(6, deep(DType::kBFloat16, GemmEpilogue::kGeluTanhBias));
  run_threads(scene.device, cases, {scene.stream(), second.get(), third.get()}, 3, 50);
  for (const cuda::Stream* const stream : {&second, &third}) forget_stream(stream->get());
}

int main(int argc, char** argv) {
  std::string why;
  cublaslt::search_in(std::vector<std::string>(argv + 1, argv + argc));
  if (!cuda::is_available(why) || !cublaslt::is_available(why)) {
    std::printf("skipped: %s\n", why.c_str());
    return kSkipped;
  }
  std::printf("cuBLASLt %zu, %s, on %s\n", cublaslt::api().version, cublaslt::api().path.c_str(),
              cuda::Device(0).name().c_str());
  return check::run_all();
}
