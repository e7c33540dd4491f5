// SPDX-License-Identifier: Apache-2.0
// Two levels with threads as ranks: "hosts" are local groups, and so is the group of leaders.
// TSan: ranks are threads.
#include "comm/two_level.h"

#include <chrono>
#include <cstring>
#include <thread>

#include "check.h"
#include "comm/backends.h"
#include "core/error.h"
#include "kernels/cpu/convert.h"
#include "kernels/reduce.h"
#include "memory_board.h"
#include "thread_ranks.h"

using namespace tp_native;        // NOLINT
using namespace tp_native::comm;  // NOLINT

namespace {

Ranks make(const std::vector<int64_t>& hosts, double timeout_s = 20) {
  static int count = 0;
  const std::string name = "test:two:" + std::to_string(count++);
  int size = 0;
  for (const int64_t n : hosts) size += static_cast<int>(n);
  auto shared = std::make_shared<SharedBoard>(size);
  const Ranks leaders = make_local(
      Identity{0, static_cast<int>(hosts.size()), name + "/leaders", "local", 0, timeout_s});
  Ranks ranks;
  for (size_t h = 0; h < hosts.size(); ++h) {
    const Ranks host =
        make_local(Identity{0, static_cast<int>(hosts[h]), name + "/" + std::to_string(h), "local",
                            0, 2 * timeout_s + 2});
    for (size_t r = 0; r < host.size(); ++r) {
      const int rank = static_cast<int>(ranks.size());
      ranks.push_back(std::make_shared<TwoLevel>(
          Identity{rank, size, name, "two", 0, timeout_s}, host[r], r == 0 ? leaders[h] : nullptr,
          std::make_shared<MemoryBoard>(shared, rank), hosts));
    }
  }
  return ranks;
}

const std::vector<std::vector<int64_t>> kWorlds = {{2, 2}, {3, 1}, {1, 2, 2}, {1, 1}};

void all_reduce(Communicator& c, float* data, int64_t count) {
  const int64_t shape[] = {count};
  c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape}, data, data,
               count, {}, {});
}

}  // namespace

TEST(all_reduce_adds_and_averages_over_even_and_uneven_hosts) {
  for (const auto& hosts : kWorlds) {
    const Ranks ranks = make(hosts);
    const auto size = static_cast<int64_t>(ranks.size());
    run_clean(ranks, [&](Communicator& c) {
      const int me = c.identity().rank;
      for (const int64_t count : {0, 1, 513, 70001}) {
        const int64_t shape[] = {count};
        const float bias[] = {0.5f};
        for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kAvg, ReduceOp::kMax}) {
          std::vector<float> data(static_cast<size_t>(count), static_cast<float>(2 * me));
          const bool has_bias = op == ReduceOp::kSum;
          c.all_reduce(
              {.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .reduce = op, .shape = shape},
              data.data(), data.data(), count,
              {.bias = has_bias ? bias : nullptr, .columns = has_bias ? 1 : 0}, {});
          const int64_t expected = op == ReduceOp::kSum   ? size * (size - 1)
                                   : op == ReduceOp::kAvg ? size - 1
                                                          : 2 * (size - 1);
          for (const float x : data)
            CHECK_EQ(x, static_cast<float>(expected) + (has_bias ? 0.5f : 0.0f));
        }
      }
    });
  }
}

