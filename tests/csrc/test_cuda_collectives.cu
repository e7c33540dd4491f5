// SPDX-License-Identifier: Apache-2.0
// The collectives on a device, bit for bit as on the CPU. Ranks are virtual: streams of one
// process.
#include <chrono>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "kernels/cuda.h"
#include "on_device.h"

namespace tp_native::kernels {
namespace {

using enum AllReduceKind;

constexpr int kMostRanks = 4;
/// Virtual ranks: staging, flags and a stream for each.
class Group {
 public:
  Group(int size, int64_t payload) : size_(size), streams_(static_cast<size_t>(size)) {
    CUDA_OK(cudaHostAlloc(&abort_, sizeof(uint32_t), cudaHostAllocMapped));
    *abort_ = 0;
    peers_.size = size;
    peers_.abort = abort_;
    peers_.buffer_bytes = cuda::staged_bytes(payload);
    for (int r = 0; r < size; ++r) {
      staging_.emplace_back(cuda::staging_bytes(payload));
      flags_.emplace_back(cuda::flag_bytes() / 4);
      peers_.data[r] = staging_.back().data();
      peers_.flags[r] = flags_.back().data();
    }
    CUDA_OK(cudaDeviceSynchronize());
  }
  ~Group() {
    *abort_ = 1;
    (void)cudaDeviceSynchronize();
    (void)cudaFreeHost(abort_);
  }
  Group(const Group&) = delete;

  int size() const { return size_; }
  cuda::Peers peers(int rank) const {
    cuda::Peers peers = peers_;
    peers.rank = rank;
    return peers;
  }
  cudaStream_t stream(int rank) const { return streams_[static_cast<size_t>(rank)].handle; }
  void abort() { *static_cast<volatile uint32_t*>(abort_) = 1; }

  /// launch(rank) for all, then waits; a group that hangs is aborted.
  void run(const std::function<void(int)>& launch) {
    for (int r = 0; r < size_; ++r) launch(r);
    wait();
  }
  void wait() {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    for (int r = 0; r < size_; ++r) {
      cudaError_t state;
      while ((state = cudaStreamQuery(stream(r))) == cudaErrorNotReady) {
        if (std::chrono::steady_clock::now() > end) {
          abort();
          check::fail(__FILE__, __LINE__, "rank " + std::to_string(r) + " hangs");
        }
        std::this_thread::yield();
      }
      CUDA_OK(state);
    }
  }

