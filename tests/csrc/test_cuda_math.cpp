// SPDX-License-Identifier: Apache-2.0
// TSan: no processes.
// The arithmetic and the index maps of the CUDA kernels, run on the host: every thread of every
// block of every rank in turn, phase by phase. Bit for bit kernels::reduce where they must agree,
// against formulas in long double elsewhere.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "activation_oracle.h"
#include "check.h"
#include "core/error.h"
#include "kernels/activation.h"
#include "kernels/cuda.h"
#include "kernels/cuda/flat.h"
#include "kernels/cuda/rows.h"
#include "kernels/cuda/slices.h"
#include "kernels/reduce.h"
#include "random_values.h"

namespace tp_native::kernels {
namespace {

using cuda::Share;

constexpr int kThreads = 4;  // of a block: small, so that a few hundred elements fill many tiles

/// visit(share) for every thread of `blocks` blocks.
void each_share(int blocks, const std::function<void(const Share&)>& visit) {
  for (int block = 0; block < blocks; ++block) {
    for (int thread = 0; thread < kThreads; ++thread) visit({block, blocks, thread, kThreads});
  }
}

/// Values that begin `shift` elements after a multiple of 16 bytes, with one more behind them that
/// nobody may write.
template <class T>
class Placed {
 public:
  Placed(const std::vector<T>& values, int shift)
      : memory_((values.size() + static_cast<size_t>(shift) + 1) * sizeof(T) / 16 + 1),
        data_(reinterpret_cast<T*>(memory_.data()) + shift),
        count_(values.size()) {
    if (count_ > 0) std::memcpy(data_, values.data(), count_ * sizeof(T));
    std::memset(data_ + count_, 0x5a, sizeof(T));
  }
  explicit Placed(int64_t count, int shift = 0)
      : Placed(std::vector<T>(static_cast<size_t>(count)), shift) {}
  T* data() { return data_; }
  bool is_in_bounds() const {
    T mark;
    std::memset(&mark, 0x5a, sizeof(T));
    return std::memcmp(data_ + count_, &mark, sizeof(T)) == 0;
  }

 private:
  struct alignas(16) Line {
    char bytes[16];
  };
  std::vector<Line> memory_;
  T* data_;
  size_t count_;
};

template <class T>
bool is_equal(const T* a, const T* b, int64_t count) {
  return count == 0 || std::memcmp(a, b, static_cast<size_t>(count) * sizeof(T)) == 0;
}

/// What the ranks of a group hold, and what kernels::reduce makes of it.
template <class T>
struct World {
  World(DType dtype, int size, int64_t count) : dtype(dtype), size(size), count(count) {
    for (int r = 0; r < size; ++r) {
      values.push_back(random_values<T>(count, static_cast<unsigned>(100 * size + r)));
      in.emplace_back(values.back(), r % 3 == 1 ? 1 : 0);  // some ranks are not aligned
      out.emplace_back(count, r % 3 == 2 ? 1 : 0);
      staging.emplace_back(count + 16 * 64);
      data.push_back(staging.back().data());
    }
  }

  std::vector<T> reduced(ReduceOp op, const T* bias = nullptr, int64_t columns = 0,
                         const T* residual = nullptr) const {
    std::vector<T> result(static_cast<size_t>(count));
    std::vector<const void*> src;
    for (const auto& v : values) src.push_back(v.data());
    void* const dst[] = {result.data()};
    reduce({dtype, op, size, src.data(), 1, dst, count, bias, columns, 0, residual});
    return result;
  }

  cuda::PeerTerms<T> terms(int rank, bool is_staged = true) {
    return {data.data(), 0, size, rank, is_staged ? in[rank].data() : static_cast<T*>(data[rank])};
  }

