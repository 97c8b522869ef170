// Device code of the `combine` stem: Gram matrix, dot products and weighted sum of rows spread over many tensors.
#pragma once
#include "compat.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "reduce.cuh"

namespace mtlgrad::cuda {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kWarp, kFinishThreads = 128;
constexpr int kGroup = 8;  // rows whose products with one another fit a thread's registers
constexpr int kCombinePackets = 2;

// A tensor that the rows are spread over, or a piece of one. It is aligned if every pointer to it is a multiple of 16
// bytes and its size is, too.
struct Segment {
  int32_t size;
  int32_t first;  // its first work item
  int32_t aligned;
};

// What a launch works on, passed by value: a kernel's parameters lie in the constant cache, need no copy and no memory
// that would have to outlive the call, and a CUDA graph keeps them. Segment p is segments[p] and the pointers[p *
// stride + t]: one for every row and then, for dots and combine, that of the vector or of the output. All segments, one
// behind the other, are cut into work items of one number of columns; only the last item of a segment may be shorter.
template <int kSegmentCapacity, int kPointerCapacity>
struct Table {
  static constexpr int kSegments = kSegmentCapacity, kPointers = kPointerCapacity;
  int32_t count, stride, items;
  Segment segments[kSegments + 1];  // and a last one that begins where the items end
  const void* pointers[kPointers];
};

// What rows of T are summed in by combine.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ double to_float(double v) { return v; }

template <typename T, typename Sum>
__device__ __forceinline__ T round_to(Sum v) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(v);
  else
    return v;
}

__device__ __forceinline__ uint32_t bits_of(__half v) { return __half_as_ushort(v); }
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }

// What a thread reads at once, 16 bytes. Two half-precision numbers stay together in one register until they are used:
// as an array of them the compiler would give each its own.
template <typename T, bool kPairs = sizeof(T) == 2>
struct alignas(16) Packet {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

template <typename T>
struct __attribute__((may_alias, aligned(16))) Packet<T, true> {
  static constexpr int kSize = 8;
  uint32_t v[4];
};

template <typename T>
__device__ __forceinline__ auto element(const Packet<T>& x, int j) {
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(__ushort_as_half(static_cast<unsigned short>(x.v[j / 2] >> j % 2 * 16)));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __uint_as_float(j % 2 ? x.v[j / 2] & 0xffff0000u : x.v[j / 2] << 16);
  else
    return x.v[j];
}

// Elements are set from the first to the last.
template <typename T>
__device__ __forceinline__ void set_element(Packet<T>& x, int j, T v) {
  if constexpr (sizeof(T) == 2)
    x.v[j / 2] = j % 2 ? x.v[j / 2] | bits_of(v) << 16 : bits_of(v);
  else
    x.v[j] = v;
}

// Packets of each row that a thread asks for before it uses the first, where so many rows are read together: about 128
// bytes in flight for each thread. Columns of a work item: as many as a block asks for at once.
__host__ __device__ constexpr int packets_for(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

template <typename T>
__host__ __device__ constexpr int item_columns(int packets) {
  return kRowThreads * packets * Packet<T>::kSize;
}

// The same for elements that are read one by one.
template <typename T>
__host__ __device__ constexpr int singles_for(int rows) {
  const int words = sizeof(T) == 8 ? 2 : 1;
  return (rows <= 2 ? 8 : rows <= 4 ? 4 : 2) / words;
}

// The work items of part `part` of `parts`, one after the other, and the segment that each lies in. A part is an even
// share of all items, whatever segments they belong to: the first segment is found by bisection, the next ones follow.
template <typename Table>
struct Walk {
  const Table& table;
  int item, end, segment;

  __device__ __forceinline__ Walk(const Table& table, int part, int parts) : table(table) {
    const int each = table.items / parts, more = table.items % parts;
    item = part * each + (part < more ? part : more);
    end = item + each + (part < more);
    int beyond = table.count;
    for (segment = 0; beyond - segment > 1;) {
      const int middle = (segment + beyond) / 2;
      if (table.segments[middle].first <= item)
        segment = middle;
      else
        beyond = middle;
    }
  }

  __device__ __forceinline__ bool more() const { return item < end; }

  __device__ __forceinline__ void next() {
    ++item;
    if (table.segments[segment + 1].first == item) ++segment;
  }
};

// The columns [begin, begin + count) of a segment that an item is; the same for every thread.
struct Span {
  int begin, count;
  bool aligned;
};

template <typename T, int kPackets, typename Table>
__device__ __forceinline__ Span span_of(const Walk<Table>& at) {
  constexpr int kColumns = item_columns<T>(kPackets);
  const Segment& segment = at.table.segments[at.segment];
  const int begin = (at.item - segment.first) * kColumns, left = segment.size - begin;
  return {begin, left < kColumns ? left : kColumns, segment.aligned != 0};
}

template <typename T, typename Table>
__device__ __forceinline__ const T* row_of(const Walk<Table>& at, int t) {
  return static_cast<const T*>(at.table.pointers[at.segment * at.table.stride + t]);
}

// use(v) for each column of kPackets packets from column c of the item on, a block's width apart; all loads are under
// way before the first use. The way out between two pairs of columns is never taken, as packets are whole: it keeps the
// compiler from converting the next pair early, for which many rows leave no registers (sm_90 would spill).
template <typename T, int kRows, int kPackets, typename Row, typename Use>
__device__ __forceinline__ void for_packets(int c, int count, const Row& row, const Use& use) {
  Packet<T> x[kPackets][kRows];
#pragma unroll
  for (int u = 0; u < kPackets; ++u)
#pragma unroll
    for (int t = 0; t < kRows; ++t) x[u][t] = *reinterpret_cast<const Packet<T>*>(row(t, c + u * item_columns<T>(1)));
#pragma unroll
  for (int u = 0; u < kPackets; ++u)
#pragma unroll
    for (int j = 0; j < Packet<T>::kSize; ++j) {
      if (kRows >= kGroup && j > 0 && j % 2 == 0 && c + j >= count) break;
      double v[kRows];
#pragma unroll
      for (int t = 0; t < kRows; ++t) v[t] = element(x[u][t], j);
      use(v);
    }
}

// use(v) for each column of an item that is this thread's, v[t] being the element of row index(t). Where rows are not
// aligned they are read one by one, neighbouring threads reading neighbours: more instructions, but no more memory
// traffic. Zeros may come in place of columns that do not exist. The loops must not be unrolled, for the registers that
// it takes.
template <typename T, int kRows, int kPackets, typename Table, typename Index, typename Use>
__device__ __forceinline__ void for_columns(const Walk<Table>& at, const Index& index, const Use& use) {
  constexpr int kStep = item_columns<T>(1), kSingles = singles_for<T>(kRows);
  const Span span = span_of<T, kPackets>(at);
  const auto row = [&](int t, int c) { return row_of<T>(at, index(t)) + static_cast<unsigned>(span.begin + c); };
  if (span.aligned) {
    int c = static_cast<int>(threadIdx.x) * Packet<T>::kSize;
    if (c + (kPackets - 1) * kStep < span.count) {
      for_packets<T, kRows, kPackets>(c, span.count, row, use);
    } else if constexpr (kPackets > 1) {
#pragma unroll 1
      for (; c < span.count; c += kStep) for_packets<T, kRows, 1>(c, span.count, row, use);
    }
  } else {
#pragma unroll 1
    for (int c = threadIdx.x; c < span.count; c += kSingles * kRowThreads) {
      T x[kSingles][kRows];
#pragma unroll
      for (int u = 0; u < kSingles; ++u)
#pragma unroll
        for (int t = 0; t < kRows; ++t) x[u][t] = c + u * kRowThreads < span.count ? *row(t, c + u * kRowThreads) : T{};
#pragma unroll
      for (int u = 0; u < kSingles; ++u) {
        double v[kRows];
#pragma unroll
        for (int t = 0; t < kRows; ++t) v[t] = to_float(x[u][t]);
        use(v);
      }
    }
  }
}

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

// The products of kRows rows, those of group blockIdx.x, with the vector behind the rows in the table; else as
// gram_kernel.
template <typename T, int kRows, typename Table>
__global__ void __launch_bounds__(kRowThreads, kRows <= 4 ? 3 : 2)
    dots_kernel(const __grid_constant__ Table table, double* workspace) {
  const int part = blockIdx.y, parts = gridDim.y, tasks = table.stride - 1, first = blockIdx.x * kRows;
  double sums[kRows];
#pragma unroll
  for (int t = 0; t < kRows; ++t) sums[t] = 0.0;
  for (Walk<Table> at(table, part, parts); at.more(); at.next())
    for_columns<T, kRows + 1, packets_for(kRows)>(
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

// The weighted sum of all rows, four at a time, in kPackets packets from column c on.
template <typename T, int kPackets, typename Row>
__device__ __forceinline__ void combine_packets(int tasks, int c, const Row& row, const double* weights, T* out) {
  Accumulator<T> sums[kPackets][Packet<T>::kSize] = {};
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
    Packet<T> x;
#pragma unroll
    for (int j = 0; j < Packet<T>::kSize; ++j) set_element(x, j, round_to<T>(sums[u][j]));
    *reinterpret_cast<Packet<T>*>(out + c + u * item_columns<T>(1)) = x;
  }
}

// Weighted sum of all rows into the output behind them in the table. A thread writes the columns that it has read, and
// after it has read them from every row: the output may be one of the rows, and so nothing here is __restrict__.
template <typename T, typename Table>
__global__ void __launch_bounds__(kRowThreads, 3)
    combine_kernel(const __grid_constant__ Table table, const double* weights) {
  constexpr int kStep = item_columns<T>(1), kSingles = 4;
  const int tasks = table.stride - 1;
  for (Walk<Table> at(table, blockIdx.x, gridDim.x); at.more(); at.next()) {
    const Span span = span_of<T, kCombinePackets>(at);
    const auto row = [&](int t, int c) { return row_of<T>(at, t) + static_cast<unsigned>(span.begin + c); };
    T* out = const_cast<T*>(row(tasks, 0));
    if (span.aligned) {
      int c = static_cast<int>(threadIdx.x) * Packet<T>::kSize;
      if (c + (kCombinePackets - 1) * kStep < span.count)
        combine_packets<T, kCombinePackets>(tasks, c, row, weights, out);
      else
#pragma unroll 1
        for (; c < span.count; c += kStep) combine_packets<T, 1>(tasks, c, row, weights, out);
    } else {
#pragma unroll 1
      for (int c = threadIdx.x; c < span.count; c += kSingles * kRowThreads) {
        Accumulator<T> sums[kSingles] = {};
#pragma unroll 4
        for (int t = 0; t < tasks; ++t) {
          const auto weight = static_cast<Accumulator<T>>(weights[t]);
#pragma unroll
          for (int u = 0; u < kSingles; ++u)
            if (c + u * kRowThreads < span.count) sums[u] += weight * to_float(*row(t, c + u * kRowThreads));
        }
#pragma unroll
        for (int u = 0; u < kSingles; ++u)
          if (c + u * kRowThreads < span.count) out[c + u * kRowThreads] = round_to<T>(sums[u]);
      }
    }
  }
}

}  // namespace mtlgrad::cuda