 private:
  int size_;
  std::vector<Stream> streams_;
  uint32_t* abort_ = nullptr;
  cuda::Peers peers_;
  std::vector<OnDevice<char>> staging_;
  std::vector<OnDevice<uint32_t>> flags_;
};

/// One all-reduce by all ranks. `how`: 0 aligned, 1 some ranks not aligned, 2 in place, 3 operands
/// in staging, 4 all ranks in one launch.
template <class T>
void check_all_reduce(Group& group, AllReduceKind kind, ReduceOp op, const Inputs<T>& inputs,
                      int how, int blocks = 0) {
  const int64_t count = inputs.count;
  std::vector<OnDevice<T>> in;
  std::vector<OnDevice<T>> out;
  std::vector<cuda::AllReduce> operands;
  auto unstaged = group.peers(0);
  for (int r = 0; r < group.size(); ++r) {
    const int shift = how == 1 && r % 2 == 1 ? 1 : 0;
    in.emplace_back(inputs.values[static_cast<size_t>(r)], shift);
    out.emplace_back(count, shift);
    unstaged.data[r] = in.back().data();
    operands.push_back({.dtype = inputs.dtype,
                        .op = op,
                        .in = how == 3 ? nullptr : in.back().data(),
                        .out = how == 2 ? in.back().data() : out.back().data(),
                        .columns = count,
                        .blocks = blocks});
  }
  if (how == 4) {
    cuda::all_reduce_in_one_launch(kind, group.peers(0), operands, group.stream(0));
    group.wait();
  } else {
    group.run([&](int r) {
      auto peers = how == 3 ? unstaged : group.peers(r);
      peers.rank = r;
      cuda::all_reduce(kind, peers, operands[static_cast<size_t>(r)], group.stream(r));
    });
  }
  const auto expected = inputs.reduced(op);
  for (int r = 0; r < group.size(); ++r) {
    const auto& result = how == 2 ? in[static_cast<size_t>(r)] : out[static_cast<size_t>(r)];
    CHECK(is_equal(result.get(), expected));
  }
}

void check_reduce_scatter(Group& group, const std::vector<int64_t>& counts) {
  const int64_t count = std::reduce(counts.begin(), counts.end());
  const Inputs<BFloat16> inputs(DType::kBFloat16, group.size(), count);
  std::vector<OnDevice<BFloat16>> in;
  std::vector<OnDevice<BFloat16>> out;
  for (int r = 0; r < group.size(); ++r) {
    in.emplace_back(inputs.values[static_cast<size_t>(r)]);
    out.emplace_back(counts[static_cast<size_t>(r)]);
  }
  group.run([&](int r) {
    const auto rank = static_cast<size_t>(r);
    cuda::reduce_scatter(
        group.peers(r),
        {DType::kBFloat16, ReduceOp::kSum, in[rank].data(), out[rank].data(), counts},
        group.stream(r));
  });
  const auto whole = inputs.reduced(ReduceOp::kSum);
  auto begin = whole.begin();
  for (size_t r = 0; r < counts.size(); ++r) {
    CHECK(is_equal(out[r].get(), std::vector<BFloat16>(begin, begin + counts[r])));
    begin += counts[r];
  }
}

void check_gathers(Group& group, const std::vector<int64_t>& bytes, int shift) {
  const int64_t count = std::reduce(bytes.begin(), bytes.end());
  const auto whole = random_values<uint8_t>(count, 3);
  std::vector<OnDevice<uint8_t>> in;
  std::vector<OnDevice<uint8_t>> out;
  int64_t begin = 0;
  for (int r = 0; r < group.size(); ++r) {
    const int64_t end = begin + bytes[static_cast<size_t>(r)];
    in.emplace_back(std::vector<uint8_t>(whole.begin() + begin, whole.begin() + end), shift);
    out.emplace_back(count, shift);
    begin = end;
  }
  group.run([&](int r) {
    const auto rank = static_cast<size_t>(r);
    cuda::all_gather(group.peers(r), {in[rank].data(), out[rank].data(), bytes}, group.stream(r));
  });
  for (const auto& result : out) CHECK(is_equal(result.get(), whole));
  for (int root = 0; root < group.size(); ++root) {
    const auto from = static_cast<size_t>(root);
    group.run([&](int r) {
      cuda::broadcast(group.peers(r),
                      {r == root ? in[from].data() : nullptr, out[static_cast<size_t>(r)].data(),
                       bytes[from], root},
                      group.stream(r));
    });
    const auto sent = in[from].get();
    for (const auto& result : out) {
      auto got = result.get();
      got.resize(sent.size());
      CHECK(is_equal(got, sent));
    }
  }
}

}  // namespace

TEST(all_reduces_give_the_bits_of_the_cpu) {
  for (int size = 1; size <= kMostRanks; ++size) {
    Group group(size, 1 << 20);
    each_dtype([&]<class T>(T, DType dtype) {
      for (const int64_t count : {1, 7, 1000, 65539}) {
        const Inputs<T> inputs(dtype, size, count);
        for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin, ReduceOp::kAvg}) {
          if (!can_reduce(dtype, op)) continue;
          for (int how = 0; how < 5; ++how) {
            if (count > 1000 && how != 0) continue;
            check_all_reduce(group, kOneShot, op, inputs, how);
            check_all_reduce(group, kTwoShot, op, inputs, how);
          }
        }
      }
    });
  }
}

TEST(large_all_reduces) {
  constexpr int64_t kCount = 1000003;
  for (int size = 2; size <= kMostRanks; ++size) {
    Group group(size, kCount * 8);
    each_floating([&]<class T>(T, DType dtype) {
      const Inputs<T> inputs(dtype, size, kCount);
      for (int how = 0; how < 5; ++how) {
        check_all_reduce(group, kOneShot, ReduceOp::kSum, inputs, how);
        check_all_reduce(group, kTwoShot, ReduceOp::kSum, inputs, how);
      }
    });
  }
}

