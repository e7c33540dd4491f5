// SPDX-License-Identifier: Apache-2.0
// The NCCL communicator over test doubles of the driver and of NCCL: results against plain loops,
// every call with every failing answer, ranks that die, hang, differ, leave.
// TSan: ranks are threads, but for the tests that kill one.
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <thread>

#include "check.h"
#include "comm/backends.h"
#include "comm/socket_board.h"
#include "comm/two_level.h"
#include "device_ranks.h"
#include "memory_board.h"

namespace {

constexpr const char* kNccl = TPN_DOUBLES "/libfake_nccl.so";

int live_communicators() { return symbol<int()>(kNccl, "fake_nccl_live")(); }

NcclOptions options_of(int rank) {
  NcclOptions options;
  options.device = rank;
  options.init_timeout_s = 5;
  options.search.file = kNccl;
  return options;
}

/// `size` ranks as threads, one GPU each; what making them threw.
struct Made {
  Ranks ranks;
  std::vector<FailureRecord> failures;
};
Made make(int size, double timeout_s = 5,
          const std::function<NcclOptions(int)>& options = options_of) {
  use_doubles();
  static int count = 0;
  const Ranks controls = make_local({0, size, concat("tp:", count++), "local", 0, timeout_s});
  Made made;
  made.ranks.resize(static_cast<size_t>(size));
  made.failures = run(controls, [&](Communicator& control) {
    const int rank = control.identity().rank;
    made.ranks[rank] = make_nccl(options(rank), controls[rank]);
  });
  return made;
}

Ranks make_clean(int size, double timeout_s = 5) {
  Made made = make(size, timeout_s);
  for (const FailureRecord& failure : made.failures) {
    if (!failure.message.empty()) throw std::runtime_error(failure.message);
  }
  return made.ranks;
}

void close_all(const Ranks& ranks) {
  run_clean(ranks, [](Communicator& c) { c.close(); });
}

}  // namespace

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

TEST(unlike_calls_are_told_on_all_ranks_soon) {
  const Ranks ranks = make_clean(3);
  std::atomic<double> begun{0};
  std::vector<double> took(3);
  const auto failures = run(ranks, [&](Communicator& c) {
    const int rank = c.identity().rank;
    on_gpu([&](Communicator& group, cuda::StreamHandle stream) {
      OnDevice<float> x(stream, ramp(64, 1));
      const int64_t shape[] = {rank == 1 ? 32 : 64};
      begun = now_s();
      group.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                       x.data(), x.data(), shape[0], {}, {stream});
    })(c);
    const double start = begun;
    try {
      for (const double end = now_s() + 10; now_s() < end;) {
        c.check();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    } catch (const Error&) {
      took[rank] = now_s() - start;
      throw;
    }
  });
  check_all_told(failures, FailureKind::kMismatch, 1, "rank 1 all_reduce(sum, float32 [32])");
  check_all_told(run(ranks, loop), FailureKind::kMismatch, 1, "rank 1 all_reduce");  // poisoned
  for (const double seconds : took) CHECK(seconds < 1.0);  // the bar is 0.1; a busy machine is slow
  close_all(ranks);
  CHECK_EQ(live_communicators(), 0);
}

TEST(a_barrier_against_a_collective_is_a_mismatch_too) {
  const Ranks ranks = make_clean(2);
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 0) c.barrier(0, {});
    loop(c);
  });
  check_all_told(failures, FailureKind::kMismatch, 1, "rank 0 barrier; rank 1 all_reduce");
  close_all(ranks);
}

TEST(a_rank_that_never_comes_is_named_at_the_deadline) {
  const Ranks ranks = make_clean(2, 0.3);
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 0) loop(c);
    for (const double end = now_s() + 10; now_s() < end;) {
      c.check();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  });
  check_all_told(failures, FailureKind::kTimeout, 1, "rank 1 did not come within 0.3 s");
  close_all(ranks);
  CHECK_EQ(live_communicators(), 0);
}

TEST(an_operation_that_never_completes_is_told_at_the_deadline) {
  const Setting hang("FAKE_NCCL_HANG", "3:0");
  const Ranks ranks = make_clean(2, 0.3);
  check_all_told(run(ranks, loop), FailureKind::kTimeout, -1, "a GPU did not get through it");
  close_all(ranks);
  CHECK_EQ(live_communicators(), 0);
}

