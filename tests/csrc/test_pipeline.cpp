// SPDX-License-Identifier: Apache-2.0
// Schedules run for real, on the test double of the driver: streams are threads, every step of
// theirs comes late by chance, and the results are those of a dense product in fp64.
// TSan: ranks are threads.
#include "overlap/pipeline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <thread>

#include "check.h"
#include "fake_streams.h"

using namespace tp_native;           // NOLINT
using namespace tp_native::overlap;  // NOLINT
using namespace fake_streams;        // NOLINT

namespace {

using Values = std::vector<double>;

constexpr Pattern kPatterns[] = {Pattern::kGemmAllReduce, Pattern::kGemmReduceScatter,
                                 Pattern::kAllGatherGemm};

/// A problem with its numbers: small whole ones, so that every order of a sum gives the same bits.
struct Case {
  Problem problem;
  Schedule schedule;
  int64_t inner = 0;  // K of the whole
  Values x;           // [rows, inner]
  Values w;           // [columns of all ranks, inner]
  bool is_gather() const { return problem.pattern == Pattern::kAllGatherGemm; }
  int64_t first_row(size_t rank) const {
    return std::accumulate(problem.sizes.begin(),
                           problem.sizes.begin() + static_cast<int64_t>(rank), int64_t{0});
  }
  double dense(int64_t row, int64_t column) const {
    return std::inner_product(x.begin() + row * inner, x.begin() + (row + 1) * inner,
                              w.begin() + column * inner, 0.0);
  }
};

Case draw_case(Pattern pattern, int ranks, std::mt19937& draw) {
  Case c;
  Problem& p = c.problem;
  p.pattern = pattern;
  p.ranks = ranks;
  p.columns = 1 + static_cast<int64_t>(draw() % 4);
  p.dtype = DType::kFloat64;
  p.multiprocessors = 2;
  p.tile = {2, 2};
  p.chunks = 1 + static_cast<int>(draw() % 6);
  p.slots = static_cast<int>(draw() % 4);
  p.beside_flop = draw() % 2 ? 1 : 0;
  for (int r = 0; r < ranks; ++r) p.sizes.push_back(draw() % 5 == 0 ? 0 : draw() % 12);
  p.rows = std::accumulate(p.sizes.begin(), p.sizes.end(), int64_t{0});
  p.inner = 3;
  const bool is_gather = pattern == Pattern::kAllGatherGemm;
  c.inner = is_gather ? p.inner : p.inner * ranks;
  const auto fill = [&](Values& values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<double>(draw() % 15) - 7);
  };
  fill(c.x, p.rows * c.inner);
  fill(c.w, p.columns * (is_gather ? ranks : 1) * c.inner);
  c.schedule = plan(p, default_costs(p.dtype));
  return c;
}

/// One rank's share of a case, and the launches that compute it.
class Share {
 public:
  Share(const Case& c, size_t rank, Meeting& meeting)
      : case_(c), rank_(rank), meeting_(meeting), inner_(c.problem.inner) {
    const Problem& p = c.problem;
    const int64_t first = c.is_gather() ? c.first_row(rank) : 0;
    const int64_t rows = c.is_gather() ? p.sizes[rank] : p.rows;
    const int64_t skip = c.is_gather() ? 0 : static_cast<int64_t>(rank) * inner_;
    for (int64_t m = first; m < first + rows; ++m)
      for (int64_t k = 0; k < inner_; ++k) x_.push_back(c.x[m * c.inner + skip + k]);
    const int64_t column = c.is_gather() ? static_cast<int64_t>(rank) * p.columns : 0;
    for (int64_t n = column; n < column + p.columns; ++n)
      for (int64_t k = 0; k < inner_; ++k) w_.push_back(c.w[n * c.inner + skip + k]);
    const bool is_scattered = p.pattern == Pattern::kGemmReduceScatter;
    const int64_t from = is_scattered ? c.first_row(rank) : 0;
    for (int64_t m = from; m < from + (is_scattered ? p.sizes[rank] : p.rows); ++m)
      for (int64_t n = column; n < column + p.columns; ++n) expected_.push_back(c.dense(m, n));
    y_.assign(expected_.size(), std::numeric_limits<double>::quiet_NaN());
    result_ = y_;
  }