TEST(fused_epilogues_give_the_bits_of_the_cpu) {
  for (int size = 1; size <= kMostRanks; ++size) {
    Group group(size, 8 * 33 * 40000);
    each_floating([&]<class T>(T, DType dtype) {
      for (const Shape shape : kRowShapes) {
        const Inputs<T> inputs(dtype, size, shape.rows * shape.columns);
        for (const int flags : epilogues()) {
          std::vector<OnDevice<T>> in;
          std::vector<std::unique_ptr<EpilogueCase<T>>> epilogues;
          for (int r = 0; r < size; ++r) {
            in.emplace_back(inputs.values[static_cast<size_t>(r)], (flags & 16) && r == 1 ? 1 : 0);
            epilogues.push_back(std::make_unique<EpilogueCase<T>>(shape.rows, shape.columns,
                                                                  r == 0 ? flags & ~16 : flags));
          }
          group.run([&](int r) {  // in place
            const auto rank = static_cast<size_t>(r);
            cuda::AllReduce a{.dtype = dtype, .in = in[rank].data(), .out = in[rank].data()};
            epilogues[rank]->fill(a);
            cuda::all_reduce(kOneShot, group.peers(r), a, group.stream(r));
          });
          for (size_t r = 0; r < in.size(); ++r) epilogues[r]->check(inputs, in[r].get());
        }
      }
    });
  }
}

TEST(reduce_scatters_and_gathers_of_uneven_parts) {
  for (int size = 1; size <= kMostRanks; ++size) {
    Group group(size, 1 << 20);
    std::vector<int64_t> even(static_cast<size_t>(size), 4096);
    std::vector<int64_t> uneven;
    for (int r = 0; r < size; ++r) uneven.push_back(r == 1 ? 0 : 4096 + 1237 * r);
    for (const auto& counts : {even, uneven}) {
      check_reduce_scatter(group, counts);
      check_gathers(group, counts, 0);
      check_gathers(group, counts, 2);
      check_gathers(group, counts, 1);
    }
  }
}

TEST(nothing_to_do_is_done_without_a_launch) {
  Group group(2, 16);
  group.run([&](int r) {
    const std::vector<int64_t> none{0, 0};
    cuda::all_reduce(kOneShot, group.peers(r), {}, group.stream(r));
    cuda::reduce_scatter(group.peers(r), {.counts = none}, group.stream(r));
    cuda::all_gather(group.peers(r), {.bytes = none}, group.stream(r));
    cuda::broadcast(group.peers(r), {}, group.stream(r));
    cuda::apply_epilogue({}, group.stream(r));
    cuda::glu({}, group.stream(r));
    cuda::glu_backward({}, group.stream(r));
    cuda::activation_backward({}, group.stream(r));
    cuda::column_sum({}, group.stream(r));
  });
}

// Kinds, sizes, dtypes and blocks change from one to the next, so blocks sit out and come back.
TEST(two_hundred_collectives_in_a_row_with_data_of_their_own) {
  for (int size = 2; size <= kMostRanks; ++size) {
    Group group(size, 1 << 20);
    for (unsigned i = 0; i < 200; ++i) {
      const int64_t count = 1 + (i * 7919) % 60000;
      const int blocks = i % 3 == 0 ? 0 : 1 + static_cast<int>(i * 13 % 48);
      const Inputs<BFloat16> inputs(DType::kBFloat16, size, count, i + 2);
      check_all_reduce(group, i % 2 == 0 ? kOneShot : kTwoShot, ReduceOp::kSum, inputs,
                       static_cast<int>(i % 5), blocks);
    }
  }
}

// No rank waits for the host between its collectives: fast ranks run ahead as far as the protocol
// lets.
TEST(collectives_queued_without_waiting) {
  constexpr int64_t kCount = 5000;
  constexpr int kQueued = 200;
  for (int size = 2; size <= kMostRanks; ++size) {
    Group group(size, kCount * 4);
    std::vector<std::unique_ptr<Inputs<float>>> inputs;
    std::vector<OnDevice<float>> in;
    std::vector<OnDevice<float>> out;
    for (unsigned i = 0; i < kQueued; ++i) {
      inputs.push_back(std::make_unique<Inputs<float>>(DType::kFloat32, size, kCount, i + 1));
      for (const auto& values : inputs.back()->values) {
        in.emplace_back(values);
        out.emplace_back(kCount);
      }
    }
    CUDA_OK(cudaDeviceSynchronize());
    for (size_t i = 0; i < kQueued; ++i) {
      for (int r = 0; r < size; ++r) {
        const size_t at = i * static_cast<size_t>(size) + static_cast<size_t>(r);
        cuda::all_reduce(i % 3 == 0 ? kTwoShot : kOneShot, group.peers(r),
                         {.dtype = DType::kFloat32,
                          .in = in[at].data(),
                          .out = out[at].data(),
                          .columns = kCount,
                          .blocks = 1 + static_cast<int>(i * 5 % 7)},
                         group.stream(r));
      }
    }
    group.wait();
    for (size_t i = 0; i < kQueued; ++i) {
      const auto expected = inputs[i]->reduced(ReduceOp::kSum);
      for (size_t r = 0; r < static_cast<size_t>(size); ++r) {
        CHECK(is_equal(out[i * static_cast<size_t>(size) + r].get(), expected));
      }
    }
  }
}

