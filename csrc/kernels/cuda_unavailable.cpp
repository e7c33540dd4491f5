#include "kernels/cuda.h"
#include "core/error.h"
namespace tp_native::kernels::cuda { void apply_epilogue(const SumEpilogue&, tp_native::cuda::StreamHandle) { fail("built without CUDA kernels"); } }
