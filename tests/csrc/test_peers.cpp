// SPDX-License-Identifier: Apache-2.0
// GPU ranks that reach each other's memory: how messages are cut, staged, followed by bias,
// residual and norm, and what happens when a rank fails. The kernels are doubles here: they do on a
// stream's thread, over the same memory and flags, what kernels/cuda.h says.
//
// TSan: ranks are threads.
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>

#include "comm/backends.h"
#include "device_ranks.h"
#include "kernels/cuda.h"
#include "kernels/reduce.h"

namespace {

void enqueue(cuda::StreamHandle stream, std::function<void()> step) {
  static auto* const append =
      symbol<void(cuda::StreamHandle, void (*)(void*), void*)>(kDriver, "fake_cuda_enqueue");
  append(
      stream,
      [](void* argument) {
        const std::unique_ptr<std::function<void()>> owned(
            static_cast<std::function<void()>*>(argument));
        (*owned)();
      },
      new std::function<void()>(std::move(step)));
}

/// Stages `in`, waits for all ranks to have done so; flag 0 counts meetings, flag 1 is this rank's.
bool meet(const kernels::cuda::Peers& p, const void* in, int64_t bytes,
          std::vector<const void*>& staged) {
  if (bytes > p.buffer_bytes) std::abort();
  const uint32_t epoch = ++p.flags[p.rank][1];
  const auto buffer = [&](int rank) {
    return static_cast<char*>(p.data[rank]) + epoch % 2 * p.buffer_bytes;
  };
  if (bytes > 0) std::memcpy(buffer(p.rank), in, static_cast<size_t>(bytes));
  std::atomic_ref(p.flags[p.rank][0]).store(epoch, std::memory_order_release);
  for (int r = 0; r < p.size; ++r) {
    while (std::atomic_ref(p.flags[r][0]).load(std::memory_order_acquire) < epoch) {
      auto& word = *const_cast<uint32_t*>(p.abort);
      if (std::atomic_ref(word).load(std::memory_order_acquire) != 0) return false;
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    staged.push_back(buffer(r));
  }
  return true;
}

int g_kernels = 0;  // launched, by all ranks
std::mutex g_mutex;
void count() {
  std::lock_guard lock(g_mutex);
  ++g_kernels;
}

}  // namespace

namespace tp_native::kernels::cuda {

bool is_built() { return true; }

bool g_is_wrong = false;

void apply_epilogue(const SumEpilogue& e, StreamHandle stream) {
  enqueue(stream, [e] {
    const void* const src[] = {e.sum};
    void* const dst[] = {e.out};
    void* const hidden[] = {e.hidden};
    if (e.norm_weight) {
      reduce_rms_norm({e.dtype, 1, src, 1, dst, hidden, e.rows, e.columns, e.bias, e.residual,
                       e.norm_weight, e.eps});
    } else {
      reduce({e.dtype, ReduceOp::kSum, 1, src, 1, dst, e.rows * e.columns, e.bias, e.columns, 0,
              e.residual});
    }
  });
}

void all_reduce(AllReduceKind kind, const Peers& p, const AllReduce& a, StreamHandle stream) {
  count();
  if (kind == AllReduceKind::kLibrary) std::abort();
  if ((a.bias || a.residual || a.norm_weight) && kind != AllReduceKind::kOneShot) std::abort();
  enqueue(stream, [p, a] {
    std::vector<const void*> src;
    const int64_t values = a.rows * a.columns;
    if (!meet(p, a.in, values * static_cast<int64_t>(item_bytes(a.dtype)), src)) return;
    void* const dst[] = {a.out};
    void* const hidden[] = {a.hidden};
    if (a.norm_weight) {
      reduce_rms_norm({a.dtype, p.size, src.data(), 1, dst, hidden, a.rows, a.columns, a.bias,
                       a.residual, a.norm_weight, a.eps});
    } else {
      reduce({a.dtype, a.op, p.size, src.data(), 1, dst, values, a.bias, a.columns, 0, a.residual});
    }
    if (g_is_wrong && p.rank == 1) static_cast<char*>(a.out)[5] ^= 1;
  });
}

void reduce_scatter(const Peers& p, const ReduceScatter& s, StreamHandle stream) {
  count();
  enqueue(stream, [p, s, counts = std::vector(s.counts.begin(), s.counts.end())] {
    std::vector<const void*> src;
    const auto width = static_cast<int64_t>(item_bytes(s.dtype));
    if (!meet(p, s.in, sum(counts) * width, src)) return;
    const int64_t first = std::accumulate(counts.begin(), counts.begin() + p.rank, int64_t{0});
    for (const void*& at : src) at = static_cast<const char*>(at) + first * width;
    void* const dst[] = {s.out};
    reduce({s.dtype, s.op, p.size, src.data(), 1, dst, counts[p.rank], nullptr, 0, 0, nullptr});
  });
}

void all_gather(const Peers& p, const AllGather& g, StreamHandle stream) {
  count();
  enqueue(stream, [p, g, bytes = std::vector(g.bytes.begin(), g.bytes.end())] {
    std::vector<const void*> src;
    if (!meet(p, g.in, bytes[p.rank], src)) return;
    char* to = static_cast<char*>(g.out);
    for (int r = 0; r < p.size; to += bytes[r++])
      if (bytes[r] > 0) std::memcpy(to, src[r], static_cast<size_t>(bytes[r]));
  });
}

void broadcast(const Peers& p, const Broadcast& b, StreamHandle stream) {
  count();
  enqueue(stream, [p, b] {
    std::vector<const void*> src;
    if (meet(p, b.in, p.rank == b.root ? b.bytes : 0, src))
      std::memcpy(b.out, src[b.root], static_cast<size_t>(b.bytes));
  });
}

}  // namespace tp_native::kernels::cuda

namespace {

/// All ranks on GPU 0.
Ranks make(int size, double timeout_s = 5) {
  use_doubles();
  static int number = 0;
  const Ranks controls = make_local({0, size, concat("tp:peers", number++), "local", 0, timeout_s});
  Ranks ranks(static_cast<size_t>(size));
  run_clean(controls, [&](Communicator& control) {
    const int rank = control.identity().rank;
    ranks[rank] = make_peers(0, controls[rank]);
  });
  return ranks;
}

void close_all(const Ranks& ranks) {
  run_clean(ranks, [](Communicator& c) { c.close(); });
}

}  // namespace

TEST(sums_of_every_size_are_those_of_the_cpu_kernels) {
  for (const int size : {1, 2, 3, 4}) {
    const Ranks ranks = make(size);
    for (const size_t count : {0u, 1u, 1003u, 5'000'003u}) {  // the last: in three pieces
      if (count > 2000 && size == 4) continue;
      run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
                  const auto mine = ramp(count, 0.1f * static_cast<float>(c.identity().rank + 1));
                  std::vector<std::vector<float>> all;
                  std::vector<const void*> src;
                  for (int r = 0; r < size; ++r)
                    all.push_back(ramp(count, 0.1f * static_cast<float>(r + 1)));
                  for (const auto& values : all) src.push_back(values.data());
                  std::vector<float> expected(count);
                  void* const dst[] = {expected.data()};
                  kernels::reduce({DType::kFloat32, ReduceOp::kSum, size, src.data(), 1, dst,
                                   static_cast<int64_t>(count), nullptr, 0, 0, nullptr});
                  OnDevice<float> x(stream, mine);
                  const int64_t shape[] = {static_cast<int64_t>(count)};
                  c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                               x.data(), x.data(), static_cast<int64_t>(count), {}, {stream});
                  CHECK(x.read() == expected);
                }));
    }
    close_all(ranks);
  }
}

