// SPDX-License-Identifier: Apache-2.0
// The NCCL communicator over test doubles of the driver and of NCCL: what it takes to start, and
// results against plain loops.
// TSan: ranks are threads.
#include <cmath>
#include <cstdlib>

#include "check.h"
#include "nccl_ranks.h"

TEST(a_missing_driver_and_library_are_told) {
  // before anything is loaded
  std::string why;
  try {
    cuda::use_driver("/nowhere/libcuda.so.1");
    CHECK(!cuda::is_available(why));
  } catch (const Error&) {
    CHECK(false);
  }
  CHECK(why.find("no NVIDIA driver") != std::string::npos);
  CHECK(!is_available("nccl"));
  {
    const Setting old("FAKE_CUDA_VERSION", "11040");
    cuda::use_driver(kDriver);
    CHECK(!cuda::is_available(why));
    CHECK(why.find("runs CUDA 11.4, expected at least 12.0: update the driver") !=
          std::string::npos);
  }
  {
    const Setting broken("FAKE_CUDA_INIT", "100");
    CHECK(!cuda::is_available(why));
    CHECK(why.find("no CUDA-capable device is detected (100)") != std::string::npos);
  }
  use_doubles();
  {
    const Setting none("FAKE_CUDA_DEVICES", "0");
    CHECK(!cuda::is_available(why));
    CHECK(why.find("finds no GPU") != std::string::npos);
  }
  CHECK(is_available("nccl"));
  const auto without = [](const std::string& file) {
    Made made = make(2, 5, [&](int rank) {
      NcclOptions options = options_of(rank);
      options.search.file = file;
      return options;
    });
    for (const FailureRecord& failure : made.failures) CHECK(!failure.message.empty());
    return made.failures[0].message;
  };
  std::string text = without("/nowhere/libnccl.so.2");
  CHECK(text.find("rank 0: no NCCL library (/nowhere/libnccl.so.2: ") != std::string::npos);
  CHECK(text.find("rank 1: no NCCL library") != std::string::npos);
  text = without(kDriver);
  CHECK(text.find("has no ncclGetVersion") != std::string::npos);
  for (const char* version : {"21705", "30000", "2000"}) {
    const Setting wrong("FAKE_NCCL_VERSION", version);
    text = without(kNccl);
    CHECK(text.find(concat("is version ", nccl::version_text(std::atoi(version)),
                           ", expected 2.18 or newer of 2.x")) != std::string::npos);
  }
}

TEST(a_device_that_is_not_there_and_a_shared_one_are_told_on_all_ranks) {
  Made made = make(2, 5, [](int rank) {
    NcclOptions options = options_of(rank);
    options.device = rank == 1 ? 9 : 0;
    return options;
  });
  check_all_told(made.failures, FailureKind::kError, -1,
                 "rank 1: cuda:9 is not there: this process sees 8 GPUs");
  const auto on_one = [](bool is_allowed) {
    return make(3, 5, [=](int rank) {
      NcclOptions options = options_of(rank);
      options.device = rank == 2 ? 1 : 0;
      options.is_gpu_shared = is_allowed;
      return options;
    });
  };
  check_all_told(on_one(false).failures, FailureKind::kError, -1,
                 "ranks 0 and 1 are on one GPU, 0000:00:00.0");
  made = on_one(true);
  for (const FailureRecord& failure : made.failures) CHECK_EQ(failure.message, "");
  close_all(made.ranks);
}

TEST(all_reduce_sums_over_1_to_4_ranks) {
  for (const int size : {1, 2, 3, 4}) {
    const Ranks ranks = make_clean(size);
    for (const size_t count : {0u, 1u, 97u, 40'000u}) {
      run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
                  const int rank = c.identity().rank;
                  OnDevice<float> x(stream, ramp(count, static_cast<float>(rank + 1)));
                  OnDevice<float> y(stream, std::vector<float>(count, -1));
                  const int64_t shape[] = {static_cast<int64_t>(count)};
                  const Signature s{
                      .op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape};
                  c.all_reduce(s, x.data(), y.data(), static_cast<int64_t>(count), {}, {stream});
                  c.all_reduce(s, x.data(), x.data(), static_cast<int64_t>(count), {}, {stream});
                  const float total = static_cast<float>(size * (size + 1)) / 2;
                  CHECK(y.read() == ramp(count, total));
                  CHECK(x.read() == ramp(count, total));
                }));
    }
    close_all(ranks);
  }
  CHECK_EQ(live_communicators(), 0);
}

