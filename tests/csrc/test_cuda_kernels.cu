// SPDX-License-Identifier: Apache-2.0
// The element-wise kernels on a device: epilogues bit for bit as on the CPU, activations, their
// gradients and column sums against fp64.
#include <cmath>
#include <vector>

#include "activation_oracle.h"
#include "kernels/cuda.h"
#include "on_device.h"

namespace tp_native::kernels {
namespace {

constexpr Activation kActivations[] = {Activation::kRelu, Activation::kGeluTanh,
                                       Activation::kGeluErf, Activation::kSilu};

/// |x - exact| within `ulps` roundings to T and an absolute rest.
template <class T>
bool is_close(T x, double exact, double ulps) {
  constexpr double kUnit = std::same_as<T, double>    ? 0x1p-52
                           : std::same_as<T, float>   ? 0x1p-23
                           : std::same_as<T, Float16> ? 0x1p-10
                                                      : 0x1p-7;
  return std::abs(static_cast<double>(widen(x)) - exact) <= ulps * kUnit * (std::abs(exact) + 1e-3);
}

template <class T>
double at(const std::vector<T>& values, int64_t i) {
  return static_cast<double>(widen(values[static_cast<size_t>(i)]));
}

/// A row of gate and up has `pad` elements behind it.
template <class T>
void check_glu(DType dtype, Activation activation, Shape shape, int64_t pad, int shift) {
  const auto [rows, columns] = shape;
  const int64_t wide = 2 * columns + pad;
  const int64_t narrow_ = columns + pad;
  const auto gate_up = random_values<T>(rows * wide, 5, true);
  const auto d_out = random_values<T>(rows * narrow_, 6, true);
  const OnDevice<T> gate_up_there(gate_up, shift);
  const OnDevice<T> d_out_there(d_out);
  const OnDevice<T> out(rows * narrow_);
  const OnDevice<T> d_gate_up(gate_up, shift);  // backward in place
  const Stream stream;
  CUDA_OK(cudaDeviceSynchronize());
  cuda::glu({dtype, activation, gate_up_there.data(), out.data(), rows, columns, wide, narrow_},
            stream.handle);
  cuda::glu_backward({dtype, activation, d_out_there.data(), d_gate_up.data(), d_gate_up.data(),
                      rows, columns, narrow_, wide, wide},
                     stream.handle);
  CUDA_OK(cudaStreamSynchronize(stream.handle));
  const auto y = out.get();
  const auto d = d_gate_up.get();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < wide; ++c) {
      const int64_t i = row * wide + c;
      if (c >= 2 * columns) CHECK(at(d, i) == at(gate_up, i));  // the pad
    }
    for (int64_t c = 0; c < columns; ++c) {
      const double gate = at(gate_up, row * wide + c);
      const double up = at(gate_up, row * wide + columns + c);
      const double dy = at(d_out, row * narrow_ + c);
      const auto value = static_cast<double>(exact_activation(activation, gate));
      const auto slope = static_cast<double>(slope_of_activation(activation, gate));
      CHECK(is_close(y[static_cast<size_t>(row * narrow_ + c)], value * up, 8));
      CHECK(is_close(d[static_cast<size_t>(row * wide + columns + c)], value * dy, 8));
      if (activation == Activation::kRelu && gate == 0) continue;
      const double tolerance = std::same_as<T, double> ? 1e9 : 32;  // the difference errs by 1e-10
      CHECK(is_close(d[static_cast<size_t>(row * wide + c)], dy * up * slope, tolerance));
    }
  }
}

template <class T>
void check_activation_backward(DType dtype, Activation activation, int64_t count, int shift) {
  const auto x = random_values<T>(count, 8, true);
  const auto dy = random_values<T>(count, 9, true);
  const OnDevice<T> x_there(x, shift);
  const OnDevice<T> dx(dy);  // in place
  CUDA_OK(cudaDeviceSynchronize());
  const Stream stream;
  cuda::activation_backward({dtype, activation, dx.data(), x_there.data(), dx.data(), count},
                            stream.handle);
  CUDA_OK(cudaStreamSynchronize(stream.handle));
  const auto result = dx.get();
  for (int64_t i = 0; i < count; ++i) {
    if (activation == Activation::kRelu && at(x, i) == 0) continue;
    const auto slope = static_cast<double>(slope_of_activation(activation, at(x, i)));
    const double tolerance = std::same_as<T, double> ? 1e9 : 32;
    CHECK(is_close(result[static_cast<size_t>(i)], at(dy, i) * slope, tolerance));
  }
}

