// SPDX-License-Identifier: Apache-2.0
// Cross entropy of logits whose columns are cut over ranks: every rank tells its statistics of each
// row in one all-gather, and all combine them in rank order.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cross_entropy.h"
#include "ops/layer_checks.h"
#include "ops/schema.h"
#include "ops/tensors.h"

namespace tp_native::ops {
namespace {

using comm::OpCode;
using comm::Signature;
using kernels::LogitStatistics;

constexpr const char* kOp = "vocab_parallel_cross_entropy";

/// Which columns of the vocabulary each rank holds.
struct Cut {
  std::vector<int64_t> widths;
  std::vector<int64_t> ends;     ///< behind each rank's last column
  std::vector<int64_t> columns;  ///< of each rank, those that are no padding
  int64_t vocabulary = 0;

  int64_t first(int64_t rank) const { return ends[rank] - widths[rank]; }
  int64_t owner(int64_t id) const { return std::ranges::upper_bound(ends, id) - ends.begin(); }
};

Cut cut_of(std::vector<int64_t> widths, std::optional<int64_t> vocab_size) {
  Cut cut;
  cut.widths = std::move(widths);
  int64_t end = 0;
  for (const int64_t n : cut.widths) cut.ends.push_back(end += n);
  TORCH_CHECK_VALUE(!vocab_size || (*vocab_size >= 1 && *vocab_size <= end), kOp, ": vocab_size ",
                    vocab_size.value_or(0), ": expected 1 to ", end,
                    ", the columns that the ranks hold: ", text_of(cut.widths));
  cut.vocabulary = vocab_size.value_or(end);
  for (size_t r = 0; r < cut.widths.size(); ++r) {
    const int64_t before = cut.ends[r] - cut.widths[r];
    cut.columns.push_back(std::clamp<int64_t>(cut.vocabulary - before, 0, cut.widths[r]));
  }
  return cut;
}

/// Where the rows of a tensor (..., columns) begin, however its leading dimensions lie.
class Rows {
 public:
  explicit Rows(const Tensor& t)
      : whole_(t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous()),
        data_(static_cast<const char*>(whole_.const_data_ptr())) {}

  const void* operator[](int64_t row) const {
    int64_t offset = 0;
    for (int64_t d = whole_.dim() - 2; d >= 0; --d) {
      offset += row % whole_.size(d) * whole_.stride(d);
      row /= whole_.size(d);
    }
    return data_ + offset * static_cast<int64_t>(whole_.element_size());
  }

 private:
  const Tensor whole_;
  const char* data_;
};

/// f(row) for every row; a thread takes what is worth waking it.
template <class F>
void for_each_row(int64_t rows, int64_t columns, const F& f) {
  constexpr int64_t kGrain = 32768;  // logits; at::internal::GRAIN_SIZE
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) f(row);
                   });
}

/// What a rank tells the others, in V: its width, whether a target is outside the vocabulary, and
/// of every row `fields` numbers. What is wrong on one rank is told to all, so none waits for it.
template <class V>
struct Message {
  static constexpr int64_t kHeader = 2;
  int64_t fields;
  int64_t rows;

  int64_t size() const { return kHeader + rows * fields; }
  V* of_row(V* message, int64_t row) const { return message + kHeader + row * fields; }
  const V* of_row(const V* message, int64_t row) const { return message + kHeader + row * fields; }
  LogitStatistics statistics(const V* message, int64_t row) const {
    const V* const at = of_row(message, row);
    return {at[0], at[1], fields > 3 ? at[3] : 0};
  }
};

[[noreturn]] void refuse_widths(const std::vector<int64_t>& found, const Cut& cut) {
  const int64_t whole = cut.ends.back();
  const bool is_gathered =
      std::ranges::all_of(found, [&](int64_t n) { return n == whole && n > 0; });
  C10_THROW_ERROR(
      ValueError,
      c10::str(kOp, ": the ranks' logits have ", text_of(found), " columns, the partition says ",
               text_of(cut.widths),
               is_gathered ? ": every rank holds the whole vocabulary. Pass this rank's columns "
                             "(ColumnParallelLinear with gather_output=False), or gathered logits "
                             "to F.cross_entropy"
                           : ": pass this rank's columns, and the partition that they are cut by"));
}

