// SPDX-License-Identifier: Apache-2.0
#include "kernels/cublaslt_api.h"

#include <atomic>
#include <filesystem>
#include <mutex>

#include "core/shared_library.h"

namespace tp_native::cublaslt {
namespace {

constexpr size_t kOldestMajor = 12;
constexpr size_t kNewestMajor = 13;
constexpr const char* kWayOut =
    "install a torch for CUDA 12 or 13, or the wheel nvidia-cublas (CUDA 13) or nvidia-cublas-cu12";

std::mutex g_mutex;
std::vector<std::string> g_names = {"libcublasLt.so.13", "libcublasLt.so.12"};
std::vector<std::string> g_places;
// Never released: work on streams may outlive every owner of ours. Release pairs with the acquire
// in api().
std::atomic<const Api*> g_api{nullptr};

/// Where to look, in order; of a folder, each name in it.
std::vector<std::string> candidates() {
  std::vector<std::string> all = g_names;
  for (const std::string& place : g_places) {
    if (!std::filesystem::is_directory(place)) {
      all.push_back(place);
      continue;
    }
    for (const std::string& name : g_names) all.push_back(place + "/" + name);
  }
  return all;
}

SharedLibrary find() {
  for (const std::string& name : g_names) {
    if (const SharedLibrary library = SharedLibrary::mapped(name.c_str())) return library;
  }
  std::string tried;
  for (const std::string& candidate : candidates()) {
    std::string why;
    if (const SharedLibrary library = SharedLibrary::open(candidate.c_str(), why)) return library;
    tried += (tried.empty() ? "" : "; ") + why;
  }
  tp_native::fail(concat("cuBLASLt is not on this machine (", tried, "): ", kWayOut));
}

Api load() {
  const SharedLibrary library = find();
  Api lt;
  const auto look_up = [&](auto& function, const char* symbol) {
    *reinterpret_cast<void**>(&function) = library.find(symbol);
    return function != nullptr;
  };
  TPN_CHECK(look_up(lt.GetVersion, "cublasLtGetVersion"), "the file found as ", g_names.front(),
            " has no cublasLtGetVersion, so it is no cuBLASLt: ", kWayOut);
  lt.path = file_of(reinterpret_cast<void*>(lt.GetVersion));
  lt.version = lt.GetVersion();
  const size_t major = lt.version / 10000;
  TPN_CHECK(major >= kOldestMajor && major <= kNewestMajor, "cuBLASLt ", lt.path, " is version ",
            major, ".", lt.version % 10000 / 100, ".", lt.version % 100, ", expected ",
            kOldestMajor, " to ", kNewestMajor, ": ", kWayOut);
#define TPN_FIND(name, result, arguments)                                                         \
  TPN_CHECK(look_up(lt.name, "cublasLt" #name), "cuBLASLt ", lt.path, " of version ", lt.version, \
            " has no cublasLt" #name ": ", kWayOut);
  TPN_CUBLASLT_API(TPN_FIND)
#undef TPN_FIND
  return lt;
}

void check_not_loaded(const char* call) {
  const Api* const lt = g_api.load(std::memory_order_acquire);
  TPN_CHECK(!lt, call, " after cuBLASLt ", lt ? lt->path : "", " was loaded");
}

}  // namespace

const Api& api() {
  if (const Api* const lt = g_api.load(std::memory_order_acquire)) return *lt;
  std::lock_guard lock(g_mutex);
  if (!g_api.load(std::memory_order_acquire)) {
    g_api.store(new Api(load()), std::memory_order_release);
  }
  return *g_api.load(std::memory_order_acquire);
}

bool is_available(std::string& why) {
  try {
    (void)api();
    return true;
  } catch (const Error& error) {
    why = error.what();
    return false;
  }
}

void search_in(const std::vector<std::string>& places) {
  std::lock_guard lock(g_mutex);
  check_not_loaded("search_in()");
  g_places = places;
}

void use_library(const std::string& name) {
  std::lock_guard lock(g_mutex);
  check_not_loaded("use_library()");
  g_names = {name};
}

void fail(const Api& lt, int status, const char* call, const std::string& what) {
  const char* const name = lt.GetStatusName(status);
  const char* const text = lt.GetStatusString(status);
  tp_native::fail(concat(what, ": `", call, "` failed: ", name ? name : "unknown cuBLAS status",
                         " (", status, ")", text ? ": " : "", text ? text : ""));
}

}  // namespace tp_native::cublaslt
