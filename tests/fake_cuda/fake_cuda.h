// SPDX-License-Identifier: Apache-2.0
// What the test doubles of NVIDIA's libraries share, and what tests ask of them: streams are
// threads that run one thing after the other, device memory is host memory.
//
// Faults, by environment variables read when a call is made:
//   FAKE_CUDA_DEVICES=N         how many GPUs there are (2)
//   FAKE_CUDA_VERSION=N         what the driver says it runs (13000)
//   FAKE_CUDA_INIT=N            what cuInit answers
//   FAKE_CUDA_MEMORY=N          bytes of device memory (1 GiB)
//   FAKE_CUDA_SM=N              compute capability times 10 (90)
//   FAKE_CUDA_CAPTURING=1       streams say that they are being captured; they run all the same
//   FAKE_CUDA_JITTER_US=N       every step of a stream first sleeps a random time up to this
#pragma once

#include <cstdint>

#define FAKE_API extern "C" __attribute__((visibility("default")))

extern "C" {
struct CUstream_st;

/// Appends a step to a stream; `run` must not throw.
void fake_cuda_enqueue(CUstream_st* stream, void (*run)(void*), void* argument);
/// Bytes of device memory that nobody has given back; streams, events and contexts likewise.
int64_t fake_cuda_live_bytes();
int fake_cuda_live_streams();
int fake_cuda_live_events();
}
