// SPDX-License-Identifier: Apache-2.0
#include "core/cuda_driver.h"

#include <mutex>

#include "core/callbacks.h"
#include "core/shared_library.h"

namespace tp_native::cuda {
namespace {

constexpr int kOldestVersion = 12000;
constexpr unsigned kNonBlocking = 1;    // CU_STREAM_NON_BLOCKING
constexpr unsigned kDisableTiming = 2;  // CU_EVENT_DISABLE_TIMING

std::mutex g_mutex;
std::string g_path = "libcuda.so.1";
const Driver* g_driver = nullptr;  // never released: streams may outlive every owner of ours

Driver load(const std::string& path) {
  std::string why;
  const SharedLibrary library = SharedLibrary::open(path.c_str(), why);
  TPN_CHECK(library, "no NVIDIA driver on this machine (", why,
            "): install one, or use backend \"shm\" (CPU)");
  Driver driver;
#define TPN_FIND(name, symbol, arguments)                                \
  *reinterpret_cast<void**>(&driver.name) = library.find(symbol);        \
  TPN_CHECK(driver.name, "the NVIDIA driver ", path, " has no ", symbol, \
            ": it is older than CUDA 12; update it");
  TPN_CUDA_DRIVER(TPN_FIND)
#undef TPN_FIND
  driver.path = file_of(reinterpret_cast<void*>(driver.Init));
  int result = driver.DriverGetVersion(&driver.version);
  TPN_CHECK(result == kSuccess && driver.version >= kOldestVersion, "the NVIDIA driver ",
            driver.path, " runs CUDA ", driver.version / 1000, ".", driver.version % 1000 / 10,
            ", expected at least ", kOldestVersion / 1000, ".0: update the driver");
  result = driver.Init(0);
  const char* text = nullptr;
  driver.GetErrorString(result, &text);
  TPN_CHECK(result == kSuccess, "the NVIDIA driver ", driver.path,
            " does not start: ", text ? text : "unknown error", " (", result,
            "): see `nvidia-smi`, or use backend \"shm\" (CPU)");
  return driver;
}

}  // namespace

const Driver& driver() {
  std::lock_guard lock(g_mutex);
  if (!g_driver) g_driver = new Driver(load(g_path));
  return *g_driver;
}

void use_driver(const std::string& path) {
  std::lock_guard lock(g_mutex);
  TPN_CHECK(!g_driver, "use_driver(", path, ") after the driver ", g_driver->path, " was loaded");
  g_path = path;
}

bool is_available(std::string& why) {
  const PlainErrors plain;
  try {
    int count = 0;
    TPN_CUDA(driver().DeviceGetCount(&count), "counting the GPUs");
    if (count == 0) why = "the driver finds no GPU";
    return count > 0;
  } catch (const Error& error) {
    why = error.what();
    return false;
  }
}

std::string text_of(int result) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver().GetErrorName(result, &name);
  driver().GetErrorString(result, &text);
  return concat(name ? name : "unknown CUDA error", " (", result, ")", text ? ": " : "",
                text ? text : "");
}

void fail(int result, const char* call, const std::string& what) {
  tp_native::fail(concat(what, ": `", call, "` failed: ", text_of(result)));
}

Device::Device(int index) : index_(index) {
  int count = 0;
  TPN_CUDA(driver().DeviceGetCount(&count), "counting the GPUs");
  TPN_CHECK(index >= 0 && index < count, "cuda:", index, " is not there: this process sees ", count,
            " GPUs; see CUDA_VISIBLE_DEVICES and LOCAL_RANK");
  TPN_CUDA(driver().DeviceGet(&handle_, index), "cuda:", index);
  TPN_CUDA(driver().DevicePrimaryCtxRetain(&context_, handle_), "starting cuda:", index);
}

std::string Device::name() const {
  char text[128] = "";
  TPN_CUDA(driver().DeviceGetName(text, sizeof(text), handle_), "cuda:", index_);
  return text;
}

