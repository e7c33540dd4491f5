// SPDX-License-Identifier: Apache-2.0
// Test double of libcublasLt.so: column-major products with every epilogue, computed on the host
// when their stream gets there, and refused where the library's documentation says so.
#include "fake_cublaslt.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

enum : int { kSuccess = 0, kNotInitialized = 1, kInvalidValue = 7, kNotSupported = 15 };
enum : int { k32F = 0, k64F = 1, k16F = 2, k16BF = 14 };
enum : uint32_t {  // of which epilogues are made
  kReluBit = 2,
  kBiasBit = 4,
  kDReluBit = 8,
  kBgradBit = 16,
  kGeluBit = 32,
  kDGeluBit = 64,
  kAuxBit = 128,
  kBgradA = 256,
  kBgradB = 512
};
constexpr uint64_t kMagic = 0x6f676c61656b6166u;
constexpr int kAlgorithms = 10;
constexpr uint64_t kSplitWorkspace = 1 << 16;
constexpr uint64_t kMarkSpacing = 1 << 10;

struct Book {
  std::mutex mutex;
  std::map<std::string, int> calls;
  std::string fail_text;
  int fail_count = 0;
  int live = 0;
  int last_algorithm = -1, last_epilogue = 0, last_sm_target = 0;
  uint64_t next_mark = 1;
};
Book& book() {
  static auto* const one = new Book;  // never ends: streams may still run at exit
  return *one;
}

const char* text(const char* name) {
  const char* const value = std::getenv(name);
  return value ? value : "";
}

/// Counts the call; what it shall fail with, 0 for nothing.
int enter(const std::string& name) {
  Book& b = book();
  std::lock_guard lock(b.mutex);
  ++b.calls[name];
  const std::string fault = text("FAKE_CUBLASLT_FAIL");
  if (fault != b.fail_text) {
    b.fail_text = fault;
    b.fail_count = 0;
  }
  const size_t first = fault.find(':');
  if (first == std::string::npos || fault.substr(0, first) != name) return kSuccess;
  char* rest = nullptr;
  const long nth = std::strtol(fault.c_str() + first + 1, &rest, 10);
  return ++b.fail_count == nth ? static_cast<int>(std::strtol(rest + 1, nullptr, 10)) : kSuccess;
}

#define ENTER(name) \
  if (const int fault_ = enter(name)) return fault_

void count_live(int change) {
  std::lock_guard lock(book().mutex);
  book().live += change;
}

size_t bytes_of(int type) { return type == k64F ? 8 : type == k32F ? 4 : 2; }

double half(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const double fraction = bits & 1023;
  const double size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(fraction + 1024, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

/// To `digits` bits of significand, ties to even: float16 has 11 and bfloat16 8.
double rounded(double x, int digits, int least_exponent) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), least_exponent);
  return std::ldexp(std::nearbyint(std::ldexp(x, digits - 1 - exponent)), exponent - digits + 1);
}

double load(int type, const void* at, int64_t i) {
  const char* const p = static_cast<const char*>(at) + i * static_cast<int64_t>(bytes_of(type));
  if (type == k64F) return *reinterpret_cast<const double*>(p);
  if (type == k32F) return *reinterpret_cast<const float*>(p);
  uint16_t bits = 0;
  std::memcpy(&bits, p, 2);
  if (type == k16F) return half(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value = 0;
  std::memcpy(&value, &wide, 4);
  return value;
}

void store(int type, void* at, int64_t i, double x) {
  char* const p = static_cast<char*>(at) + i * static_cast<int64_t>(bytes_of(type));
  if (type == k64F) {
    std::memcpy(p, &x, 8);
    return;
  }
  const float f = static_cast<float>(x);
  if (type == k32F) {
    std::memcpy(p, &f, 4);
    return;
  }
  uint16_t bits = 0;
  if (type == k16BF) {
    const float r = static_cast<float>(rounded(f, 8, -126));
    uint32_t wide = 0;
    std::memcpy(&wide, &r, 4);
    bits = static_cast<uint16_t>(wide >> 16);
  } else {
    const double r = rounded(f, 11, -14);
    const double size = std::abs(r);
    const uint16_t sign = std::signbit(r) ? 0x8000 : 0;
    if (std::isnan(r)) {
      bits = 0x7e00;
    } else if (size > 65504) {
      bits = sign | 0x7c00;
    } else if (size < std::ldexp(1, -14)) {
      bits = sign | static_cast<uint16_t>(std::ldexp(size, 24));
    } else {
      const int exponent = std::ilogb(size);
      bits = static_cast<uint16_t>(sign | ((exponent + 15) << 10) |
                                   (static_cast<int>(std::ldexp(size, 10 - exponent)) & 1023));
    }
  }
  std::memcpy(p, &bits, 2);
}

}  // namespace

