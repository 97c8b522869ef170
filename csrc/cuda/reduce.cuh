// Sums over a warp and over a block, in a fixed order: the result does not depend on scheduling.
#pragma once
#include "compat.cuh"

namespace mtlgrad::cuda {

constexpr int kWarp = 32;

// Every lane gets the sum. All 32 lanes must call it.
template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Every thread gets the sum, the same bits in all. Every thread of the block must call it; the block is one-dimensional
// and a multiple of 32 threads. May be called again at once: the last barrier keeps the next call from overwriting
// `partial` while a slow warp still reads it.
template <typename T>
__device__ __forceinline__ T block_sum(T v) {
  __shared__ T partial[kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
  v = warp_sum(v);
  if (lane == 0) partial[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = warp_sum(lane < warps ? partial[lane] : T(0));
  __syncthreads();
  return v;
}

}  // namespace mtlgrad::cuda