/// Not inlined: gcc 12 takes the end of a vector whose size it knows for what is deleted.
[[gnu::noinline]] static void check_norm(int64_t rows, int64_t columns) {
  const Ranks ranks = make(2);
  run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
              const auto values = static_cast<size_t>(rows * columns);
              const auto first = ramp(values, 0.5f);
              const auto second = ramp(values, 0.25f);
              const auto bias = ramp(static_cast<size_t>(columns), 2);
              const auto residual = ramp(values, -1);
              const auto weight = ramp(static_cast<size_t>(columns), 0.01f);
              std::vector<float> normed(values);
              std::vector<float> hidden(values);
              const void* const src[] = {first.data(), second.data()};
              void* const dst[] = {normed.data()};
              void* const dst_hidden[] = {hidden.data()};
              kernels::reduce_rms_norm({DType::kFloat32, 2, src, 1, dst, dst_hidden, rows, columns,
                                        bias.data(), residual.data(), weight.data(), 1e-5});
              OnDevice<float> x(stream, c.identity().rank == 0 ? first : second);
              OnDevice<float> b(stream, bias);
              OnDevice<float> r(stream, residual);
              OnDevice<float> w(stream, weight);
              OnDevice<float> h(stream, std::vector<float>(values));
              const int64_t shape[] = {rows, columns};
              c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                           x.data(), x.data(), rows * columns,
                           {.bias = b.data(),
                            .columns = columns,
                            .residual = r.data(),
                            .norm_weight = w.data(),
                            .eps = 1e-5,
                            .hidden = h.data()},
                           {stream});
              CHECK(x.read() == normed);
              CHECK(h.read() == hidden);
            }));
  close_all(ranks);
}

TEST(bias_residual_and_norm_follow_whole_rows_across_pieces) {
  check_norm(1700, 1500);  // 10.2 MB: two pieces
  check_norm(3, 7);
}

