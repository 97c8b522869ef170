#include "moments_multiclass.cuh"

#include "kernels.h"
#include "launch.h"

namespace mtlgrad::cuda {

void multiclass_moments(DType dtype, Features features, const int64_t* targets, MulticlassPosterior posterior,
                        const double* points, int64_t num_points, double* workspace, int64_t slots, Output output,
                        Place place) {
  if (features.batch == 0 || features.width == 0) return;
  constexpr int kThreads = 128;
  DeviceGuard guard(place.device);
  const int64_t slice = multiclass_workspace(posterior.structure, posterior.num_classes, num_points);
  const auto blocks = static_cast<unsigned>(std::min(slots, features.batch));
  for_dtype("multiclass_moments", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto structure) {
      KERNEL_LAUNCH((multiclass_kernel<T, kThreads, decltype(structure)::value>), blocks, kThreads, 0,
                    static_cast<cudaStream_t>(place.stream), features, targets, posterior, points, num_points,
                    workspace, slice, output);
    };
    switch (posterior.structure) {
      case Structure::full: return launch(std::integral_constant<Structure, Structure::full>{});
      case Structure::block: return launch(std::integral_constant<Structure, Structure::block>{});
      default: return launch(std::integral_constant<Structure, Structure::kron>{});
    }
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace mtlgrad::cuda