/// Raises ValueError, on all ranks alike, where every rank seems to hold the same columns: each
/// would be counted once a rank, and the loss be too large by log(ranks).
template <class V>
void refuse_gathered(const Message<V>& message, const V* all, const Cut& cut, const int64_t* target,
                     int64_t ignore_index) {
  const auto size = static_cast<int64_t>(cut.widths.size());
  const int64_t width = cut.widths[0];
  if (std::ranges::any_of(cut.widths, [&](int64_t n) { return n != width; })) return;
  const auto sum_of_equals = static_cast<V>(cut.columns[0]);
  bool has_evidence = false;  // a row of one value is equal everywhere by itself
  for (int64_t row = 0; row < message.rows; ++row) {
    if (target[row] != ignore_index && target[row] >= width) return;
    const V* const first = message.of_row(all, row);
    for (int64_t r = 1; r < size; ++r) {
      const V* const other = message.of_row(all + r * message.size(), row);
      if (std::memcmp(first, other, 2 * sizeof(V)) != 0) return;
    }
    has_evidence = has_evidence || (std::isfinite(first[0]) && std::isfinite(first[1]) &&
                                    first[1] != sum_of_equals);
  }
  TORCH_CHECK_VALUE(
      !has_evidence, kOp, ": the logits of all ", size, " ranks, ", width,
      " columns each, agree to the bit in every row's maximum and sum, and every target is below ",
      width, ": these look like gathered logits, of which each would count ", size,
      " times. Pass this rank's columns (ColumnParallelLinear with gather_output=False), or "
      "gathered logits to F.cross_entropy");
}

/// The same where all columns but rank 0's are called padding: the loss would be right then, and
/// the gradient of the other ranks' weights zero.
void refuse_gathered_padding(const Cut& cut) {
  const int64_t width = cut.widths[0];
  const auto size = static_cast<int64_t>(cut.widths.size());
  const bool is_even =
      std::ranges::all_of(cut.widths, [&](int64_t n) { return n == width && n > 0; });
  TORCH_CHECK_VALUE(!is_even || cut.vocabulary > width || cut.vocabulary <= width - width / size,
                    kOp, ": each of the ", size, " ranks holds ", width,
                    " columns, and vocab_size is ", cut.vocabulary,
                    ": these look like gathered logits, padding included. Pass this rank's columns "
                    "(ColumnParallelLinear with gather_output=False), gathered logits to "
                    "F.cross_entropy, or partition= if all but rank 0's columns are padding");
}

std::vector<int64_t> gather_widths(comm::Communicator& communicator, const Signature& whole,
                                   int64_t width) {
  const auto size = static_cast<size_t>(communicator.identity().size);
  const std::vector<int64_t> ones(size, 1);
  const std::vector<int64_t> shape = {static_cast<int64_t>(size)};
  std::vector<int64_t> widths(size);
  const Signature step{
      .op = OpCode::kAllGather, .dtype = DType::kInt64, .shape = shape, .whole = &whole};
  communicator.all_gather(step, &width, widths.data(), 1, ones, {});
  return widths;
}

struct Options {
  int64_t ignore_index;
  double label_smoothing;
};

/// The loss of a row of which `whole` is known.
double loss_of(const LogitStatistics& whole, double predicted, int64_t vocabulary,
               double label_smoothing) {
  const double log_sum = std::log(whole.exp_sum);
  const double loss = log_sum + (kernels::shift_of(whole.max) - predicted);
  if (label_smoothing == 0) return loss;  // else 0 * infinity where a logit is -infinity
  const double mean = log_sum - whole.shifted_sum / static_cast<double>(vocabulary);
  return (1 - label_smoothing) * loss + label_smoothing * mean;
}

/// One call of the op on this rank.
struct Call {
  const Tensor& logits;
  const int64_t* target;
  const Cut& cut;
  int64_t rank;
  Options options;

  bool is_outside(int64_t id) const {
    return id != options.ignore_index && (id < 0 || id >= cut.vocabulary);
  }
};