template <class T>
std::vector<T> column_sum(DType dtype, const std::vector<T>& values, Shape shape, int64_t stride,
                          int shift) {
  const OnDevice<T> in(values, shift);
  const OnDevice<T> out(shape.columns);
  const OnDevice<char> workspace(
      cuda::column_sum_workspace_bytes(dtype, shape.rows, shape.columns));
  CUDA_OK(cudaDeviceSynchronize());
  const Stream stream;
  cuda::column_sum(
      {dtype, in.data(), out.data(), shape.rows, shape.columns, stride, workspace.data()},
      stream.handle);
  CUDA_OK(cudaStreamSynchronize(stream.handle));
  return out.get();
}

template <class T>
void check_column_sum(DType dtype, Shape shape) {
  const int64_t stride = shape.columns + (shape.columns % 8 == 0 ? 8 : 3);
  const auto values = random_values<T>(shape.rows * stride, 4, true);
  const auto sums = column_sum(dtype, values, shape, stride, 0);
  CHECK(is_equal(column_sum(dtype, values, shape, stride, 1), sums));  // whatever the alignment
  for (int64_t c = 0; c < shape.columns; ++c) {
    double sum = 0;
    double magnitude = 0;
    for (int64_t row = 0; row < shape.rows; ++row) {
      sum += at(values, row * stride + c);
      magnitude += std::abs(at(values, row * stride + c));
    }
    const double in_float = std::same_as<T, double> ? 1e-13 : 1e-5;
    const double x = at(sums, c);
    CHECK(is_close(sums[static_cast<size_t>(c)], sum, 1) ||
          std::abs(x - sum) <= in_float * magnitude);
  }
}

}  // namespace

TEST(epilogues_give_the_bits_of_the_cpu) {
  const Stream stream;
  each_floating([&]<class T>(T, DType dtype) {
    for (const Shape shape : kRowShapes) {
      const Inputs<T> inputs(dtype, 1, shape.rows * shape.columns);
      for (const int flags : epilogues()) {
        const EpilogueCase<T> epilogue(shape.rows, shape.columns, flags);
        const OnDevice<T> sum(inputs.values[0], (flags & 16) ? 1 : 0);
        const OnDevice<T> out(inputs.count);
        const bool in_place = flags % 3 == 0;
        cuda::SumEpilogue e{
            .dtype = dtype, .sum = sum.data(), .out = in_place ? sum.data() : out.data()};
        epilogue.fill(e);
        CUDA_OK(cudaDeviceSynchronize());
        cuda::apply_epilogue(e, stream.handle);
        CUDA_OK(cudaStreamSynchronize(stream.handle));
        epilogue.check(inputs, in_place ? sum.get() : out.get());
      }
    }
  });
}

TEST(gated_activations_and_their_gradients) {
  each_floating([&]<class T>(T, DType dtype) {
    for (const Activation activation : kActivations) {
      check_glu<T>(dtype, activation, {33, 256}, 0, 0);
      check_glu<T>(dtype, activation, {5, 1024}, 16, 0);  // strided
      check_glu<T>(dtype, activation, {7, 37}, 3, 0);
      check_glu<T>(dtype, activation, {3, 64}, 0, 1);  // not aligned
      check_glu<T>(dtype, activation, {1, 1}, 0, 0);
    }
  });
  check_glu<BFloat16>(DType::kBFloat16, Activation::kSilu, {1024, 1032}, 8, 0);
}

TEST(gradients_through_activations) {
  each_floating([&]<class T>(T, DType dtype) {
    for (const Activation activation : kActivations) {
      for (const int64_t count : {1, 7, 4099, 100003}) {
        check_activation_backward<T>(dtype, activation, count, 0);
      }
      check_activation_backward<T>(dtype, activation, 1000, 1);
    }
  });
}

TEST(column_sums_are_exact_enough_and_repeatable) {
  each_floating([&]<class T>(T, DType dtype) {
    for (const Shape shape :
         {Shape{0, 5}, {1, 1}, {7, 37}, {128, 256}, {129, 256}, {5000, 1032}, {20000, 33}}) {
      check_column_sum<T>(dtype, shape);
    }
  });
}

}  // namespace tp_native::kernels

int main() { return tp_native::kernels::run_all_on_device(); }