TEST(parts_of_unequal_sizes_go_where_they_belong) {
  for (const std::vector<int64_t>& cut : std::vector<std::vector<int64_t>>{
           {5}, {4, 4}, {3, 0, 4}, {0, 0, 7, 20'000}, {2'500'000, 7}, {1'000'000, 1'500'000}}) {
    const Ranks ranks = make(static_cast<int>(cut.size()));
    check_parts(ranks, cut);
    close_all(ranks);
  }
}

TEST(streams_may_change_between_calls) {
  const Setting jitter("FAKE_CUDA_JITTER_US", "300");
  const Ranks ranks = make(3);
  run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle) {
              const cuda::Stream streams[2];
              const int64_t shape[] = {1};
              std::vector<std::unique_ptr<OnDevice<float>>> all;
              for (int step = 0; step < 30; ++step) {
                const cuda::StreamHandle on = streams[(step + c.identity().rank) % 2].get();
                auto x = std::make_unique<OnDevice<float>>(on, std::vector<float>{1.0f});
                c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                             x->data(), x->data(), 1, {}, {on});
                all.push_back(std::move(x));
              }
              for (auto& x : all) CHECK_EQ(x->read()[0], 3.0f);
            }));
  close_all(ranks);
}

TEST(nccl_groups_take_these_kernels_for_small_sums_if_they_are_right) {
  use_doubles();
  const auto make_over = [&](const std::string& name) {
    const Ranks controls = make_local({0, 3, name, "local", 0, 5});
    Ranks ranks(3);
    run_clean(controls, [&](Communicator& control) {
      const int rank = control.identity().rank;
      NcclOptions options;
      options.device = rank;
      options.peer_bytes = 1 << 20;
      options.search.file = TPN_DOUBLES "/libfake_nccl.so";
      ranks[rank] = make_nccl(options, controls[rank]);
    });
    return ranks;
  };
  const auto kernels_of = [&](const Ranks& ranks, size_t rows) {
    const int before = g_kernels;
    run_clean(ranks, on_gpu([&](Communicator& c, cuda::StreamHandle stream) {
                OnDevice<float> x(stream, ramp(rows * 100, 1));
                OnDevice<float> residual(stream, ramp(rows * 100, -3));
                OnDevice<float> weight(stream, ramp(100, 1));
                OnDevice<float> hidden(stream, ramp(rows * 100, 9));
                const int64_t shape[] = {static_cast<int64_t>(rows), 100};
                c.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                             x.data(), x.data(), shape[0] * 100,
                             {.columns = 100,
                              .residual = residual.data(),
                              .norm_weight = weight.data(),
                              .eps = 1,
                              .hidden = hidden.data()},
                             {stream});
                CHECK(x.read() == std::vector<float>(rows * 100));  // 3 x - 3 x, normed
                CHECK(hidden.read() == std::vector<float>(rows * 100));
              }));
    return g_kernels - before;
  };
  Ranks ranks = make_over("tp:small");
  CHECK_EQ(kernels_of(ranks, 4), 3);     // one launch a rank, the norm in it
  CHECK_EQ(kernels_of(ranks, 2000), 3);  // 800 KB: two shots, the norm behind them
  CHECK_EQ(kernels_of(ranks, 4000), 0);  // 1.6 MB: NCCL's
  close_all(ranks);
  kernels::cuda::g_is_wrong = true;
  ranks = make_over("tp:wrong");
  kernels::cuda::g_is_wrong = false;
  CHECK_EQ(kernels_of(ranks, 4), 0);
  close_all(ranks);
}

TEST(failures_end_the_kernels_that_wait) {
  {
    const Ranks ranks = make(2, 0.3);
    const auto failures = run(ranks, [](Communicator& c) {
      if (c.identity().rank == 0)
        on_gpu([](Communicator& g, cuda::StreamHandle s) {
          OnDevice<float> x(s, ramp(64, 1));
          const int64_t shape[] = {64};
          g.all_reduce({.op = OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                       x.data(), x.data(), 64, {}, {s});
          x.read();  // comes back although rank 1 never comes
          g.check();
        })(c);
      for (const double end = now_s() + 10; now_s() < end;) {
        c.check();
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
    });
    check_all_told(failures, FailureKind::kTimeout, 1, "rank 1 did not come within 0.3 s");
    close_all(ranks);
  }
  {
    const Ranks ranks = make(3);
    check_all_told(run(ranks,
                       [](Communicator& c) {
                         if (c.identity().rank == 2) c.abort("enough");
                         for (const double end = now_s() + 10; now_s() < end;) c.check();
                       }),
                   FailureKind::kAborted, 2, "rank 2 aborted the group: enough");
    close_all(ranks);
  }
}

TEST(memory_that_cannot_be_had_is_told_on_all_ranks) {
  use_doubles();
  const Setting memory("FAKE_CUDA_MEMORY", "20000000");
  const Ranks controls = make_local({0, 2, "tp:poor", "local", 0, 5});
  const auto failures =
      run(controls, [&](Communicator& c) { (void)make_peers(0, controls[c.identity().rank]); });
  check_all_told(failures, FailureKind::kError, -1, "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory");
}

TEST(nothing_is_left_on_the_device) {
  CHECK_EQ(symbol<int64_t()>(kDriver, "fake_cuda_live_bytes")(), 0);
  CHECK_EQ(symbol<int()>(kDriver, "fake_cuda_live_events")(), 0);
  CHECK(g_kernels > 100);
}

int main() {
  ::setenv("FAKE_CUDA_DEVICES", "8", 1);  // device_ranks.h puts rank r's streams on GPU r
  return check::run_all();
}
