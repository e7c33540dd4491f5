// SPDX-License-Identifier: Apache-2.0
// A device of the driver's double with cuBLASLt's: what a test of GEMM begins with, and that it
// left nothing behind.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/shared_library.h"
#include "gemm_cases.h"
#include "kernels/cublaslt_api.h"

using namespace gemm_cases;  // NOLINT

constexpr const char* kFake = TPN_DOUBLES "/libfake_cublaslt.so";

template <class Function>
Function* of_fake(const char* name) {
  std::string why;
  return reinterpret_cast<Function*>(SharedLibrary::open(kFake, why).find(name));
}
inline int live() { return of_fake<int()>("fake_cublaslt_live")(); }
inline int calls(const char* name) {
  return of_fake<int(const char*)>("fake_cublaslt_calls")(name);
}
inline int last_algorithm() { return of_fake<int()>("fake_cublaslt_last_algorithm")(); }
inline int last_epilogue() { return of_fake<int()>("fake_cublaslt_last_epilogue")(); }
inline int last_sm_target() { return of_fake<int()>("fake_cublaslt_last_sm_target")(); }
inline int64_t device_bytes() {
  std::string why;
  const auto library = SharedLibrary::open(TPN_DOUBLES "/libfake_cuda.so", why);
  return reinterpret_cast<int64_t (*)()>(library.find("fake_cuda_live_bytes"))();
}

/// An environment variable while it lives.
class Setting {
 public:
  Setting(const char* name, const std::string& value) : name_(name) {
    ::setenv(name, value.c_str(), 1);
  }
  ~Setting() { ::unsetenv(name_); }
  Setting(const Setting&) = delete;
  Setting& operator=(const Setting&) = delete;

 private:
  const char* name_;
};

template <class Run>
std::string error_of(Run run) {
  try {
    run();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

inline void expect_error(const std::string& error, std::initializer_list<const char*> parts) {
  for (const char* const part : parts) {
    if (error.find(part) == std::string::npos)
      check::fail(__FILE__, __LINE__, concat("\"", part, "\" is not in: ", error));
  }
}

/// A current device and a stream of it, with nothing remembered; nothing may be left behind.
class Scene {
 public:
  explicit Scene(int index = 0) : device_(index), current_(device_), bytes_(device_bytes()) {
    forget_choices();
    stream_ = std::make_unique<cuda::Stream>();
  }
  ~Scene() noexcept(false) {
    synchronise();
    forget_stream(stream_->get());
    synchronise();
    stream_.reset();
    if (std::uncaught_exceptions() > 0) return;
    CHECK_EQ(live(), 0);
    CHECK_EQ(device_bytes(), bytes_);
  }
  Scene(const Scene&) = delete;
  Scene& operator=(const Scene&) = delete;
  cuda::StreamHandle stream() const { return stream_->get(); }
  void synchronise() const {
    TPN_CUDA(cuda::driver().StreamSynchronize(stream()), "a test's stream");
  }

 private:
  cuda::Device device_;
  cuda::Current current_;
  int64_t bytes_;
  std::unique_ptr<cuda::Stream> stream_;
};

inline Case small(GemmEpilogue epilogue = GemmEpilogue::kNone, DType dtype = DType::kFloat32) {
  return {.m = 16, .n = 24, .k = 32, .dtype = dtype, .out_dtype = dtype, .epilogue = epilogue};
}
