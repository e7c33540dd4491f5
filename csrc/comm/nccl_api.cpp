// SPDX-License-Identifier: Apache-2.0
#include "comm/nccl_api.h"

#include <mutex>

#include "core/callbacks.h"
#include "core/error.h"
#include "core/shared_library.h"

namespace tp_native::comm::nccl {
namespace {

constexpr int kOldest = 21800;
constexpr int kTooNew = 30000;
constexpr int kFirstWithWindows = 22700;

struct Found {
  SharedLibrary library;
  std::string tried;

  /// True once a library answers; remembers why this one does not.
  bool take(SharedLibrary candidate, const std::string& what, const std::string& why) {
    if (library) return true;
    if (candidate && candidate.find("ncclGetVersion")) {
      library = candidate;
      return true;
    }
    tried +=
        concat(tried.empty() ? "" : "; ", what, ": ", candidate ? "has no ncclGetVersion" : why);
    return false;
  }
};

Found look(const Search& search) {
  Found found;
  std::string why;
  if (!search.file.empty()) {
    found.take(SharedLibrary::open(search.file.c_str(), why), search.file, why);
    return found;  // what was asked for, or nothing
  }
  constexpr const char* kName = "libnccl.so.2";
  if (found.take(SharedLibrary::mapped("libtorch_cuda.so"), "libtorch_cuda.so", "not loaded"))
    return found;
  if (found.take(SharedLibrary::mapped(kName), "a loaded libnccl.so.2", "none")) return found;
  const bool is_mapped = !mapped_files("libnccl.so").empty();
  SharedLibrary by_name = SharedLibrary::open(kName, why);
  if (found.take(by_name, kName, why) || is_mapped) return found;
  for (const std::string& file : search.wheel_files) {
    SharedLibrary wheel = SharedLibrary::open(file.c_str(), why);
    if (found.take(wheel, file, why)) break;
  }
  return found;
}

Api load(const Search& search) {
  const Found found = look(search);
  TPN_CHECK(found.library, "no NCCL library (", found.tried,
            "): use a torch built for CUDA, or pip install nvidia-nccl-cu12 or -cu13");
  Api api;
#define TPN_FIND(name, result, arguments) \
  *reinterpret_cast<void**>(&api.name) = found.library.find("nccl" #name);
  TPN_NCCL_REQUIRED(TPN_FIND)
  TPN_NCCL_OPTIONAL(TPN_FIND)
#undef TPN_FIND
  api.path = file_of(reinterpret_cast<void*>(api.GetVersion));
  const int result = api.GetVersion(&api.version);
  TPN_CHECK(result == kSuccess && api.version >= kOldest && api.version < kTooNew, "the NCCL at ",
            api.path, " is version ", version_text(api.version),
            ", expected 2.18 or newer of 2.x: install another one, or name its file in "
            "TP_NATIVE_NCCL_PATH");
#define TPN_CHECK_FOUND(name, result, arguments)                                \
  TPN_CHECK(api.name, "the NCCL ", version_text(api.version), " at ", api.path, \
            " has no nccl" #name);
  TPN_NCCL_REQUIRED(TPN_CHECK_FOUND)
#undef TPN_CHECK_FOUND
  if (const auto files = mapped_files("libnccl.so"); files.size() > 1) {
    std::string all;
    for (const std::string& file : files) all += concat(all.empty() ? "" : ", ", file);
    warn(concat("two copies of NCCL are loaded (", all, "); tp_native uses ", api.path,
                ": uninstall one of the nvidia-nccl packages"));
  }
  return api;
}

std::mutex g_mutex;
const Api* g_api = nullptr;  // never released: communicators may outlive every owner of ours

}  // namespace

const Api& api(const Search& search) {
  std::lock_guard lock(g_mutex);
  if (!g_api) g_api = new Api(load(search));
  return *g_api;
}

const char* name(Registration registration) {
  constexpr const char* kNames[] = {"none", "buffer", "window"};
  return kNames[static_cast<size_t>(registration)];
}

Registration registration_of(const Api& api) {
  if (!api.MemAlloc || !api.MemFree) return Registration::kNone;
  if (api.version >= kFirstWithWindows && api.CommWindowRegister && api.CommWindowDeregister)
    return Registration::kWindow;
  return api.CommRegister && api.CommDeregister ? Registration::kBuffer : Registration::kNone;
}

std::string version_text(int version) {
  if (version < 10000) return concat(version / 1000, ".", version % 1000 / 100, ".", version % 100);
  return concat(version / 10000, ".", version % 10000 / 100, ".", version % 100);
}

std::string text_of(const Api& api, int result, Handle handle) {
  const char* const last = api.GetLastError(handle);
  return concat(api.GetErrorString(result), " (", result, ")", last && *last ? ": " : "",
                last ? last : "");
}

int reduced_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 7;
    case DType::kFloat64:
      return 8;
    case DType::kFloat16:
      return 6;
    case DType::kBFloat16:
      return 9;
    case DType::kInt32:
      return 2;
    case DType::kInt64:
      return 4;
    case DType::kInt8:
      return 0;
    case DType::kUInt8:
    case DType::kBool:
      return 1;
    default:
      fail(concat("NCCL cannot reduce ", name(dtype), ": convert it to int32 first"));
  }
}

int reduction(DType dtype, ReduceOp op) {
  constexpr int kSum = 0, kMax = 2, kMin = 3, kAvg = 4;
  const bool is_bool = dtype == DType::kBool;  // bytes 0 and 1: "or" is the greater, "and" the less
  switch (op) {
    case ReduceOp::kMax:
      return kMax;
    case ReduceOp::kMin:
      return kMin;
    case ReduceOp::kAvg:
      return kAvg;
    default:
      return is_bool ? kMax : kSum;
  }
}

}  // namespace tp_native::comm::nccl
