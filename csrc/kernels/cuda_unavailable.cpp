// SPDX-License-Identifier: Apache-2.0
// Stands in for kernels/cuda/ in a build without nvcc.
#include "core/error.h"
#include "kernels/cuda.h"

namespace tp_native::kernels::cuda {
namespace {

[[noreturn]] void fail_unbuilt(const char* what) {
  fail(
      concat(what,
             ": this build has no CUDA kernels; rebuild tp_native where nvcc is found (on PATH, or "
             "named by CUDACXX)"));
}

}  // namespace

bool is_built() { return false; }

void apply_epilogue(const SumEpilogue&, StreamHandle) { fail_unbuilt("apply_epilogue"); }
void glu(const Glu&, StreamHandle) { fail_unbuilt("glu"); }
void glu_backward(const GluBackward&, StreamHandle) { fail_unbuilt("glu_backward"); }
void activation_backward(const ActivationBackward&, StreamHandle) {
  fail_unbuilt("activation_backward");
}
void column_sum(const ColumnSum&, StreamHandle) { fail_unbuilt("column_sum"); }
void all_reduce(AllReduceKind, const Peers&, const AllReduce&, StreamHandle) {
  fail_unbuilt("all_reduce");
}
void all_reduce_in_one_launch(AllReduceKind, const Peers&, std::span<const AllReduce>,
                              StreamHandle) {
  fail_unbuilt("all_reduce_in_one_launch");
}
void reduce_scatter(const Peers&, const ReduceScatter&, StreamHandle) {
  fail_unbuilt("reduce_scatter");
}
void all_gather(const Peers&, const AllGather&, StreamHandle) { fail_unbuilt("all_gather"); }
void broadcast(const Peers&, const Broadcast&, StreamHandle) { fail_unbuilt("broadcast"); }

}  // namespace tp_native::kernels::cuda
