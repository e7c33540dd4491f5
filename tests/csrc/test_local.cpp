// SPDX-License-Identifier: Apache-2.0
// The protocol with ranks as threads: collectives against plain sums, and every way to fail.
// TSan: ranks are threads.
#include <chrono>
#include <cstring>
#include <random>
#include <thread>

#include "check.h"
#include "comm/backends.h"
#include "comm/registry.h"
#include "core/callbacks.h"
#include "core/error.h"
#include "thread_ranks.h"

using namespace tp_native;        // NOLINT
using namespace tp_native::comm;  // NOLINT

namespace {

Ranks make(int size, double timeout_s = 20) {
  static int count = 0;
  return make_local(Identity{0, size, "test:" + std::to_string(count++), "local", 0, timeout_s});
}

void all_reduce(Communicator& c, float* data, int64_t count) {
  const int64_t shape[] = {count};
  c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape}, data, data,
               count, {}, {});
}

}  // namespace

TEST(all_reduce_sums_private_shared_and_mixed_operands) {
  for (const int size : {2, 3, 4, 7}) {
    const Ranks ranks = make(size);
    run_clean(ranks, [&](Communicator& c) {
      const int me = c.identity().rank;
      const float total = static_cast<float>(size * (size + 1) / 2);
      for (const int64_t count : {0, 1, 511, 513, 8193, 65537, 300001}) {
        for (const int mode : {0, 1, 2}) {
          const bool is_shared = mode == 1 || (mode == 2 && me % 2 == 0);
          std::vector<float> own(static_cast<size_t>(count));
          const Block block = c.allocate(count * 4);
          float* const data =
              is_shared && block.data ? static_cast<float*>(block.data) : own.data();
          for (int64_t i = 0; i < count; ++i) data[i] = static_cast<float>((me + 1) * (i % 13));
          all_reduce(c, data, count);
          for (int64_t i = 0; i < count; ++i) CHECK_EQ(data[i], total * static_cast<float>(i % 13));
        }
      }
    });
  }
}

TEST(ten_thousand_random_collectives_of_every_kind_keep_in_step) {
  for (const int size : {2, 3}) {
    const Ranks ranks = make(size);
    run_clean(ranks, [&](Communicator& c) {
      const int me = c.identity().rank;
      std::mt19937 rng(42);  // the same decisions on every rank
      std::vector<std::pair<Block, float>> held;
      for (int step = 0; step < 10000; ++step) {
        const auto count = static_cast<int64_t>(rng() % (step % 100 == 0 ? 200000 : 3000));
        const int64_t shape[] = {count};
        const auto seed = static_cast<float>(step % 97);
        switch (rng() % 5) {
          case 0: {
            std::vector<float> data(static_cast<size_t>(count), seed + static_cast<float>(me));
            all_reduce(c, data.data(), count);
            for (const float x : data)
              CHECK_EQ(x,
                       static_cast<float>(size) * seed + static_cast<float>(size * (size - 1) / 2));
            break;
          }
          case 1: {
            Block block = c.allocate(count * 4);
            if (!block.data) break;  // too small to be shared: the same on every rank
            auto* const data = static_cast<float*>(block.data);
            for (int64_t i = 0; i < count; ++i) data[i] = seed;
            all_reduce(c, data, count);
            if (me == 0) held.emplace_back(std::move(block), static_cast<float>(size) * seed);
            if (held.size() > 50) held.clear();
            break;
          }
          case 2: {
            std::vector<int64_t> columns;
            int64_t width = 0;
            for (int r = 0; r < size; ++r) width += columns.emplace_back((count + r) % 50);
            const int64_t rows = count % 40;
            const int64_t global[] = {rows, width};
            std::vector<float> in(static_cast<size_t>(rows * columns[static_cast<size_t>(me)]),
                                  static_cast<float>(me));
            std::vector<float> out(static_cast<size_t>(rows * width), -1.0f);
            c.all_gather({.op = OpCode::kAllGather,
                          .dtype = DType::kFloat32,
                          .dim = 1,
                          .shape = global,
                          .sizes = columns},
                         in.data(), out.data(), rows, columns, {});
            for (int64_t row = 0, i = 0; row < rows; ++row) {
              for (int r = 0; r < size; ++r) {
                for (int64_t k = 0; k < columns[static_cast<size_t>(r)]; ++k)
                  CHECK_EQ(out[static_cast<size_t>(i++)], static_cast<float>(r));
              }
            }
            break;
          }
          case 3: {
            const int root = static_cast<int>(rng() % static_cast<unsigned>(size));
            std::vector<float> data(static_cast<size_t>(count), me == root ? seed : -1.0f);
            c.broadcast(
                {.op = OpCode::kBroadcast, .dtype = DType::kFloat32, .root = root, .shape = shape},
                data.data(), count, {});
            for (const float x : data) CHECK_EQ(x, seed);
            break;
          }
          default:
            c.barrier(0, {});
        }
      }
      for (const auto& [block, value] : held)
        CHECK_EQ(*static_cast<const float*>(block.data), value);
    });
    CHECK(ranks[0]->stats().collectives > 9000);
    CHECK_EQ(ranks[0]->op_log().size(), size_t{1024});
  }
}