/// This rank's message; without statistics where the ranks will raise.
template <class V>
std::vector<V> told(const Message<V>& message, const Call& call) {
  const auto is_outside = [&](int64_t id) { return call.is_outside(id); };
  const int64_t width = call.logits.size(-1);
  const bool is_wrong = std::any_of(call.target, call.target + message.rows, is_outside);
  std::vector<V> mine(static_cast<size_t>(message.size()));
  mine[0] = static_cast<V>(width);
  mine[1] = static_cast<V>(is_wrong);
  if (is_wrong || width != call.cut.widths[call.rank]) return mine;
  const Rows rows(call.logits);
  const DType dtype = dtype_of(call.logits);
  const int64_t first = call.cut.first(call.rank);
  const int64_t columns = call.cut.columns[call.rank];
  for_each_row(message.rows, width, [&](int64_t row) {
    const void* const at = rows[row];
    const LogitStatistics found = kernels::logit_statistics(dtype, at, columns, message.fields > 3);
    V* const to = message.of_row(mine.data(), row);
    to[0] = static_cast<V>(found.max);
    to[1] = static_cast<V>(found.exp_sum);
    const int64_t hit = call.target[row] - first;
    if (hit >= 0 && hit < columns) to[2] = static_cast<V>(kernels::logit_value(dtype, at, hit));
    if (message.fields > 3) to[3] = static_cast<V>(found.shifted_sum);
  });
  return mine;
}

/// Raises ValueError or IndexError, on all ranks alike.
template <class V>
void check_told(const Message<V>& message, const V* all, const Call& call) {
  std::vector<int64_t> widths;
  bool is_any_wrong = false;
  bool is_as_cut = true;
  for (size_t r = 0; r < call.cut.widths.size(); ++r) {
    const V* const from = all + static_cast<int64_t>(r) * message.size();
    widths.push_back(static_cast<int64_t>(from[0]));
    is_as_cut = is_as_cut && from[0] == static_cast<V>(call.cut.widths[r]);
    is_any_wrong = is_any_wrong || from[1] != 0;
  }
  if (!is_as_cut) refuse_widths(widths, call.cut);
  if (!is_any_wrong) return;
  for (int64_t row = 0; row < message.rows; ++row) {
    TORCH_CHECK_INDEX(!call.is_outside(call.target[row]), kOp, ": target ", call.target[row],
                      " at position ", row, " is outside the vocabulary: expected 0 to ",
                      call.cut.vocabulary - 1, ", or ignore_index, ", call.options.ignore_index);
  }
  TORCH_CHECK_INDEX(false, kOp, ": another rank has a target outside the vocabulary, 0 to ",
                    call.cut.vocabulary - 1, "; the targets must be the same on all ranks");
}

template <class V>
void combine(const Message<V>& message, const V* all, const Call& call, const Tensor& loss,
             const Tensor& statistics) {
  const auto size = static_cast<int64_t>(call.cut.widths.size());
  V* const losses = loss.mutable_data_ptr<V>();
  V* const max = statistics.mutable_data_ptr<V>();
  V* const exp_sum = max + message.rows;
  constexpr int64_t kLogitsPerRank = 16;  // a rank's share of a row costs about as much
  for_each_row(message.rows, kLogitsPerRank * size, [&](int64_t row) {
    c10::SmallVector<LogitStatistics, 8> parts;
    for (int64_t r = 0; r < size; ++r) {
      parts.push_back(message.statistics(all + r * message.size(), row));
    }
    const LogitStatistics found = kernels::combined({parts.data(), parts.size()}, call.cut.columns);
    max[row] = static_cast<V>(kernels::shift_of(found.max));
    exp_sum[row] = static_cast<V>(found.exp_sum);
    losses[row] = 0;
    if (call.target[row] == call.options.ignore_index) return;
    const int64_t owner = call.cut.owner(call.target[row]);
    const V predicted = message.of_row(all + owner * message.size(), row)[2];
    losses[row] = static_cast<V>(
        loss_of(found, predicted, call.cut.vocabulary, call.options.label_smoothing));
  });
}

