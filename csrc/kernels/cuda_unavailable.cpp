#include "core/error.h"
#include "kernels/cuda.h"
namespace tp_native::kernels::cuda {
void apply_epilogue(const SumEpilogue&, tp_native::cuda::StreamHandle) {
  fail("built without CUDA kernels");
}
}  // namespace tp_native::kernels::cuda
