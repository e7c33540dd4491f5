// SPDX-License-Identifier: Apache-2.0
// TSan: no processes.
// The protocol of the CUDA collectives on the host: a thread for every block of every rank, nothing
// between ranks but the flags. Fast ranks run ahead as far as they can; kinds, sizes and blocks
// change from one collective to the next. TSan sees every access that the flags do not order.
#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "kernels/cuda/all_reduce.h"
#include "kernels/reduce.h"
#include "random_values.h"

namespace tp_native::kernels {
namespace {

using cuda::OpFamily;
using cuda::Share;

constexpr int64_t kMost = 300;  // elements

struct alignas(16) Line {
  char bytes[16];
};

/// What the ranks of a group share.
struct Group {
  explicit Group(int size, uint32_t epoch = 0, uint32_t sequence = 0)
      : size(size),
        staging(size, std::vector<Line>(2 * kMost)),
        operands(size, std::vector<Line>(kMost)),
        flags(size, std::vector<uint32_t>(cuda::flag_bytes() / 4, epoch)) {
    peers.size = size;
    peers.abort = &abort;
    peers.buffer_bytes = kMost * 16;
    for (int r = 0; r < size; ++r) {
      peers.data[r] = staging[r].data();
      peers.flags[r] = flags[r].data();
      std::fill(flags[r].end() - cuda::kMaxBlocks, flags[r].end(), sequence);
    }
  }

  int size;
  uint32_t abort = 0;
  std::vector<std::vector<Line>> staging;
  std::vector<std::vector<Line>> operands;
  std::vector<std::vector<uint32_t>> flags;
  cuda::Peers peers;
};

/// One collective: the same on every rank, from its number alone.
struct Plan {
  explicit Plan(unsigned number) : number(number) {
    std::mt19937 rng(number);
    is_one_shot = rng() % 2 == 0;
    is_staged = rng() % 4 != 0;
    blocks = 1 + static_cast<int>(rng() % 5);
    count = 1 + static_cast<int64_t>(rng() % kMost);
  }
  std::vector<float> values_of(int rank) const {
    return random_values<float>(count, number * 16 + static_cast<unsigned>(rank), true);
  }
  std::vector<float> expected(int size) const {
    std::vector<std::vector<float>> values;
    std::vector<const void*> src;
    for (int r = 0; r < size; ++r) values.push_back(values_of(r));
    for (const auto& v : values) src.push_back(v.data());
    std::vector<float> result(static_cast<size_t>(count));
    void* const dst[] = {result.data()};
    reduce({DType::kFloat32, ReduceOp::kSum, size, src.data(), 1, dst, count});
    return result;
  }

  unsigned number;
  bool is_one_shot, is_staged;
  int blocks;
  int64_t count;
};

/// A kernel: its blocks at once, over when they are.
void launch(const Plan& plan, const cuda::Ranks& ranks, const cuda::Slices& slices) {
  std::vector<std::thread> blocks;
  for (int b = 0; b < plan.blocks; ++b) {
    blocks.emplace_back([&, b] {
      const Share share{b, plan.blocks, 0, 1};
      if (plan.is_one_shot) {
        cuda::reduce_in_one_shot<float, OpFamily::kSums, false, 4, 2>(share, ranks, 0);
      } else {
        cuda::reduce_in_slices<float, OpFamily::kSums, true, 4, 2>(share, ranks, slices, 0);
      }
    });
  }
  for (auto& block : blocks) block.join();
}

/// Rank's part in one collective: whether its result is right.
bool run_plan(Group& group, const Plan& plan, int rank) {
  auto values = plan.values_of(rank);
  std::vector<Line> out(kMost);
  cuda::Ranks ranks;
  ranks.peers = group.peers;
  ranks.first = rank;
  ranks.columns = plan.count;
  const auto slices = cuda::even_slices(plan.count, group.size, sizeof(float));
  auto* const result = reinterpret_cast<float*>(out.data());
  auto& operand = ranks.operands[0];
  operand.out = result + (plan.is_one_shot ? 0 : slices.begin[rank]);
  if (plan.is_staged) {
    operand.in = values.data();
    operand.has_packs = cuda::is_aligned(operand.in);
  } else {
    std::memcpy(group.operands[rank].data(), values.data(), values.size() * sizeof(float));
    for (int r = 0; r < group.size; ++r) ranks.peers.data[r] = group.operands[r].data();
    operand.has_packs = true;
  }
  launch(plan, ranks, slices);
  const auto expected = plan.expected(group.size);
  return std::memcmp(result, expected.data(), expected.size() * sizeof(float)) == 0;
}

/// `count` collectives by all ranks, each at its own pace.
void run_all(Group& group, unsigned count) {
  std::atomic<int> wrong = 0;
  std::vector<std::thread> ranks;
  for (int r = 0; r < group.size; ++r) {
    ranks.emplace_back([&, r] {
      std::mt19937 rng(static_cast<unsigned>(r));
      for (unsigned number = 0; number < count; ++number) {
        if (rng() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(rng() % 2000));
        if (!run_plan(group, Plan(number), r)) ++wrong;
      }
    });
  }
  for (auto& rank : ranks) rank.join();
  CHECK_EQ(wrong.load(), 0);
}

}  // namespace

TEST(two_hundred_collectives_at_every_rank_s_own_pace) {
  for (const int size : {1, 2, 3, 4}) {
    Group group(size);
    run_all(group, 200);
  }
}

TEST(counters_wrap_around) {
  Group group(3, UINT32_MAX - 20, UINT32_MAX - 10);
  run_all(group, 60);
  for (const auto& flags : group.flags) CHECK(flags.back() == 60 - 11);  // block 255 sat out
}

TEST(an_abort_ends_a_wait) {
  Group group(2);
  std::thread alone([&] { (void)run_plan(group, Plan(0), 0); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  std::atomic_ref(group.abort).store(1);
  alone.join();
  CHECK_EQ(group.flags[0].back(), 0u);  // it did not finish
}

}  // namespace tp_native::kernels

int main() { return check::run_all(); }