TEST(uneven_shares_are_gathered_scattered_and_broadcast) {
  for (const auto& hosts : kWorlds) {
    const Ranks ranks = make(hosts);
    const int size = static_cast<int>(ranks.size());
    run_clean(ranks, [&](Communicator& c) {
      const int me = c.identity().rank;
      for (const int64_t scale : {1, 9000}) {
        std::vector<int64_t> counts;
        int64_t whole = 0;
        for (int r = 0; r < size; ++r) whole += counts.emplace_back((r + size - 1) % size * scale);
        const int64_t mine = counts[static_cast<size_t>(me)];
        const int64_t shape[] = {3, whole};
        const auto expect = [&](const std::vector<float>& found, int64_t rows) {
          size_t i = 0;
          for (int64_t row = 0; row < rows; ++row) {
            for (int r = 0; r < size; ++r) {
              for (int64_t k = 0; k < counts[static_cast<size_t>(r)]; ++k)
                CHECK_EQ(found[i++], static_cast<float>(100 * r + row));
            }
          }
        };
        std::vector<float> in(static_cast<size_t>(3 * mine));
        for (size_t i = 0; i < in.size(); ++i)
          in[i] =
              static_cast<float>(100 * me + static_cast<int64_t>(i) / std::max<int64_t>(1, mine));
        std::vector<float> all(static_cast<size_t>(3 * whole), -1);
        c.all_gather({.op = OpCode::kAllGather,
                      .dtype = DType::kFloat32,
                      .dim = 1,
                      .shape = shape,
                      .sizes = counts},
                     in.data(), all.data(), 3, counts, {});
        expect(all, 3);

        std::vector<float> out(static_cast<size_t>(mine), -1);
        c.reduce_scatter({.op = OpCode::kReduceScatter,
                          .dtype = DType::kFloat32,
                          .shape = shape,
                          .sizes = counts},
                         all.data(), out.data(), counts, {});
        for (const float x : out) CHECK_EQ(x, static_cast<float>(100 * me * size));

        for (int root = 0; root < size; ++root) {
          const Signature gathers{.op = OpCode::kGather,
                                  .dtype = DType::kFloat32,
                                  .root = root,
                                  .shape = shape,
                                  .sizes = counts};
          std::vector<float> whole_at_root(me == root ? static_cast<size_t>(whole) : 0, -1);
          c.gather(gathers, in.data(), me == root ? whole_at_root.data() : nullptr, counts, {});
          if (me == root) expect(whole_at_root, 1);
          Signature scatters = gathers;
          scatters.op = OpCode::kScatter;
          std::vector<float> back(static_cast<size_t>(mine), -1);
          c.scatter(scatters, me == root ? whole_at_root.data() : nullptr, back.data(), counts, {});
          for (const float x : back) CHECK_EQ(x, static_cast<float>(100 * me));
          std::vector<float> told(static_cast<size_t>(scale), static_cast<float>(me));
          c.broadcast(
              {.op = OpCode::kBroadcast, .dtype = DType::kFloat32, .root = root, .shape = shape},
              told.data(), scale, {});
          for (const float x : told) CHECK_EQ(x, static_cast<float>(root));
        }
        c.barrier(0, {});
      }
    });
  }
}

TEST(sixteen_bit_sums_are_bitwise_equal_on_all_ranks) {
  const Ranks ranks = make({2, 3});
  std::vector<std::vector<uint16_t>> found(5);
  run_clean(ranks, [&](Communicator& c) {
    std::vector<uint16_t> data(5000);
    const auto me = static_cast<uint32_t>(c.identity().rank);
    for (uint32_t i = 0; i < data.size(); ++i)
      data[i] = static_cast<uint16_t>(0x3f00u + (i * 2654435761u * (me + 1) >> 24));
    const int64_t shape[] = {5000};
    c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kBFloat16, .shape = shape}, data.data(),
                 data.data(), 5000, {}, {});
    found[me] = data;
  });
  for (const auto& data : found) CHECK(data == found[0]);
}

TEST(a_mismatch_between_hosts_names_global_ranks_on_all) {
  const Ranks ranks = make({2, 2});
  const auto failures = run(ranks, [](Communicator& c) {
    std::vector<float> data(6, 1.0f);
    all_reduce(c, data.data(), c.identity().rank >= 2 ? 5 : 6);
  });
  for (int r = 0; r < 4; ++r) {
    const FailureRecord& failure = failures[static_cast<size_t>(r)];
    CHECK(failure.kind == FailureKind::kMismatch);
    CHECK_EQ(failure.rank, r);
    CHECK_EQ(failure.peer, 2);
    CHECK(failure.message.find("rank 0 all_reduce(sum, float32 [6]); rank 2 all_reduce(sum, "
                               "float32 [5])") != std::string::npos);
  }
}

TEST(a_mismatch_within_a_host_reaches_the_other_hosts) {
  const Ranks ranks = make({2, 2});
  const auto failures = run(ranks, [](Communicator& c) {
    std::vector<float> data(6, 1.0f);
    all_reduce(c, data.data(), c.identity().rank == 3 ? 5 : 6);
  });
  for (const FailureRecord& failure : failures) {
    CHECK(failure.kind == FailureKind::kMismatch);
    CHECK_EQ(failure.peer, 3);
    CHECK(failure.message.find("rank 3 all_reduce(sum, float32 [5])") != std::string::npos);
  }
}

