// Device code of the `combine` stem: Gram matrix, dot products and weighted sums of rows spread over many tensors.
#pragma once
#include "reduce.cuh"
#include "rows.cuh"

namespace mtlgrad::cuda {

// Sums over a warp of eight values at once: lane l gets that of v[l / 4]. In each of three steps a lane gives half of
// its values away and takes in the other half of its partner's: 9 shuffles, not 40.
template <typename T>
__device__ __forceinline__ T warp_sums(T (&v)[8]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane & (4 * half);
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const T keep = upper ? v[k + half] : v[k], give = upper ? v[k] : v[k + half];
      v[k] = keep + __shfl_xor_sync(0xffffffffu, give, 4 * half);
    }
  }
  v[0] += __shfl_xor_sync(0xffffffffu, v[0], 2);
  v[0] += __shfl_xor_sync(0xffffffffu, v[0], 1);
  return v[0];
}

// workspace[k * parts + part] = the block's sum of sums[k], for k < used: through the warps by shuffles, then through
// shared memory in the order of the warps. The barrier: all warps have written before any thread adds.
template <int kCount>
__device__ __forceinline__ void write_partials(const double (&sums)[kCount], int used, double* workspace, int part,
                                               int parts) {
  constexpr int kChunks = (kCount + 7) / 8;
  __shared__ double partial[kRowWarps][kChunks * 8];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    double v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = chunk * 8 + k < kCount ? sums[chunk * 8 + k] : 0.0;
    const double sum = warp_sums(v);
    if (lane % 4 == 0) partial[warp][chunk * 8 + lane / 4] = sum;
  }
  __syncthreads();
  for (int k = threadIdx.x; k < used; k += kRowThreads) {
    double sum = 0.0;
#pragma unroll
    for (int w = 0; w < kRowWarps; ++w) sum += partial[w][k];
    workspace[int64_t(k) * parts + part] = sum;
  }
}

// Pairs i <= j below n, row by row.
__host__ __device__ __forceinline__ int64_t triangle(int64_t i, int64_t j, int64_t n) {
  return i * n - i * (i - 1) / 2 + j - i;
}

// Where in the workspace the pair of rows i <= j is: the triangle of all pairs, or, with more than kGroup rows,
// kGroup^2 for each pair of groups.
__host__ __device__ __forceinline__ int64_t gram_slot(int64_t i, int64_t j, int64_t tasks) {
  if (tasks <= kGroup) return triangle(i, j, tasks);
  const int64_t groups = (tasks + kGroup - 1) / kGroup;
  return triangle(i / kGroup, j / kGroup, groups) * kGroup * kGroup + i % kGroup * kGroup + j % kGroup;
}

// The products of up to kGroup rows with one another; reads every row once. A block walks over its part of the items
// with all T (T + 1) / 2 sums of its threads in registers; there is no barrier on the way, so that a warp that waits
// for memory holds up no other. A float32 product is exact in float64.
template <typename T, int kTasks, typename Table>
__global__ void __launch_bounds__(kRowThreads, kTasks <= 4 ? 3 : 2)
    gram_kernel(const __grid_constant__ Table table, double* workspace) {
  constexpr int kPairs = kTasks * (kTasks + 1) / 2;
  const int part = blockIdx.x, parts = gridDim.x;
  double sums[kPairs];
#pragma unroll
  for (int k = 0; k < kPairs; ++k) sums[k] = 0.0;
  for (Walk<Table> at(table, part, parts); at.more(); at.next())
    for_columns<T, kTasks, packets_for(kTasks)>(
        at, [](int t) { return t; },
        [&](const double (&v)[kTasks]) {
          int k = 0;
#pragma unroll
          for (int a = 0; a < kTasks; ++a)
#pragma unroll
            for (int b = a; b < kTasks; ++b) sums[k++] += v[a] * v[b];
        });
  write_partials(sums, kPairs, workspace, part, parts);
}

