// SPDX-License-Identifier: Apache-2.0
// The collectives, on a CPU or a GPU: checks, layout, one call of the communicator.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "kernels/reduce.h"
#include "ops/schema.h"
#include "ops/tensors.h"

namespace tp_native::ops {
namespace {

using comm::OpCode;
using comm::Signature;

void bump_version(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

/// `dim` counted from 0; raises IndexError as torch does.
int64_t wrap_dim(const char* op, const Tensor& t, int64_t dim) {
  const int64_t wrapped = dim < 0 ? dim + t.dim() : dim;
  TORCH_CHECK_INDEX(wrapped >= 0 && wrapped < t.dim(), op, ": dim ", dim,
                    " is out of range for a tensor of ", t.dim(), " dimensions");
  return wrapped;
}

void check_src(const char* op, int64_t src, const comm::Identity& group) {
  TORCH_CHECK_VALUE(src >= 0 && src < group.size, op, ": src ", src, " is not a rank of group ",
                    group.name, ": expected 0 to ", group.size - 1);
}

/// Raises TypeError, before any rank waits for this one.
ReduceOp check_reducible(const char* op, const Tensor& t, std::string_view reduce) {
  const ReduceOp kind = reduce_op_of(reduce);
  TORCH_CHECK_TYPE(kernels::can_reduce(dtype_of(t), kind), op, ": ", t.scalar_type(),
                   " values have no \"", reduce,
                   "\": convert them to a floating dtype, or use \"sum\"");
  return kind;
}

void all_reduce_in_place(const Tensor& t, const Tensor&, std::string_view op,
                         std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  const ReduceOp reduce = check_reducible("all_reduce", t, op);
  const Tensor whole = t.contiguous();
  const Signature signature{.op = OpCode::kAllReduce,
                            .dtype = dtype_of(t),
                            .reduce = reduce,
                            .shape = span_of(t.sizes())};
  communicator->all_reduce(signature, whole.const_data_ptr(), whole.mutable_data_ptr(),
                           whole.numel(), {}, Placed("all_reduce", t, communicator->identity()));
  if (!whole.is_same(t)) t.copy_(whole);
  bump_version(t);
}

Tensor all_reduce(const Tensor& t, const Tensor&, std::string_view op, std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  const ReduceOp reduce = check_reducible("all_reduce", t, op);
  const Signature signature{.op = OpCode::kAllReduce,
                            .dtype = dtype_of(t),
                            .reduce = reduce,
                            .shape = span_of(t.sizes())};
  const Tensor out = empty_shared(*communicator, t.sizes(), t.options());
  out.copy_(t);
  communicator->all_reduce(signature, out.const_data_ptr(), out.mutable_data_ptr(), out.numel(), {},
                           Placed("all_reduce", t, communicator->identity()));
  return out;
}

Tensor copy_to_ranks(const Tensor& t, const Tensor&, std::string_view) { return t.clone(); }

Tensor scatter_to_ranks(const Tensor& t, const Tensor&, Sizes symbolic, int64_t dim, int64_t rank,
                        std::string_view group) {
  const comm::Identity& self = comm::find_communicator(group)->identity();
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  dim = wrap_dim("scatter_to_ranks", t, dim);
  check_rank("scatter_to_ranks", rank, self);
  check_sizes("scatter_to_ranks", sizes, self);
  check_whole("scatter_to_ranks", t, dim, sizes);
  const int64_t first = c10::sum_integers(sizes.slice(0, rank));
  return t.narrow(dim, first, sizes[rank]).clone(at::MemoryFormat::Contiguous);
}

void broadcast_in_place(const Tensor& t, const Tensor&, int64_t src, std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  check_src("broadcast", src, communicator->identity());
  const Tensor whole = t.contiguous();
  const Signature signature{.op = OpCode::kBroadcast,
                            .dtype = dtype_of(t),
                            .root = static_cast<int>(src),
                            .shape = span_of(t.sizes())};
  communicator->broadcast(signature, whole.mutable_data_ptr(), whole.numel(),
                          Placed("broadcast", t, communicator->identity()));
  if (!whole.is_same(t)) t.copy_(whole);
  bump_version(t);
}

Tensor broadcast(const Tensor& t, const Tensor& order, int64_t src, int64_t rank,
                 std::string_view group) {
  check_rank("broadcast", rank, comm::find_communicator(group)->identity());
  const Tensor out = t.clone(at::MemoryFormat::Contiguous);
  broadcast_in_place(out, order, src, group);
  return out;
}

Tensor all_gather(const Tensor& t, const Tensor&, Sizes symbolic, int64_t dim, std::string_view,
                  int64_t rank, std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  const comm::Identity& self = communicator->identity();
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  dim = wrap_dim("all_gather", t, dim);
  check_rank("all_gather", rank, self);
  check_sizes("all_gather", sizes, self);
  TORCH_CHECK_VALUE(t.size(dim) == sizes[self.rank], "all_gather: dimension ", dim, " is ",
                    t.size(dim), " on rank ", self.rank, ", expected ", sizes[self.rank],
                    " by the partition ", text_of(sizes),
                    "; pass partition=Partition.from_sizes([...]) with every rank's size");
  std::vector<int64_t> shape = t.sizes().vec();
  shape[dim] = c10::sum_integers(sizes);
  const int64_t rows = c10::multiply_integers(shape.begin(), shape.begin() + dim);
  const int64_t inner = c10::multiply_integers(shape.begin() + dim + 1, shape.end());
  std::vector<int64_t> columns;
  for (const int64_t n : sizes) columns.push_back(n * inner);
  const Tensor out = at::empty(shape, t.options());
  const Tensor in = t.contiguous();
  const Signature signature{.op = OpCode::kAllGather,
                            .dtype = dtype_of(t),
                            .dim = static_cast<int>(dim),
                            .shape = shape,
                            .sizes = span_of(sizes)};
  communicator->all_gather(signature, in.const_data_ptr(), out.mutable_data_ptr(), rows, columns,
                           Placed("all_gather", t, self));
  return out;
}

Tensor reduce_scatter(const Tensor& t, const Tensor&, Sizes symbolic, int64_t dim,
                      std::string_view op, int64_t rank, std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  const comm::Identity& self = communicator->identity();
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  dim = wrap_dim("reduce_scatter", t, dim);
  check_rank("reduce_scatter", rank, self);
  check_sizes("reduce_scatter", sizes, self);
  check_whole("reduce_scatter", t, dim, sizes);
  const ReduceOp reduce = check_reducible("reduce_scatter", t, op);
  const Tensor in = t.movedim(dim, 0).contiguous();  // rank r's part is one run then
  std::vector<int64_t> shape = in.sizes().vec();
  const int64_t inner = c10::multiply_integers(shape.begin() + 1, shape.end());
  std::vector<int64_t> counts;
  for (const int64_t n : sizes) counts.push_back(n * inner);
  shape[0] = sizes[self.rank];
  const Tensor out = at::empty(shape, t.options());
  const Signature signature{.op = OpCode::kReduceScatter,
                            .dtype = dtype_of(t),
                            .reduce = reduce,
                            .dim = static_cast<int>(dim),
                            .shape = span_of(t.sizes()),
                            .sizes = span_of(sizes)};
  communicator->reduce_scatter(signature, in.const_data_ptr(), out.mutable_data_ptr(), counts,
                               Placed("reduce_scatter", t, self));
  return out.movedim(0, dim).contiguous();
}

/// Rank `root`'s whole tensor, cut along dimension 0, and everybody's part: checked, and as the
/// communicator wants them.
struct Cut {
  std::vector<int64_t> shape;  ///< of the whole
  std::vector<int64_t> counts;
};
Cut cut_of(const char* op, const Tensor& whole, const Tensor& part, at::IntArrayRef sizes,
           int64_t root, const comm::Identity& self) {
  TORCH_CHECK_VALUE(root >= 0 && root < self.size, op, ": root ", root, " is not a rank of group ",
                    self.name, ": expected 0 to ", self.size - 1);
  check_sizes(op, sizes, self);
  TORCH_CHECK_VALUE(part.dim() >= 1, op,
                    ": a tensor without dimensions cannot be cut; pass t.view(1)");
  TORCH_CHECK_VALUE(part.size(0) == sizes[self.rank], op, ": the dimension is ", part.size(0),
                    " on rank ", self.rank, ", expected ", sizes[self.rank], " by the partition ",
                    text_of(sizes), "; pass partition=Partition.from_sizes([...])");
  Cut cut{part.sizes().vec(), {}};
  cut.shape[0] = c10::sum_integers(sizes);
  const int64_t inner = c10::multiply_integers(cut.shape.begin() + 1, cut.shape.end());
  for (const int64_t n : sizes) cut.counts.push_back(n * inner);
  if (root == self.rank) {
    TORCH_CHECK_VALUE(whole.sizes().equals(cut.shape), op, ": the whole tensor has shape ",
                      text_of(whole.sizes()), ", expected ", text_of(cut.shape));
    TORCH_CHECK_TYPE(whole.scalar_type() == part.scalar_type(), op, ": the whole tensor is ",
                     whole.scalar_type(), ", the parts ", part.scalar_type());
  }
  return cut;
}

void gather_into(const Tensor& t, const Tensor&, const Tensor& out, Sizes symbolic, int64_t dst,
                 std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  const Cut cut = cut_of("gather", out, t, sizes, dst, communicator->identity());
  TORCH_CHECK_VALUE(out.is_contiguous(), "gather: out is not contiguous");
  const Tensor in = t.contiguous();
  const Signature signature{.op = OpCode::kGather,
                            .dtype = dtype_of(t),
                            .root = static_cast<int>(dst),
                            .shape = cut.shape,
                            .sizes = span_of(sizes)};
  communicator->gather(signature, in.const_data_ptr(), out.mutable_data_ptr(), cut.counts,
                       Placed("gather", t, communicator->identity()));
  bump_version(out);
}

void scatter_into(const Tensor& t, const Tensor&, const Tensor& out, Sizes symbolic, int64_t src,
                  std::string_view group) {
  const auto communicator = comm::find_communicator(group);
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  const Cut cut = cut_of("scatter", t, out, sizes, src, communicator->identity());
  TORCH_CHECK_VALUE(out.is_contiguous(), "scatter: out is not contiguous");
  const Tensor in = t.contiguous();
  const Signature signature{.op = OpCode::kScatter,
                            .dtype = dtype_of(out),
                            .root = static_cast<int>(src),
                            .shape = cut.shape,
                            .sizes = span_of(sizes)};
  communicator->scatter(signature, in.const_data_ptr(), out.mutable_data_ptr(), cut.counts,
                        Placed("scatter", out, communicator->identity()));
  bump_version(out);
}

/// With `order`, although it sends nothing: compilers must not make one tensor of two of a shape.
Tensor make_empty_shared(const Tensor& order, Sizes symbolic, at::ScalarType dtype,
                         std::string_view group) {
  return empty_shared(*comm::find_communicator(group), C10_AS_INTARRAYREF_SLOW(symbolic),
                      order.options().dtype(dtype), true);
}

void implement(torch::Library& m) {
  m.impl("all_reduce_", &all_reduce_in_place);
  m.impl("broadcast_", &broadcast_in_place);
  m.impl("all_reduce", &all_reduce);
  m.impl("copy_to_ranks", &copy_to_ranks);
  m.impl("scatter_to_ranks", &scatter_to_ranks);
  m.impl("broadcast", &broadcast);
  m.impl("all_gather", &all_gather);
  m.impl("reduce_scatter", &reduce_scatter);
  m.impl("gather_into", &gather_into);
  m.impl("scatter_into", &scatter_into);
  m.impl("empty_shared", &make_empty_shared);
}

TORCH_LIBRARY_IMPL(tp_native, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(tp_native, CUDA, m) { implement(m); }

}  // namespace
}  // namespace tp_native::ops