TEST(a_rank_that_left_is_named) {
  const Ranks ranks = make_clean(2);
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 1) {
      c.close();
      fail("done");
    }
    loop(c);
  });
  CHECK(failures[0].kind == FailureKind::kPeerLost);
  CHECK_EQ(failures[0].peer, 1);
  close_all(ranks);
}

TEST(abort_reaches_all_ranks_and_use_after_close_is_refused) {
  const Ranks ranks = make_clean(3);
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 2) c.abort("enough");
    loop(c);
  });
  check_all_told(failures, FailureKind::kAborted, 2, "rank 2 aborted the group: enough");
  close_all(ranks);
  close_all(ranks);  // idempotent
  const Ranks again = make_clean(2);
  close_all(again);
  for (const FailureRecord& failure : run(again, loop))
    CHECK(failure.message.find("is closed") != std::string::npos);
  for (const FailureRecord& failure : run(again, [](Communicator& c) { c.barrier(0, {}); }))
    CHECK(failure.message.find("is closed") != std::string::npos);
  CHECK_EQ(live_communicators(), 0);
}

TEST(every_call_with_every_failing_answer_is_an_error_on_all_ranks_and_leaves_nothing) {
  const char* const calls[] = {"ncclGetUniqueId",
                               "ncclCommInitRankConfig",
                               "ncclAllReduce",
                               "ncclReduceScatter",
                               "ncclAllGather",
                               "ncclBroadcast",
                               "ncclSend",
                               "ncclRecv",
                               "ncclGroupStart",
                               "ncclGroupEnd",
                               "ncclCommGetAsyncError",
                               "ncclCommFinalize",
                               "ncclCommDestroy"};
  const auto everything = on_gpu([](Communicator& c, cuda::StreamHandle stream) {
    const bool is_first = c.identity().rank == 0;
    const int64_t cut[] = {2, 1};
    const int64_t even[] = {2, 2};
    const int64_t shape[] = {3};
    OnDevice<float> x(stream, ramp(8, 1));
    OnDevice<float> y(stream, ramp(8, 1));
    Signature s{.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape};
    c.all_reduce(s, x.data(), x.data(), 3, {}, {stream});
    s.op = OpCode::kReduceScatter;
    c.reduce_scatter(s, x.data(), y.data(), even, {stream});
    s.op = OpCode::kAllGather;
    c.all_gather(s, x.data(), y.data(), 1, even, {stream});
    c.all_gather(s, x.data(), y.data(), 1, cut, {stream});
    s.op = OpCode::kBroadcast, s.root = 0;
    c.broadcast(s, x.data(), 3, {stream});
    s.op = OpCode::kGather;
    c.gather(s, x.data(), is_first ? y.data() : nullptr, cut, {stream});
    s.op = OpCode::kScatter;
    c.scatter(s, is_first ? y.data() : nullptr, x.data(), cut, {stream});
    x.read();
    for (const double end = now_s() + 0.05; now_s() < end;) {
      c.check();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  for (const char* call : calls) {
    for (const int result : {1, 2, 3, 4, 5, 6}) {
      const Setting failing("FAKE_NCCL_FAIL", concat(call, ":0:", result));
      Made made = make(2, 3);
      std::string told;
      if (made.ranks[0] && made.ranks[1]) {
        const auto failures = run(made.ranks, everything);
        told = failures[0].message;
        const bool is_end =
            std::strcmp(call, "ncclCommFinalize") == 0 || std::strcmp(call, "ncclCommDestroy") == 0;
        if (is_end != failures[0].message.empty() || is_end != failures[1].message.empty())
          throw std::runtime_error(concat(call, " ", result, ": \"", failures[0].message,
                                          "\" and \"", failures[1].message, '"'));
        close_all(made.ranks);
      } else {
        CHECK(!made.failures[0].message.empty() && !made.failures[1].message.empty());
        told = made.failures[0].message;
      }
      const bool is_silent = std::strncmp(call, "ncclComm", 8) == 0;
      if (!is_silent && told.find(concat("(", result, ")")) == std::string::npos)
        throw std::runtime_error(concat(call, " ", result, ": ", told));
      made.ranks.clear();
      if (live_communicators() != 0)
        throw std::runtime_error(concat(call, " ", result, " leaves a communicator: ", told));
    }
  }
}

TEST(an_error_that_comes_later_is_told) {
  for (const int result : {1, 2, 3, 6}) {
    const Setting later("FAKE_NCCL_ASYNC", concat("4:", result, ":1"));
    const Ranks ranks = make_clean(2);
    check_all_told(run(ranks, loop), result == 6 ? FailureKind::kPeerLost : FailureKind::kError,
                   result == 6 ? -1 : 1, "failed on rank 1");
    close_all(ranks);
  }
  CHECK_EQ(live_communicators(), 0);
}

TEST(a_library_that_does_not_finish_is_aborted) {
  const Setting hangs("FAKE_NCCL_FINALIZE_HANGS", "1");
  const Ranks ranks = make_clean(2);
  const double start = now_s();
  close_all(ranks);
  CHECK(now_s() - start < 11);
  CHECK_EQ(live_communicators(), 0);
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

TEST(kept_memory_is_registered_and_outlives_the_group) {
  const auto allocated = symbol<int()>(kNccl, "fake_nccl_allocated");
  const Ranks ranks = make_clean(2);
  std::vector<Block> kept(2);
  run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
              const Block passing = c.allocate(4000);
              Block& block = kept[c.identity().rank] = c.allocate(4000);
              CHECK(block.data != nullptr && block.data != passing.data);
              const int64_t shape[] = {1000};
              OnDevice<float> x(stream, ramp(1000, 1));
              cuda::copy(block.data, x.data(), 4000, stream);
              c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                           block.data, x.data(), 1000, {}, {stream});
              CHECK(x.read() == ramp(1000, 2));
            }));
  CHECK_EQ(allocated(), 2);
  close_all(ranks);
  CHECK_EQ(live_communicators(), 0);  // destroyed in good order: nothing was registered any more
  std::memset(kept[0].data, 1, 4000);
  kept.clear();
  CHECK_EQ(allocated(), 0);
  const Setting none("FAKE_NCCL_FAIL", "ncclMemAlloc:0:1");
  const Ranks again = make_clean(2);
  for (const FailureRecord& failure : run(again, [](Communicator& c) { c.allocate(64); }))
    CHECK(failure.message.find("ncclMemAlloc of 64 bytes failed: unhandled cuda error (1)") !=
          std::string::npos);
  close_all(again);
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

namespace {

/// Ranks of "hosts" of these sizes: local groups and a local group of leaders, notes over sockets.
Made make_over_hosts(const std::vector<int64_t>& hosts, double timeout_s = 5) {
  use_doubles();
  static int count = 0;
  const std::string name = concat("tp:hosts:", count++);
  const int size = static_cast<int>(sum(hosts));
  const auto shared = std::make_shared<SharedBoard>(size);
  const Ranks leaders =
      make_local({0, static_cast<int>(hosts.size()), name + "/leaders", "local", 0, timeout_s});
  Ranks controls;
  for (size_t h = 0; h < hosts.size(); ++h) {
    const Ranks host = make_local(
        {0, static_cast<int>(hosts[h]), concat(name, '/', h), "local", 0, 2 * timeout_s + 2});
    for (size_t r = 0; r < host.size(); ++r) {
      const int rank = static_cast<int>(controls.size());
      controls.push_back(std::make_shared<TwoLevel>(
          Identity{rank, size, name, "two", 0, timeout_s}, host[r], r == 0 ? leaders[h] : nullptr,
          std::make_shared<MemoryBoard>(shared, rank), hosts));
    }
  }
  const auto width = static_cast<size_t>(size);
  std::vector<std::vector<int>> sockets(width, std::vector<int>(width, -1));
  for (size_t r = 1; r < width; ++r) {
    int ends[2];
    CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    sockets[0][r] = ends[0];
    sockets[r][0] = ends[1];
  }
  Made made;
  made.ranks.resize(width);
  made.failures = run(controls, [&](Communicator& control) {
    const int rank = control.identity().rank;
    made.ranks[rank] = make_nccl(options_of(rank), controls[rank],
                                 make_socket_board(controls[rank], sockets[rank]));
  });
  for (const FailureRecord& failure : made.failures) CHECK_EQ(failure.message, "");
  return made;
}

}  // namespace

TEST(ranks_of_several_hosts_number_note_and_leave_as_one_group) {
  const Ranks ranks = make_over_hosts({2, 1}).ranks;
  check_parts(ranks, {3, 0, 4});
  run_clean(ranks, [](Communicator& c) {
    c.barrier(0, {});
    c.check();
    const std::vector<LogEntry> log = c.op_log();
    for (size_t i = 1; i < log.size(); ++i) CHECK_EQ(log[i].seq, log[i - 1].seq + 1);
    CHECK(log.front().op == OpCode::kInit && log.back().op == OpCode::kBarrier);
  });
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 2) {
      c.close();
      fail("done");
    }
    loop(c);
  });
  check_all_told({failures[0], failures[1]}, FailureKind::kPeerLost, 2, "rank 2 left the group");
  close_all(ranks);
  CHECK_EQ(live_communicators(), 0);
}

