// SPDX-License-Identifier: Apache-2.0
// What follows a sum where it cannot join the pass that makes it.
#pragma once

#include "comm/communicator.h"
#include "kernels/reduce.h"

namespace tp_native::comm {

/// The part of `epilogue` that joins the sum; add_residual_and_norm() is the rest.
inline Epilogue bias_of(const Epilogue& epilogue) {
  return {.bias = epilogue.bias, .columns = epilogue.columns};
}

/// `out` holds the sum with its bias, rounded. Every rank completes all of it, to the same bits as
/// in one pass: that rounds there too.
inline void add_residual_and_norm(DType dtype, const Epilogue& e, void* out, int64_t count) {
  if (count == 0 || (!e.residual && !e.norm_weight)) return;
  const void* const src[] = {out};
  void* const dst[] = {out};
  void* const hidden[] = {e.hidden};
  if (!e.norm_weight) {
    kernels::reduce({dtype, ReduceOp::kSum, 1, src, 1, dst, count, nullptr, 0, 0, e.residual});
    return;
  }
  kernels::reduce_rms_norm({.dtype = dtype,
                            .sources = 1,
                            .src = src,
                            .targets = 1,
                            .normed = dst,
                            .hidden = hidden,
                            .rows = count / e.columns,
                            .columns = e.columns,
                            .residual = e.residual,
                            .norm_weight = e.norm_weight,
                            .eps = e.eps});
}

}  // namespace tp_native::comm