struct Description {
  int compute, scale;
  int32_t trans_a = 0, trans_b = 0, sm_target = 0;
  uint32_t epilogue = 1;
  char* bias = nullptr;
  char* aux = nullptr;
  int64_t aux_ld = 0;
};
struct Layout {
  int type;
  int64_t rows, cols, ld;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t scheme_mask = 7;
  uint32_t alignment[4] = {256, 256, 256, 256};  // A, B, C, D
};
struct Algorithm {
  uint64_t magic, index, alignment, workspace, scheme, configuration, mark, reserved;
};
struct Result {
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

namespace {

/// An algorithm is for one kind of product.
uint64_t configuration_of(const Description& d, const Layout& a, const Layout& c) {
  uint64_t hash = 7;
  for (const int part : {d.compute, d.trans_a, d.trans_b, static_cast<int>(d.epilogue), a.type,
                         c.type, static_cast<int>(c.rows), static_cast<int>(c.cols)})
    hash = hash * 1000003 + static_cast<uint64_t>(part);
  return hash;
}

int check(const Description& d, const Layout& a, const Layout& b, const Layout& c) {
  const int64_t m = d.trans_a ? a.cols : a.rows;
  const int64_t k = d.trans_a ? a.rows : a.cols;
  const int64_t n = d.trans_b ? b.rows : b.cols;
  if (m != c.rows || n != c.cols || k != (d.trans_b ? b.cols : b.rows)) return kInvalidValue;
  if (m == 0 || n == 0 || k == 0) return kInvalidValue;
  if (a.ld < a.rows || b.ld < b.rows || c.ld < c.rows) return kInvalidValue;
  const bool is_double = d.compute == 70;
  if (is_double != (a.type == k64F) || is_double != (d.scale == k64F)) return kNotSupported;
  if (a.type != b.type || (c.type != a.type && c.type != k32F)) return kNotSupported;
  if (d.compute == 77 && a.type != k32F) return kNotSupported;
  const uint32_t e = d.epilogue;
  if (std::to_string(e) == text("FAKE_CUBLASLT_NO_EPILOGUE")) return kNotSupported;
  if (e == 1) return kSuccess;
  if (is_double) return kNotSupported;
  if (c.type != a.type && e & (kAuxBit | kBgradA | kBgradB)) return kNotSupported;
  if (e & (kBiasBit | kBgradBit | kBgradA | kBgradB) && !d.bias) return kInvalidValue;
  if (e & kAuxBit) {
    const int64_t granule = e & (kReluBit | kDReluBit) ? 128 : 8;
    if (!d.aux || d.aux_ld < m || d.aux_ld % granule != 0) return kInvalidValue;
    if (reinterpret_cast<uintptr_t>(d.aux) % 16 != 0) return kNotSupported;
  }
  return kSuccess;
}

double gelu(double x) {
  const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  return 0.5 * x * (1 + std::tanh(u));
}
double gelu_slope(double x) {
  const double c = std::sqrt(2 / M_PI);
  const double t = std::tanh(c * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x);
}

/// One cublasLtMatmul, from its call until its stream has run it.
struct Product {
  Description d;
  Layout a, b, c;
  const char* a_data;
  const char* b_data;
  const char* c_data;
  char* d_data;
  double alpha, beta;
  char* workspace;  // null, or of kSplitWorkspace bytes that nobody else may touch meanwhile
  uint64_t mark;
  long us;
  bool is_spoiled = false;