TEST(unlike_calls_on_two_hosts_are_told_on_all_ranks) {
  for (const bool is_barrier : {false, true}) {
    const Ranks ranks = make_over_hosts({2, 2}).ranks;
    const auto failures = run(ranks, [&](Communicator& c) {
      if (c.identity().rank == 3 && is_barrier) c.barrier(0, {});
      if (c.identity().rank == 3) {
        int32_t x = 0;
        on_gpu([&](Communicator& group, cuda::StreamHandle stream) {
          OnDevice<int32_t> one(stream, {x});
          const int64_t shape[] = {1};
          group.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kInt32, .shape = shape},
                           one.data(), one.data(), 1, {}, {stream});
        })(c);
      }
      loop(c);
    });
    check_all_told(failures, FailureKind::kMismatch, 3,
                   is_barrier ? "rank 3 barrier" : "rank 3 all_reduce(sum, int32 [1])");
    close_all(ranks);
  }
  CHECK_EQ(live_communicators(), 0);
}

TEST(a_barrier_over_two_hosts_ends_with_a_verdict_of_either_part) {
  const Ranks ranks = make_over_hosts({1, 2}, 0.3).ranks;
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank != 2) c.barrier(0, {});
    for (const double end = now_s() + 10; now_s() < end;) {
      c.check();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  });
  check_all_told(failures, FailureKind::kTimeout, 2, "rank 2 did not come within 0.3 s");
  close_all(ranks);

  const Ranks others = make_over_hosts({1, 2}, 5).ranks;
  check_all_told(run(others,
                     [](Communicator& c) {
                       if (c.identity().rank == 0) c.abort("enough");
                       c.barrier(0, {});
                       loop(c);
                     }),
                 FailureKind::kAborted, 0, "rank 0 aborted the group: enough");
  close_all(others);
  CHECK_EQ(live_communicators(), 0);
}

