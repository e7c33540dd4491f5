// SPDX-License-Identifier: Apache-2.0
// NCCL through a table of functions: no nccl.h to build, no library to link. What is declared here
// is the part of NCCL's 2.x C interface that has not changed since 2.18, and what came later under
// names of its own.
#pragma once

#include <climits>
#include <cstddef>
#include <string>
#include <vector>

#include "core/cuda_driver.h"
#include "core/dtype.h"

extern "C" {
struct ncclComm;
}

namespace tp_native::comm::nccl {

using Handle = ncclComm*;
using cuda::StreamHandle;

struct UniqueId {
  char bytes[128];
};

enum Result : int {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

constexpr int kUndefined = INT_MIN;

/// ncclConfig_t of 2.18, which later libraries take for what it says it is.
struct Config {
  size_t bytes = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;
  int blocking = 0;
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
};

#define TPN_NCCL_REQUIRED(X)                                                          \
  X(GetVersion, int, (int*))                                                          \
  X(GetUniqueId, int, (UniqueId*))                                                    \
  X(CommInitRankConfig, int, (Handle*, int, UniqueId, int, Config*))                  \
  X(CommFinalize, int, (Handle))                                                      \
  X(CommDestroy, int, (Handle))                                                       \
  X(CommAbort, int, (Handle))                                                         \
  X(CommGetAsyncError, int, (Handle, int*))                                           \
  X(GetErrorString, const char*, (int))                                               \
  X(GetLastError, const char*, (Handle))                                              \
  X(GroupStart, int, ())                                                              \
  X(GroupEnd, int, ())                                                                \
  X(AllReduce, int, (const void*, void*, size_t, int, int, Handle, StreamHandle))     \
  X(ReduceScatter, int, (const void*, void*, size_t, int, int, Handle, StreamHandle)) \
  X(AllGather, int, (const void*, void*, size_t, int, Handle, StreamHandle))          \
  X(Broadcast, int, (const void*, void*, size_t, int, int, Handle, StreamHandle))     \
  X(Send, int, (const void*, size_t, int, int, Handle, StreamHandle))                 \
  X(Recv, int, (void*, size_t, int, int, Handle, StreamHandle))

/// Null in libraries that are too old for them.
#define TPN_NCCL_OPTIONAL(X)                                       \
  X(MemAlloc, int, (void**, size_t))                               \
  X(MemFree, int, (void*))                                         \
  X(CommRegister, int, (Handle, void*, size_t, void**))            \
  X(CommDeregister, int, (Handle, void*))                          \
  X(CommWindowRegister, int, (Handle, void*, size_t, void**, int)) \
  X(CommWindowDeregister, int, (Handle, void*))

struct Api {
#define TPN_DECLARE(name, result, arguments) result(*name) arguments = nullptr;
  TPN_NCCL_REQUIRED(TPN_DECLARE)
  TPN_NCCL_OPTIONAL(TPN_DECLARE)
#undef TPN_DECLARE
  int version = 0;   ///< 22809 for 2.28.9: what the library that answers says
  std::string path;  ///< the file that it is in
};

/// What a library may be told of memory that collectives then need not copy.
enum class Registration : int {
  kNone,
  kBuffer,  ///< ncclCommRegister: each rank for itself
  kWindow,  ///< ncclCommWindowRegister, from 2.27 on: all ranks together, at one offset
};
const char* name(Registration registration);  ///< "none", "buffer", "window"
/// The best that the library has; kNone also where it has no memory of its own to give.
Registration registration_of(const Api& api);
constexpr int kSymmetricWindow = 1;  ///< NCCL_WIN_COLL_SYMMETRIC

/// Where to look for the library, in this order: `file`, if not empty; the scope of a mapped
/// libtorch_cuda.so, which is the copy that torch uses; a mapped libnccl.so.2; the loader's
/// libnccl.so.2; and, only where no NCCL is mapped, `wheel_files`.
struct Search {
  std::string file;
  std::vector<std::string> wheel_files;
};

/// The process's library; the first call decides. Raises for none or one that is not 2.18 or newer
/// of 2.x, naming what was tried. Warns where two copies are mapped.
const Api& api(const Search& search = {});

/// "2.28.9"
std::string version_text(int version);
/// "invalid usage (5): <what the library says of its last error>"
std::string text_of(const Api& api, int result, Handle handle);

/// ncclDataType_t; raises TypeError's text for a dtype that NCCL cannot reduce.
int reduced_type(DType dtype);
constexpr int kBytes = 1;  ///< ncclUint8: what is only moved goes byte by byte
/// ncclRedOp_t. A bool is true or false whatever its byte.
int reduction(DType dtype, ReduceOp op);

}  // namespace tp_native::comm::nccl
