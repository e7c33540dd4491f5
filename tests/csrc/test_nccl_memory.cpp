// SPDX-License-Identifier: Apache-2.0
// Memory that NCCL is told of: symmetric windows, buffers where there are none, nothing where a
// rank cannot; who gives it back, and when.
// TSan: ranks are threads, but for the test that kills one.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "check.h"
#include "comm/host_board.h"
#include "comm/nccl_communicator.h"
#include "core/callbacks.h"
#include "nccl_ranks.h"

namespace {

constexpr int64_t kBytes = 4000;

int counted(const char* name) { return symbol<int()>(kNccl, name)(); }
int windows() { return counted("fake_nccl_windows"); }
int buffers() { return counted("fake_nccl_buffers"); }
int allocated() { return counted("fake_nccl_allocated"); }

/// What the ranks' blocks are, the same on all: "window", "buffer", "none".
std::string kind_of(const Ranks& ranks) {
  std::string kinds;
  for (const auto& rank : ranks) {
    const Stats stats = rank->stats();
    CHECK_EQ(stats.windows + stats.registered + stats.unregistered, 1);
    const std::string kind = stats.windows ? "window" : stats.registered ? "buffer" : "none";
    if (!kinds.empty()) CHECK_EQ(kind, kinds);
    kinds = kind;
  }
  return kinds;
}

/// One block on each rank, used once; what it is, and the warnings on the way.
struct Taken {
  std::vector<Block> blocks;
  std::string kind;
};
Taken take(const Ranks& ranks) {
  Taken taken;
  taken.blocks.resize(ranks.size());
  run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
              Block& block = taken.blocks[c.identity().rank] = c.allocate(kBytes);
              CHECK(block.data != nullptr);
              const int64_t shape[] = {1000};
              OnDevice<float> x(stream, ramp(1000, 1));
              cuda::copy(block.data, x.data(), kBytes, stream);
              c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                           block.data, x.data(), 1000, {}, {stream});
              CHECK(x.read() == ramp(1000, static_cast<float>(c.identity().size)));
            }));
  taken.kind = kind_of(ranks);
  return taken;
}

void check_nothing_is_left() {
  CHECK_EQ(live_communicators(), 0);
  CHECK_EQ(windows(), 0);
  CHECK_EQ(buffers(), 0);
  CHECK_EQ(allocated(), 0);
}

/// Ranks whose library is the double with some of it taken away.
Ranks make_with(int size, const std::function<void(nccl::Api&)>& change) {
  use_doubles();
  static int count = 0;
  static std::vector<std::unique_ptr<nccl::Api>> apis;  // outlive their communicators
  nccl::Search search;
  search.file = kNccl;
  nccl::Api& api = *apis.emplace_back(std::make_unique<nccl::Api>(nccl::api(search)));
  change(api);
  const Ranks controls = make_local({0, size, concat("tp:less:", count++), "local", 0, 5});
  nccl::UniqueId id{};
  CHECK_EQ(api.GetUniqueId(&id), 0);
  Ranks ranks(static_cast<size_t>(size));
  run_clean(controls, [&](Communicator& control) {
    const Identity identity = control.identity();
    auto host = std::dynamic_pointer_cast<HostCommunicator>(controls[identity.rank]);
    auto made = std::make_shared<NcclCommunicator>(identity, api, cuda::Device(identity.rank), host,
                                                   std::make_shared<HostBoard>(host));
    made->connect(id, {}, 5);
    ranks[identity.rank] = made;
  });
  return ranks;
}

}  // namespace

TEST(kept_memory_is_a_window_and_outlives_the_group) {
  for (const int size : {1, 2, 3, 4}) {
    const Ranks ranks = make_clean(size);
    Taken taken = take(ranks);
    CHECK_EQ(taken.kind, "window");
    CHECK_EQ(windows(), size);
    close_all(ranks);
    CHECK_EQ(live_communicators(), 0);  // destroyed in good order: nothing was registered any more
    CHECK_EQ(windows(), 0);
    CHECK_EQ(allocated(), size);
    std::memset(taken.blocks[0].data, 1, kBytes);
    taken.blocks.clear();
    check_nothing_is_left();
  }
}

TEST(what_the_library_lacks_is_done_without) {
  const auto kind = [](const std::function<void(nccl::Api&)>& change) {
    const Ranks ranks = make_with(2, change);
    std::string found;
    {
      const Taken taken = take(ranks);
      found = taken.kind;
      CHECK_EQ(buffers(), found == "buffer" ? 2 : 0);
    }
    CHECK_EQ(allocated(), found == "window" ? 2 : 0);  // a window's memory goes back later
    close_all(ranks);
    check_nothing_is_left();
    return found;
  };
  CHECK_EQ(kind([](nccl::Api&) {}), "window");
  CHECK_EQ(kind([](nccl::Api& api) { api.version = 22605; }), "buffer");
  CHECK_EQ(kind([](nccl::Api& api) { api.version = 22700; }), "window");
  CHECK_EQ(kind([](nccl::Api& api) { api.CommWindowRegister = nullptr; }), "buffer");
  CHECK_EQ(kind([](nccl::Api& api) { api.CommWindowDeregister = nullptr; }), "buffer");
  for (const bool is_allocator : {false, true}) {
    const Ranks ranks = make_with(2, [&](nccl::Api& api) {
      if (is_allocator) {
        api.MemFree = nullptr;
      } else {
        api.CommWindowRegister = nullptr;
        api.CommRegister = nullptr;
      }
    });
    run_clean(ranks, [](Communicator& c) { CHECK(c.allocate(kBytes).data == nullptr); });
    close_all(ranks);
  }
  check_nothing_is_left();
}