  /// Everything on `stream`, through `pipeline`; throws where a number is wrong.
  void run(Pipeline& pipeline, const cuda::Device& device, cuda::StreamHandle stream) {
    const cuda::Current current(device);
    const Schedule& s = case_.schedule;
    const int64_t width = case_.is_gather() ? inner_ : case_.problem.columns;
    {
      const cuda::Workspace slots(s.slots * s.slot_rows * width * 8, stream, "chunks");
      const auto buffer = [&](const Chunk& chunk) {
        return chunk.slot < 0
                   ? nullptr
                   : reinterpret_cast<double*>(slots.data()) + chunk.slot * s.slot_rows * width;
      };
      pipeline.run(s, stream,
                   {[&](const Chunk& chunk, cuda::StreamHandle on) {
                      enqueue(on, [this, &chunk, to = buffer(chunk)] { multiply(chunk, to); });
                    },
                    [&](const Chunk& chunk, cuda::StreamHandle on) {
                      enqueue(on, [this, &chunk, to = buffer(chunk)] { communicate(chunk, to); });
                    },
                    [&](cuda::StreamHandle on) {
                      enqueue(on, [this, first = reinterpret_cast<const double*>(slots.data())] {
                        sum_x(first);
                      });
                    }});
    }  // the memory goes back in the order of the caller's stream, and is overwritten
    enqueue(stream, [this] { result_ = y_; });
    TPN_CUDA(cuda::driver().StreamSynchronize(stream), "a test");
    g_faults.check();
    CHECK(result_ == expected_);
    const Values& all = case_.is_gather() ? case_.x : x_;
    if (case_.problem.beside_flop > 0) CHECK_EQ(sum_, std::accumulate(all.begin(), all.end(), 0.0));
  }

 private:
  void multiply(const Chunk& chunk, double* buffer) {
    const int64_t columns = case_.problem.columns;
    for (const Batch& batch : batches(chunk)) {
      for (int64_t i = 0; i < batch.count * batch.rows; ++i) {
        const int64_t row = batch.row + i / batch.rows * batch.row_stride + i % batch.rows;
        const int64_t packed = batch.packed_row + i;
        const double* const from = case_.is_gather() ? buffer + packed * inner_ : &x_[row * inner_];
        double* const to =
            buffer && !case_.is_gather() ? buffer + packed * columns : &y_[row * columns];
        for (int64_t n = 0; n < columns; ++n)
          to[n] = std::inner_product(from, from + inner_, &w_[n * inner_], 0.0);
      }
    }
  }

  void communicate(const Chunk& chunk, double* buffer) {
    const int64_t columns = case_.problem.columns;
    if (case_.is_gather()) {
      meeting_.meet(rank_, x_.data() + chunk.pieces[rank_].local_row * inner_, [&](const auto& in) {
        for (size_t r = 0; r < in.size(); ++r) {
          const Piece& piece = chunk.pieces[r];
          std::copy_n(in[r], piece.rows * inner_, buffer + piece.packed_row * inner_);
        }
      });
      return;
    }
    const bool is_all_reduce = case_.problem.pattern == Pattern::kGemmAllReduce;
    const Piece& piece = chunk.pieces[is_all_reduce ? 0 : rank_];
    const int64_t skip = is_all_reduce ? 0 : piece.packed_row * columns;
    double* const out = y_.data() + piece.local_row * columns;
    Values sum(static_cast<size_t>(piece.rows * columns), 0.0);
    meeting_.meet(rank_, is_all_reduce ? out : buffer, [&](const auto& in) {
      for (const double* values : in)
        for (size_t i = 0; i < sum.size(); ++i) sum[i] += values[skip + static_cast<int64_t>(i)];
    });
    std::ranges::copy(sum, out);
  }

  void sum_x(const double* slots) {
    if (!case_.is_gather()) sum_ = std::accumulate(x_.begin(), x_.end(), 0.0);
    for (const Chunk& chunk : case_.schedule.chunks) {
      if (!case_.is_gather()) break;
      const double* const first = slots + chunk.slot * case_.schedule.slot_rows * inner_;
      sum_ = std::accumulate(first, first + chunk.rows * inner_, sum_);
    }
  }

  const Case& case_;
  size_t rank_;
  Meeting& meeting_;
  int64_t inner_;
  Values x_, w_, expected_;
  Values y_, result_;
  double sum_ = 0;
};

/// What a rank keeps from call to call.
struct Place {
  cuda::Device device{0};
  cuda::Stream stream = make(device);
  Pipeline pipeline{device};

  static cuda::Stream make(const cuda::Device& device) {
    const cuda::Current current(device);
    return cuda::Stream();
  }
};

/// A schedule of so many chunks for one rank: its collectives meet nobody.
Schedule alone(Pattern pattern, int chunks) {
  Problem p{
      .pattern = pattern, .rows = 2 * chunks, .columns = 1, .inner = 1, .sizes = {2 * chunks}};
  p.tile = {2, 2};
  p.chunks = chunks;
  const Schedule made = plan(p, CostModel{});
  CHECK_EQ(made.chunks.size(), static_cast<size_t>(chunks));
  return made;
}

