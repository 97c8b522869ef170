// Device code of moments over weight samples.
#pragma once
#include "compat.cuh"
#include "sink.cuh"

namespace mtlgrad::cuda {

// Logits to residuals in place: an element a thread (binary), a (example, sample) pair a thread (multiclass).
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    binary_residuals_kernel(T* __restrict__ logits, const T* __restrict__ targets, int64_t batch, int64_t samples,
                            int64_t classes) {
  const int64_t step = int64_t(gridDim.x) * kThreads, count = batch * samples * classes;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t c = i / (batch * samples), b = i / samples % batch;
    logits[i] = math::binary_residual(math::logistic(logits[i]), targets[b * classes + c]);
  }
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    multiclass_residuals_kernel(T* __restrict__ logits, const int64_t* __restrict__ targets, int64_t batch,
                                int64_t samples, int64_t classes) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < batch * samples; i += step)
    math::multiclass_residuals(logits + i * classes, targets[i / samples], classes);
}

// Mean and variance over the samples of gradient = sum over `period` rows of residual x weight.
//
// A thread owns one feature of kExamples examples, and for each of them three registers over the whole pass: the shift,
// the sum of deviations from it and the sum of their squares. The shift is the mean gradient of the first few samples, in
// a short pass of its own: deviations are then of the size of the standard deviation, so that tight posteriors do not
// cancel. A weight is loaded once, coalesced along the features, and serves all kExamples examples; their residuals, the
// same for the whole block, come from shared memory, kExamples side by side so that they are read as vectors. The rows of
// weights, `period` classes to a sample, stream past in tiles of kTile residual rows, whatever the number of classes.
//   barrier 1: the tile is written before any thread reads it
//   barrier 2: all have read it before the next one overwrites it
template <typename T, int kThreads, int kExamples, int kTile>
__global__ void __launch_bounds__(kThreads)
    sampled_kernel(const T* __restrict__ residuals, const T* __restrict__ samples, int64_t batch, int64_t num_samples,
                   int64_t classes, int64_t width, bool binary, Sink sink) {
  __shared__ T tile[kTile][kExamples];
  const int64_t d = int64_t(blockIdx.x) * kThreads + threadIdx.x, example = int64_t(blockIdx.y) * kExamples;
  const int64_t tasks = binary ? classes : 1, period = binary ? 1 : classes, stride = binary ? classes : 1;
  const int64_t few = math::shift_samples(num_samples), all = num_samples * period;
  for (int64_t t = blockIdx.z; t < tasks; t += gridDim.z) {
    const T* of_task = residuals + t * batch * all;  // [B, all]
    T shift[kExamples], sum[kExamples], squares[kExamples], gradient[kExamples];
#pragma unroll
    for (int k = 0; k < kExamples; ++k) shift[k] = sum[k] = squares[k] = gradient[k] = T(0);
    for (int pass = 0; pass < 2; ++pass) {
      const int64_t rows = pass ? all : few * period;
      int64_t in_sample = 0;
      for (int64_t begin = 0; begin < rows; begin += kTile) {
        const int count = static_cast<int>(rows - begin < kTile ? rows - begin : kTile);
        for (int i = threadIdx.x; i < count * kExamples; i += kThreads) {
          const int64_t b = example + i / count;
          tile[i % count][i / count] = b < batch ? of_task[b * all + begin + i % count] : T(0);
        }
        __syncthreads();
        if (d < width)
          for (int q = 0; q < count; ++q) {
            const T weight = samples[((begin + q) * stride + t) * (width + 1) + d];
#pragma unroll
            for (int k = 0; k < kExamples; ++k) gradient[k] += weight * tile[q][k];
            if (++in_sample < period) continue;
            in_sample = 0;
#pragma unroll
            for (int k = 0; k < kExamples; ++k) {
              const T deviation = gradient[k] - shift[k];
              sum[k] += deviation;
              squares[k] += deviation * deviation;
              gradient[k] = T(0);
            }
          }
        __syncthreads();
      }
      if (pass == 0) {
#pragma unroll
        for (int k = 0; k < kExamples; ++k) {
          shift[k] = sum[k] / static_cast<T>(few);
          sum[k] = squares[k] = T(0);
        }
      }
    }
    if (d >= width) continue;
    const math::Power<T> power = power_of<T>(sink, t);
    const T scale = T(1) / static_cast<T>(num_samples);
#pragma unroll
    for (int k = 0; k < kExamples; ++k) {
      const int64_t b = example + k;
      if (b >= batch) break;
      const T mark = of_task[b * all];
      const T mean = sum[k] * scale, variance = squares[k] * scale - mean * mean;
      emit(sink, b, t, tasks, d, width, power,
           mark != mark ? math::no_label<T>() : math::checked(shift[k] + mean, variance));
    }
  }
}

}  // namespace mtlgrad::cuda
