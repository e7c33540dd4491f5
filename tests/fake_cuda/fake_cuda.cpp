// SPDX-License-Identifier: Apache-2.0
// Test double of libcuda.so.1: the part of the driver API in core/cuda_driver.h.
#include "fake_cuda.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <utility>

namespace {

enum : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kNoContext = 201,
  kInvalidDevice = 101,
  kInvalidHandle = 400,
  kNotReady = 600,
};

long setting(const char* name, long otherwise) {
  const char* const text = std::getenv(name);
  return text && *text ? std::strtol(text, nullptr, 10) : otherwise;
}

}  // namespace

struct CUctx_st {
  int device;
};

struct CUevent_st {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0;       // tickets given
  std::set<uint64_t> pending;  // a wait is for the record that it found, whatever comes after
  std::chrono::steady_clock::time_point at;
};

struct CUstream_st {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> steps;
  bool is_busy = false;
  bool is_ending = false;
  std::thread thread;

  CUstream_st() : thread([this] { run(); }) {}

  void push(std::function<void()> step) {
    {
      std::lock_guard lock(mutex);
      steps.push_back(std::move(step));
    }
    changed.notify_all();
  }
  void run() {
    std::minstd_rand draw(static_cast<unsigned>(reinterpret_cast<uintptr_t>(this) >> 4));
    std::unique_lock lock(mutex);
    for (;;) {
      changed.wait(lock, [&] { return !steps.empty() || is_ending; });
      if (steps.empty()) return;
      const std::function<void()> step = std::move(steps.front());
      steps.pop_front();
      is_busy = true;
      lock.unlock();
      if (const long most = setting("FAKE_CUDA_JITTER_US", 0); most > 0)
        std::this_thread::sleep_for(std::chrono::microseconds(draw() % (most + 1)));
      step();
      lock.lock();
      is_busy = false;
      changed.notify_all();
    }
  }
  bool is_idle() {
    std::lock_guard lock(mutex);
    return steps.empty() && !is_busy;
  }
  void drain() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return steps.empty() && !is_busy; });
  }
};

namespace {

struct World {
  std::mutex mutex;
  bool is_started = false;
  std::set<CUstream_st*> streams;
  std::set<std::shared_ptr<CUevent_st>> events;
  std::map<unsigned long long, size_t> memory;
  size_t used = 0;
  CUctx_st contexts[16];
  CUstream_st* default_stream = nullptr;
};
World& world() {
  static auto* const one = new World;  // never ends: streams may still run at exit
  return *one;
}
// In the thread's static block, where sanitizers can follow it.
[[gnu::tls_model("initial-exec")]] thread_local CUctx_st* t_contexts[16];
[[gnu::tls_model("initial-exec")]] thread_local int t_depth = 0;

CUstream_st* known(CUstream_st* stream) {
  World& w = world();
  std::lock_guard lock(w.mutex);
  if (!stream) {
    if (!w.default_stream) w.default_stream = new CUstream_st;
    return w.default_stream;
  }
  return w.streams.contains(stream) ? stream : nullptr;
}

std::shared_ptr<CUevent_st> known(CUevent_st* event) {
  World& w = world();
  std::lock_guard lock(w.mutex);
  const auto found =
      std::ranges::find_if(w.events, [&](const auto& owned) { return owned.get() == event; });
  return found == w.events.end() ? nullptr : *found;
}

int push(CUstream_st* stream, std::function<void()> step) {
  CUstream_st* const to = known(stream);
  if (!to) return kInvalidHandle;
  to->push(std::move(step));
  return kSuccess;
}

int take(unsigned long long* pointer, size_t bytes) {
  World& w = world();
  std::lock_guard lock(w.mutex);
  if (t_depth == 0) return kNoContext;
  if (bytes == 0) return kInvalidValue;
  if (w.used + bytes > static_cast<size_t>(setting("FAKE_CUDA_MEMORY", 1L << 30)))
    return kOutOfMemory;
  void* const memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(memory, 0xcd, bytes);  // nobody may count on zeros
  *pointer = reinterpret_cast<unsigned long long>(memory);
  w.memory[*pointer] = bytes;
  w.used += bytes;
  return kSuccess;
}

int give_back(unsigned long long pointer) {
  World& w = world();
  std::lock_guard lock(w.mutex);
  const auto found = w.memory.find(pointer);
  if (found == w.memory.end()) return kInvalidValue;
  w.used -= found->second;
  std::memset(reinterpret_cast<void*>(pointer), 0xdd, found->second);
  w.memory.erase(found);
  std::free(reinterpret_cast<void*>(pointer));
  return kSuccess;
}

}  // namespace

FAKE_API void fake_cuda_enqueue(CUstream_st* stream, void (*run)(void*), void* argument) {
  if (push(stream, [=] { run(argument); }) != kSuccess) std::abort();
}
FAKE_API int64_t fake_cuda_live_bytes() {
  std::lock_guard lock(world().mutex);
  return static_cast<int64_t>(world().used);
}
FAKE_API int fake_cuda_live_streams() {
  std::lock_guard lock(world().mutex);
  return static_cast<int>(world().streams.size());
}
FAKE_API int fake_cuda_live_events() {
  std::lock_guard lock(world().mutex);
  return static_cast<int>(world().events.size());
}