int index_of(const Schedule& s, const Chunk& chunk) {
  return static_cast<int>(&chunk - s.chunks.data());
}

void nothing(const Chunk&, cuda::StreamHandle) {}

}  // namespace

TEST(results_are_those_of_the_dense_product) {
  std::mt19937 draw(20260802);
  std::vector<std::unique_ptr<Place>> places;
  for (int r = 0; r < 4; ++r) places.push_back(std::make_unique<Place>());
  int overlapped = 0;
  for (int round = 0; round < 200; ++round) {
    for (const Pattern pattern : kPatterns) {
      const int ranks = 1 + static_cast<int>(draw() % 4);
      const Case c = draw_case(pattern, ranks, draw);
      overlapped += c.schedule.is_overlapped() ? 1 : 0;
      Meeting meeting(static_cast<size_t>(ranks));
      on_threads(static_cast<size_t>(ranks), [&](size_t rank) {
        Place& place = *places[rank];
        Share(c, rank, meeting).run(place.pipeline, place.device, place.stream.get());
      });
    }
  }
  CHECK(overlapped > 300);
}

TEST(collectives_run_under_gemms) {
  Place place;
  for (const Pattern pattern : kPatterns) {
    const Schedule s = alone(pattern, 4);
    // A pair of which each waits for the other to begin: in one stream they would wait for ever.
    const bool is_gather = pattern == Pattern::kAllGatherGemm;
    const int gemm = is_gather ? 0 : 1;
    const int collective = is_gather ? 1 : 0;
    Marks marks;
    const auto pair = [&](const std::string& name, int index, const std::string& other,
                          int other_index) {
      return [=, &marks, &s](const Chunk& chunk, cuda::StreamHandle on) {
        enqueue(on, [=, &marks, i = index_of(s, chunk)] {
          marks.set(concat(name, " ", i, " begins"));
          if (i == index) marks.await(concat(other, " ", other_index, " begins"));
          marks.set(concat(name, " ", i, " ends"));
        });
      };
    };
    const auto make = pair("GEMM", gemm, "collective", collective);
    const auto send = pair("collective", collective, "GEMM", gemm);
    place.pipeline.run(s, place.stream.get(), {make, send});
    TPN_CUDA(cuda::driver().StreamSynchronize(place.stream.get()), "a test");
    g_faults.check();
    CHECK(marks.is_before("collective 0 begins", "GEMM 3 ends"));
    for (int i = 0; i < 4; ++i) {
      const std::string made = concat("GEMM ", i), sent = concat("collective ", i);
      CHECK(is_gather ? marks.is_before(sent + " ends", made + " begins")
                      : marks.is_before(made + " ends", sent + " begins"));
    }
  }
}

TEST(a_second_gemm_runs_beside_the_collective) {
  Place place;
  Problem p{.rows = 2, .columns = 1, .inner = 1, .tile = {2, 2}, .beside_flop = 1, .chunks = 1};
  const Schedule s = plan(p, CostModel{});
  CHECK(s.is_overlapped());
  Marks marks;
  place.pipeline.run(s, place.stream.get(),
                     {nothing,
                      [&](const Chunk&, cuda::StreamHandle on) {
                        enqueue(on, [&] {  // each waits for the other to begin
                          marks.set("collective");
                          marks.await("beside");
                        });
                      },
                      [&](cuda::StreamHandle on) {
                        enqueue(on, [&] {
                          marks.set("beside");
                          marks.await("collective");
                        });
                      }});
  TPN_CUDA(cuda::driver().StreamSynchronize(place.stream.get()), "a test");
  g_faults.check();
}

TEST(one_chunk_stays_on_the_callers_stream) {
  Place place;
  const int streams = fake().live_streams();
  const int events = fake().live_events();
  for (const Pattern pattern : kPatterns) {
    Problem p{.pattern = pattern, .rows = 2, .columns = 1, .inner = 1, .sizes = {2}};
    std::vector<cuda::StreamHandle> seen;
    const auto see = [&](const Chunk&, cuda::StreamHandle on) { seen.push_back(on); };
    place.pipeline.run(plan(p, CostModel{}), place.stream.get(), {see, see});
    CHECK(seen == std::vector(2, place.stream.get()));
  }
  CHECK_EQ(fake().live_streams(), streams);
  CHECK_EQ(fake().live_events(), events);
}

