// SPDX-License-Identifier: Apache-2.0
// The dtypes of a variant's rows of logits. Included inside its anonymous namespace, behind them.

template <class T>
void logit_statistics_of(const void* row, int64_t columns, bool has_shifted_sum,
                         LogitStatistics& out) {
  const T* const logits = static_cast<const T*>(row);
  if (has_shifted_sum) return logit_statistics_of<T, true>(logits, columns, out);
  logit_statistics_of<T, false>(logits, columns, out);
}

void logit_statistics_any(DType dtype, const void* row, int64_t columns, bool has_shifted_sum,
                          LogitStatistics& out) {
  switch (dtype) {
    case DType::kFloat32:
      return logit_statistics_of<float>(row, columns, has_shifted_sum, out);
    case DType::kFloat64:
      return logit_statistics_of<double>(row, columns, has_shifted_sum, out);
    case DType::kFloat16:
      return logit_statistics_of<Float16>(row, columns, has_shifted_sum, out);
    default:
      return logit_statistics_of<BFloat16>(row, columns, has_shifted_sum, out);
  }
}

template <class T>
void logit_gradient_of(const void* row, int64_t columns, const LogitGradient& g, void* out) {
  logit_gradient_of<T>(static_cast<const T*>(row), columns, g, static_cast<T*>(out));
}

void logit_gradient_any(DType dtype, const void* row, int64_t columns, const LogitGradient& g,
                        void* out) {
  switch (dtype) {
    case DType::kFloat32:
      return logit_gradient_of<float>(row, columns, g, out);
    case DType::kFloat64:
      return logit_gradient_of<double>(row, columns, g, out);
    case DType::kFloat16:
      return logit_gradient_of<Float16>(row, columns, g, out);
    default:
      return logit_gradient_of<BFloat16>(row, columns, g, out);
  }
}
