// SPDX-License-Identifier: Apache-2.0
// The cross entropy of cut logits on a GPU. It has no kernel of its own: it is made of torch's
// operations, a dozen passes over the logits where the one for CPUs makes two, and float32 copies
// of 16-bit logits. Nothing waits for the device, so two checks are missing here: that of gathered
// logits, and a width that the partition denies is told to that rank only.
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "ops/layer_checks.h"
#include "ops/schema.h"
#include "ops/tensors.h"

namespace tp_native::ops {
namespace {

using comm::OpCode;
using comm::Signature;

constexpr const char* kOp = "vocab_parallel_cross_entropy";
constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// One vector of `part`s, rank 0's first: [size, ...part's shape].
Tensor gathered(comm::Communicator& communicator, const Signature& whole, const Tensor& part) {
  const comm::Identity& self = communicator.identity();
  const std::vector<int64_t> sizes(static_cast<size_t>(self.size), part.numel());
  std::vector<int64_t> shape = part.sizes().vec();
  shape.insert(shape.begin(), self.size);
  const Tensor in = part.contiguous();
  const Tensor out = at::empty(shape, part.options());
  const Signature step{.op = OpCode::kAllGather,
                       .dtype = dtype_of(part),
                       .dim = 0,
                       .shape = shape,
                       .sizes = sizes,
                       .whole = &whole};
  communicator.all_gather(step, in.const_data_ptr(), out.mutable_data_ptr(), 1, sizes,
                          Placed(kOp, part, self));
  return out;
}

/// `max`, and 0 where it is -infinity: what such a row is relative to.
Tensor shift_of(const Tensor& max) { return max.masked_fill(max.eq(-kInfinity), 0); }

Tensor is_padding(const Tensor& first, const Tensor& vocabulary, int64_t width) {
  return at::arange(width, first.options()).add(first).ge(vocabulary);
}

/// Where this rank's columns have the label, and which one; 0 elsewhere.
struct Hits {
  Tensor is_mine;
  Tensor column;
};
Hits hits_of(const Tensor& labels, const Tensor& is_ignored, const Tensor& first, int64_t width) {
  const Tensor column = labels.sub(first);
  const Tensor is_mine =
      column.ge(0).logical_and(column.lt(width)).logical_and(is_ignored.logical_not());
  return {is_mine, column.masked_fill(is_mine.logical_not(), 0).unsqueeze(1)};
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
  const int64_t width = logits.size(-1);
  TORCH_CHECK_VALUE(sizes.empty() || sizes[rank] == width, kOp, ": rank ", rank, "'s logits have ",
                    width, " columns, the partition says ", text_of(sizes),
                    ": pass this rank's columns, not gathered ones");
  const Placed placed(kOp, logits, self);
  const Signature whole{.op = OpCode::kVocabParallelCrossEntropy,
                        .dtype = dtype_of(logits),
                        .shape = span_of(target.sizes()),
                        .sizes = span_of(sizes)};

  const at::TensorOptions counts = logits.options().dtype(at::kLong);
  const auto count = [&](int64_t n) { return at::full({1}, n, counts); };  // no copy from the host
  std::vector<Tensor> given;
  for (const int64_t n : sizes) given.push_back(count(n));
  const Tensor widths =
      given.empty() ? gathered(*communicator, whole, count(width)).view({-1}) : at::cat(given);
  const Tensor ends = widths.cumsum(0);
  const Tensor held = ends.select(0, self.size - 1);
  const Tensor vocabulary = vocab_size ? at::full({}, *vocab_size, counts) : held;
  const Tensor first = ends.select(0, rank).sub(width);
  at::_assert_async(vocabulary.le(held),
                    "vocab_parallel_cross_entropy: vocab_size is larger than "
                    "the columns that the ranks hold");

  const int64_t rows = target.numel();
  const Tensor labels = target.reshape({rows}).to(at::kLong);
  const Tensor is_ignored = labels.eq(ignore_index);
  at::_assert_async(labels.ge(0).logical_and(labels.lt(vocabulary)).logical_or(is_ignored).all(),
                    "vocab_parallel_cross_entropy: a target is outside the vocabulary");
  Tensor x = logits.reshape({rows, width}).to(wide_type(logits));
  Tensor padding;
  if (vocab_size) {
    padding = is_padding(first, vocabulary, width);
    x = x.masked_fill(padding, -kInfinity);
  }
  const at::TensorOptions options = x.options();
  const Tensor max = width == 0 ? at::full({rows}, -kInfinity, options) : x.amax(1);
  const Tensor below = x.sub(shift_of(max).unsqueeze(1));
  const Hits hits = hits_of(labels, is_ignored, first, width);
  const Tensor predicted =
      width == 0 ? at::zeros({rows}, options)
                 : x.gather(1, hits.column).squeeze(1).masked_fill(hits.is_mine.logical_not(), 0);
  std::vector<Tensor> fields = {max, below.exp().sum(1), predicted};
  if (label_smoothing != 0) {
    fields.push_back((vocab_size ? below.masked_fill(padding, 0) : below).sum(1));
  }
  const Tensor all = gathered(*communicator, whole, at::stack(fields));

  const auto field = [&](int64_t r, int64_t f) { return all.select(0, r).select(0, f); };
  const Tensor shift = shift_of(all.select(1, 0).amax(0));
  const Tensor columns = at::minimum(ends, vocabulary).sub(ends.sub(widths)).clamp_min(0);
  Tensor exp_sum = at::zeros({rows}, options);
  Tensor label = at::zeros({rows}, options);
  Tensor shifted_sum = at::zeros({rows}, options);
  for (int64_t r = 0; r < self.size; ++r) {  // in rank order: the same bits everywhere
    const Tensor step = shift_of(field(r, 0)).sub(shift);
    const Tensor is_empty = field(r, 0).eq(-kInfinity);
    exp_sum = exp_sum.add(field(r, 1).mul(step.masked_fill(is_empty, 0).exp()));
    label = label.add(field(r, 2));
    if (label_smoothing != 0) {
      shifted_sum = shifted_sum.add(field(r, 3)).add(step.mul(columns.select(0, r)));
    }
  }
  const Tensor log_sum = exp_sum.log();
  Tensor loss = log_sum.add(shift.sub(label));
  if (label_smoothing != 0) {
    const Tensor mean = log_sum.sub(shifted_sum.div(vocabulary));
    loss = loss.mul(1 - label_smoothing).add(mean.mul(label_smoothing));
  }
  std::vector<int64_t> shape = target.sizes().vec();
  loss = loss.masked_fill_(is_ignored, 0).view(shape);
  shape.insert(shape.begin(), 2);
  return {loss, at::stack({shift, exp_sum}).view(shape), at::stack({first, vocabulary})};
}

Tensor cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                              const Tensor& statistics, const Tensor& place, int64_t ignore_index,
                              double label_smoothing) {
  const c10::DeviceGuard guard(logits.device());
  const int64_t width = logits.size(-1);
  const int64_t rows = target.numel();
  if (logits.numel() == 0) return at::empty(logits.sizes(), logits.options());
  const Tensor first = place.select(0, 0);
  const Tensor vocabulary = place.select(0, 1);
  const Tensor labels = target.reshape({rows}).to(at::kLong);
  const Tensor is_ignored = labels.eq(ignore_index);
  const Tensor weight = grad.reshape({rows}).to(statistics.scalar_type());
  const Tensor shift = statistics.select(0, 0).reshape({rows, 1});
  const Tensor exp_sum = statistics.select(0, 1).reshape({rows});
  Tensor out = logits.reshape({rows, width}).to(statistics.scalar_type()).sub(shift);
  out.exp_().mul_(weight.div(exp_sum).unsqueeze(1));
  if (label_smoothing != 0) out.sub_(weight.mul(label_smoothing).div(vocabulary).unsqueeze(1));
  const Hits hits = hits_of(labels, is_ignored, first, width);
  const Tensor less =
      weight.mul(label_smoothing - 1).masked_fill(hits.is_mine.logical_not(), 0).unsqueeze(1);
  out.scatter_add_(1, hits.column, less);
  out.masked_fill_(is_ignored.unsqueeze(1), 0)
      .masked_fill_(is_padding(first, vocabulary, width), 0);
  return out.to(logits.scalar_type()).view(logits.sizes());
}

TORCH_LIBRARY_IMPL(tp_native, CUDA, m) {
  m.impl("vocab_parallel_cross_entropy", &cross_entropy);
  m.impl("vocab_parallel_cross_entropy_backward", &cross_entropy_backward);
}

}  // namespace
}  // namespace tp_native::ops
