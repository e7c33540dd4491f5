// SPDX-License-Identifier: Apache-2.0
// What tests ask of the test double of libcublasLt, by dlsym.
//
// By environment variables read when a call is made:
//   FAKE_CUBLASLT_VERSION=N       what cublasLtGetVersion says (130100)
//   FAKE_CUBLASLT_FAIL=NAME:N:S   the Nth call of cublasLtNAME from now answers S; a new value
//   counts anew FAKE_CUBLASLT_US=A,B,...      how long the heuristic's first, second ... algorithm
//   takes (0) FAKE_CUBLASLT_NO_EPILOGUE=E   the epilogue of this value is not supported
#pragma once

#include "fake_cuda.h"

extern "C" {
/// Descriptions, layouts and preferences that nobody has destroyed.
int fake_cublaslt_live();
/// Calls of cublasLtNAME so far.
int fake_cublaslt_calls(const char* name);
/// Of the last cublasLtMatmul that was accepted: which of the heuristic's answers, the epilogue,
/// the multiprocessors it was planned for, and the least alignment told.
int fake_cublaslt_last_algorithm();
int fake_cublaslt_last_epilogue();
int fake_cublaslt_last_sm_target();
}
