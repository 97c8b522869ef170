// Device code of multiclass moments: the stages of math/multiclass.h, one block an example at a time.
#pragma once
#include "compat.cuh"
#include "output.cuh"
#include "reduce.cuh"

#include "math/multiclass.h"

namespace mtlgrad::cuda {

// w.h~ in float64 by one warp; every lane gets it.
template <typename T>
__device__ __forceinline__ double warp_logit(const T* w, const T* h, int64_t width, int lane) {
  double sum = 0;
  for (int64_t d = lane; d < width; d += kWarp) sum += static_cast<double>(w[d]) * static_cast<double>(h[d]);
  return warp_sum(sum) + static_cast<double>(w[width]);
}

template <typename T>
__device__ __forceinline__ double warp_slack(const T* variances, const T* h, int64_t width, int lane) {
  double sum = 0;
  for (int64_t d = lane; d < width; d += kWarp) sum += static_cast<double>(fabs(h[d]) * sqrt(variances[d]));
  sum = warp_sum(sum) + static_cast<double>(sqrt(variances[width]));
  return static_cast<double>(math::kNoise<T>) * sum * sum;
}

// A block takes examples b = blockIdx.x, + gridDim.x, ...; its slice of the workspace, in global memory, holds what the
// stages hand on, in float64. Stages and why a barrier stands after each:
//   1  dot products, one a warp: logits, V, rounding slack          -> one thread reads all of V
//   2  Cholesky of V and its inverse, by thread 0: C is small        -> every point needs L
//   3  residuals and phi, a point a thread                           -> sums run over all points
//   4  means over the points, one phi a warp, which then centres it  -> products of centred rows of other warps
//   5  covariances over the points, a pair a warp                    -> E[r r'] reads them
//   6  E[r r'], a pair a thread                                      -> the correction reads any of them
//   7  corrections                                                   -> every feature needs all coefficients
//   8  the quadratic form, a feature a thread                        -> the next example overwrites the workspace
// The structure is a template argument: each of the three needs half the registers of one kernel for all. Three blocks a
// multiprocessor: left to itself the compiler stops at 128 registers, and spills some.
template <typename T, int kThreads, Structure structure>
__global__ void __launch_bounds__(kThreads, 3)
    multiclass_kernel(Features features, const int64_t* __restrict__ targets, MulticlassPosterior posterior,
                      const double* __restrict__ points, int64_t num_points, double* __restrict__ workspace,
                      int64_t slice_size, Output output) {
  posterior.structure = structure;
  const int64_t classes = posterior.num_classes, width = features.width;
  const math::MulticlassSlice s =
      math::multiclass_slice(workspace + blockIdx.x * slice_size, structure, classes, num_points);
  const math::MulticlassSizes sizes = math::multiclass_sizes(structure, classes);
  const T* class_covariance = static_cast<const T*>(posterior.classes);
  const math::Power<T> power = power_of<T>(output, 0);
  const int64_t stride = math::point_stride(num_points);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  constexpr int kWarps = kThreads / kWarp;

  for (int64_t b = blockIdx.x; b < features.batch; b += gridDim.x) {
    const T* h = static_cast<const T*>(features.data) + b * features.stride;
    const math::MulticlassExample<T> e{h, width, targets[b], b, features.batch, posterior};
    if (e.target == math::kNoClass) {  // the same for the whole block: no thread is left behind at a barrier
      for (int64_t d = threadIdx.x; d < width; d += kThreads)
        emit(output, b, 0, 1, d, width, power, math::no_label<T>());
      continue;
    }

    double scale = 0;  // kron: h~.S_feature h~, which every warp computes for itself
    if (structure == Structure::kron) {
      scale = warp_logit(e.row(classes), h, width, lane);
      const double slack = warp_slack(e.variances(0), h, width, lane);
      scale = scale >= -slack ? (scale > 0.0 ? scale : 0.0) : math::not_a_number<double>();
      for (int64_t i = threadIdx.x; i < classes * classes; i += kThreads)
        s.factor[i] = scale * static_cast<double>(class_covariance[i]);
      for (int64_t c = threadIdx.x; c < classes; c += kThreads)
        s.slack[c] = slack * static_cast<double>(class_covariance[c * classes + c]);
    } else {
      for (int64_t i = warp; i < sizes.factor; i += kWarps) {
        const double v = warp_logit(e.row(classes + i), h, width, lane);
        if (lane == 0) s.factor[i] = v;
      }
      for (int64_t c = warp; c < classes; c += kWarps) {
        const double slack = warp_slack(e.variances(c), h, width, lane);
        if (lane == 0) s.slack[c] = slack;
      }
    }
    for (int64_t c = warp; c < classes; c += kWarps) {
      const double mu = warp_logit(e.row(c), h, width, lane);
      if (lane == 0) s.mu[c] = mu;
    }
    __syncthreads();

    if (threadIdx.x == 0) math::multiclass_factor(s, structure, classes, math::kPivotTolerance<T>);
    __syncthreads();

    for (int64_t p = threadIdx.x; p < num_points; p += kThreads)
      math::multiclass_points<1>(s, structure, classes, e.target, points + p * classes, 1, p, stride, scale);
    __syncthreads();

    for (int64_t i = warp; i < sizes.phi; i += kWarps) {
      double* phi = s.phi + i * stride;
      double mean = 0;
      for (int64_t p = lane; p < num_points; p += kWarp) mean += phi[p];
      mean = warp_sum(mean) / static_cast<double>(num_points);
      for (int64_t p = lane; p < num_points; p += kWarp) phi[p] -= mean;
      if (lane == 0) s.first[i] = mean;
    }
    __syncthreads();

    for (int64_t i = 0; i < sizes.phi; ++i)
      for (int64_t j = warp; j <= i; j += kWarps) {
        const double *x = s.phi + i * stride, *y = s.phi + j * stride;
        double sum = 0;
        for (int64_t p = lane; p < num_points; p += kWarp) sum += x[p] * y[p];
        sum = warp_sum(sum) / static_cast<double>(num_points);
        if (lane == 0) s.second[i * (i + 1) / 2 + j] = sum;
      }
    __syncthreads();

    for (int64_t i = threadIdx.x; i < classes * classes; i += kThreads) {
      const int64_t c = i / classes, k = i % classes, row = c > k ? c : k, column = c > k ? k : c;
      s.products[i] = s.second[row * (row + 1) / 2 + column] + s.first[c] * s.first[k];
    }
    __syncthreads();

    math::multiclass_finish(s, structure, classes, scale, class_covariance, threadIdx.x, kThreads);
    __syncthreads();

    for (int64_t d = threadIdx.x; d < width; d += kThreads) {
      T mean = 0, variance = 0, spread = 0;
      for (int64_t i = 0; i < sizes.phi; ++i) {
        const double* row = s.second + i * (i + 1) / 2;
        const T a = e.row(i)[d];
        T product = static_cast<T>(row[i]) * a;
        for (int64_t j = 0; j < i; ++j) product += static_cast<T>(2 * row[j]) * e.row(j)[d];
        variance += a * product;
        mean += static_cast<T>(s.first[i]) * a;
      }
      for (int64_t q = 0; q < sizes.spread; ++q) spread += static_cast<T>(s.spread[q]) * e.spread(q)[d];
      emit(output, b, 0, 1, d, width, power, math::checked(mean, math::if_positive(variance + spread, spread)));
    }
    __syncthreads();
  }
}

}  // namespace mtlgrad::cuda