TEST(gpus_without_symmetric_memory_are_asked_once) {
  const Setting none("FAKE_NCCL_NO_WINDOWS", "1");
  const Ranks ranks = make_clean(3);
  CHECK_EQ(take(ranks).kind, "buffer");
  // a second window would fail now, if it were asked for
  const Setting broken("FAKE_NCCL_FAIL", "ncclCommWindowRegister:0:3");
  CHECK_EQ(take(ranks).kind, "buffer");
  close_all(ranks);
  check_nothing_is_left();
}

TEST(one_rank_that_wants_no_windows_decides_for_all) {
  Made made = make(3, 5, [](int rank) {
    NcclOptions options = options_of(rank);
    if (rank == 1) options.registration = nccl::Registration::kBuffer;
    return options;
  });
  CHECK_EQ(take(made.ranks).kind, "buffer");
  CHECK_EQ(windows(), 0);
  close_all(made.ranks);
  made.ranks.clear();
  check_nothing_is_left();
}

TEST(a_registration_that_fails_on_one_rank_is_done_without_on_all) {
  for (const char* call : {"ncclCommWindowRegister", "ncclCommRegister"}) {
    const bool is_window = std::strcmp(call, "ncclCommWindowRegister") == 0;
    for (const int result : {1, 2, 3, 4, 5, 6}) {
      const Ranks ranks = make_with(3, [&](nccl::Api& api) {
        if (!is_window) api.version = 22605;
      });
      {
        const Setting failing("FAKE_NCCL_FAIL", concat(call, ":0:", result, ":1"));
        const Taken taken = take(ranks);
        if (taken.kind != "none" || windows() != 0 || buffers() != 0)
          throw std::runtime_error(concat(call, " ", result, ": ", taken.kind));
      }
      // the group goes on, and tries again
      CHECK_EQ(take(ranks).kind, is_window ? "window" : "buffer");
      close_all(ranks);
      check_nothing_is_left();
    }
  }
}

TEST(a_registration_that_one_rank_never_joins_is_told_on_all) {
  for (const int result : {2, 5}) {
    const Setting failing("FAKE_NCCL_FAIL", concat("ncclCommWindowRegister:0:", result, ":1"));
    const Setting apart("FAKE_NCCL_WINDOW_APART", "1");
    const Ranks ranks = make_clean(3, 30);
    const double start = now_s();
    check_all_told(run(ranks, [](Communicator& c) { c.allocate(kBytes); }), FailureKind::kError, 1,
                   concat("ncclCommWindowRegister failed on rank 1: "));
    CHECK(now_s() - start < 6);  // not the group's 30 s
    close_all(ranks);
  }
  check_nothing_is_left();
}

TEST(a_window_that_fails_in_the_library_is_told_on_all) {
  for (const int result : {1, 2, 3, 5, 6}) {
    const Setting later("FAKE_NCCL_WINDOW_LATER", concat(result, ":2"));
    const Ranks ranks = make_clean(3);
    const bool is_remote = result == 6;
    for (const FailureRecord& failure : run(ranks, [](Communicator& c) { c.allocate(kBytes); })) {
      CHECK(failure.kind == (is_remote ? FailureKind::kPeerLost : FailureKind::kError));
      CHECK(failure.message.find(concat("(", result, ")")) != std::string::npos);
    }
    close_all(ranks);
  }
  check_nothing_is_left();
}

TEST(unlike_amounts_are_a_mismatch) {
  const Ranks ranks = make_clean(3);
  check_all_told(
      run(ranks, [](Communicator& c) { c.allocate(c.identity().rank == 2 ? 8192 : 4096); }),
      FailureKind::kMismatch, 2, "rank 2 empty_shared(uint8 [8192])");
  close_all(ranks);
  check_nothing_is_left();
}

TEST(a_rank_that_calls_something_else_is_a_mismatch) {
  const Ranks ranks = make_clean(2);
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 0) c.allocate(kBytes);
    loop(c);
  });
  check_all_told(failures, FailureKind::kMismatch, 1,
                 "rank 0 empty_shared(uint8 [4000]); rank 1 all_reduce");
  close_all(ranks);
  check_nothing_is_left();
}