TEST(unlike_roots_and_reductions_of_whole_hosts_are_mismatches) {
  const int64_t shape[] = {4};
  const std::vector<int64_t> counts(4, 4);
  using Call = std::function<void(Communicator&, bool, float*, float*)>;
  const auto reduce = [&](bool is_other) {
    return Signature{.op = OpCode::kAllReduce,
                     .dtype = DType::kFloat32,
                     .reduce = is_other ? ReduceOp::kAvg : ReduceOp::kSum,
                     .shape = shape};
  };
  const std::vector<std::pair<std::string, Call>> calls = {
      {"avg", [&](Communicator& c, bool is_other, float* in,
                  float* out) { c.all_reduce(reduce(is_other), in, out, 4, {}, {}); }},
      {"src 3",
       [&](Communicator& c, bool is_other, float* in, float*) {
         c.broadcast({.op = OpCode::kBroadcast,
                      .dtype = DType::kFloat32,
                      .root = is_other ? 3 : 0,
                      .shape = shape},
                     in, 4, {});
       }},
      {"dst 3",
       [&](Communicator& c, bool is_other, float* in, float* out) {
         c.gather({.op = OpCode::kGather,
                   .dtype = DType::kFloat32,
                   .root = is_other ? 3 : 1,
                   .shape = shape,
                   .sizes = counts},
                  in, out, counts, {});
       }},
      {"src 2",
       [&](Communicator& c, bool is_other, float* in, float* out) {
         c.scatter({.op = OpCode::kScatter,
                    .dtype = DType::kFloat32,
                    .root = is_other ? 2 : 1,
                    .shape = shape,
                    .sizes = counts},
                   out, in, counts, {});
       }},
  };
  for (const auto& [words, call] : calls) {
    for (const int other_host : {0, 1}) {
      const Ranks ranks = make({2, 2}, 5);
      const auto failures = run(ranks, [&](Communicator& c) {
        std::vector<float> in(4, 1.0f), out(16);
        call(c, c.identity().rank / 2 == other_host, in.data(), out.data());
      });
      for (const FailureRecord& failure : failures) {
        CHECK(failure.kind == FailureKind::kMismatch);
        CHECK(failure.message.find(words) != std::string::npos);
      }
    }
  }
}

TEST(sixteen_bit_sums_are_rounded_once_and_averages_do_not_overflow) {
  const auto half = [](float x) { return kernels::to_float16(x).bits; };
  const Ranks ranks = make({2, 2});
  run_clean(ranks, [&](Communicator& c) {
    const auto me = static_cast<size_t>(c.identity().rank);
    const int64_t shape[] = {2};
    const std::vector<int64_t> counts = {1, 0, 0, 1};
    for (const ReduceOp op : {ReduceOp::kAvg, ReduceOp::kSum}) {
      const bool is_avg = op == ReduceOp::kAvg;
      // 2048 + 1 + 1 is 2050; rounded after the first host, where 2049 has no place, it is 2048
      constexpr float kSmall[] = {2048, 1, 1, 0};
      const std::vector<uint16_t> in(2, half(is_avg ? 40000.0f : kSmall[me]));
      const uint16_t expected = half(is_avg ? 40000.0f : 2050.0f);
      Signature s{.op = OpCode::kAllReduce, .dtype = DType::kFloat16, .reduce = op, .shape = shape};
      std::vector<uint16_t> out(2);
      c.all_reduce(s, in.data(), out.data(), 2, {}, {});
      for (const uint16_t x : out) CHECK_EQ(x, expected);
      s.op = OpCode::kReduceScatter;
      s.sizes = counts;
      uint16_t mine = expected;
      c.reduce_scatter(s, in.data(), &mine, counts, {});
      CHECK_EQ(mine, expected);
    }
  });
}

TEST(residual_and_norm_follow_the_sum_over_hosts) {
  constexpr int64_t kRows = 5;
  constexpr int64_t kColumns = 24;
  constexpr size_t kCount = kRows * kColumns;
  std::vector<float> bias(kColumns), scale(kColumns), residual(kCount);
  for (size_t i = 0; i < kCount; ++i) residual[i] = static_cast<float>(i % 7);
  for (size_t i = 0; i < kColumns; ++i) {
    bias[i] = static_cast<float>(i % 3);
    scale[i] = 1.0f + static_cast<float>(i % 5);
  }
  const std::vector<float> sum(kCount, 3.0f);  // 0 + 1 + 2
  std::vector<float> normed(kCount), hidden(kCount);
  const void* const src[] = {sum.data()};
  void* const normed_to[] = {normed.data()};
  void* const hidden_to[] = {hidden.data()};
  kernels::reduce_rms_norm({DType::kFloat32, 1, src, 1, normed_to, hidden_to, kRows, kColumns,
                            bias.data(), residual.data(), scale.data(), 1e-5});
  const Ranks ranks = make({1, 2});
  run_clean(ranks, [&](Communicator& c) {
    const int64_t shape[] = {kRows, kColumns};
    const Signature s{.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape};
    const std::vector<float> in(kCount, static_cast<float>(c.identity().rank));
    std::vector<float> out(kCount), state(kCount);
    c.all_reduce(s, in.data(), out.data(), kCount,
                 {.bias = bias.data(),
                  .columns = kColumns,
                  .residual = residual.data(),
                  .norm_weight = scale.data(),
                  .eps = 1e-5,
                  .hidden = state.data()},
                 {});
    CHECK(out == normed);
    CHECK(state == hidden);
    c.all_reduce(s, in.data(), out.data(), kCount,
                 {.bias = bias.data(), .columns = kColumns, .residual = residual.data()}, {});
    CHECK(out == hidden);
  });
}

