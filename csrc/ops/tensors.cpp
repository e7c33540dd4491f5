// SPDX-License-Identifier: Apache-2.0
#include "ops/tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <sstream>

namespace tp_native::ops {

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kInt:
      return DType::kInt32;
    case at::kLong:
      return DType::kInt64;
    case at::kByte:
      return DType::kUInt8;
    case at::kChar:
      return DType::kInt8;
    case at::kShort:
      return DType::kInt16;
    case at::kBool:
      return DType::kBool;
    default:
      C10_THROW_ERROR(TypeError,
                      c10::str("dtype ", t.scalar_type(),
                               " cannot be sent between ranks: expected float32, "
                               "float64, float16, bfloat16, an integer of 8 to 64 bits, or bool"));
  }
}

ReduceOp reduce_op_of(std::string_view op) {
  if (op == "sum") return ReduceOp::kSum;
  if (op == "max") return ReduceOp::kMax;
  if (op == "min") return ReduceOp::kMin;
  if (op == "avg") return ReduceOp::kAvg;
  C10_THROW_ERROR(ValueError, c10::str("reduce op \"", op,
                                       "\": expected \"sum\", \"avg\", \"max\" or \"min\""));
}

at::Tensor empty_shared(comm::Communicator& communicator, at::IntArrayRef shape,
                        const at::TensorOptions& options, bool is_kept) {
  const int64_t bytes =
      c10::multiply_integers(shape) * static_cast<int64_t>(options.dtype().itemsize());
  if (!options.device().is_cpu() && !is_kept) return at::empty(shape, options);
  comm::Block block = communicator.allocate(bytes);
  if (!block.data) return at::empty(shape, options);
  return at::from_blob(block.data, shape, [owner = std::move(block.owner)](void*) {}, options);
}

std::pair<at::Tensor, at::Tensor> empty_shared_pair(comm::Communicator& communicator,
                                                    at::IntArrayRef shape,
                                                    const at::TensorOptions& options) {
  const int64_t bytes =
      c10::multiply_integers(shape) * static_cast<int64_t>(options.dtype().itemsize());
  const comm::Block block = communicator.allocate(2 * bytes);
  if (!block.data) return {at::empty(shape, options), at::empty(shape, options)};
  const auto part = [&](int64_t offset) {
    return at::from_blob(
        static_cast<char*>(block.data) + offset, shape, [owner = block.owner](void*) {}, options);
  };
  return {part(0), part(bytes)};
}

comm::Stream stream_of(const at::Tensor& t) {
  if (t.is_cpu()) return {};
  const c10::impl::VirtualGuardImpl guard(t.device().type());
  return {guard.getStream(t.device()).native_handle()};
}

Placed::Placed(const char* op, const at::Tensor& t, const comm::Identity& group) {
  const c10::Device device = t.device();
  if (device.is_cpu() && group.device < 0) [[likely]]
    return;
  TORCH_CHECK_VALUE(device.is_cuda() && device.index() == group.device, op, ": the tensor is on ",
                    device, ", group ", group.name, " works on ",
                    group.device < 0 ? c10::Device(c10::kCPU)
                                     : c10::Device(c10::kCUDA, static_cast<int8_t>(group.device)),
                    ": move it with t.to(group.device)");
  device_.reset_device(device);
  stream_ = stream_of(t);
}

void check_rank(const char* op, int64_t rank, const comm::Identity& group) {
  TORCH_CHECK_VALUE(rank == group.rank, op, ": called as rank ", rank, " of group ", group.name,
                    ", in which this process is rank ", group.rank,
                    ": a graph that was compiled for another rank runs on that rank only");
}

void check_sizes(const char* op, at::IntArrayRef sizes, const comm::Identity& group) {
  TORCH_CHECK_VALUE(static_cast<int>(sizes.size()) == group.size, op, ": sizes ", text_of(sizes),
                    " has ", sizes.size(), " entries, expected one for each of the ", group.size,
                    " ranks of group ", group.name);
  for (const int64_t n : sizes) {
    TORCH_CHECK_VALUE(n >= 0, op, ": sizes ", text_of(sizes), " has a negative entry");
  }
}

void check_whole(const char* op, const at::Tensor& t, int64_t dim, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.size(dim) == c10::sum_integers(sizes), op, ": dimension ", dim, " is ",
                    t.size(dim), ", the partition ", text_of(sizes), " adds up to ",
                    c10::sum_integers(sizes));
}

std::string text_of(at::IntArrayRef values) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << ']';
  return text.str();
}

}  // namespace tp_native::ops