TEST(a_rank_that_never_comes_to_a_registration_is_named) {
  const Ranks ranks = make_clean(2, 0.3);
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 0) c.allocate(kBytes);
    for (const double end = now_s() + 10; now_s() < end;) {
      c.check();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  });
  check_all_told(failures, FailureKind::kTimeout, 1, ") did not come within 0.3 s");
  close_all(ranks);
  check_nothing_is_left();
}

TEST(memory_that_runs_out_on_one_rank_is_told_on_all_and_the_group_goes_on) {
  const Ranks ranks = make_clean(3);
  {
    const Setting none("FAKE_NCCL_FAIL", "ncclMemAlloc:0:1");
    for (const FailureRecord& failure : run(ranks, [](Communicator& c) { c.allocate(64); }))
      CHECK(failure.message.find(
                "ncclMemAlloc of 64 bytes failed on rank 0: unhandled cuda error (1)") !=
            std::string::npos);
  }
  CHECK_EQ(take(ranks).kind, "window");
  close_all(ranks);
  check_nothing_is_left();
}

// NCCL's offsets are counted on each rank: the double fails where they differ.
TEST(windows_are_given_up_in_the_same_order_whenever_tensors_die) {
  const Ranks ranks = make_clean(3);
  std::vector<std::vector<Block>> held(3);
  const auto allocate = [&] {
    run_clean(ranks,
              [&](Communicator& c) { held[c.identity().rank].push_back(c.allocate(kBytes)); });
  };
  for (int i = 0; i < 4; ++i) allocate();
  held[0][1] = {};
  held[1][3] = {};
  held[2][0] = {};
  allocate();  // no window is free on all ranks yet
  CHECK_EQ(windows(), 15);
  for (auto& blocks : held) blocks[1] = {};
  allocate();
  CHECK_EQ(windows(), 15);  // one went, one came
  for (auto& blocks : held) blocks.clear();
  CHECK_EQ(allocated(), 15);
  CHECK_EQ(ranks[0]->stats().windows, 0);
  allocate();
  CHECK_EQ(windows(), 3);
  CHECK_EQ(allocated(), 3);
  close_all(ranks);
  held.clear();
  check_nothing_is_left();
}

TEST(a_window_that_cannot_be_given_up_ends_windows_on_all_ranks) {
  const Ranks ranks = make_clean(2);
  take(ranks);
  {
    const Setting stuck("FAKE_NCCL_FAIL", "ncclCommWindowDeregister:0:3:1");
    CHECK_EQ(take(ranks).kind, "buffer");
  }
  CHECK_EQ(take(ranks).kind, "buffer");
  run(ranks, [](Communicator& c) { c.close(); });
  CHECK_EQ(allocated(), 0);
  CHECK_EQ(live_communicators(), 0);
}

TEST(tensors_that_die_after_a_failure_free_their_memory) {
  const Ranks ranks = make_clean(2);
  Taken taken = take(ranks);
  check_all_told(run(ranks,
                     [](Communicator& c) {
                       if (c.identity().rank == 1) c.abort("enough");
                       loop(c);
                     }),
                 FailureKind::kAborted, 1, "enough");
  taken.blocks[0] = {};  // before close()
  close_all(ranks);
  taken.blocks.clear();  // after it
  check_nothing_is_left();
  for (const FailureRecord& failure : run(ranks, [](Communicator& c) { c.allocate(64); }))
    CHECK(failure.kind == FailureKind::kAborted);
}

TEST(a_rank_killed_during_a_registration_is_named) { kill_one_of_three("test_nccl_memory", 0.3); }

namespace {

/// A rank of the test above: rank 1 joins no registration, so that the others' does not end.
int rank_process(int rank, const char* job, int ready) {
  use_doubles();
  ShmOptions shm;
  shm.address = concat("tpn-test-nccl-memory-", job);
  nccl::Search search;
  search.file = kNccl;
  if (rank == 1) {
    const_cast<nccl::Api&>(nccl::api(search)).CommWindowRegister =
        [](nccl::Handle, void*, size_t, void**, int) -> int { return nccl::kSuccess; };
  }
  const auto group = make_nccl(options_of(rank), make_shm({rank, 3, "tp", "shm", 0, 30}, shm));
  if (::write(ready, "r", 1) != 1) return 3;
  try {
    group->allocate(kBytes);
  } catch (const Error& error) {
    const FailureRecord& record = error.record();
    const bool is_right = record.kind == FailureKind::kPeerLost && record.peer == 1 &&
                          record.message.find("died") != std::string::npos;
    if (!is_right) std::printf("rank %d: %s\n", rank, record.message.c_str());
    group->close();
    return is_right && live_communicators() == 0 && allocated() == 0 ? 0 : 1;
  }
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  ::setenv("FAKE_CUDA_DEVICES", "8", 1);
  if (argc == 5) return rank_process(std::atoi(argv[2]), argv[3], std::atoi(argv[4]));
  return check::run_all();
}
