// One task's moments along the D features of one example, written out or accumulated into the sums: see Output in kernels.h.
#pragma once
#include "cpu/parallel.h"
#include "math/moments.h"

namespace mtlgrad::cpu {

template <typename T>
struct OutputRow {
  T *mean, *variance;          // write here, or
  T *numerator, *denominator;  // add here
  double power, scale;
};

template <typename T>
inline OutputRow<T> output_row(const Output& output, int64_t example, int64_t task, int64_t tasks, int64_t width) {
  const int64_t row = (example * tasks + task) * width;
  if (output.numerator)
    return {nullptr,
            nullptr,
            static_cast<T*>(output.numerator) + example * width,
            static_cast<T*>(output.denominator) + example * width,
            output.power[task],
            output.scale[task]};
  return {static_cast<T*>(output.mean) + row, static_cast<T*>(output.variance) + row, nullptr, nullptr, 1.0, 1.0};
}

template <typename T, typename F, typename W>
MTLGRAD_INLINE void accumulate(const OutputRow<T>& row, int64_t begin, int64_t end, const F& moments_at,
                               const W& weight_of) {
  T* __restrict__ numerator = row.numerator, * __restrict__ denominator = row.denominator;
  const T scale = static_cast<T>(row.scale);
#pragma omp simd
  for (int64_t d = begin; d < end; ++d) {
    const math::Moments<T> m = moments_at(d);
    const T weight = weight_of(m.variance);
    numerator[d] += weight * (scale * m.mean), denominator[d] += weight;
  }
}

// moments_at(d) for d in [begin, end). Functions, not lambdas, hold the loops: a lambda that is not inlined would leave
// the clone's instruction set. A power of one has a loop of its own, since a branch inside would stop the vectoriser.
template <typename T, typename F>
MTLGRAD_INLINE void emit(const OutputRow<T>& row, int64_t begin, int64_t end, const F& moments_at) {
  if (row.numerator) {
    const T floor = static_cast<T>(math::kSmallestVariance);
    const math::Power<T> power(row.power);
    if (row.power == 1.0)
      accumulate(row, begin, end, moments_at, [=](T variance) __attribute__((always_inline)) {
        return T(1) / (variance < floor ? floor : variance);
      });
    else
      accumulate(row, begin, end, moments_at,
                 [=](T variance) __attribute__((always_inline)) { return math::precision_weight(variance, power); });
    return;
  }
  T* __restrict__ mean = row.mean, * __restrict__ variance = row.variance;
#pragma omp simd
  for (int64_t d = begin; d < end; ++d) {
    const math::Moments<T> m = moments_at(d);
    mean[d] = m.mean, variance[d] = m.variance;
  }
}

template <typename T>
MTLGRAD_INLINE void emit_no_label(const OutputRow<T>& row, int64_t begin, int64_t end) {
  if (row.numerator) return;
  const math::Moments<T> none = math::no_label<T>();
  for (int64_t d = begin; d < end; ++d) row.mean[d] = none.mean, row.variance[d] = none.variance;
}

// x.y in float64: residuals and logit variances are small differences of large sums.
template <typename T>
MTLGRAD_INLINE double dot(const T* x, const T* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return sum;
}

// sum_d |h_d| sqrt(s_d): the scale of the rounding in h.S h.
template <typename T>
MTLGRAD_INLINE T noise_scale(const T* h, const T* s, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += std::fabs(h[i]) * std::sqrt(s[i]);
  return sum;
}

}  // namespace mtlgrad::cpu