TEST(dtypes_and_reductions_are_those_of_nccl) {
  const Ranks ranks = make_clean(3);
  const auto reduced = [&]<class T>(T, DType dtype, ReduceOp op) {
    T found{};
    run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
                const T values[] = {T(1), T(0), T(1)};
                OnDevice<T> x(stream, {values[c.identity().rank]});
                const int64_t shape[] = {1};
                c.all_reduce(
                    {.op = OpCode::kAllReduce, .dtype = dtype, .reduce = op, .shape = shape},
                    x.data(), x.data(), 1, {}, {stream});
                const T value = x.read()[0];
                if (c.identity().rank == 1) found = value;
              }));
    return static_cast<double>(found);
  };
  CHECK_EQ(reduced(float{}, DType::kFloat32, ReduceOp::kSum), 2);
  CHECK_EQ(reduced(double{}, DType::kFloat64, ReduceOp::kMax), 1);
  CHECK_EQ(reduced(double{}, DType::kFloat64, ReduceOp::kMin), 0);
  CHECK_EQ(reduced(double{}, DType::kFloat64, ReduceOp::kAvg), 2.0 / 3);
  CHECK_EQ(reduced(_Float16{}, DType::kFloat16, ReduceOp::kSum), 2);
  CHECK_EQ(reduced(int32_t{}, DType::kInt32, ReduceOp::kSum), 2);
  CHECK_EQ(reduced(int64_t{}, DType::kInt64, ReduceOp::kSum), 2);
  CHECK_EQ(reduced(int8_t{}, DType::kInt8, ReduceOp::kSum), 2);
  CHECK_EQ(reduced(uint8_t{}, DType::kUInt8, ReduceOp::kSum), 2);
  CHECK_EQ(reduced(uint8_t{}, DType::kBool, ReduceOp::kSum), 1);  // "or"
  CHECK_EQ(reduced(uint8_t{}, DType::kBool, ReduceOp::kMin), 0);  // "and"
  for (const FailureRecord& failure : run(ranks, [](Communicator& c) {
         int16_t x = 0;
         c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kInt16}, &x, &x, 1, {}, {});
       }))
    CHECK(failure.message.find("NCCL cannot reduce int16: convert it to int32") !=
          std::string::npos);
  CHECK_EQ(reduced(float{}, DType::kFloat32, ReduceOp::kSum), 2);  // the group goes on
  close_all(ranks);
}

TEST(parts_of_unequal_sizes_go_where_they_belong) {
  for (const std::vector<int64_t>& cut :
       std::vector<std::vector<int64_t>>{{5}, {4, 4}, {3, 0, 4}, {0, 0, 7, 20'000}}) {
    const Ranks ranks = make_clean(static_cast<int>(cut.size()));
    check_parts(ranks, cut);
    close_all(ranks);
  }
  CHECK_EQ(live_communicators(), 0);
}

TEST(a_call_returns_before_its_work_is_done_and_order_is_kept_under_delays) {
  const Setting jitter("FAKE_CUDA_JITTER_US", "300");
  const Setting progress("FAKE_NCCL_PROGRESS_MS", "1");
  const Ranks ranks = make_clean(3);
  run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
              OnDevice<double> x(stream, {1.0});
              const int64_t shape[] = {1};
              for (int step = 0; step < 30; ++step) {
                c.all_reduce({.op = OpCode::kAllReduce,
                              .dtype = DType::kFloat64,
                              .reduce = step % 2 == 0 ? ReduceOp::kSum : ReduceOp::kAvg,
                              .shape = shape},
                             x.data(), x.data(), 1, {}, {stream});
              }
              CHECK_EQ(x.read()[0], std::pow(3.0, 15));
              CHECK_EQ(c.stats().collectives, 31u);  // with init
            }));
  close_all(ranks);
}

TEST(memory_that_runs_out_names_need_and_have) {
  const Ranks ranks = make_clean(2);
  const Setting memory("FAKE_CUDA_MEMORY", "400000");
  const auto failures = run(
      ranks, on_gpu([](Communicator& c, cuda::StreamHandle stream) {
        const int64_t cut[] = {1, 60'000};
        const int64_t shape[] = {60'001};
        OnDevice<float> x(stream, {1});
        c.reduce_scatter(
            {.op = OpCode::kReduceScatter, .dtype = DType::kFloat32, .shape = shape, .sizes = cut},
            x.data(), x.data(), cut, {stream});
      }));
  for (const FailureRecord& failure : failures)
    CHECK(failure.message.find("out of GPU memory: reduce_scatter needs 720000 bytes, ") !=
          std::string::npos);
  close_all(ranks);
}

TEST(events_do_not_pile_up) {
  const auto events = symbol<int()>(kDriver, "fake_cuda_live_events");
  const Ranks ranks = make_clean(2);
  run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
              OnDevice<float> x(stream, ramp(64, 0));
              const int64_t shape[] = {64};
              for (int step = 0; step < 400; ++step) {
                c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                             x.data(), x.data(), 64, {}, {stream});
                if (step % 20 == 19) x.read(), c.barrier(0, {});
              }
              CHECK(events() < 400);
            }));
  close_all(ranks);
  CHECK_EQ(events(), 0);
}

int main() {
  ::setenv("FAKE_CUDA_DEVICES", "8", 1);
  return check::run_all();
}
