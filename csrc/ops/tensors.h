// SPDX-License-Identifier: Apache-2.0
// Between torch's tensors and the core's pointers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <memory>
#include <string_view>
#include <vector>

#include "comm/communicator.h"
#include "comm/registry.h"

namespace tp_native::ops {

/// Raises TypeError for a dtype that the core does not carry.
DType dtype_of(const at::Tensor& t);
ReduceOp reduce_op_of(std::string_view op);

/// An uninitialised tensor, in the communicator's memory where it can be: a collective on it copies
/// nothing. On a GPU that is for tensors that are kept: taking such memory takes long.
at::Tensor empty_shared(comm::Communicator& communicator, at::IntArrayRef shape,
                        const at::TensorOptions& options, bool is_kept = false);

/// Two of them, the second behind the first in one block where there is one.
std::pair<at::Tensor, at::Tensor> empty_shared_pair(comm::Communicator& communicator,
                                                    at::IntArrayRef shape,
                                                    const at::TensorOptions& options);

/// torch's current stream on t's device; none on a CPU.
comm::Stream stream_of(const at::Tensor& t);

/// The stream that a collective on `t` runs in, and while it lives `t`'s device is the current one.
/// Raises ValueError for a tensor that is not where the group works.
class Placed {
 public:
  Placed(const char* op, const at::Tensor& t, const comm::Identity& group);
  operator comm::Stream() const { return stream_; }  // NOLINT

 private:
  c10::OptionalDeviceGuard device_;
  comm::Stream stream_;
};

/// Raises ValueError unless `rank`, which a graph was traced for, is this process's.
void check_rank(const char* op, int64_t rank, const comm::Identity& group);

/// Raises ValueError unless `sizes` has one entry per rank, none negative.
void check_sizes(const char* op, at::IntArrayRef sizes, const comm::Identity& group);

/// Raises ValueError unless `sizes` add up to the dimension that they cut.
void check_whole(const char* op, const at::Tensor& t, int64_t dim, at::IntArrayRef sizes);

inline std::span<const int64_t> span_of(at::IntArrayRef values) {
  return {values.data(), values.size()};
}

/// "[4, 4, 3]"
std::string text_of(at::IntArrayRef values);

}  // namespace tp_native::ops