// More rows: blockIdx.x is a pair of groups of kGroup rows, blockIdx.y the part. The blocks of one part, neighbours in
// the order of launch, read the same columns at about the same time, the first from memory, the others mostly from the
// second-level cache. A pair of a group with itself is done like any other, and half of its results are not used. In
// place of rows beyond the last one it reads the last one, without use.
template <typename T, typename Table>
__global__ void __launch_bounds__(kRowThreads)
    gram_groups_kernel(const __grid_constant__ Table table, double* workspace) {
  const int part = blockIdx.y, parts = gridDim.y, tasks = table.stride, groups = (tasks + kGroup - 1) / kGroup;
  int first = 0, second = blockIdx.x;  // of the groups: pair blockIdx.x of the triangle
  while (second >= groups - first) second -= groups - first++;
  second = (first + second) * kGroup, first *= kGroup;  // now of the rows
  const int columns = tasks - second;
  double sums[kGroup * kGroup];
#pragma unroll
  for (int k = 0; k < kGroup * kGroup; ++k) sums[k] = 0.0;
  for (Walk<Table> at(table, part, parts); at.more(); at.next())
    for_columns<T, 2 * kGroup, 1>(
        at, [&](int t) { return min(t < kGroup ? first + t : second + t - kGroup, tasks - 1); },
        [&](const double (&v)[2 * kGroup]) {
#pragma unroll
          for (int b = 0; b < kGroup; ++b)
            if (b < columns) {
#pragma unroll
              for (int a = 0; a < kGroup; ++a) sums[a * kGroup + b] += v[a] * v[kGroup + b];
            }
        });
  workspace += int64_t(blockIdx.x) * kGroup * kGroup * parts;
  write_partials(sums, kGroup * kGroup, workspace, part, parts);
}

// The products of kRows rows, those of group blockIdx.x, with the vector of V behind the rows in the table; else as
// gram_kernel.
template <typename T, typename V, int kRows, typename Table>
__global__ void __launch_bounds__(kRowThreads, kRows <= 4 ? 3 : 2)
    dots_kernel(const __grid_constant__ Table table, double* workspace) {
  const int part = blockIdx.y, parts = gridDim.y, tasks = table.stride - 1, first = blockIdx.x * kRows;
  double sums[kRows];
#pragma unroll
  for (int t = 0; t < kRows; ++t) sums[t] = 0.0;
  for (Walk<Table> at(table, part, parts); at.more(); at.next())
    for_columns<T, kRows + 1, dots_packets<T, V>(kRows), V>(
        at, [&](int t) { return t == kRows ? tasks : min(first + t, tasks - 1); },
        [&](const double (&v)[kRows + 1]) {
#pragma unroll
          for (int t = 0; t < kRows; ++t) sums[t] += v[t] * v[kRows];
        });
  write_partials(sums, min(kRows, tasks - first), workspace + int64_t(first) * parts, part, parts);
}

// The sum of the parts in a fixed order; thread 0 has it to write.
__device__ __forceinline__ double sum_of_parts(const double* slot, int parts) {
  double sum = 0.0;
  for (int k = threadIdx.x; k < parts; k += kFinishThreads) sum += slot[k];
  return block_sum(sum);
}

// A block adds up one pair of rows, blockIdx.y <= blockIdx.x.
template <typename Out>
__global__ void __launch_bounds__(kFinishThreads) gram_finish_kernel(const double* workspace, int parts, Out* out) {
  const int i = blockIdx.y, j = blockIdx.x, tasks = gridDim.x;
  if (j < i) return;  // the whole block
  const double sum = sum_of_parts(workspace + gram_slot(i, j, tasks) * parts, parts);
  if (threadIdx.x > 0) return;
  out[int64_t(i) * tasks + j] += sum;
  if (i != j) out[int64_t(j) * tasks + i] += sum;
}

template <typename Out>
__global__ void __launch_bounds__(kFinishThreads) dots_finish_kernel(const double* workspace, int parts, Out* out) {
  const double sum = sum_of_parts(workspace + int64_t(blockIdx.x) * parts, parts);
  if (threadIdx.x == 0) out[blockIdx.x] += sum;
}

// sums[u][j] += weight * element for rows first .. first + kRows - 1; all loads are under way before the first use.
template <typename T, int kRows, int kPackets, typename Sum, typename Row>
__device__ __forceinline__ void add_rows(Sum (&sums)[kPackets][Packet<T>::kSize], int first, int c, const Row& row,
                                         const double* weights) {
  Packet<T> x[kRows][kPackets];
#pragma unroll
  for (int t = 0; t < kRows; ++t)
#pragma unroll
    for (int u = 0; u < kPackets; ++u)
      x[t][u] = *reinterpret_cast<const Packet<T>*>(row(first + t, c + u * item_columns<T>(1)));
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    const Sum weight = static_cast<Sum>(weights[first + t]);
#pragma unroll
    for (int u = 0; u < kPackets; ++u)
#pragma unroll
      for (int j = 0; j < Packet<T>::kSize; ++j) sums[u][j] += weight * element(x[t][u], j);
  }
}

