#include "moments_sampled.cuh"

#include "kernels.h"
#include "launch.h"

namespace mtlgrad::cuda {

namespace {
constexpr int kThreads = 128;
}

void sample_residuals(DType dtype, Likelihood likelihood, void* logits, const void* targets, int64_t batch,
                      int64_t samples, int64_t classes, Place place) {
  if (batch * samples * classes == 0) return;
  DeviceGuard guard(place.device);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  for_dtype("sample_residuals", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (likelihood == Likelihood::binary)
      KERNEL_LAUNCH((binary_residuals_kernel<T, kThreads>), blocks_for(batch * samples * classes, kThreads), kThreads,
                    0, stream, static_cast<T*>(logits), static_cast<const T*>(targets), batch, samples, classes);
    else
      KERNEL_LAUNCH((multiclass_residuals_kernel<T, kThreads>), blocks_for(batch * samples, kThreads), kThreads, 0,
                    stream, static_cast<T*>(logits), static_cast<const int64_t*>(targets), batch, samples, classes);
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

void sampled_moments(DType dtype, Likelihood likelihood, const void* residuals, const void* samples, int64_t batch,
                     int64_t num_samples, int64_t classes, int64_t width, Sink sink, Place place) {
  if (batch == 0 || width == 0) return;
  constexpr int kExamples = 8, kTile = 128;
  DeviceGuard guard(place.device);
  const bool binary = likelihood == Likelihood::binary;
  constexpr int64_t kPerLaunch = kMaxGridY * kExamples;
  for_dtype("sampled_moments", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (batch > kPerLaunch) throw std::invalid_argument("sampled_moments (cuda): at most 524,280 examples");
    const dim3 grid(static_cast<unsigned>((width + kThreads - 1) / kThreads),
                    static_cast<unsigned>((batch + kExamples - 1) / kExamples),
                    task_blocks(sink, binary ? classes : 1));
    KERNEL_LAUNCH((sampled_kernel<T, kThreads, kExamples, kTile>), grid, kThreads, 0,
                  static_cast<cudaStream_t>(place.stream), static_cast<const T*>(residuals),
                  static_cast<const T*>(samples), batch, num_samples, classes, width, binary, sink);
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace mtlgrad::cuda
