// Device code of the `rules` stem: a warp works as one of math/rules.h's teams, in shared memory.
#pragma once
#include "align.cuh"
#include "compat.cuh"
#include "kernels.h"
#include "math/rules.h"
#include "reduce.cuh"

namespace mtlgrad::cuda {

struct Warp {
  static constexpr int kLanes = kWarp;
  int lane;
  __device__ __forceinline__ void sync() const { __syncwarp(); }
  __device__ __forceinline__ double sum(double x) const { return warp_sum(x); }
  __device__ __forceinline__ bool any(bool p) const { return __any_sync(0xffffffffu, p); }
  // Every lane gets the same: of equal values the first one's.
  __device__ __forceinline__ math::Extreme largest(math::Extreme e) const {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const double value = __shfl_xor_sync(0xffffffffu, e.value, offset);
      const int at = __shfl_xor_sync(0xffffffffu, e.at, offset);
      e = math::larger(e, {value, at});
    }
    return e;
  }
};

__device__ __forceinline__ Warp this_warp() { return {static_cast<int>(threadIdx.x)}; }

// A block, of one warp, for each task: its projection goes to row blockIdx.x of `rows`, [n, n].
__global__ void __launch_bounds__(kWarp) project_task_kernel(const double* gram, int n, double* rows) {
  DYNAMIC_SHARED(double, arena);
  const Warp team = this_warp();
  const int i = static_cast<int>(blockIdx.x);
  double* v = rows + i * n;
  if (!math::is_finite(team, gram, n)) return math::fill(team, v, n, math::not_a_number<double>());
  math::DualCone<Warp>(team, gram, n, arena).project_task(i, v);
}

// weights_j = sum_i preference_i rows_ij, in the order of the tasks.
__global__ void __launch_bounds__(kWarp)
    weigh_rows_kernel(const double* rows, const double* preference, int n, double* weights) {
  for (int j = static_cast<int>(threadIdx.x); j < n; j += kWarp) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) sum += (preference ? preference[i] : 1.0 / n) * rows[i * n + j];
    weights[j] = sum;
  }
}

__global__ void __launch_bounds__(kWarp)
    project_preference_kernel(const double* gram, const double* preference, int n, double* weights) {
  DYNAMIC_SHARED(double, arena);
  const Warp team = this_warp();
  if (!math::is_finite(team, gram, n)) return math::fill(team, weights, n, math::not_a_number<double>());
  math::DualCone<Warp>(team, gram, n, arena).project_preference(preference, weights);
}

__global__ void __launch_bounds__(kWarp) least_norm_kernel(const double* gram, int n, double* weights) {
  DYNAMIC_SHARED(double, arena);
  math::least_norm(this_warp(), gram, n, arena, weights);
}

__global__ void __launch_bounds__(kWarp) conflict_averse_kernel(const double* gram, double c, int n, double* weights) {
  DYNAMIC_SHARED(double, arena);
  math::conflict_averse(this_warp(), gram, c, n, arena, weights);
}

__global__ void __launch_bounds__(kWarp, 1)
    fair_kernel(const double* gram, double alpha, bool normalize, int n, double* weights) {
  DYNAMIC_SHARED(double, arena);
  math::fair(this_warp(), gram, alpha, normalize, n, arena, weights);
}

// With a row and a column of zeros more if n is odd, as the alignment has them.
__global__ void __launch_bounds__(kWarp) equal_projections_kernel(const double* gram, int n, double* weights) {
  DYNAMIC_SHARED(double, arena);
  __shared__ Turn turns[kMaxAlignTasks / 2];
  const Warp team = this_warp();
  const int even = n + n % 2;
  double *matrix = arena, *vectors = matrix + even * even, *lengths = vectors + even * even, *y = lengths + n;
  double* rest = y + n;
  if (!math::is_finite(team, gram, n)) return math::fill(team, weights, n, math::not_a_number<double>());
  math::cosines(team, gram, n, matrix, lengths);
  if (!math::inverse_times_ones(team, matrix, n, vectors, rest, y)) {
    for (int k = team.lane; k < even * even; k += kWarp) {
      const int i = k / even, j = k % even;
      const bool some = i < n && j < n && lengths[i] > 0.0 && lengths[j] > 0.0;
      matrix[k] = i == j ? 1.0 : some ? math::entry(gram, n, i, j) / lengths[i] / lengths[j] : 0.0;
      vectors[k] = i == j ? 1.0 : 0.0;
    }
    team.sync();
    diagonalise<kWarp, kMaxAlignTasks / 2>(matrix, vectors, even, even, turns);
    team.sync();
    math::pseudo_inverse_times_ones(team, matrix, even + 1, vectors, 1, even, lengths, n, rest, y);
  }
  math::equal_projections(team, y, lengths, n, weights);
}

// A lane for each task, one after the other beyond 32; then their sum, in the order of the tasks.
__global__ void __launch_bounds__(kWarp)
    resolve_conflicts_kernel(const double* gram, int64_t seed, const int64_t* step, int n, double* weights) {
  DYNAMIC_SHARED(double, arena);
  const Warp team = this_warp();
  int* orders = reinterpret_cast<int*>(arena + n * n);
  if (!math::is_finite(team, gram, n)) return math::fill(team, weights, n, math::not_a_number<double>());
  for (int i = team.lane; i < n; i += kWarp)
    math::resolve_conflicts(gram, n, i, seed, *step, orders + i * n, arena + i * n);
  team.sync();
  for (int j = team.lane; j < n; j += kWarp) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) sum += arena[i * n + j];
    weights[j] = sum;
  }
}

}  // namespace mtlgrad::cuda