std::string Device::bus_id() const {
  char text[32] = "";
  TPN_CUDA(driver().DeviceGetPCIBusId(text, sizeof(text), handle_), "cuda:", index_);
  return text;
}

int Device::attribute(int number) const {
  int value = 0;
  TPN_CUDA(driver().DeviceGetAttribute(&value, number, handle_), "cuda:", index_);
  return value;
}

Current::Current(const Device& device) {
  TPN_CUDA(driver().CtxPushCurrent(device.context()), "cuda:", device.index());
}

Current::~Current() {
  Context popped = nullptr;
  (void)driver().CtxPopCurrent(&popped);
}

Stream::Stream(bool is_urgent) {
  int least = 0;
  int greatest = 0;
  TPN_CUDA(driver().CtxGetStreamPriorityRange(&least, &greatest), "making a stream");
  TPN_CUDA(driver().StreamCreateWithPriority(&handle_, kNonBlocking, is_urgent ? greatest : least),
           "making a stream");
}

Stream::~Stream() {
  if (handle_) (void)driver().StreamDestroy(handle_);
}

Event::Event(bool is_timed) {
  TPN_CUDA(driver().EventCreate(&handle_, is_timed ? 0 : kDisableTiming), "making an event");
}

Event::~Event() {
  if (handle_) (void)driver().EventDestroy(handle_);
}

void Event::record(StreamHandle stream) const {
  TPN_CUDA(driver().EventRecord(handle_, stream), "recording an event");
}

void Event::wait_on(StreamHandle stream) const {
  TPN_CUDA(driver().StreamWaitEvent(stream, handle_, 0), "waiting for an event");
}

bool Event::is_reached() const {
  const int result = driver().EventQuery(handle_);
  if (result == kNotReady) return false;
  TPN_CUDA(result, "work on the GPU");
  return true;
}

Workspace::Workspace(int64_t bytes, StreamHandle stream, const char* what) : stream_(stream) {
  if (bytes == 0) return;
  const int result = driver().MemAllocAsync(&pointer_, static_cast<size_t>(bytes), stream);
  if (result == kOutOfMemory) {
    size_t free = 0;
    size_t total = 0;
    (void)driver().MemGetInfo(&free, &total);
    tp_native::fail(concat("out of GPU memory: ", what, " needs ", bytes, " bytes, ", free, " of ",
                           total,
                           " are free; torch.cuda.empty_cache() gives back what torch keeps, or "
                           "use smaller batches"));
  }
  TPN_CUDA(result, what, ", ", bytes, " bytes");
}

Workspace::~Workspace() {
  if (pointer_) (void)driver().MemFreeAsync(pointer_, stream_);
}

bool is_capturing(StreamHandle stream) {
  int status = 0;
  TPN_CUDA(driver().StreamIsCapturing(stream, &status), "asking a stream for its capture");
  return status != 0;
}

void copy(void* to, const void* from, int64_t bytes, StreamHandle stream) {
  if (bytes == 0 || to == from) return;
  TPN_CUDA(driver().MemcpyAsync(address(to), address(from), static_cast<size_t>(bytes), stream),
           "copying ", bytes, " bytes");
}

void copy_rows(void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t row_bytes,
               int64_t rows, StreamHandle stream) {
  if (row_bytes == 0 || rows == 0) return;
  if (to_pitch == row_bytes && from_pitch == row_bytes) {
    copy(to, from, row_bytes * rows, stream);
    return;
  }
  Memcpy2D shape;
  shape.src = address(from);
  shape.src_pitch = static_cast<size_t>(from_pitch);
  shape.dst = address(to);
  shape.dst_pitch = static_cast<size_t>(to_pitch);
  shape.row_bytes = static_cast<size_t>(row_bytes);
  shape.rows = static_cast<size_t>(rows);
  TPN_CUDA(driver().Memcpy2DAsync(&shape, stream), "copying ", rows, " rows");
}

}  // namespace tp_native::cuda
