// Placeholder.
#pragma once
#include <cstdint>

#include "reduce.cuh"

namespace mtlgrad::cuda {

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    row_square_kernel(const float* __restrict__ x, float* __restrict__ out, int64_t cols, int64_t stride) {
  const int64_t r = blockIdx.x;
  float sum = 0.0f;
  for (int64_t c = threadIdx.x; c < cols; c += kThreads) sum += x[r * stride + c] * x[r * stride + c];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[r] = sum;
}

}  // namespace mtlgrad::cuda
