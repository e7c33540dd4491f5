// SPDX-License-Identifier: Apache-2.0
// CUDA's driver API, reached by dlsym with declarations of our own: streams, events and memory work
// in a build that had no CUDA toolkit, beside a torch that has no CUDA, and against a test double.
// Handles are those of the runtime API: a cudaStream_t is a CUstream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/error.h"

extern "C" {
struct CUctx_st;
struct CUstream_st;
struct CUevent_st;
}

namespace tp_native::cuda {

using Context = CUctx_st*;
using StreamHandle = CUstream_st*;
using EventHandle = CUevent_st*;
using DevicePointer = unsigned long long;  // CUdeviceptr

/// CUresult values that we tell apart.
enum Result : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kNotReady = 600,
};

struct Memcpy2D;       // below
struct IpcMemHandle {  // CUipcMemHandle
  char reserved[64];
};

// The names that cuda.h's macros lead to; all are in drivers since CUDA 11.3.
#define TPN_CUDA_DRIVER(X)                                                                  \
  X(Init, "cuInit", (unsigned))                                                             \
  X(DriverGetVersion, "cuDriverGetVersion", (int*))                                         \
  X(GetErrorName, "cuGetErrorName", (int, const char**))                                    \
  X(GetErrorString, "cuGetErrorString", (int, const char**))                                \
  X(DeviceGetCount, "cuDeviceGetCount", (int*))                                             \
  X(DeviceGet, "cuDeviceGet", (int*, int))                                                  \
  X(DeviceGetName, "cuDeviceGetName", (char*, int, int))                                    \
  X(DeviceGetAttribute, "cuDeviceGetAttribute", (int*, int, int))                           \
  X(DeviceGetPCIBusId, "cuDeviceGetPCIBusId", (char*, int, int))                            \
  X(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (Context*, int))                    \
  X(CtxPushCurrent, "cuCtxPushCurrent_v2", (Context))                                       \
  X(CtxPopCurrent, "cuCtxPopCurrent_v2", (Context*))                                        \
  X(CtxGetDevice, "cuCtxGetDevice", (int*))                                                 \
  X(CtxGetStreamPriorityRange, "cuCtxGetStreamPriorityRange", (int*, int*))                 \
  X(CtxSynchronize, "cuCtxSynchronize", ())                                                 \
  X(StreamCreateWithPriority, "cuStreamCreateWithPriority", (StreamHandle*, unsigned, int)) \
  X(StreamDestroy, "cuStreamDestroy_v2", (StreamHandle))                                    \
  X(StreamSynchronize, "cuStreamSynchronize", (StreamHandle))                               \
  X(StreamQuery, "cuStreamQuery", (StreamHandle))                                           \
  X(StreamWaitEvent, "cuStreamWaitEvent", (StreamHandle, EventHandle, unsigned))            \
  X(StreamIsCapturing, "cuStreamIsCapturing", (StreamHandle, int*))                         \
  X(EventCreate, "cuEventCreate", (EventHandle*, unsigned))                                 \
  X(EventDestroy, "cuEventDestroy_v2", (EventHandle))                                       \
  X(EventRecord, "cuEventRecord", (EventHandle, StreamHandle))                              \
  X(EventQuery, "cuEventQuery", (EventHandle))                                              \
  X(EventSynchronize, "cuEventSynchronize", (EventHandle))                                  \
  X(EventElapsedTime, "cuEventElapsedTime", (float*, EventHandle, EventHandle))             \
  X(MemGetInfo, "cuMemGetInfo_v2", (size_t*, size_t*))                                      \
  X(MemAlloc, "cuMemAlloc_v2", (DevicePointer*, size_t))                                    \
  X(MemFree, "cuMemFree_v2", (DevicePointer))                                               \
  X(MemAllocAsync, "cuMemAllocAsync", (DevicePointer*, size_t, StreamHandle))               \
  X(MemFreeAsync, "cuMemFreeAsync", (DevicePointer, StreamHandle))                          \
  X(MemHostAlloc, "cuMemHostAlloc", (void**, size_t, unsigned))                             \
  X(MemFreeHost, "cuMemFreeHost", (void*))                                                  \
  X(MemcpyAsync, "cuMemcpyAsync", (DevicePointer, DevicePointer, size_t, StreamHandle))     \
  X(Memcpy2DAsync, "cuMemcpy2DAsync_v2", (const Memcpy2D*, StreamHandle))                   \
  X(MemsetD8Async, "cuMemsetD8Async", (DevicePointer, unsigned char, size_t, StreamHandle)) \
  X(IpcGetMemHandle, "cuIpcGetMemHandle", (IpcMemHandle*, DevicePointer))                   \
  X(IpcOpenMemHandle, "cuIpcOpenMemHandle_v2", (DevicePointer*, IpcMemHandle, unsigned))    \
  X(IpcCloseMemHandle, "cuIpcCloseMemHandle", (DevicePointer))

