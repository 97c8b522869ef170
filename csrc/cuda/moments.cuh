// Device code of the `moments` stem: regression, binary, and the weighted mean.
#pragma once
#include "compat.cuh"
#include "output.cuh"
#include "reduce.cuh"

namespace mtlgrad::cuda {

// A block works on one example; its threads stride over the features. First the dot products that an output's scalars
// need (float sums of at most width / threads terms each, then a tree: the rounding error grows with the logarithm),
// then one pass over the features. Writing moments, outputs are spread over blockIdx.y; accumulating, one block does all
// outputs of its example, since every (example, feature) has one owner.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    regression_kernel(Features features, const T* __restrict__ targets, OutputsPosterior posterior, Output output) {
  const int64_t b = blockIdx.x, width = features.width, outputs = posterior.outputs;
  const bool bias = posterior.weights > width;
  const T* h = static_cast<const T*>(features.data) + b * features.stride;
  for (int64_t o = blockIdx.y; o < outputs; o += gridDim.y) {
    const T target = targets[b * outputs + o];
    const auto row = math::posterior_row<T>(posterior, o, b);
    const T* __restrict__ m = row.mean, * __restrict__ c = row.cross_covariance, * __restrict__ s = row.variances;
    const math::Power<T> power = power_of<T>(output, o);
    T prediction = 0, v = 0, scale = 0;
    for (int64_t d = threadIdx.x; d < width; d += kThreads) {
      prediction += m[d] * h[d];
      v += c[d] * h[d];
      scale += fabs(h[d]) * sqrt(s[d]);
    }
    // Every thread takes part in the sums, also where there is no label: the barriers in them are the block's.
    const T r = block_sum(prediction) + ((bias ? m[width] : T(0)) - target);
    const T variance = block_sum(v) + (bias ? c[width] : T(0));
    const T noise = block_sum(scale) + (bias ? T(sqrt(s[width])) : T(0));
    const math::LogitVariance<T> z = math::logit_variance(variance, noise);
    for (int64_t d = threadIdx.x; d < width; d += kThreads)
      emit(output, b, o, outputs, d, width, power,
           target != target ? math::no_label<T>() : math::regression(m[d], c[d], s[d], r, z));
  }
}

// As above; the quadrature in between is done by every warp for itself, a node a lane, so that its sums need no barrier.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    binary_kernel(Features features, const T* __restrict__ targets, OutputsPosterior posterior,
                  const T* __restrict__ nodes, const T* __restrict__ weights, int64_t num_nodes, Output output) {
  const int64_t b = blockIdx.x, width = features.width, outputs = posterior.outputs;
  const T* h = static_cast<const T*>(features.data) + b * features.stride;
  for (int64_t o = blockIdx.y; o < outputs; o += gridDim.y) {
    const T target = targets[b * outputs + o];
    const auto row = math::posterior_row<T>(posterior, o, b);
    const T* __restrict__ m = row.mean, * __restrict__ k = row.cross_covariance, * __restrict__ s = row.variances;
    T logit = 0, v = 0, scale = 0;
    for (int64_t d = threadIdx.x; d < width; d += kThreads) {
      logit += m[d] * h[d];
      v += k[d] * h[d];
      scale += fabs(h[d]) * sqrt(s[d]);
    }
    const math::Logistic<T> at = math::logistic(block_sum(logit) + m[width]);
    const T variance = block_sum(v) + k[width];
    const math::LogitVariance<T> z = math::logit_variance(variance, block_sum(scale) + T(sqrt(s[width])));
    const T deviation = sqrt(z.v);
    math::BinarySums<T> sums{};
    const bool saturated = math::is_saturated(at);  // for the whole block
    for (int64_t i = threadIdx.x % kWarp; i < num_nodes; i += kWarp)
      saturated ? math::add_node<true>(sums, at, deviation, nodes[i], weights[i])
                : math::add_node<false>(sums, at, deviation, nodes[i], weights[i]);
    sums.d = warp_sum(sums.d), sums.du = warp_sum(sums.du), sums.dh = warp_sum(sums.dh);
    sums.dd = warp_sum(sums.dd), sums.ddu = warp_sum(sums.ddu), sums.ddh = warp_sum(sums.ddh);
    const math::Power<T> power = power_of<T>(output, o);
    const auto c = math::binary_coefficients(sums, math::binary_residual(at, target), z);
    for (int64_t d = threadIdx.x; d < width; d += kThreads)
      emit(output, b, o, outputs, d, width, power,
           target != target ? math::no_label<T>() : math::binary(c, m[d], k[d], s[d]));
  }
}

// A thread an output element: T pairs in, one number out; neighbouring threads read neighbouring features. Four tasks'
// pairs are on their way before the first is used, with 8 blocks a multiprocessor 32 KB.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 8)
    precision_mean_kernel(const T* __restrict__ means, const T* __restrict__ variances,
                          const double* __restrict__ power, T* __restrict__ out, int64_t batch, int64_t tasks,
                          int64_t width) {
  constexpr int kAtOnce = 4;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < batch * width; i += step) {
    const int64_t first = i / width * tasks * width + i % width;
    T numerator = 0, denominator = 0;
    for (int64_t begin = 0; begin < tasks; begin += kAtOnce) {
      T mean[kAtOnce], variance[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const bool there = begin + k < tasks;
        mean[k] = there ? means[first + (begin + k) * width] : T(0);
        variance[k] = there ? variances[first + (begin + k) * width] : T(0);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (begin + k >= tasks) break;
        const T weight = math::precision_weight(variance[k], math::Power<T>(power[begin + k]));
        numerator += weight * mean[k];
        denominator += weight;
      }
    }
    out[i] = math::weighted_mean(numerator, denominator, static_cast<T>(batch));
  }
}

// Eight blocks a multiprocessor: for sm_80 the compiler would rather have 32 registers and a stack for a division.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 8)
    weighted_mean_kernel(const T* __restrict__ numerator, const T* __restrict__ denominator, T* __restrict__ out,
                         int64_t batch, int64_t width) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < batch * width; i += step)
    out[i] = math::weighted_mean(numerator[i], denominator[i], static_cast<T>(batch));
}

}  // namespace mtlgrad::cuda