// The weighted sum of all rows, four at a time, on top of base if there is one, in kPackets packets from column c on.
template <typename T, bool kBase, int kPackets, typename Row, typename B>
__device__ __forceinline__ void add_all_rows(int tasks, int c, const Row& row, const double* weights, const B* base,
                                             B* out) {
  constexpr int kStep = item_columns<T>(1);
  Accumulator<T, kBase> sums[kPackets][Packet<T>::kSize] = {};
  if constexpr (kBase) {
#pragma unroll
    for (int u = 0; u < kPackets; ++u) {
      const auto x = load_packets<T>(base + c + u * kStep);
#pragma unroll
      for (int j = 0; j < Packet<T>::kSize; ++j) sums[u][j] = element(x, j);
    }
  }
  int first = 0;
#pragma unroll 1
  for (; first + 4 <= tasks; first += 4) add_rows<T, 4>(sums, first, c, row, weights);
  switch (tasks - first) {
    case 3: add_rows<T, 3>(sums, first, c, row, weights); break;
    case 2: add_rows<T, 2>(sums, first, c, row, weights); break;
    case 1: add_rows<T, 1>(sums, first, c, row, weights); break;
    default: break;
  }
#pragma unroll
  for (int u = 0; u < kPackets; ++u) {
    Packet<B> x;
#pragma unroll
    for (int j = 0; j < Packet<T>::kSize; ++j) {
      set_element(x, j % x.kSize, round_to<B>(sums[u][j]));
      if (j % x.kSize == x.kSize - 1) *reinterpret_cast<Packet<B>*>(out + c + u * kStep + j / x.kSize * x.kSize) = x;
    }
  }
}

// Weighted sum of all rows into the output behind them in the table; for add_weighted on top of the base that is between
// the two. A thread writes the columns that it has read, and after it has read them from every row: the output may be
// one of the rows, or base, and so nothing here is __restrict__.
template <typename T, typename B, bool kBase, typename Table>
__global__ void __launch_bounds__(kRowThreads, 3)
    combine_kernel(const __grid_constant__ Table table, const double* weights) {
  using Sum = Accumulator<T, kBase>;
  constexpr int kPackets = combine_packets<T, kBase>(), kStep = item_columns<T>(1), kSingles = 4;
  const int tasks = table.stride - (kBase ? 2 : 1);
  for (Walk<Table> at(table, blockIdx.x, gridDim.x); at.more(); at.next()) {
    const Span span = span_of<T, kPackets>(at);
    const auto row = [&](int t, int c) { return row_of<T>(at, t) + static_cast<unsigned>(span.begin + c); };
    const B* base = kBase ? row_of<B>(at, tasks) + static_cast<unsigned>(span.begin) : nullptr;
    B* out = const_cast<B*>(row_of<B>(at, table.stride - 1)) + static_cast<unsigned>(span.begin);
    if (span.aligned) {
      int c = static_cast<int>(threadIdx.x) * Packet<T>::kSize;
      if (c + (kPackets - 1) * kStep < span.count)
        add_all_rows<T, kBase, kPackets>(tasks, c, row, weights, base, out);
      else
#pragma unroll 1
        for (; c < span.count; c += kStep) add_all_rows<T, kBase, 1>(tasks, c, row, weights, base, out);
    } else {
#pragma unroll 1
      for (int c = threadIdx.x; c < span.count; c += kSingles * kRowThreads) {
        Sum sums[kSingles] = {};
        if constexpr (kBase) {
#pragma unroll
          for (int u = 0; u < kSingles; ++u)
            if (c + u * kRowThreads < span.count) sums[u] = to_float(base[c + u * kRowThreads]);
        }
#pragma unroll 4
        for (int t = 0; t < tasks; ++t) {
          const auto weight = static_cast<Sum>(weights[t]);
#pragma unroll
          for (int u = 0; u < kSingles; ++u)
            if (c + u * kRowThreads < span.count) sums[u] += weight * to_float(*row(t, c + u * kRowThreads));
        }
#pragma unroll
        for (int u = 0; u < kSingles; ++u)
          if (c + u * kRowThreads < span.count) out[c + u * kRowThreads] = round_to<B>(sums[u]);
      }
    }
  }
}

}  // namespace mtlgrad::cuda