TEST(a_killed_rank_is_named_and_nothing_waits_for_it) {
#if !defined(__SANITIZE_THREAD__)
  // fresh processes: the libraries of this one have threads
  int pipes[2];
  CHECK(::pipe(pipes) == 0);
  pid_t pids[3];
  for (int rank = 0; rank < 3; ++rank) {
    pids[rank] = ::fork();
    CHECK(pids[rank] >= 0);
    if (pids[rank] == 0) {
      ::execl("/proc/self/exe", "test_nccl", "rank", std::to_string(rank).c_str(),
              std::to_string(::getppid()).c_str(), std::to_string(pipes[1]).c_str(), nullptr);
      ::_exit(99);
    }
  }
  char ready = 0;
  for (int rank = 0; rank < 3; ++rank) CHECK(::read(pipes[0], &ready, 1) == 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double start = now_s();
  CHECK(::kill(pids[1], SIGKILL) == 0);
  for (int rank = 0; rank < 3; ++rank) {
    int status = 0;
    CHECK(::waitpid(pids[rank], &status, 0) == pids[rank]);
    if (rank != 1) CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  CHECK(now_s() - start < 5);
  ::close(pipes[0]);
  ::close(pipes[1]);
#endif
}

namespace {

/// A rank of the test above: 0 if it is told that rank 1 died, and ends.
int rank_process(int rank, const char* job, int ready) {
  use_doubles();
  ShmOptions shm;
  shm.address = concat("tpn-test-nccl-", job);
  const auto group = make_nccl(options_of(rank), make_shm({rank, 3, "tp", "shm", 0, 30}, shm));
  if (::write(ready, "r", 1) != 1) return 3;
  try {
    loop(*group);
  } catch (const Error& error) {
    const FailureRecord& record = error.record();
    const bool is_right = record.kind == FailureKind::kPeerLost && record.peer == 1 &&
                          record.message.find("died") != std::string::npos;
    if (!is_right) std::printf("rank %d: %s\n", rank, record.message.c_str());
    group->close();
    return is_right && live_communicators() == 0 ? 0 : 1;
  }
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  ::setenv("FAKE_CUDA_DEVICES", "8", 1);
  if (argc == 5) return rank_process(std::atoi(argv[2]), argv[3], std::atoi(argv[4]));
  return check::run_all();
}
