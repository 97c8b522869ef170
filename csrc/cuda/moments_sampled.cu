#include "moments_sampled.cuh"

#include "kernels.h"
#include "launch.h"

namespace mtlgrad::cuda {

namespace {

constexpr int kThreads = 128;

// Blocks of a launch that are worth larger tiles: one for each multiprocessor of an H100 or H200. A constant, and the
// sums of an example and feature are the same whatever the tile.
#ifdef MTLGRAD_EMULATE
constexpr int64_t kEnoughBlocks = 3;  // tests are to meet all tiles
#else
constexpr int64_t kEnoughBlocks = 132;
#endif

// launch(tile, its grid) for the largest of these tiles that makes enough blocks, or else the last.
template <typename Tile, typename... Smaller, typename Launch>
void for_tile(int64_t batch, int64_t width, unsigned task_blocks, const Launch& launch) {
  const int64_t columns = (width + Tile::kFeatures - 1) / Tile::kFeatures;
  const int64_t rows = (batch + Tile::kExamples - 1) / Tile::kExamples;
  if constexpr (sizeof...(Smaller) > 0)
    if (columns * rows * task_blocks < kEnoughBlocks) return for_tile<Smaller...>(batch, width, task_blocks, launch);
  if (rows > kMaxGridY)
    throw std::invalid_argument("sampled_moments (cuda): at most " + std::to_string(kMaxGridY * Tile::kExamples) +
                                " examples");
  launch(Tile{}, dim3(static_cast<unsigned>(columns), static_cast<unsigned>(rows), task_blocks));
}

}  // namespace

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
                     int64_t num_samples, int64_t classes, int64_t width, Output output, Place place) {
  if (batch == 0 || width == 0) return;
  DeviceGuard guard(place.device);
  const bool binary = likelihood == Likelihood::binary;
  for_dtype("sampled_moments", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kPacket = 16 / sizeof(T);
    for_tile<SampledTile<T, 2 * kPacket, kPacket>, SampledTile<T, kPacket, kPacket / 2>, SampledTile<T, 2, 1>>(
        batch, width, task_blocks(output, binary ? classes : 1), [&](auto tile, const dim3& grid) {
          using Tile = decltype(tile);
          KERNEL_LAUNCH((sampled_kernel<T, Tile>), grid, Tile::kThreads, 0, static_cast<cudaStream_t>(place.stream),
                        static_cast<const T*>(residuals), static_cast<const T*>(samples), batch, num_samples, classes,
                        width, binary, output);
        });
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace mtlgrad::cuda