TEST(a_launch_that_throws_leaves_the_streams_joined) {
  struct Refused {};
  Place place;
  for (const Pattern pattern : kPatterns) {
    const Schedule s = alone(pattern, 5);
    for (const bool is_gemm : {true, false}) {
      for (int at = 0; at < 5; ++at) {
        std::atomic<int> launched = 0;
        std::atomic<int> done = 0;
        const auto launch = [&](bool throws) {
          return [&, throws](const Chunk& chunk, cuda::StreamHandle on) {
            ++launched;
            enqueue(on, [&] {
              std::this_thread::sleep_for(std::chrono::microseconds(300));
              ++done;
            });
            if (throws && index_of(s, chunk) == at) throw Refused();
          };
        };
        bool is_refused = false;
        try {
          place.pipeline.run(s, place.stream.get(), {launch(is_gemm), launch(!is_gemm)});
        } catch (const Refused&) {
          is_refused = true;
        }
        CHECK(is_refused);
        enqueue(place.stream.get(), [&] { CHECK_EQ(done.load(), launched.load()); });
        TPN_CUDA(cuda::driver().StreamSynchronize(place.stream.get()), "a test");
        g_faults.check();
        CHECK(launched > 0);
      }
    }
  }
}

TEST(streams_and_events_are_used_again_and_given_back) {
  const int streams = fake().live_streams();
  const int events = fake().live_events();
  {
    Place place;
    const Schedule s = alone(Pattern::kGemmReduceScatter, 6);
    place.pipeline.run(s, place.stream.get(), {nothing, nothing});
    const int kept = fake().live_events();
    CHECK_EQ(kept, events + s.events);
    const auto refuse = [](const Chunk&, cuda::StreamHandle) { throw std::runtime_error("no"); };
    for (int i = 0; i < 50; ++i) {
      place.pipeline.run(s, place.stream.get(), {nothing, nothing});
      try {
        place.pipeline.run(s, place.stream.get(), {nothing, refuse});
      } catch (const std::runtime_error&) {
      }
    }
    CHECK_EQ(fake().live_events(), kept);
    CHECK_EQ(fake().live_streams(), streams + 2);
  }
  CHECK_EQ(fake().live_streams(), streams);
  CHECK_EQ(fake().live_events(), events);
}

TEST(each_callers_stream_has_a_communication_stream_of_its_own) {
  Place place;
  const Schedule s = alone(Pattern::kGemmAllReduce, 2);
  const auto stream_beside = [&](cuda::StreamHandle caller) {
    cuda::StreamHandle seen = nullptr;
    place.pipeline.run(s, caller,
                       {nothing, [&](const Chunk&, cuda::StreamHandle on) { seen = on; }});
    CHECK(seen != caller);
    return seen;
  };
  const int before = fake().live_streams();
  std::vector<cuda::Stream> callers;
  std::set<cuda::StreamHandle> sides;
  for (int i = 0; i < 40; ++i) {
    callers.push_back(Place::make(place.device));
    const cuda::StreamHandle side = stream_beside(callers.back().get());
    if (i < 32) CHECK(sides.insert(side).second);
    CHECK(stream_beside(callers.back().get()) == side);
  }
  CHECK_EQ(fake().live_streams(), before + 40 + 32);  // the idle ones changed hands
}

TEST(threads_with_pipelines_of_their_own) {
  on_threads(4, [](size_t thread) {
    std::mt19937 draw(static_cast<unsigned>(thread));
    Place place;
    for (int round = 0; round < 20; ++round) {
      const Case c = draw_case(kPatterns[round % 3], 1, draw);
      Meeting meeting(1);
      Share(c, 0, meeting).run(place.pipeline, place.device, place.stream.get());
    }
  });
}

TEST(threads_share_a_pipeline_and_a_stream) {
  Place place;
  const cuda::Stream other = Place::make(place.device);
  for (const cuda::StreamHandle second : {other.get(), place.stream.get()}) {
    on_threads(2, [&](size_t thread) {
      std::mt19937 draw(static_cast<unsigned>(thread));
      for (int round = 0; round < 30; ++round) {
        const Case c = draw_case(kPatterns[round % 3], 1, draw);
        Meeting meeting(1);
        Share(c, 0, meeting)
            .run(place.pipeline, place.device, thread == 0 ? place.stream.get() : second);
      }
    });
  }
}

int main() {
  (void)fake();
  const int64_t bytes = fake().live_bytes();
  const int failed = check::run_all();
  if (fake().live_bytes() != bytes) std::printf("FAILED  memory was not given back\n");
  return fake().live_bytes() == bytes ? failed : EXIT_FAILURE;
}
