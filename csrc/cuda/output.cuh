// One task's moments at one dimension of one example, written out or accumulated into the sums: see Output in kernels.h.
#pragma once
#include "compat.cuh"

#include "kernels.h"
#include "math/moments.h"

namespace mtlgrad::cuda {

// Accumulating adds to numerator and denominator without atomics: one thread owns (example, d) for all tasks, one after the
// other, so the order of the sum is fixed.
template <typename T>
__device__ __forceinline__ void emit(const Output& output, int64_t example, int64_t task, int64_t tasks, int64_t d,
                                     int64_t width, const math::Power<T>& power, math::Moments<T> m) {
  if (output.numerator) {
    const T weight = math::precision_weight(m.variance, power);
    const int64_t i = example * width + d;
    static_cast<T*>(output.numerator)[i] += weight * (static_cast<T>(output.scale[task]) * m.mean);
    static_cast<T*>(output.denominator)[i] += weight;
  } else {
    const int64_t i = (example * tasks + task) * width + d;
    static_cast<T*>(output.mean)[i] = m.mean;
    static_cast<T*>(output.variance)[i] = m.variance;
  }
}

template <typename T>
__device__ __forceinline__ math::Power<T> power_of(const Output& output, int64_t task) {
  return math::Power<T>(output.numerator ? output.power[task] : 1.0);
}

}  // namespace mtlgrad::cuda
