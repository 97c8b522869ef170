#include "moments.cuh"

#include "kernels.h"
#include "launch.h"

namespace mtlgrad::cuda {

namespace {
constexpr int kThreads = 128;
}

void regression_moments(DType dtype, Features features, const void* targets, OutputsPosterior posterior, Output output,
                        Place place) {
  if (features.batch == 0 || posterior.outputs == 0 || features.width == 0) return;
  DeviceGuard guard(place.device);
  const dim3 grid(static_cast<unsigned>(features.batch), task_blocks(output, posterior.outputs));
  for_dtype("regression_moments", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    KERNEL_LAUNCH((regression_kernel<T, kThreads>), grid, kThreads, 0, static_cast<cudaStream_t>(place.stream),
                  features, static_cast<const T*>(targets), posterior, output);
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

void binary_moments(DType dtype, Features features, const void* targets, OutputsPosterior posterior, const void* nodes,
                    const void* weights, int64_t num_nodes, Output output, Place place) {
  if (features.batch == 0 || posterior.outputs == 0 || features.width == 0) return;
  DeviceGuard guard(place.device);
  const dim3 grid(static_cast<unsigned>(features.batch), task_blocks(output, posterior.outputs));
  for_dtype("binary_moments", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    KERNEL_LAUNCH((binary_kernel<T, kThreads>), grid, kThreads, 0, static_cast<cudaStream_t>(place.stream), features,
                  static_cast<const T*>(targets), posterior, static_cast<const T*>(nodes),
                  static_cast<const T*>(weights), num_nodes, output);
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

void precision_mean(DType dtype, const void* means, const void* variances, const double* power, void* out,
                    int64_t batch, int64_t tasks, int64_t width, Place place) {
  if (batch == 0 || width == 0) return;
  DeviceGuard guard(place.device);
  for_dtype("precision_mean", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    KERNEL_LAUNCH((precision_mean_kernel<T, kThreads>), blocks_for(batch * width, kThreads), kThreads, 0,
                  static_cast<cudaStream_t>(place.stream), static_cast<const T*>(means),
                  static_cast<const T*>(variances), power, static_cast<T*>(out), batch, tasks, width);
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

void weighted_mean(DType dtype, const void* numerator, const void* denominator, void* out, int64_t batch, int64_t width,
                   Place place) {
  if (batch == 0 || width == 0) return;
  DeviceGuard guard(place.device);
  for_dtype("weighted_mean", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    KERNEL_LAUNCH((weighted_mean_kernel<T, kThreads>), blocks_for(batch * width, kThreads), kThreads, 0,
                  static_cast<cudaStream_t>(place.stream), static_cast<const T*>(numerator),
                  static_cast<const T*>(denominator), static_cast<T*>(out), batch, width);
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace mtlgrad::cuda