template <class V>
void exchange(comm::Communicator& communicator, const Signature& whole, const Call& call,
              const Tensor& loss, const Tensor& statistics) {
  const int64_t size = communicator.identity().size;
  const Message<V> message{.fields = call.options.label_smoothing == 0 ? 3 : 4,
                           .rows = loss.numel()};
  const std::vector<V> mine = told(message, call);
  const std::vector<int64_t> sizes(static_cast<size_t>(size), message.size());
  const std::vector<int64_t> shape = {size * message.size()};
  std::vector<V> all(static_cast<size_t>(shape[0]));
  const Signature step{.op = OpCode::kAllGather,
                       .dtype = dtype_of(loss),
                       .dim = 0,
                       .shape = shape,
                       .sizes = sizes,
                       .whole = &whole};
  communicator.all_gather(step, mine.data(), all.data(), 1, sizes, {});
  check_told(message, all.data(), call);
  refuse_gathered(message, all.data(), call.cut, call.target, call.options.ignore_index);
  combine(message, all.data(), call, loss, statistics);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const Tensor&, Sizes symbolic,
                                                 std::optional<int64_t> vocab_size,
                                                 int64_t ignore_index, double label_smoothing,
                                                 int64_t rank, std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  const comm::Identity& self = communicator->identity();
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  check_cross_entropy(kOp, logits, target, sizes, rank, self);
  const Placed placed(kOp, logits, self);  // a group on GPUs takes none of these
  const Signature whole{.op = OpCode::kVocabParallelCrossEntropy,
                        .dtype = dtype_of(logits),
                        .shape = span_of(target.sizes()),
                        .sizes = span_of(sizes)};
  const Cut cut =
      cut_of(sizes.empty() ? gather_widths(*communicator, whole, logits.size(-1)) : sizes.vec(),
             vocab_size);
  if (sizes.empty()) refuse_gathered_padding(cut);
  const Tensor labels = target.to(at::kLong).contiguous();
  const at::TensorOptions options = logits.options().dtype(wide_type(logits));
  std::vector<int64_t> shape = target.sizes().vec();
  const Tensor loss = at::empty(shape, options);
  shape.insert(shape.begin(), 2);
  const Tensor statistics = at::empty(shape, options);
  const auto run = loss.scalar_type() == at::kDouble ? &exchange<double> : &exchange<float>;
  const Call call{
      logits, labels.const_data_ptr<int64_t>(), cut, rank, {ignore_index, label_smoothing}};
  run(*communicator, whole, call, loss, statistics);
  const Tensor place = at::empty({2}, options.dtype(at::kLong));
  place.mutable_data_ptr<int64_t>()[0] = cut.first(rank);
  place.mutable_data_ptr<int64_t>()[1] = cut.vocabulary;
  return {loss, statistics, place};
}

template <class V>
void fill_gradient(const Tensor& grad, const Tensor& logits, const Tensor& labels,
                   const Tensor& statistics, const Tensor& place, const Options& options,
                   const Tensor& out) {
  const int64_t* const target = labels.const_data_ptr<int64_t>();
  const int64_t first = place.const_data_ptr<int64_t>()[0];
  const int64_t vocabulary = place.const_data_ptr<int64_t>()[1];
  const DType dtype = dtype_of(logits);
  const int64_t width = logits.size(-1);
  const int64_t columns = std::clamp<int64_t>(vocabulary - first, 0, width);
  const auto item = static_cast<int64_t>(logits.element_size());
  const V* const max = statistics.const_data_ptr<V>();
  const V* const exp_sum = max + labels.numel();
  const Rows rows(logits);
  const Rows weights(grad.unsqueeze(-1));
  auto* const base = static_cast<char*>(out.mutable_data_ptr());
  for_each_row(labels.numel(), width, [&](int64_t row) {
    char* const to = base + row * width * item;
    const int64_t counted = target[row] == options.ignore_index ? 0 : columns;
    std::memset(to + counted * item, 0, static_cast<size_t>((width - counted) * item));
    if (counted == 0) return;
    const double weight = *static_cast<const V*>(weights[row]);
    const int64_t hit = target[row] - first;
    kernels::logit_gradient(dtype, rows[row], columns,
                            {.max = max[row],
                             .exp_sum = exp_sum[row],
                             .weight = weight,
                             .smoothing = options.label_smoothing / static_cast<double>(vocabulary),
                             .hit = hit >= 0 && hit < columns ? hit : -1,
                             .hit_weight = weight * (1 - options.label_smoothing)},
                            to);
  });
}

Tensor cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                              const Tensor& statistics, const Tensor& place, int64_t ignore_index,
                              double label_smoothing) {
  const Tensor out = at::empty(logits.sizes(), logits.options());
  if (out.numel() == 0) return out;
  const auto run =
      wide_type(logits) == at::kDouble ? &fill_gradient<double> : &fill_gradient<float>;
  run(grad.to(wide_type(logits)), logits, target.to(at::kLong).contiguous(),
      statistics.contiguous(), place, {ignore_index, label_smoothing}, out);
  return out;
}

TORCH_LIBRARY_IMPL(tp_native, CPU, m) {
  m.impl("vocab_parallel_cross_entropy", &cross_entropy);
  m.impl("vocab_parallel_cross_entropy_backward", &cross_entropy_backward);
}

}  // namespace

}  // namespace tp_native::ops
