#include "rules.cuh"

#include "kernels.h"
#include "launch.h"

namespace mtlgrad::cuda {

namespace {

// The most float64 of shared memory that any of them needs.
constexpr int64_t kLargestArena = math::simplex_arena(kMaxAlignTasks);
static_assert(kLargestArena >= math::dual_cone_arena(kMaxAlignTasks) &&
              kLargestArena >= math::fair_arena(kMaxAlignTasks) && kLargestArena >= math::imtlg_arena(kMaxAlignTasks) &&
              kLargestArena >= 2 * kMaxAlignTasks * kMaxAlignTasks);

// One warp a block, with so many float64 of shared memory. Leave for more than 48 KB is given for the largest size:
// threads may ask for different ones at once.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int64_t arena, const Place& place, Arguments... arguments) {
  const size_t bytes = static_cast<size_t>(arena) * sizeof(double);
  if (bytes > (48 << 10))
    MTLGRAD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kLargestArena * sizeof(double)));
  KERNEL_LAUNCH((kernel), static_cast<unsigned>(blocks), kWarp, bytes, static_cast<cudaStream_t>(place.stream),
                arguments...);
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

int checked(int64_t tasks) {
  if (tasks < 1 || tasks > kMaxAlignTasks)
    throw std::invalid_argument("rules (cuda): 1 to " + std::to_string(kMaxAlignTasks) + " tasks");
  return static_cast<int>(tasks);
}

}  // namespace

void upgrad(const double* gram, const double* preference, int64_t tasks, double* weights, double* workspace,
            Place place) {
  const int n = checked(tasks);
  DeviceGuard guard(place.device);
  launch(project_task_kernel, n, math::dual_cone_arena(n), place, gram, n, workspace);
  launch(weigh_rows_kernel, 1, 0, place, static_cast<const double*>(workspace), preference, n, weights);
}

void dualproj(const double* gram, const double* preference, int64_t tasks, double* weights, Place place) {
  const int n = checked(tasks);
  DeviceGuard guard(place.device);
  launch(project_preference_kernel, 1, math::dual_cone_arena(n), place, gram, preference, n, weights);
}

void mgda(const double* gram, int64_t tasks, double* weights, Place place) {
  const int n = checked(tasks);
  DeviceGuard guard(place.device);
  launch(least_norm_kernel, 1, math::simplex_arena(n), place, gram, n, weights);
}

void cagrad(const double* gram, double c, int64_t tasks, double* weights, Place place) {
  const int n = checked(tasks);
  DeviceGuard guard(place.device);
  launch(conflict_averse_kernel, 1, math::simplex_arena(n), place, gram, c, n, weights);
}

void fairgrad(const double* gram, double alpha, bool normalize, int64_t tasks, double* weights, Place place) {
  const int n = checked(tasks);
  DeviceGuard guard(place.device);
  launch(fair_kernel, 1, math::fair_arena(n), place, gram, alpha, normalize, n, weights);
}

void imtlg(const double* gram, int64_t tasks, double* weights, Place place) {
  const int n = checked(tasks);
  DeviceGuard guard(place.device);
  launch(equal_projections_kernel, 1, math::imtlg_arena(n), place, gram, n, weights);
}

void pcgrad(const double* gram, int64_t seed, const int64_t* step, int64_t tasks, double* weights, Place place) {
  const int n = checked(tasks);
  DeviceGuard guard(place.device);
  launch(resolve_conflicts_kernel, 1, 2 * tasks * tasks, place, gram, seed, step, n, weights);
}

}  // namespace mtlgrad::cuda
