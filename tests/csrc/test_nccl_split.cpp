// SPDX-License-Identifier: Apache-2.0
// Groups made of the ranks of another group over NCCL, as Group.split makes them: a communicator
// and a control group of their own, on the same GPUs and in the same streams.
// TSan: ranks are threads.
#include <chrono>
#include <cstdlib>
#include <thread>

#include "check.h"
#include "nccl_ranks.h"

namespace {

/// A rank, and its place in the world of four and in its half.
struct Both {
  std::shared_ptr<Communicator> world;
  std::shared_ptr<Communicator> half;
};

std::vector<Both> make_halves(double timeout_s = 5) {
  static int count = 0;
  const std::string name = concat("tp:split:", count++);
  std::vector<Both> ranks;
  for (const auto& rank : make_clean(4, timeout_s)) ranks.push_back({rank, nullptr});
  for (int half = 0; half < 2; ++half) {
    const Ranks controls = make_local({0, 2, concat(name, '/', half), "local", 0, timeout_s});
    run_clean(controls, [&](Communicator& control) {
      const int local = control.identity().rank;
      const int rank = 2 * half + local;
      ranks[rank].half = make_nccl(options_of(rank), controls[local]);
    });
  }
  return ranks;
}

Ranks worlds(const std::vector<Both>& ranks) {
  Ranks all;
  for (const Both& rank : ranks) all.push_back(rank.world);
  return all;
}
Ranks half_of(const std::vector<Both>& ranks, int half) {
  return {ranks[2 * half].half, ranks[2 * half + 1].half};
}

float summed(Communicator& c, float value, cuda::StreamHandle stream) {
  OnDevice<float> x(stream, {value});
  const int64_t shape[] = {1};
  c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape}, x.data(),
               x.data(), 1, {}, {stream});
  return x.read()[0];
}

/// A sum in a half, on its ranks' own GPUs.
void works(const Ranks& half) {
  run_clean(half, [](Communicator& c) {
    const cuda::Device device(c.identity().device);
    const cuda::Current current(device);
    const cuda::Stream stream;
    CHECK_EQ(summed(c, static_cast<float>(c.identity().rank + 1), stream.get()), 3.0f);
    c.barrier(0, {});
    c.check();
  });
}

}  // namespace

TEST(halves_and_the_whole_take_turns_in_one_stream) {
  const auto ranks = make_halves();
  run_clean(worlds(ranks), on_gpu([&](Communicator& world, cuda::StreamHandle stream) {
              const int rank = world.identity().rank;
              Communicator& half = *ranks[rank].half;
              CHECK_EQ(half.identity().rank, rank % 2);
              CHECK_EQ(half.identity().size, 2);
              const auto value = static_cast<float>(rank + 1);
              for (int step = 0; step < 20; ++step) {
                CHECK_EQ(summed(world, value, stream), 10.0f);
                CHECK_EQ(summed(half, value, stream), rank < 2 ? 3.0f : 7.0f);
                if (rank < 2) CHECK_EQ(summed(half, 1, stream), 2.0f);  // only one half does this
              }
              half.barrier(0, {});
              world.barrier(0, {});
            }));
  CHECK_EQ(live_communicators(), 8);
  close_all(half_of(ranks, 0));
  close_all(half_of(ranks, 1));
  close_all(worlds(ranks));
  CHECK_EQ(live_communicators(), 0);
}

TEST(kept_memory_belongs_to_the_half_that_took_it) {
  const auto ranks = make_halves();
  std::vector<Block> blocks(4);
  for (int half = 0; half < 2; ++half) {
    run_clean(half_of(ranks, half), [&](Communicator& c) {
      blocks[2 * half + c.identity().rank] = c.allocate(4096 * (half + 1));
      CHECK_EQ(c.stats().windows, 1);
    });
  }
  for (const Both& rank : ranks) CHECK_EQ(rank.world->stats().windows, 0);
  close_all(half_of(ranks, 0));
  works(half_of(ranks, 1));
  blocks.clear();
  close_all(half_of(ranks, 1));
  close_all(worlds(ranks));
  CHECK_EQ(live_communicators(), 0);
}

TEST(groups_close_in_any_order_and_a_closed_one_is_refused) {
  for (const bool is_world_first : {false, true}) {
    const auto ranks = make_halves();
    close_all(is_world_first ? worlds(ranks) : half_of(ranks, 0));
    works(half_of(ranks, 1));
    if (is_world_first) works(half_of(ranks, 0));
    const Ranks closed = is_world_first ? worlds(ranks) : half_of(ranks, 0);
    for (const FailureRecord& failure : run(closed, [](Communicator& c) { c.barrier(0, {}); }))
      CHECK(failure.message.find("is closed") != std::string::npos);
    for (const FailureRecord& failure : run(closed, [](Communicator& c) { c.allocate(64); }))
      CHECK(failure.message.find("is closed") != std::string::npos);
    close_all(worlds(ranks));
    close_all(half_of(ranks, 0));
    close_all(half_of(ranks, 1));
    CHECK_EQ(live_communicators(), 0);
  }
}

TEST(what_fails_in_a_half_is_that_halfs) {
  const auto ranks = make_halves();
  const auto failures = run(half_of(ranks, 0), [](Communicator& c) {
    if (c.identity().rank == 1) c.abort("enough");
    for (const double end = now_s() + 10; now_s() < end;) {
      c.check();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  check_all_told(failures, FailureKind::kAborted, 1, "rank 1 aborted the group: enough");
  works(half_of(ranks, 1));
  run_clean(worlds(ranks), [](Communicator& c) { c.barrier(0, {}); });
  close_all(half_of(ranks, 0));
  close_all(half_of(ranks, 1));
  close_all(worlds(ranks));
  CHECK_EQ(live_communicators(), 0);
}

TEST(a_rank_that_left_its_half_is_named_there_alone) {
  const auto ranks = make_halves();
  const auto failures = run(half_of(ranks, 1), [](Communicator& c) {
    if (c.identity().rank == 0) {
      c.close();
      fail("done");
    }
    c.barrier(0, {});
  });
  CHECK(failures[1].kind == FailureKind::kPeerLost);
  CHECK_EQ(failures[1].peer, 0);
  works(half_of(ranks, 0));
  run_clean(worlds(ranks), [](Communicator& c) { c.barrier(0, {}); });
  for (const Both& rank : ranks) rank.half->close(), rank.world->close();
  CHECK_EQ(live_communicators(), 0);
}

int main() {
  ::setenv("FAKE_CUDA_DEVICES", "8", 1);
  return check::run_all();
}
