// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace tp_native {

enum class DType : uint8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt32,
  kInt64,
  kUInt8,
  kInt8,
  kInt16,
  kBool
};
enum class ReduceOp : uint8_t { kSum, kMax, kMin, kAvg };

constexpr size_t item_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kInt16:
      return 2;
    default:
      return 1;
  }
}

constexpr const char* name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16", "int32",
                                    "int64",   "uint8",   "int8",    "int16",    "bool"};
  const auto index = static_cast<size_t>(dtype);
  return index < sizeof(kNames) / sizeof(kNames[0]) ? kNames[index] : "unknown dtype";
}

constexpr const char* name(ReduceOp op) {
  constexpr const char* kNames[] = {"sum", "max", "min", "avg"};
  const auto index = static_cast<size_t>(op);
  return index < 4 ? kNames[index] : "unknown reduction";
}

constexpr bool is_floating(DType dtype) { return dtype <= DType::kBFloat16; }

}  // namespace tp_native