TEST(unlike_operations_fail_on_all_ranks_before_any_output_is_written) {
  const Ranks ranks = make(3);
  const auto failures = run(ranks, [](Communicator& c) {
    std::vector<float> data(6, 1.0f);
    const int64_t wide[] = {2, 3};
    const int64_t tall[] = {3, 2};
    const bool is_odd = c.identity().rank == 1;
    const Signature signature{
        .op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = is_odd ? tall : wide};
    try {
      c.all_reduce(signature, data.data(), data.data(), 6, {}, {});
    } catch (...) {
      for (const float x : data) CHECK_EQ(x, 1.0f);
      throw;
    }
  });
  for (int r = 0; r < 3; ++r) {
    CHECK(failures[static_cast<size_t>(r)].kind == FailureKind::kMismatch);
    CHECK_EQ(failures[static_cast<size_t>(r)].rank, r);
    CHECK_EQ(failures[static_cast<size_t>(r)].peer, 1);  // the one that differs from the majority
    CHECK(failures[static_cast<size_t>(r)].message.find("rank 1 all_reduce(sum, float32 [3, 2])") !=
          std::string::npos);
  }
}

TEST(a_late_rank_times_out_and_the_group_stays_failed) {
  const Ranks ranks = make(2, 0.2);
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 1) std::this_thread::sleep_for(std::chrono::milliseconds(600));
    c.barrier(0, {});
  });
  CHECK(failures[0].kind == FailureKind::kTimeout);
  CHECK(failures[1].kind == FailureKind::kTimeout);  // it comes too late and learns why
  CHECK_EQ(failures[0].peer, 1);
  CHECK(failures[0].elapsed_s >= 0.2);
  const auto again = run(ranks, [](Communicator& c) { c.barrier(0, {}); });
  CHECK_EQ(again[0].message, failures[0].message);
}

TEST(a_rank_that_closes_is_named_and_close_frees_a_waiting_thread) {
  const Ranks ranks = make(2);
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 1) return c.close();
    c.barrier(0, {});
  });
  CHECK(failures[0].kind == FailureKind::kPeerLost);
  CHECK_EQ(failures[0].peer, 1);

  const Ranks others = make(2);
  std::thread closer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    others[0]->close();
  });
  const auto stuck = run({others[0]}, [](Communicator& c) { c.barrier(0, {}); });
  closer.join();
  CHECK(stuck[0].message.find("closed the group while one of its threads") != std::string::npos);
  others[0]->close();  // idempotent
}

TEST(abort_ends_a_wait_with_the_reason) {
  const Ranks ranks = make(2);
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      c.abort("out of patience");
    }
    c.barrier(0, {});
  });
  for (const FailureRecord& failure : failures) {
    CHECK(failure.kind == FailureKind::kAborted);
    CHECK(failure.message.find("rank 0 aborted the group: out of patience") != std::string::npos);
  }
}

TEST(more_threads_than_one_of_a_rank_take_turns) {
  const Ranks ranks = make(2);
  run_clean(ranks, [](Communicator& c) {
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&c] {
        for (int i = 0; i < 200; ++i) c.barrier(0, {});
      });
    }
    for (std::thread& thread : threads) thread.join();
  });
}

TEST(a_failed_group_hands_out_no_block_that_a_slow_peer_may_still_write) {
  const Ranks ranks = make(2, 0.05);
  const Block held = ranks[0]->allocate(1 << 16);
  CHECK(held.data != nullptr);
  const auto failures = run({ranks[0]}, [](Communicator& c) { c.barrier(0, {}); });
  CHECK(failures[0].kind == FailureKind::kTimeout);
  CHECK(ranks[0]->allocate(1 << 16).data == nullptr);
}

TEST(blocks_are_reused_outlive_close_and_run_out_politely) {
  Ranks ranks = make(2);
  const void* first = nullptr;
  {
    const Block block = ranks[0]->allocate(1 << 20);
    CHECK(block.data != nullptr);
    first = block.data;
    CHECK(ranks[0]->stats().arena_bytes_in_use >= 1 << 20);
  }
  CHECK_EQ(ranks[0]->stats().arena_bytes_in_use, int64_t{0});
  Block kept = ranks[0]->allocate(1 << 20);
  CHECK_EQ(static_cast<const void*>(kept.data), first);
  CHECK(ranks[0]->allocate(int64_t{1} << 50).data == nullptr);
  CHECK(ranks[0]->allocate(-1).data == nullptr);
  ranks.clear();
  std::memset(kept.data, 7, 1 << 20);  // still mapped
}

TEST(names_are_registered_once_and_unknown_ones_are_told) {
  const Ranks ranks = make(1);
  register_communicator("test:name", ranks[0]);
  CHECK(find_communicator("test:name") == ranks[0]);
  const auto text_of = [](const std::function<void()>& fn) -> std::string {
    try {
      fn();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  CHECK(text_of([&] { register_communicator("test:name", ranks[0]); }).find("exists already") !=
        std::string::npos);
  unregister_communicator("test:name");
  unregister_communicator("test:name");
  CHECK(text_of([] { (void)find_communicator("test:name"); }).find("no group \"test:name\"") !=
        std::string::npos);
  CHECK(is_available("shm") && is_available("local") && !is_available("mpi"));
}

TEST(an_exception_of_one_rank_reaches_the_others_in_its_words) {
  const Ranks ranks = make(2);
  Callbacks strict;
  strict.warn = [](const std::string&) { throw std::runtime_error("warnings are errors"); };
  install_callbacks(strict);
  const auto failures = run(ranks, [](Communicator& c) {
    std::vector<float> data(4, 1.0f);
    for (int i = 0; i < 200; ++i) {  // rank 0 tells that rank 1 is slow
      if (c.identity().rank == 1) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      all_reduce(c, data.data(), 4);
    }
  });
  install_callbacks({});
  CHECK_EQ(failures[0].message, std::string("warnings are errors"));
  CHECK(failures[1].kind == FailureKind::kError);
  CHECK_EQ(failures[1].peer, 0);
  CHECK(failures[1].message.find("rank 0 failed: warnings are errors") != std::string::npos);
}

int main() { return check::run_all(); }