TEST(a_thousand_replays_of_a_graph) {
  constexpr int64_t kCount = 20000;
  constexpr int kSize = 2;
  Group group(kSize, kCount * 2);
  std::vector<OnDevice<BFloat16>> in;
  std::vector<OnDevice<BFloat16>> out;
  cudaGraphExec_t graphs[kSize];
  for (int r = 0; r < kSize; ++r) {
    in.emplace_back(kCount);
    out.emplace_back(kCount);
    cudaGraph_t graph;
    CUDA_OK(cudaStreamBeginCapture(group.stream(r), cudaStreamCaptureModeThreadLocal));
    cuda::all_reduce(kOneShot, group.peers(r),
                     {.dtype = DType::kBFloat16,
                      .in = in.back().data(),
                      .out = out.back().data(),
                      .columns = kCount},
                     group.stream(r));
    CUDA_OK(cudaStreamEndCapture(group.stream(r), &graph));
    CUDA_OK(cudaGraphInstantiate(&graphs[r], graph, 0));
    CUDA_OK(cudaGraphDestroy(graph));
    CUDA_OK(cudaGraphUpload(graphs[r], group.stream(r)));
  }
  group.wait();
  for (unsigned round = 0; round < 10; ++round) {
    const Inputs<BFloat16> inputs(DType::kBFloat16, kSize, kCount, round + 1);
    for (size_t r = 0; r < kSize; ++r) in[r].put(inputs.values[r]);
    CUDA_OK(cudaDeviceSynchronize());
    for (int i = 0; i < 100; ++i) {
      for (int r = 0; r < kSize; ++r) CUDA_OK(cudaGraphLaunch(graphs[r], group.stream(r)));
    }
    group.wait();
    const auto expected = inputs.reduced(ReduceOp::kSum);
    for (const auto& result : out) CHECK(is_equal(result.get(), expected));
    check_all_reduce(group, kOneShot, ReduceOp::kSum, inputs, 0);  // eager in between
  }
  for (const auto graph : graphs) CUDA_OK(cudaGraphExecDestroy(graph));
}

TEST(an_abort_ends_a_wait_for_a_rank_that_never_comes) {
  Group group(2, 1 << 16);
  const OnDevice<float> in(1000);
  const OnDevice<float> out(1000);
  CUDA_OK(cudaDeviceSynchronize());
  cuda::all_reduce(kOneShot, group.peers(0),
                   {.dtype = DType::kFloat32, .in = in.data(), .out = out.data(), .columns = 1000},
                   group.stream(0));
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(cudaStreamQuery(group.stream(0)) == cudaErrorNotReady);
  const auto begin = std::chrono::steady_clock::now();
  group.abort();
  group.wait();
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(1));
}

TEST(what_does_not_fit_is_refused) {
  Group group(2, 64);
  const auto refuses = [](const std::function<void()>& call, const char* with) {
    try {
      call();
    } catch (const Error& error) {
      return std::string(error.what()).find(with) != std::string::npos;
    }
    return false;
  };
  const cuda::AllReduce large{
      .in = group.peers(0).data[0], .out = group.peers(0).data[0], .columns = 17};
  CHECK(
      refuses([&] { cuda::all_reduce(kOneShot, group.peers(0), large, group.stream(0)); }, "cut"));
  auto blind = group.peers(0);
  blind.abort = nullptr;
  CHECK(refuses([&] { cuda::all_reduce(kOneShot, blind, large, group.stream(0)); }, "abort"));
  CHECK(refuses(
      [&] { cuda::glu({.dtype = DType::kInt32, .rows = 1, .columns = 1}, group.stream(0)); },
      "int32"));
}

}  // namespace tp_native::kernels

int main() { return tp_native::kernels::run_all_on_device(); }