TEST(abort_and_leaving_end_every_rank_of_every_host) {
  const Ranks ranks = make({2, 2});
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 3) {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      return c.abort("out of patience");
    }
    c.barrier(0, {});
  });
  for (size_t r = 0; r < 3; ++r) {
    CHECK(failures[r].kind == FailureKind::kAborted);
    CHECK_EQ(failures[r].peer, 3);
    CHECK(failures[r].message.find("rank 3 aborted the group: out of patience") !=
          std::string::npos);
  }
  const Ranks others = make({2, 2});
  const auto left = run(others, [](Communicator& c) {
    if (c.identity().rank == 3) return c.close();
    c.barrier(0, {});
  });
  for (size_t r = 0; r < 3; ++r) {
    CHECK(left[r].kind == FailureKind::kPeerLost);
    CHECK_EQ(left[r].peer, 3);
  }
}

TEST(a_waiting_rank_is_watched_and_closed_by_another_thread) {
  const Ranks ranks = make({2, 2});
  const auto start = std::chrono::steady_clock::now();
  const auto failures = run(ranks, [&](Communicator& c) {
    if (c.identity().rank != 1) return c.barrier(0, {});
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK_EQ(ranks[0]->stats().collectives, uint64_t{1});
    CHECK_EQ(ranks[0]->op_log().size(), size_t{1});
    CHECK(!ranks[0]->failure());
    ranks[0]->close();
    c.barrier(0, {});
  });
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(5));
  for (const FailureRecord& failure : failures) {
    CHECK(failure.kind == FailureKind::kAborted);
    CHECK_EQ(failure.peer, 0);
    CHECK(failure.message.find("rank 0 closed the group while") != std::string::npos);
  }
}

TEST(what_a_rank_throws_itself_reaches_the_others_in_its_words) {
  const Ranks ranks = make({2, 2});
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank != 3) return c.barrier(0, {});
    const std::vector<int64_t> counts = {0, 0, 0, -1};  // no vector holds the sum
    const int64_t shape[] = {-1};
    c.reduce_scatter({.op = OpCode::kReduceScatter, .shape = shape, .sizes = counts}, nullptr,
                     nullptr, counts, {});
  });
  CHECK(!failures[3].message.empty());
  for (size_t r = 0; r < 3; ++r) {
    CHECK(failures[r].kind == FailureKind::kError);
    CHECK_EQ(failures[r].peer, 3);
    CHECK(failures[r].message.find("rank 3 failed: " + failures[3].message) != std::string::npos);
  }
  CHECK(ranks[3]->failure()->kind == FailureKind::kError);
}

TEST(a_check_between_collectives_tells_of_a_rank_that_left_any_host) {
  const Ranks ranks = make({2, 2});
  run_clean(ranks, [](Communicator& c) {
    c.barrier(0, {});
    c.check();
    c.barrier(0, {});
  });
  CHECK_EQ(ranks[0]->stats().late_share.size(), size_t{4});
  ranks[3]->close();
  for (size_t r = 0; r < 3; ++r) {
    const auto failures = run({ranks[r]}, [](Communicator& c) { c.check(); });
    CHECK(failures[0].kind == FailureKind::kPeerLost);
    CHECK_EQ(failures[0].peer, 3);
    CHECK(failures[0].message.find("rank 3 left the group") != std::string::npos ||
          failures[0].message.find("rank 3 (pid ") != std::string::npos);
  }
}

TEST(a_late_rank_is_named_though_its_leader_is_late_with_it) {
  const Ranks ranks = make({2, 2}, 0.3);
  const auto failures = run(ranks, [](Communicator& c) {
    if (c.identity().rank == 3) std::this_thread::sleep_for(std::chrono::milliseconds(900));
    c.barrier(0, {});
  });
  for (const FailureRecord& failure : failures) {
    CHECK(failure.kind == FailureKind::kTimeout);
    CHECK_EQ(failure.peer, 3);
  }
}

TEST(what_a_host_finds_between_collectives_is_told_to_all) {
  const Ranks ranks = make({1, 2});
  run_clean(ranks, [](Communicator& c) {
    c.barrier(0, {});
    c.look();
    c.check();
  });
  const auto shared = std::make_shared<SharedBoard>(3);
  const Ranks host = make_local(Identity{0, 2, "test:two:look", "local", 0, 5});
  TwoLevel last({2, 3, "test:two:look", "two", 0, 5}, host[1], nullptr,
                std::make_shared<MemoryBoard>(shared, 2), {1, 2});
  last.look();
  CHECK(!shared->verdict);
  host[0]->abort("its GPU is gone");
  last.look();
  CHECK(shared->verdict.has_value());
  CHECK_EQ(shared->verdict->culprit, 1);
  CHECK_EQ(shared->verdict->text, "rank 1 aborted the group: its GPU is gone");
}

int main() { return check::run_all(); }
