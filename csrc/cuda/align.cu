#include "align.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace mtlgrad::cuda {

namespace {

// Shared memory for n x n matrices `a` and `v`, n even.
constexpr size_t shared_bytes(size_t n) { return 2 * n * (n + 1) * sizeof(double); }

template <int kThreads, int kPairs>
void launch(const double* gram, const double* preference, Scale scale, double rtol, int tasks, const Alignment& out,
            const Place& place) {
  // 48 KB and less need no leave. It is given for the largest size: threads may ask for different ones at once.
  if (shared_bytes(2 * kPairs) > (32 << 10))
    MTLGRAD_CUDA_CHECK(cudaFuncSetAttribute(align_kernel<kThreads, kPairs>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shared_bytes(2 * kPairs))));
  KERNEL_LAUNCH((align_kernel<kThreads, kPairs>), 1, kThreads, shared_bytes(tasks + tasks % 2),
                static_cast<cudaStream_t>(place.stream), gram, preference, scale, rtol, tasks, out);
}

}  // namespace

int64_t align_workspace(int64_t) { return 0; }

// As many threads as a round has work for, so that for up to 8 tasks a warp and its barriers will do.
void align(const double* gram, const double* preference, Scale scale, double rtol, int64_t tasks, Alignment out,
           double*, Place place) {
  if (tasks < 1 || tasks > kMaxAlignTasks)
    throw std::invalid_argument("align (cuda): 1 to " + std::to_string(kMaxAlignTasks) + " tasks");
  DeviceGuard guard(place.device);
  const int count = static_cast<int>(tasks);
  if (count <= 8)
    launch<32, 4>(gram, preference, scale, rtol, count, out, place);
  else if (count <= 16)
    launch<128, 8>(gram, preference, scale, rtol, count, out, place);
  else
    launch<512, kMaxAlignTasks / 2>(gram, preference, scale, rtol, count, out, place);
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

int64_t merge_workspace(int64_t tasks, int64_t columns) {
  return tasks * tasks + std::max(gram_workspace(tasks, columns), align_workspace(tasks));
}

void merge(DType dtype, Rows rows, const double* preference, Scale scale, double rtol, Alignment alignment,
           void* const* out, double* workspace, Place place) {
  double *products = workspace, *rest = workspace + rows.tasks * rows.tasks;
  {
    DeviceGuard guard(place.device);
    MTLGRAD_CUDA_CHECK(cudaMemsetAsync(products, 0, rows.tasks * rows.tasks * sizeof(double),
                                       static_cast<cudaStream_t>(place.stream)));
  }
  gram(dtype, rows, products, rest, place);
  align(products, preference, scale, rtol, rows.tasks, alignment, rest, place);
  combine(dtype, rows, alignment.weights, out, place);
}

}  // namespace mtlgrad::cuda
