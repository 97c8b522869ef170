// Device code of the `align` stem: the eigenproblem of a few tasks' Gram matrix, and the alignment from it.
#pragma once
#include "compat.cuh"
#include "kernels.h"
#include "math/align.h"
#include "reduce.cuh"

namespace mtlgrad::cuda {

// A barrier for the block, which may be a single warp: that needs no more than a warp's.
template <int kThreads>
__device__ __forceinline__ void block_barrier() {
  if constexpr (kThreads == kWarp)
    __syncwarp();
  else
    __syncthreads();
}

// The same, and whether `p` holds in any thread. A vote alone would not order the warp's memory accesses.
template <int kThreads>
__device__ __forceinline__ bool block_any(bool p) {
  if constexpr (kThreads == kWarp) {
    __syncwarp();
    return __any_sync(0xffffffffu, p);
  } else {
    return __syncthreads_or(p);
  }
}

struct Turn {
  math::Rotation by;
  int p, q;
};

// Pair k < n / 2 of round `round` < n - 1 of a tournament between n players, n even: in each round everyone meets
// someone, in all of them everyone everyone. The last player stays, the others move on by one.
__device__ __forceinline__ Turn pair_of(int k, int round, int n) {
  const int others = n - 1, up = round + k, down = round - k;
  const int p = k == 0 ? others : up < others ? up : up - others;
  return {{1.0, 0.0, 0.0}, p, down < 0 ? down + others : down};
}

// What the turns of pair i and of pair j do to the 2 x 2 entries in the rows of i and the columns of j, and by symmetry
// to those in the rows of j and the columns of i. Nobody else reads or writes any of them.
__device__ __forceinline__ void turn_entries(double* a, int stride, const Turn& i, const Turn& j) {
  const double pp = a[i.p * stride + j.p], pq = a[i.p * stride + j.q];
  const double qp = a[i.q * stride + j.p], qq = a[i.q * stride + j.q];
  const double c = j.by.c, s = j.by.s;
  const double pp1 = c * pp - s * pq, pq1 = s * pp + c * pq;
  const double qp1 = c * qp - s * qq, qq1 = s * qp + c * qq;
  const double d = i.by.c, r = i.by.s;
  a[i.p * stride + j.p] = a[j.p * stride + i.p] = d * pp1 - r * qp1;
  a[i.q * stride + j.p] = a[j.p * stride + i.q] = r * pp1 + d * qp1;
  a[i.p * stride + j.q] = a[j.q * stride + i.p] = d * pq1 - r * qq1;
  a[i.q * stride + j.q] = a[j.q * stride + i.q] = r * pq1 + d * qq1;
}

// Turns `a`, n x n with n even, to diagonal and `v` to its eigenvectors, in columns. The n / 2 pairs of a round have no
// index in common, so that their rotations are one step:
//   the first n / 2 threads find the rotations;
//   vote: they are written before any thread reads them, and if there is none the round is over;
//   a thread each for the entries that two pairs share, and for a row of `v` and a pair;
//   barrier: `a` is written before the next round reads it, and `turns` has been read before that overwrites it.
// kPairs, the most pairs there can be, divides kThreads.
template <int kThreads, int kPairs>
__device__ __forceinline__ void diagonalise(double* a, double* v, int n, int stride, Turn (&turns)[kPairs]) {
  const int pairs = n / 2, thread = static_cast<int>(threadIdx.x), j = thread % kPairs, first = thread / kPairs;
  for (int sweep = 0; sweep < math::kMaxSweeps; ++sweep) {
    bool turned = false;
    for (int round = 0; round < n - 1; ++round) {
      bool turns_mine = false;
      if (thread < pairs) {
        Turn turn = pair_of(thread, round, n);
        const double app = a[turn.p * stride + turn.p], aqq = a[turn.q * stride + turn.q];
        const double apq = a[turn.p * stride + turn.q];
        turns_mine = !math::negligible(app, aqq, apq);
        if (turns_mine) turn.by = math::rotation(app, aqq, apq);
        turns[thread] = turn;
      }
      if (!block_any<kThreads>(turns_mine)) continue;
      turned = true;
      if (j < pairs) {
        const Turn turn = turns[j];
        for (int i = first; i < j; i += kThreads / kPairs) turn_entries(a, stride, turns[i], turn);
        if (j % (kThreads / kPairs) == first && turn.by.t != 0.0) {  // i = j, where there is a turn
          const double shift = turn.by.t * a[turn.p * stride + turn.q];
          a[turn.p * stride + turn.p] -= shift;
          a[turn.q * stride + turn.q] += shift;
          a[turn.p * stride + turn.q] = a[turn.q * stride + turn.p] = 0.0;
        }
        for (int k = first; k < n; k += kThreads / kPairs) {
          const double p = v[k * stride + turn.p], q = v[k * stride + turn.q];
          v[k * stride + turn.p] = turn.by.c * p - turn.by.s * q;
          v[k * stride + turn.q] = turn.by.s * p + turn.by.c * q;
        }
      }
      block_barrier<kThreads>();
    }
    if (!turned) return;
  }
}

// One block does it all, in shared memory: the matrix and its eigenvectors, with a row and a column of zeros if T is
// odd and a stride that is odd. The upper triangle of `gram` counts.
template <int kThreads, int kPairs>
__global__ void __launch_bounds__(kThreads)
    align_kernel(const double* __restrict__ gram, const double* __restrict__ preference, Scale scale, double rtol,
                 int tasks, Alignment out) {
  __shared__ Turn turns[kPairs];
  __shared__ double values[2 * kPairs], descending[2 * kPairs], factors[2 * kPairs], wanted[2 * kPairs];
  DYNAMIC_SHARED(double, matrices);
  const int thread = static_cast<int>(threadIdx.x), n = tasks + tasks % 2, stride = n + 1;
  double *a = matrices, *v = matrices + n * stride;

  // A thread loads and scales the same entries i <= j and their mirror images; of the others' it needs the diagonal.
  // Barrier 1: that is there; barrier 2: all have read it before it is scaled; vote: all is scaled.
  bool finite = true;
  for (int k = thread; k < n * n; k += kThreads) {
    const int i = k / n, j = k % n;
    v[i * stride + j] = i == j ? 1.0 : 0.0;
    if (i > j) continue;
    const double x = j < tasks ? gram[i * tasks + j] : 0.0;
    finite = finite && isfinite(x);
    a[i * stride + j] = a[j * stride + i] = x;
  }
  if (thread < tasks) wanted[thread] = preference ? preference[thread] : 1.0;
  block_barrier<kThreads>();
  double largest = 0.0;
  for (int i = 0; i < tasks; ++i) largest = a[i * stride + i] > largest ? a[i * stride + i] : largest;
  block_barrier<kThreads>();
  for (int k = thread; k < n * n; k += kThreads) {
    const int i = k / n, j = k % n;
    if (i > j) continue;
    const double x = largest > 0.0 ? a[i * stride + j] / largest : 0.0;
    finite = finite && isfinite(x);
    a[i * stride + j] = a[j * stride + i] = x;
  }
  if (block_any<kThreads>(!finite)) {
    const double nan = math::not_a_number<double>();
    for (int k = thread; k < tasks * tasks; k += kThreads) out.transform[k] = nan;
    if (thread < tasks) out.weights[thread] = out.singular_values[thread] = nan;
    if (thread == 0) *out.condition_number = nan, *out.rank = -1;
    return;
  }

  diagonalise<kThreads>(a, v, n, stride, turns);

  // Each barrier: the array above it is complete before the lines below it read what other threads wrote.
  if (thread < tasks) values[thread] = a[thread * stride + thread] > 0.0 ? a[thread * stride + thread] : 0.0;
  block_barrier<kThreads>();
  if (thread < tasks) descending[math::place_of(values, thread, tasks)] = values[thread];
  block_barrier<kThreads>();
  const int rank = static_cast<int>(math::numerical_rank(descending, tasks, rtol));
  if (thread < tasks) {
    const bool kept = rank > 0 && values[thread] >= descending[rank - 1];
    factors[thread] = kept ? sqrt(math::scale_square(descending, rank, static_cast<int>(scale)) / values[thread]) : 0.0;
    out.singular_values[thread] = sqrt(descending[thread]) * sqrt(largest);
  }
  if (thread == 0) {
    *out.rank = rank;
    *out.condition_number = math::condition_number(descending[0], descending[tasks - 1]);
  }
  block_barrier<kThreads>();
  for (int k = thread; k < tasks * tasks; k += kThreads) {
    const int i = k / tasks, j = k % tasks;
    double sum = rank == 0 && i == j ? 1.0 : 0.0;
    for (int l = 0; l < tasks; ++l) sum += factors[l] * (v[i * stride + l] * v[j * stride + l]);
    out.transform[k] = a[i * stride + j] = sum;
  }
  block_barrier<kThreads>();
  if (thread >= tasks) return;
  double weight = 0.0;
  for (int j = 0; j < tasks; ++j) weight += a[thread * stride + j] * wanted[j];
  out.weights[thread] = weight;
}

}  // namespace mtlgrad::cuda