  double op_a(int64_t i, int64_t l) const {
    return load(a.type, a_data, d.trans_a ? l + i * a.ld : i + l * a.ld);
  }
  double op_b(int64_t l, int64_t j) const {
    return load(b.type, b_data, d.trans_b ? j + l * b.ld : l + j * b.ld);
  }

  /// A split sum's parts go to the workspace...
  void first_kernel() {
    std::this_thread::sleep_for(std::chrono::microseconds(us));
    if (workspace)
      for (uint64_t at = 0; at < kSplitWorkspace; at += kMarkSpacing)
        std::memcpy(workspace + at, &mark, 8);
  }
  /// ... and are added up by a second kernel.
  void second_kernel() {
    for (uint64_t at = 0; workspace && at < kSplitWorkspace; at += kMarkSpacing)
      is_spoiled = is_spoiled || std::memcmp(workspace + at, &mark, 8) != 0;
    const int64_t k = d.trans_a ? a.rows : a.cols;
    std::vector<double> row_sums(static_cast<size_t>(c.rows));
    for (int64_t j = 0; j < c.cols; ++j) {
      for (int64_t i = 0; i < c.rows; ++i) {
        double sum = 0;
        for (int64_t l = 0; l < k; ++l) sum += op_a(i, l) * op_b(l, j);
        double x = alpha * sum;
        if (beta != 0) x += beta * load(c.type, c_data, i + j * c.ld);
        x = finish(x, i, j);
        row_sums[static_cast<size_t>(i)] += x;
        store(c.type, d_data, i + j * c.ld, is_spoiled ? NAN : x);
      }
    }
    if (d.epilogue & kBgradBit)
      for (int64_t i = 0; i < c.rows; ++i)
        store(c.type, d.bias, i, row_sums[static_cast<size_t>(i)]);
    if (d.epilogue & kBgradA) {
      for (int64_t i = 0; i < c.rows; ++i) {
        double sum = 0;
        for (int64_t l = 0; l < k; ++l) sum += op_a(i, l);
        store(c.type, d.bias, i, sum);
      }
    }
    if (d.epilogue & kBgradB) {
      for (int64_t j = 0; j < c.cols; ++j) {
        double sum = 0;
        for (int64_t l = 0; l < k; ++l) sum += op_b(l, j);
        store(c.type, d.bias, j, sum);
      }
    }
  }
  bool mask(int64_t at) const { return d.aux[at / 8] >> at % 8 & 1; }
  void set_mask(int64_t at, bool is_on) const {
    const auto bit = static_cast<char>(1 << at % 8);
    d.aux[at / 8] = static_cast<char>(is_on ? d.aux[at / 8] | bit : d.aux[at / 8] & ~bit);
  }
  double finish(double x, int64_t i, int64_t j) const {
    const uint32_t e = d.epilogue;
    const int64_t at = i + j * d.aux_ld;
    if (e & kBiasBit) x += load(c.type, d.bias, i);
    if (e & kReluBit && e & kAuxBit) set_mask(at, x > 0);
    if (e & kReluBit) x = std::max(x, 0.0);
    if (e & kGeluBit && e & kAuxBit) store(c.type, d.aux, at, x);
    if (e & kGeluBit) x = gelu(x);
    if (e & kDReluBit && !mask(at)) x = 0;
    if (e & kDGeluBit) x *= gelu_slope(load(c.type, d.aux, at));
    return x;
  }
};

std::vector<long> speeds_us() {
  std::vector<long> all;
  const char* at = text("FAKE_CUBLASLT_US");
  while (*at) {
    char* rest = nullptr;
    all.push_back(std::strtol(at, &rest, 10));
    at = *rest ? rest + 1 : rest;
  }
  all.resize(kAlgorithms, all.empty() ? 0 : all.back());
  return all;
}

bool is_aligned(const void* p, uint64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

template <class T, class... Values>
int make(const char* name, T** made, Values... values) {
  ENTER(name);
  *made = new T{values...};
  count_live(1);
  return kSuccess;
}
template <class T>
int destroy(const char* name, T* it) {
  const int fault = enter(name);
  delete it;
  count_live(-1);
  return fault;
}
template <class T>
int assign(T& to, const void* from, size_t bytes) {
  if (!from || bytes != sizeof(T)) return kInvalidValue;
  std::memcpy(&to, from, sizeof(T));
  return kSuccess;
}

}  // namespace

FAKE_API int fake_cublaslt_live() {
  std::lock_guard lock(book().mutex);
  return book().live;
}
FAKE_API int fake_cublaslt_calls(const char* name) {
  std::lock_guard lock(book().mutex);
  return book().calls[name];
}
FAKE_API int fake_cublaslt_last_algorithm() {
  std::lock_guard lock(book().mutex);
  return book().last_algorithm;
}
FAKE_API int fake_cublaslt_last_epilogue() {
  std::lock_guard lock(book().mutex);
  return book().last_epilogue;
}
FAKE_API int fake_cublaslt_last_sm_target() {
  std::lock_guard lock(book().mutex);
  return book().last_sm_target;
}

FAKE_API size_t cublasLtGetVersion() {
  const char* const version = text("FAKE_CUBLASLT_VERSION");
  return *version ? static_cast<size_t>(std::strtol(version, nullptr, 10)) : 130100;
}
FAKE_API const char* cublasLtGetStatusName(int status) {
  return status == kInvalidValue   ? "CUBLAS_STATUS_INVALID_VALUE"
         : status == kNotSupported ? "CUBLAS_STATUS_NOT_SUPPORTED"
                                   : "CUBLAS_STATUS_FAKE";
}
FAKE_API const char* cublasLtGetStatusString(int) { return "a fake status"; }
FAKE_API int cublasLtCreate(void** context) {
  ENTER("Create");
  *context = new int;
  return kSuccess;
}
FAKE_API int cublasLtMatmulDescCreate(Description** made, int compute, int scale) {
  return make("MatmulDescCreate", made, compute, scale);
}
FAKE_API int cublasLtMatmulDescDestroy(Description* it) { return destroy("MatmulDescDestroy", it); }
FAKE_API int cublasLtMatmulDescSetAttribute(Description* d, int attribute, const void* value,
                                            size_t bytes) {
  ENTER("MatmulDescSetAttribute");
  switch (attribute) {
    case 3:
      return assign(d->trans_a, value, bytes);
    case 4:
      return assign(d->trans_b, value, bytes);
    case 7:
      return assign(d->epilogue, value, bytes);
    case 8:
      return assign(d->bias, value, bytes);
    case 11:
      return assign(d->aux, value, bytes);
    case 12:
      return assign(d->aux_ld, value, bytes);
    case 15:
      return assign(d->sm_target, value, bytes);
    default:
      return kInvalidValue;
  }
}
FAKE_API int cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t rows, uint64_t cols,
                                        int64_t ld) {
  return make("MatrixLayoutCreate", made, type, static_cast<int64_t>(rows),
              static_cast<int64_t>(cols), ld);
}
FAKE_API int cublasLtMatrixLayoutDestroy(Layout* it) { return destroy("MatrixLayoutDestroy", it); }
FAKE_API int cublasLtMatmulPreferenceCreate(Preference** made) {
  return make("MatmulPreferenceCreate", made);
}
FAKE_API int cublasLtMatmulPreferenceDestroy(Preference* it) {
  return destroy("MatmulPreferenceDestroy", it);
}
FAKE_API int cublasLtMatmulPreferenceSetAttribute(Preference* p, int attribute, const void* value,
                                                  size_t bytes) {
  ENTER("MatmulPreferenceSetAttribute");
  if (attribute == 1) return assign(p->workspace, value, bytes);
  if (attribute == 3) return assign(p->scheme_mask, value, bytes);
  if (attribute < 5 || attribute > 8) return kInvalidValue;
  return assign(p->alignment[attribute - 5], value, bytes);
}
/// Odd answers split the sum over k and need a workspace; the first half needs 16-byte alignment.
FAKE_API int cublasLtMatmulAlgoGetHeuristic(void* context, Description* d, Layout* a, Layout* b,
                                            Layout* c, Layout*, Preference* p, int wanted,
                                            Result* results, int* found) {
  ENTER("MatmulAlgoGetHeuristic");
  if (!context) return kNotInitialized;
  if (const int status = check(*d, *a, *b, *c)) return status;
  const uint32_t told = *std::min_element(p->alignment, p->alignment + 4);
  *found = 0;
  for (uint64_t i = 0; i < kAlgorithms && *found < wanted; ++i) {
    Algorithm algorithm{kMagic,
                        i,
                        i < kAlgorithms / 2 ? 16 : bytes_of(a->type),
                        i % 2 ? kSplitWorkspace : 0,
                        i % 4 == 3 ? 4u
                        : i % 2    ? 2u
                                   : 0u,
                        configuration_of(*d, *a, *c),
                        0,
                        0};
    const bool has_aligned_rows = (a->ld * static_cast<int64_t>(bytes_of(a->type)) |
                                   b->ld * static_cast<int64_t>(bytes_of(b->type)) |
                                   c->ld * static_cast<int64_t>(bytes_of(c->type))) %
                                      static_cast<int64_t>(algorithm.alignment) ==
                                  0;
    if (told < algorithm.alignment || !has_aligned_rows) continue;
    if (algorithm.workspace > p->workspace) continue;
    if (algorithm.scheme & ~uint64_t{p->scheme_mask}) continue;
    results[(*found)++] = {algorithm, algorithm.workspace, kSuccess, 1, {}};
  }
  return *found ? kSuccess : kNotSupported;
}
FAKE_API int cublasLtMatmulAlgoCheck(void*, Description* d, Layout* a, Layout* b, Layout* c,
                                     Layout*, const Algorithm* algorithm, Result* result) {
  ENTER("MatmulAlgoCheck");
  if (const int status = check(*d, *a, *b, *c)) return status;
  if (algorithm->magic != kMagic || algorithm->configuration != configuration_of(*d, *a, *c))
    return kInvalidValue;
  result->workspace = algorithm->workspace;
  return kSuccess;
}
FAKE_API int cublasLtMatmul(void* context, Description* d, const void* alpha, const void* a_data,
                            Layout* a, const void* b_data, Layout* b, const void* beta,
                            const void* c_data, Layout* c, void* d_data, Layout*,
                            const Algorithm* algorithm, void* workspace, size_t workspace_bytes,
                            CUstream_st* stream) {
  ENTER("Matmul");
  if (!context) return kNotInitialized;
  if (const int status = check(*d, *a, *b, *c)) return status;
  if (algorithm->magic != kMagic || algorithm->configuration != configuration_of(*d, *a, *c))
    return kInvalidValue;
  if (workspace_bytes < algorithm->workspace || !is_aligned(workspace, 256)) return kInvalidValue;
  for (const void* p : {a_data, b_data, c_data, static_cast<const void*>(d_data)})
    if (!is_aligned(p, algorithm->alignment)) return kInvalidValue;
  const auto scalar = [d](const void* at) {
    return d->scale == k64F ? *static_cast<const double*>(at)
                            : static_cast<double>(*static_cast<const float*>(at));
  };
  uint64_t mark = 0;
  {
    Book& notes = book();
    std::lock_guard lock(notes.mutex);
    mark = notes.next_mark++;
    notes.last_algorithm = static_cast<int>(algorithm->index);
    notes.last_epilogue = static_cast<int>(d->epilogue);
    notes.last_sm_target = d->sm_target;
  }
  auto* const product = new Product{*d,
                                    *a,
                                    *b,
                                    *c,
                                    static_cast<const char*>(a_data),
                                    static_cast<const char*>(b_data),
                                    static_cast<const char*>(c_data),
                                    static_cast<char*>(d_data),
                                    scalar(alpha),
                                    scalar(beta),
                                    algorithm->workspace ? static_cast<char*>(workspace) : nullptr,
                                    mark,
                                    speeds_us()[algorithm->index]};
  fake_cuda_enqueue(stream, [](void* it) { static_cast<Product*>(it)->first_kernel(); }, product);
  // A product of two kernels: another thread may enqueue in between.
  if (product->workspace) std::this_thread::sleep_for(std::chrono::microseconds(20));
  fake_cuda_enqueue(
      stream,
      [](void* it) {
        const std::unique_ptr<Product> mine(static_cast<Product*>(it));
        mine->second_kernel();
      },
      product);
  return kSuccess;
}