/// CUDA_MEMCPY2D_v2: `rows` runs of `row_bytes`, each a pitch behind the last.
struct Memcpy2D {
  size_t src_x_bytes = 0, src_y = 0;
  int src_kind = 2;  // CU_MEMORYTYPE_DEVICE
  const void* src_host = nullptr;
  DevicePointer src = 0;
  void* src_array = nullptr;
  size_t src_pitch = 0;
  size_t dst_x_bytes = 0, dst_y = 0;
  int dst_kind = 2;
  void* dst_host = nullptr;
  DevicePointer dst = 0;
  void* dst_array = nullptr;
  size_t dst_pitch = 0;
  size_t row_bytes = 0, rows = 0;
};

struct Driver {
#define TPN_DECLARE(name, symbol, arguments) int(*name) arguments = nullptr;
  TPN_CUDA_DRIVER(TPN_DECLARE)
#undef TPN_DECLARE
  int version = 0;  ///< 12040 for 12.4: the newest CUDA that this driver runs
  std::string path;
};

/// The process's driver, initialised. Raises if there is none or it is too old: what was found, and
/// the way out.
const Driver& driver();
/// Whether driver() works and finds a device; `why` says why not.
bool is_available(std::string& why);
/// Tests: the file to take in place of libcuda.so.1, before the first driver().
void use_driver(const std::string& path);

std::string text_of(int result);  ///< "CUDA_ERROR_OUT_OF_MEMORY: out of memory"
[[noreturn]] void fail(int result, const char* call, const std::string& what);

#define TPN_CUDA(call, ...)                                                          \
  do {                                                                               \
    if (const int tpn_result_ = (call); tpn_result_ != 0) [[unlikely]]               \
      ::tp_native::cuda::fail(tpn_result_, #call, ::tp_native::concat(__VA_ARGS__)); \
  } while (false)

/// A device's primary context, which torch and the runtime API use too.
class Device {
 public:
  explicit Device(int index);  ///< raises for a device that is not there
  int index() const { return index_; }
  Context context() const { return context_; }
  std::string name() const;
  std::string bus_id() const;  ///< the same in every process, whatever CUDA_VISIBLE_DEVICES hides
  int attribute(int number) const;
  int multiprocessors() const { return attribute(16); }

 private:
  int index_;
  int handle_ = -1;
  Context context_ = nullptr;
};

/// Makes a device current on this thread while it lives.
class Current {
 public:
  explicit Current(const Device& device);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

/// Non-blocking: never waits for the default stream. `is_urgent`: the highest priority.
class Stream {
 public:
  explicit Stream(bool is_urgent = false);
  ~Stream();
  Stream(Stream&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Stream& operator=(Stream&&) = delete;
  StreamHandle get() const { return handle_; }

 private:
  StreamHandle handle_ = nullptr;
};

class Event {
 public:
  explicit Event(bool is_timed = false);
  ~Event();
  Event(Event&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&&) = delete;
  EventHandle get() const { return handle_; }
  void record(StreamHandle stream) const;
  void wait_on(StreamHandle stream) const;  ///< `stream` goes on once the event is reached
  bool is_reached() const;                  ///< raises what the work before it failed with

 private:
  EventHandle handle_ = nullptr;
};

/// Device memory in the order of a stream: taken when the stream gets here, given back when it
/// reaches the destruction. Works under graph capture.
class Workspace {
 public:
  Workspace(int64_t bytes, StreamHandle stream, const char* what);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return reinterpret_cast<char*>(pointer_); }

 private:
  DevicePointer pointer_ = 0;
  StreamHandle stream_;
};

bool is_capturing(StreamHandle stream);
inline DevicePointer address(const void* pointer) {
  return reinterpret_cast<DevicePointer>(pointer);
}
void copy(void* to, const void* from, int64_t bytes, StreamHandle stream);
/// `rows` runs of `row_bytes`; where the next run begins, in bytes after the last.
void copy_rows(void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t row_bytes,
               int64_t rows, StreamHandle stream);

}  // namespace tp_native::cuda
