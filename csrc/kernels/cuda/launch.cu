// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/launch.h"

#include <cuda_runtime.h>

#include "kernels/cuda.h"

namespace tp_native::kernels::cuda {

bool is_built() { return true; }

void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  TPN_CHECK(error == cudaSuccess, what, ": the launch failed: ", cudaGetErrorName(error), ": ",
            cudaGetErrorString(error));
}

int multiprocessors() {
  int device = 0;
  int count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  TPN_CHECK(error == cudaSuccess,
            "asking the GPU for its multiprocessors: ", cudaGetErrorName(error), ": ",
            cudaGetErrorString(error));
  return count;
}

}  // namespace tp_native::kernels::cuda