  DType dtype;
  int size;
  int64_t count;
  std::vector<std::vector<T>> values;
  std::vector<Placed<T>> in;
  std::vector<Placed<T>> out;
  std::vector<Placed<T>> staging;
  std::vector<void*> data;
};

template <class T>
bool are_aligned(std::initializer_list<const T*> pointers) {
  return std::ranges::all_of(pointers, [](const T* p) { return cuda::is_aligned(p); });
}

template <class T, cuda::OpFamily kFamily, int kBatch, int kDepth>
void check_one_shot(DType dtype, ReduceOp op, int size, int64_t count, int blocks) {
  World<T> world(dtype, size, count);
  for (int r = 0; r < size; ++r) {
    each_share(blocks, [&](const Share& share) {
      cuda::copy_flat<T>(share, world.in[r].data(), world.terms(r).staging(r), count);
    });
  }
  const auto expected = world.reduced(op);
  for (int r = 0; r < size; ++r) {
    T* const out = world.out[r].data();
    const bool packs = are_aligned<T>({world.in[r].data(), out});
    each_share(blocks, [&](const Share& share) {
      cuda::sum_flat<kFamily, false, kBatch, kDepth>(share, world.terms(r), op, cuda::After<T>{},
                                                     packs, count, out);
    });
    CHECK(is_equal(out, expected.data(), count) && world.out[r].is_in_bounds());
  }
}

/// counts empty: an all-reduce in two shots; staged or, if not, with the operands in place.
template <class T, cuda::OpFamily kFamily, int kBatch, int kDepth>
void check_slices(DType dtype, ReduceOp op, int size, int64_t count, int blocks,
                  const std::vector<int64_t>& counts, bool is_staged) {
  World<T> world(dtype, size, count);
  const bool gathers = counts.empty();
  const auto item = static_cast<int64_t>(sizeof(T));
  const auto slices =
      gathers ? cuda::even_slices(count, size, item) : cuda::slices_of(counts, item);
  for (int r = 0; r < size; ++r) {
    each_share(blocks, [&](const Share& share) {
      if (is_staged) {
        cuda::stage_slices(share, world.terms(r), slices, world.in[r].data());
      } else {
        cuda::copy_flat<T>(share, world.values[r].data(), world.terms(r).staging(r), count);
      }
    });
  }
  const auto expected = world.reduced(op);
  for (int r = 0; r < size; ++r) {
    auto terms = world.terms(r, is_staged);
    T* const out = world.out[r].data() + (gathers ? slices.begin[r] : 0);
    T* const staging = terms.staging(r) + slices.staged[r];
    const T* const in = is_staged ? world.in[r].data() : nullptr;
    terms.own += slices.begin[r];
    terms.shift = slices.staged[r];
    const bool packs = are_aligned<T>({in ? in + slices.begin[r] : nullptr, out});
    each_share(blocks, [&](const Share& share) {
      cuda::sum_flat<kFamily, false, kBatch, kDepth>(share, terms, op, cuda::After<T>{}, packs,
                                                     slices.length[r], gathers ? staging : out,
                                                     gathers ? out : nullptr);
    });
    CHECK(is_equal(out, expected.data() + slices.begin[r], slices.length[r]));
  }
  if (!gathers) return;
  for (int r = 0; r < size; ++r) {
    each_share(blocks, [&](const Share& share) {
      cuda::gather_slices(share, world.terms(r), slices, world.out[r].data());
    });
    CHECK(is_equal(world.out[r].data(), expected.data(), count) && world.out[r].is_in_bounds());
  }
}

/// Both kernels that may serve `op`, and all shapes.
template <class T, cuda::OpFamily kFamily>
void check_reductions(DType dtype, ReduceOp op) {
  for (const int size : {1, 2, 3, 4, 5, 8, 16}) {
    for (const int64_t count : {1, 7, 16, 63, 64, 65, 200, 1031}) {
      for (const int blocks : {1, 3}) {
        check_one_shot<T, kFamily, 4, 2>(dtype, op, size, count, blocks);
        check_one_shot<T, kFamily, 8, 1>(dtype, op, size, count, blocks);
        check_slices<T, kFamily, 4, 2>(dtype, op, size, count, blocks, {}, true);
        check_slices<T, kFamily, 8, 1>(dtype, op, size, count, blocks, {}, false);
      }
    }
    std::vector<int64_t> counts;
    for (int r = 0; r < size; ++r) counts.push_back(r % 4 == 2 ? 0 : 1 + 61 * ((r * 7) % 5));
    check_slices<T, kFamily, 4, 2>(dtype, op, size, std::reduce(counts.begin(), counts.end()), 2,
                                   counts, true);
  }
}

/// The one-shot sum with what follows it; kDepth packs at once.
template <class T, int kBatch, int kDepth>
void check_flat_epilogue(DType dtype, int size, int64_t rows, int64_t columns, int flags) {
  const int64_t count = rows * columns;
  World<T> world(dtype, size, count);
  Placed<T> bias(random_values<T>(columns, 1), (flags & 4) ? 1 : 0);
  Placed<T> residual(random_values<T>(count, 2), 0);
  const T* const with_bias = (flags & 1) ? bias.data() : nullptr;
  const T* const with_residual = (flags & 2) ? residual.data() : nullptr;
  const auto expected = world.reduced(ReduceOp::kSum, with_bias, columns, with_residual);
  for (int r = 0; r < size; ++r) {
    std::memcpy(world.data[r], world.values[r].data(), static_cast<size_t>(count) * sizeof(T));
  }
  for (int r = 0; r < size; ++r) {
    T* const out = r == 0 ? world.in[0].data() : world.out[r].data();  // in place
    const bool packs = are_aligned<T>({world.in[r].data(), out, with_bias, with_residual}) &&
                       (!with_bias || columns % cuda::kLanes<T> == 0);
    const cuda::After<T> after{with_bias, with_residual, nullptr, nullptr, columns, 0};
    each_share(3, [&](const Share& share) {
      cuda::sum_flat<cuda::OpFamily::kSums, true, kBatch, kDepth>(
          share, world.terms(r), ReduceOp::kSum, after, packs, count, out);
    });
    CHECK(is_equal(out, expected.data(), count));
  }
}

template <class T>
Value<T> scale_of(const T* h, int64_t columns, double eps) {
  Value<T> sums[kPartialSums];
  for (int k = 0; k < kPartialSums; ++k) sums[k] = cuda::sum_of_squares(h, columns, k);
  for (int half = kPartialSums / 2; half > 0; half /= 2) {  // as lanes shuffle down
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return inverse_rms(sums[0], columns, eps);
}

template <int N, bool kIsKept, class T>
void check_rows(DType dtype, int size, int64_t rows, int64_t columns, int flags) {
  constexpr double kEps = 1e-5;
  const int64_t count = rows * columns;
  World<T> world(dtype, size, count);
  if (flags & 8) world.values[0] = random_values<T>(count, 9, true);
  const auto bias = random_values<T>(columns, 1, true);
  const auto weight = random_values<T>(columns, 3, true);
  auto residual = random_values<T>(count, 2, true);
  std::vector<T> normed(static_cast<size_t>(count));
  std::vector<T> hidden(static_cast<size_t>(count));
  std::vector<const void*> src;
  for (const auto& v : world.values) src.push_back(v.data());
  void* const to[] = {normed.data()};
  void* const keep[] = {hidden.data()};
  const T* const with_bias = (flags & 1) ? bias.data() : nullptr;
  T* const with_residual = (flags & 2) ? residual.data() : nullptr;
  reduce_rms_norm({dtype, size, src.data(), 1, to, keep, rows, columns, with_bias, with_residual,
                   weight.data(), kEps});

  for (int r = 0; r < size; ++r) {
    std::memcpy(world.data[r], world.values[r].data(), static_cast<size_t>(count) * sizeof(T));
  }
  Placed<T> in(world.values[0], 0);
  T* const out = in.data();                                     // in place
  T* const hidden_out = (flags & 4) ? with_residual : nullptr;  // the same
  const cuda::After<T> after{with_bias, with_residual, weight.data(), hidden_out, columns, kEps};
  auto terms = world.terms(0);
  terms.own = in.data();
  Placed<T> kept(columns);
  for (int64_t r = 0; r < rows; ++r) {
    const auto row = cuda::Row<T>::at(r, after, out, kIsKept ? kept.data() : nullptr);
    for (int thread = 0; thread < kThreads; ++thread) {
      cuda::sum_row<N, 4, 2, kIsKept>(cuda::Columns<N>::of(thread, kThreads), terms, after, row);
    }
    const Value<T> scale = scale_of(row.h, columns, kEps);
    for (int thread = 0; thread < kThreads; ++thread) {
      cuda::normalise_row<N, kIsKept>(cuda::Columns<N>::of(thread, kThreads), after, row, scale);
    }
  }
  CHECK(is_equal(out, normed.data(), count) && in.is_in_bounds() && kept.is_in_bounds());
  if (hidden_out) CHECK(is_equal(hidden_out, hidden.data(), count));
}

template <Activation kActivation, class T>
void check_activation(double tolerance) {
  for (double at = -40; at <= 40; at += 1 / 64.0) {
    const auto x = widen(narrowed<T>(static_cast<Value<T>>(at)));
    const auto [value, slope] = activated<kActivation, T>(x);
    const long double exact_value = exact_activation(kActivation, x);
    const long double room = tolerance * (1 + std::abs(x));
    CHECK(std::abs(value - exact_value) <= room);
    if (kActivation == Activation::kRelu && x == 0) continue;
    const long double exact_slope = slope_of_activation(kActivation, x);
    CHECK(std::abs(slope - exact_slope) <= room + 1e-9L);
  }
  const auto infinite = static_cast<Value<T>>(HUGE_VAL);
  CHECK_EQ((activated<kActivation, T>(infinite).value), infinite);
  CHECK_EQ((activated<kActivation, T>(Value<T>{-1000}).value), 0);
  CHECK_EQ((activated<kActivation, T>(Value<T>{-1000}).slope), 0);
  CHECK_EQ((activated<kActivation, T>(Value<T>{1000}).value), 1000);
  CHECK_EQ((activated<kActivation, T>(Value<T>{1000}).slope), 1);
  const auto nan = static_cast<Value<T>>(NAN);
  CHECK(std::isnan(activated<kActivation, T>(nan).value));
}

template <class T>
void check_activations(double tolerance) {
  check_activation<Activation::kRelu, T>(tolerance);
  check_activation<Activation::kGeluTanh, T>(tolerance);
  check_activation<Activation::kGeluErf, T>(tolerance);
  check_activation<Activation::kSilu, T>(tolerance);
}

bool raises_without_kernels(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return std::string(error.what()).find("nvcc") != std::string::npos;
  }
  return false;
}

}  // namespace

// a few roundings in the type that computes
TEST(activations_and_slopes_follow_their_formulas) {
  check_activations<float>(1e-6);
  check_activations<double>(1e-14);
  check_activations<Float16>(1e-6);
  check_activations<BFloat16>(1e-6);
}

TEST(relu_lets_no_gradient_through_where_it_is_off) {
  constexpr auto kRelu = Activation::kRelu;
  const auto slope = [](float x) { return activated<kRelu, float>(x).slope; };
  CHECK_EQ((through<kRelu, float>(HUGE_VALF, slope(-1.0f))), 0.0f);
  CHECK_EQ((through<kRelu, float>(3.0f, slope(0.0f))), 0.0f);
  CHECK_EQ((through<kRelu, float>(3.0f, slope(2.0f))), 3.0f);
  CHECK_EQ((through<kRelu, float>(3.0f, slope(NAN))), 3.0f);  // as torch's threshold_backward
}

TEST(collectives_give_the_bits_of_reduce) {
  each_dtype([]<class T>(T, DType dtype) {
    if constexpr (!std::same_as<T, Bool>) {
      check_reductions<T, cuda::OpFamily::kSums>(dtype, ReduceOp::kSum);
    } else {
      check_reductions<T, cuda::OpFamily::kOrders>(dtype, ReduceOp::kSum);
    }
    if constexpr (std::floating_point<Value<T>>) {
      check_reductions<T, cuda::OpFamily::kSums>(dtype, ReduceOp::kAvg);
    }
    check_reductions<T, cuda::OpFamily::kOrders>(dtype, ReduceOp::kMax);
    check_reductions<T, cuda::OpFamily::kOrders>(dtype, ReduceOp::kMin);
  });
}

TEST(a_signed_byte_sums_as_an_unsigned_one) {
  for (int a = -128; a < 128; ++a) {
    for (int b = -128; b < 128; ++b) {
      const auto sum = plus(static_cast<int8_t>(a), static_cast<int8_t>(b));
      CHECK_EQ(int{static_cast<uint8_t>(sum)},
               int{plus(static_cast<uint8_t>(a), static_cast<uint8_t>(b))});
    }
  }
}

TEST(bias_and_residual_join_as_in_reduce) {
  each_floating([]<class T>(T, DType dtype) {
    for (const int size : {1, 2, 4, 5}) {
      for (const int64_t columns : {1, 8, 24, 37, 64}) {
        for (int flags = 0; flags < 8; ++flags) {
          check_flat_epilogue<T, 1, 2>(dtype, 1, 5, columns, flags);
          check_flat_epilogue<T, 8, 1>(dtype, size, 5, columns, flags);
        }
      }
    }
  });
}

TEST(norms_give_the_bits_of_reduce_rms_norm) {
  each_floating([]<class T>(T, DType dtype) {
    for (const int size : {1, 2, 3, 4, 8}) {
      for (const int64_t columns : {1, 2, 15, 31, 32, 33, 64, 100, 1024, 1031}) {
        for (int flags = 0; flags < 16; ++flags) {
          if ((flags & 4) && !(flags & 2)) continue;
          const int64_t rows = columns > 1000 ? 1 : 3;
          check_rows<1, false, T>(dtype, size, rows, columns, flags);
          check_rows<1, true, T>(dtype, size, rows, columns, flags);
          if (columns % cuda::kLanes<T> == 0) {
            check_rows<cuda::kLanes<T>, false, T>(dtype, size, rows, columns, flags);
            check_rows<cuda::kLanes<T>, true, T>(dtype, size, rows, columns, flags);
          }
        }
      }
    }
  });
}

TEST(gathers_put_every_part_in_its_place) {
  for (const int size : {1, 2, 3, 4, 16}) {
    for (const int blocks : {1, 3}) {
      for (const int shift : {0, 1}) {
        std::vector<int64_t> counts;
        for (int r = 0; r < size; ++r) counts.push_back(r % 3 == 1 ? 0 : (r * 131 + 70) % 400);
        auto slices = cuda::slices_of(counts, 1);
        const int64_t count = slices.begin[size - 1] + slices.length[size - 1];
        const auto whole = random_values<uint8_t>(count, 5);
        std::vector<Placed<uint8_t>> staging;
        std::vector<void*> data;
        for (int r = 0; r < size; ++r) {
          slices.staged[r] = 0;
          staging.emplace_back(400);
          data.push_back(staging.back().data());
          each_share(blocks, [&](const Share& share) {
            cuda::copy_flat<uint8_t>(share, whole.data() + slices.begin[r], staging.back().data(),
                                     counts[r]);
          });
        }
        for (int r = 0; r < size; ++r) {
          Placed<uint8_t> out(count, shift);
          const cuda::PeerTerms<uint8_t> terms{data.data(), 0, size, r, nullptr};
          each_share(blocks, [&](const Share& share) {
            cuda::copy_flat<uint8_t>(share, whole.data() + slices.begin[r],
                                     out.data() + slices.begin[r], counts[r]);
            cuda::gather_slices(share, terms, slices, out.data());
          });
          CHECK(is_equal(out.data(), whole.data(), count) && out.is_in_bounds());
        }
      }
    }
  }
}

TEST(every_element_is_taken_once_and_by_the_same_block_on_every_rank) {
  constexpr int kLanes = 8;
  for (const int64_t count : {0, 1, 7, 8, 31, 32, 33, 64, 255, 256, 1000}) {
    for (const int blocks : {1, 2, 3, 7, 64}) {
      std::vector<int> owners[2];  // of a rank that is aligned, and of one that is not
      for (const bool has_packs : {false, true}) {
        std::vector<int> owner(static_cast<size_t>(count), -1);
        const int64_t packs = has_packs ? count / kLanes : 0;
        each_share(blocks, [&](const Share& share) {
          const auto take = [&](int64_t i) {
            CHECK_EQ(owner.at(static_cast<size_t>(i)), -1);
            owner[static_cast<size_t>(i)] = static_cast<int>(share.block);
          };
          for (int64_t p = share.first_pack(); p < packs; p += share.stride()) {
            for (int k = 0; k < kLanes; ++k) take(p * kLanes + k);
          }
          share.rest(packs * kLanes, count, kLanes, take);
        });
        CHECK(std::ranges::count(owner, -1) == 0);
        owners[has_packs] = owner;
      }
      CHECK(owners[0] == owners[1]);
    }
  }
}

TEST(even_slices_differ_by_a_pack_at_the_most_and_cover_everything) {
  for (const int64_t item : {1, 2, 4, 8}) {
    for (int size = 1; size <= cuda::kMaxRanks; ++size) {
      for (const int64_t count : {1, 15, 16, 17, 100, 1024, 4099}) {
        const auto slices = cuda::even_slices(count, size, item);
        int64_t begin = 0;
        int64_t most = 0;
        int64_t least = count;
        for (int r = 0; r < size; ++r) {
          CHECK_EQ(slices.begin[r], begin);
          CHECK_EQ(slices.staged[r], begin);
          if (slices.length[r] > 0) CHECK_EQ(begin % cuda::lanes_of(item), 0);
          begin += slices.length[r];
          most = std::max(most, slices.length[r]);
          least = std::min(least, slices.length[r]);
        }
        CHECK_EQ(begin, count);
        CHECK(most - least < 2 * cuda::lanes_of(item) && most == slices.length[0]);
      }
    }
  }
}

TEST(given_slices_begin_at_whole_packs_in_staging) {
  const std::vector<int64_t> counts{5, 0, 16, 17};
  const auto slices = cuda::slices_of(counts, 2);
  CHECK(slices.begin[3] == 21 && slices.length[3] == 17);
  CHECK(slices.staged[1] == 8 && slices.staged[2] == 8 && slices.staged[3] == 24);
  CHECK_EQ(cuda::reduce_scatter_payload(DType::kBFloat16, counts), (24 + 24) * 2);
}

TEST(a_row_cursor_is_a_division) {
  for (const int64_t columns : {1, 3, 7, 64}) {
    for (const int64_t step : {1, 2, 63, 64, 65, 1000}) {
      auto cursor = cuda::RowCursor::at(5, columns);
      const auto by = cuda::RowCursor::at(step, columns);
      for (int64_t i = 5; i < 5 + 20 * step; i += step) {
        CHECK(cursor.row == i / columns && cursor.column == i % columns);
        cursor.advance(by, columns);
      }
    }
  }
}

TEST(staging_holds_two_payloads_of_whole_packs) {
  CHECK(cuda::staged_bytes(0) == 0 && cuda::staged_bytes(1) == 16 && cuda::staged_bytes(16) == 16);
  CHECK_EQ(cuda::staging_bytes(17), 64);
  CHECK_EQ(cuda::column_sum_workspace_bytes(DType::kBFloat16, 128, 10), 0);
  CHECK_EQ(cuda::column_sum_workspace_bytes(DType::kBFloat16, 129, 10), 2 * 10 * 4);
  CHECK_EQ(cuda::column_sum_workspace_bytes(DType::kFloat64, 1000000, 10), 64 * 10 * 8);
}

TEST(the_size_of_a_message_chooses_the_all_reduce) {
  using enum AllReduceKind;
  CHECK(choose_all_reduce(0, 4) == kOneShot && choose_all_reduce(512 << 10, 4) == kOneShot);
  CHECK(choose_all_reduce((512 << 10) + 1, 4) == kTwoShot);
  CHECK(choose_all_reduce((256 << 10) + 1, 8) == kTwoShot);
  CHECK(choose_all_reduce(8 << 20, 2) == kOneShot &&
        choose_all_reduce((8 << 20) + 1, 2) == kLibrary);
  const AllReduceRange ranges[] = {{1024, kLibrary}, {4096, kOneShot}, {8192, kTwoShot}};
  CHECK(choose_all_reduce(1024, 4, ranges) == kLibrary);
  CHECK(choose_all_reduce(1025, 4, ranges) == kOneShot);
  CHECK(choose_all_reduce(8192, 4, ranges) == kTwoShot);
  CHECK(choose_all_reduce(8193, 4, ranges) == kLibrary);
  CHECK(fuses_norm(kOneShot, 128 << 10) && !fuses_norm(kOneShot, (128 << 10) + 1));
  CHECK(!fuses_norm(kTwoShot, 1) && fuses_norm(kOneShot, 5, 5));
}

TEST(without_kernels_every_launcher_says_what_to_do) {
  if (cuda::is_built()) return;
  const cuda::Peers peers;
  const auto kind = AllReduceKind::kOneShot;
  CHECK(raises_without_kernels([] { cuda::apply_epilogue({}, nullptr); }));
  CHECK(raises_without_kernels([] { cuda::glu({}, nullptr); }));
  CHECK(raises_without_kernels([] { cuda::glu_backward({}, nullptr); }));
  CHECK(raises_without_kernels([] { cuda::activation_backward({}, nullptr); }));
  CHECK(raises_without_kernels([] { cuda::column_sum({}, nullptr); }));
  CHECK(raises_without_kernels([&] { cuda::all_reduce(kind, peers, {}, nullptr); }));
  CHECK(raises_without_kernels([&] { cuda::all_reduce_in_one_launch(kind, peers, {}, nullptr); }));
  CHECK(raises_without_kernels([&] { cuda::reduce_scatter(peers, {}, nullptr); }));
  CHECK(raises_without_kernels([&] { cuda::all_gather(peers, {}, nullptr); }));
  CHECK(raises_without_kernels([&] { cuda::broadcast(peers, {}, nullptr); }));
}

}  // namespace tp_native::kernels

int main() { return check::run_all(); }
