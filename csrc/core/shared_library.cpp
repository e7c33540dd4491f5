// SPDX-License-Identifier: Apache-2.0
#include "core/shared_library.h"

#include <dlfcn.h>
#include <link.h>

#include <string_view>

namespace tp_native {

SharedLibrary SharedLibrary::mapped(const char* name) {
  return SharedLibrary(::dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD));
}

SharedLibrary SharedLibrary::open(const char* name, std::string& why) {
  void* const handle = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    const char* const text = ::dlerror();
    why = text ? text : "unknown reason";
  }
  return SharedLibrary(handle);
}

void* SharedLibrary::find(const char* symbol) const { return ::dlsym(handle_, symbol); }

std::string file_of(const void* address) {
  Dl_info info{};
  return ::dladdr(address, &info) != 0 && info.dli_fname ? info.dli_fname : "";
}

std::set<std::string> mapped_files(const std::string& prefix) {
  struct Search {
    std::string_view prefix;
    std::set<std::string> found;
  } search{prefix, {}};
  ::dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& s = *static_cast<Search*>(data);
        const std::string_view path = info->dlpi_name ? info->dlpi_name : "";
        const size_t slash = path.rfind('/');
        const std::string_view file =
            slash == std::string_view::npos ? path : path.substr(slash + 1);
        if (file.substr(0, s.prefix.size()) == s.prefix) s.found.emplace(path);
        return 0;
      },
      &search);
  return search.found;
}

}  // namespace tp_native
