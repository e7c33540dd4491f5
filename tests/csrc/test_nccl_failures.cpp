// SPDX-License-Identifier: Apache-2.0
// What goes wrong over NCCL, on test doubles of it and of the driver: every call with every failing
// answer, ranks that die, hang, differ, leave.
// TSan: ranks are threads, but for the test that kills one.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "check.h"
#include "nccl_ranks.h"

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

TEST(a_killed_rank_is_named_and_nothing_waits_for_it) {
  kill_one_of_three("test_nccl_failures", 0.2);
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