FAKE_API int cuInit(unsigned) {
  World& w = world();
  std::lock_guard lock(w.mutex);
  if (const long result = setting("FAKE_CUDA_INIT", 0)) return static_cast<int>(result);
  for (int i = 0; i < 16; ++i) w.contexts[i].device = i;
  w.is_started = true;
  return kSuccess;
}
FAKE_API int cuDriverGetVersion(int* version) {
  *version = static_cast<int>(setting("FAKE_CUDA_VERSION", 13000));
  return kSuccess;
}
FAKE_API int cuGetErrorName(int result, const char** text) {
  *text = result == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE";
  return kSuccess;
}
FAKE_API int cuGetErrorString(int result, const char** text) {
  static const std::map<int, const char*> kTexts = {{kOutOfMemory, "out of memory"},
                                                    {100, "no CUDA-capable device is detected"},
                                                    {kNotReady, "device not ready"},
                                                    {kInvalidHandle, "invalid resource handle"}};
  const auto found = kTexts.find(result);
  *text = found == kTexts.end() ? "a fake error" : found->second;
  return kSuccess;
}
FAKE_API int cuDeviceGetCount(int* count) {
  if (!world().is_started) return kNotInitialized;
  *count = static_cast<int>(setting("FAKE_CUDA_DEVICES", 2));
  return kSuccess;
}
FAKE_API int cuDeviceGet(int* device, int index) {
  *device = index;
  return index < setting("FAKE_CUDA_DEVICES", 2) ? kSuccess : kInvalidDevice;
}
FAKE_API int cuDeviceGetName(char* text, int length, int) {
  std::snprintf(text, static_cast<size_t>(length), "Fake GPU");
  return kSuccess;
}
FAKE_API int cuDeviceGetAttribute(int* value, int number, int) {
  const long sm = setting("FAKE_CUDA_SM", 90);
  *value = static_cast<int>(number == 75 ? sm / 10 : number == 76 ? sm % 10 : 4);
  return kSuccess;
}
FAKE_API int cuDeviceGetPCIBusId(char* text, int length, int device) {
  std::snprintf(text, static_cast<size_t>(length), "0000:%02x:00.0", device);
  return kSuccess;
}
FAKE_API int cuDevicePrimaryCtxRetain(CUctx_st** context, int device) {
  *context = &world().contexts[device];
  return kSuccess;
}
FAKE_API int cuCtxPushCurrent_v2(CUctx_st* context) {
  if (t_depth == 16) return kNoContext;
  t_contexts[t_depth++] = context;
  return kSuccess;
}
FAKE_API int cuCtxPopCurrent_v2(CUctx_st** context) {
  if (t_depth == 0) return kNoContext;
  *context = t_contexts[--t_depth];
  return kSuccess;
}
FAKE_API int cuCtxGetDevice(int* device) {
  if (t_depth == 0) return kNoContext;
  *device = t_contexts[t_depth - 1]->device;
  return kSuccess;
}
FAKE_API int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return kSuccess;
}
FAKE_API int cuCtxSynchronize() {
  std::set<CUstream_st*> streams;
  {
    std::lock_guard lock(world().mutex);
    streams = world().streams;
  }
  for (CUstream_st* const stream : streams) stream->drain();
  return kSuccess;
}
FAKE_API int cuStreamCreateWithPriority(CUstream_st** stream, unsigned, int) {
  if (t_depth == 0) return kNoContext;
  *stream = new CUstream_st;
  std::lock_guard lock(world().mutex);
  world().streams.insert(*stream);
  return kSuccess;
}
FAKE_API int cuStreamDestroy_v2(CUstream_st* stream) {  // what it still has to do is done first
  {
    std::lock_guard lock(world().mutex);
    if (world().streams.erase(stream) == 0) return kInvalidHandle;
  }
  std::thread([stream] {
    {
      std::lock_guard lock(stream->mutex);
      stream->is_ending = true;
    }
    stream->changed.notify_all();
    stream->thread.join();
    delete stream;
  }).detach();
  return kSuccess;
}
FAKE_API int cuStreamSynchronize(CUstream_st* stream) {
  CUstream_st* const s = known(stream);
  if (!s) return kInvalidHandle;
  s->drain();
  return kSuccess;
}
FAKE_API int cuStreamQuery(CUstream_st* stream) {
  CUstream_st* const s = known(stream);
  if (!s) return kInvalidHandle;
  return s->is_idle() ? kSuccess : kNotReady;
}
FAKE_API int cuStreamIsCapturing(CUstream_st*, int* status) {
  *status = static_cast<int>(setting("FAKE_CUDA_CAPTURING", 0));
  return kSuccess;
}
FAKE_API int cuEventCreate(CUevent_st** event, unsigned) {
  if (t_depth == 0) return kNoContext;
  auto made = std::make_shared<CUevent_st>();
  *event = made.get();
  std::lock_guard lock(world().mutex);
  world().events.insert(std::move(made));
  return kSuccess;
}
FAKE_API int cuEventDestroy_v2(CUevent_st* event) {
  const auto found = known(event);
  if (!found) return kInvalidHandle;
  std::lock_guard lock(world().mutex);
  world().events.erase(found);
  return kSuccess;
}
FAKE_API int cuEventRecord(CUevent_st* event, CUstream_st* stream) {
  const auto found = known(event);
  if (!found) return kInvalidHandle;
  uint64_t ticket = 0;
  {
    std::lock_guard lock(found->mutex);
    ticket = ++found->recorded;
    found->pending.insert(ticket);
  }
  return push(stream, [found, ticket] {
    {
      std::lock_guard lock(found->mutex);
      found->pending.erase(ticket);
      found->at = std::chrono::steady_clock::now();
    }
    found->changed.notify_all();
  });
}
FAKE_API int cuStreamWaitEvent(CUstream_st* stream, CUevent_st* event, unsigned) {
  const auto found = known(event);
  if (!found) return kInvalidHandle;
  uint64_t ticket = 0;
  {
    std::lock_guard lock(found->mutex);
    ticket = found->recorded;
  }
  return push(stream, [found, ticket] {
    std::unique_lock lock(found->mutex);
    found->changed.wait(lock, [&] { return !found->pending.contains(ticket); });
  });
}
FAKE_API int cuEventQuery(CUevent_st* event) {
  const auto found = known(event);
  if (!found) return kInvalidHandle;
  std::lock_guard lock(found->mutex);
  return found->pending.contains(found->recorded) ? kNotReady : kSuccess;
}
FAKE_API int cuEventSynchronize(CUevent_st* event) {
  const auto found = known(event);
  if (!found) return kInvalidHandle;
  std::unique_lock lock(found->mutex);
  const uint64_t ticket = found->recorded;
  found->changed.wait(lock, [&] { return !found->pending.contains(ticket); });
  return kSuccess;
}
FAKE_API int cuEventElapsedTime(float* ms, CUevent_st* first, CUevent_st* second) {
  *ms = std::chrono::duration<float, std::milli>(second->at - first->at).count();
  return kSuccess;
}
FAKE_API int cuMemGetInfo_v2(size_t* free, size_t* total) {
  std::lock_guard lock(world().mutex);
  *total = static_cast<size_t>(setting("FAKE_CUDA_MEMORY", 1L << 30));
  *free = *total - world().used;
  return kSuccess;
}
FAKE_API int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes) {
  return take(pointer, bytes);
}
FAKE_API int cuMemFree_v2(unsigned long long pointer) { return give_back(pointer); }
FAKE_API int cuMemAllocAsync(unsigned long long* pointer, size_t bytes, CUstream_st* stream) {
  return known(stream) ? take(pointer, bytes) : kInvalidHandle;
}
FAKE_API int cuMemFreeAsync(unsigned long long pointer, CUstream_st* stream) {
  return push(stream, [=] { (void)give_back(pointer); });
}
FAKE_API int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::calloc(1, bytes);
  return kSuccess;
}
FAKE_API int cuMemFreeHost(void* memory) {
  std::free(memory);
  return kSuccess;
}
FAKE_API int cuMemcpyAsync(unsigned long long to, unsigned long long from, size_t bytes,
                           CUstream_st* stream) {
  return push(stream, [=] {
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  });
}
struct Memcpy2D {
  size_t src_x, src_y;
  int src_kind;
  const void* src_host;
  unsigned long long src;
  void* src_array;
  size_t src_pitch;
  size_t dst_x, dst_y;
  int dst_kind;
  void* dst_host;
  unsigned long long dst;
  void* dst_array;
  size_t dst_pitch;
  size_t bytes, rows;
};
FAKE_API int cuMemcpy2DAsync_v2(const Memcpy2D* shape, CUstream_st* stream) {
  const Memcpy2D s = *shape;
  if (s.src_pitch < s.bytes || s.dst_pitch < s.bytes || s.src_kind != 2 || s.dst_kind != 2)
    return kInvalidValue;
  return push(stream, [=] {
    for (size_t row = 0; row < s.rows; ++row) {
      std::memcpy(reinterpret_cast<void*>(s.dst + row * s.dst_pitch),
                  reinterpret_cast<const void*>(s.src + row * s.src_pitch), s.bytes);
    }
  });
}
FAKE_API int cuMemsetD8Async(unsigned long long to, unsigned char value, size_t bytes,
                             CUstream_st* stream) {
  return push(stream, [=] { std::memset(reinterpret_cast<void*>(to), value, bytes); });
}
FAKE_API int cuIpcGetMemHandle(char* handle, unsigned long long pointer) {
  std::memcpy(handle, &pointer, sizeof(pointer));
  return kSuccess;
}
struct IpcHandle {
  char bytes[64];
};
FAKE_API int cuIpcOpenMemHandle_v2(unsigned long long* pointer, IpcHandle handle, unsigned) {
  std::memcpy(pointer, handle.bytes, sizeof(*pointer));  // within one process only
  return kSuccess;
}
FAKE_API int cuIpcCloseMemHandle(unsigned long long) { return kSuccess; }
