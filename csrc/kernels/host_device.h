// SPDX-License-Identifier: Apache-2.0
// TPN_HOST_DEVICE: runs on the host and, where nvcc compiles it, on the device as well. What it
// marks is unit-tested on the host.
#pragma once

#ifdef __CUDACC__
#define TPN_HOST_DEVICE __host__ __device__
#else
#define TPN_HOST_DEVICE
#endif

#ifdef __CUDA_ARCH__
#define TPN_PRAGMA(text) _Pragma(#text)
#define TPN_UNROLL TPN_PRAGMA(unroll)
#define TPN_UNROLL_BY(n) TPN_PRAGMA(unroll n)
#else
#define TPN_UNROLL
#define TPN_UNROLL_BY(n)
#endif
