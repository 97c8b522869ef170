// How the kernels of the `combine` stem read T rows spread over many tensors: tables of pointers passed by value, an
// even share of the columns for every block, 16 bytes at a time.
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

// A tensor that the rows are spread over, or a piece of one. It is aligned if every pointer to it is a multiple of 16
// bytes and its size is, too.
struct Segment {
  int32_t size;
  int32_t first;  // its first work item
  int32_t aligned;
};

// What a launch works on, passed by value: a kernel's parameters lie in the constant cache, need no copy and no memory
// that would have to outlive the call, and a CUDA graph keeps them. Segment p is segments[p] and the pointers[p *
// stride + t]: one for every row, then the vector's (dots), base's (add_weighted) and the output's (combine, add_weighted). All
// segments, one behind the other, are cut into work items of one number of columns; only the last item of a segment may
// be shorter.
template <int kSegmentCapacity, int kPointerCapacity>
struct Table {
  static constexpr int kSegments = kSegmentCapacity, kPointers = kPointerCapacity;
  int32_t count, stride, items;
  Segment segments[kSegments + 1];  // and a last one that begins where the items end
  const void* pointers[kPointers];
};

// What rows of T are summed in: by combine, and on top of a base by add_weighted.
template <typename T, bool kBase = false>
using Accumulator = std::conditional_t<kBase || std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ double to_float(double v) { return v; }

template <typename T, typename Sum>
__device__ __forceinline__ T round_to(Sum v) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(static_cast<float>(v));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(v));
  else
    return static_cast<T>(v);
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

// As many elements of V as a packet of T has; V is as wide as T, or wider.
template <typename T, typename V>
struct Packets {
  static constexpr int kEach = Packet<V>::kSize, kCount = Packet<T>::kSize / kEach;
  Packet<V> v[kCount];
};

template <typename T, typename V>
__device__ __forceinline__ Packets<T, V> load_packets(const V* at) {
  Packets<T, V> x;
#pragma unroll
  for (int k = 0; k < x.kCount; ++k) x.v[k] = *reinterpret_cast<const Packet<V>*>(at + k * x.kEach);
  return x;
}

template <typename T, typename V>
__device__ __forceinline__ auto element(const Packets<T, V>& x, int j) {
  return element(x.v[j / x.kEach], j % x.kEach);
}

// Packets of each row that a thread asks for before it uses the first, where so many rows are read together: about 128
// bytes in flight for each thread. Columns of a work item: as many as a block asks for at once.
__host__ __device__ constexpr int packets_for(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

// The same for dots, whose vector may be as wide as two rows; and for combine and add_weighted, where sixteen float64 sums
// beside four rows would be too much for the registers.
template <typename T, typename V>
__host__ __device__ constexpr int dots_packets(int rows) {
  return packets_for(rows + static_cast<int>(sizeof(V) / sizeof(T)) - 1);
}

template <typename T, bool kBase>
__host__ __device__ constexpr int combine_packets() {
  return kBase && sizeof(T) == 2 ? 1 : 2;
}

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
// way before the first use. The last row is read by last(c) where its type V is another. The way out between two pairs
// of columns is never taken, as packets are whole: it keeps the compiler from converting the next pair early, for which
// many rows leave no registers (sm_90 would spill).
template <typename T, int kRows, int kPackets, typename V, typename Row, typename Last, typename Use>
__device__ __forceinline__ void for_packets(int c, int count, const Row& row, const Last& last, const Use& use) {
  constexpr int kSame = std::is_same_v<T, V> ? kRows : kRows - 1;
  Packet<T> x[kPackets][kSame];
  [[maybe_unused]] Packets<T, V> y[kPackets];
#pragma unroll
  for (int u = 0; u < kPackets; ++u) {
#pragma unroll
    for (int t = 0; t < kSame; ++t) x[u][t] = *reinterpret_cast<const Packet<T>*>(row(t, c + u * item_columns<T>(1)));
    if constexpr (kSame < kRows) y[u] = load_packets<T>(last(c + u * item_columns<T>(1)));
  }
#pragma unroll
  for (int u = 0; u < kPackets; ++u)
#pragma unroll
    for (int j = 0; j < Packet<T>::kSize; ++j) {
      if (kRows >= kGroup && j > 0 && j % 2 == 0 && c + j >= count) break;
      double v[kRows];
#pragma unroll
      for (int t = 0; t < kSame; ++t) v[t] = element(x[u][t], j);
      if constexpr (kSame < kRows) v[kSame] = element(y[u], j);
      use(v);
    }
}

// use(v) for each column of an item that is this thread's, v[t] being the element of row index(t), the last of type V.
// Where rows are not aligned they are read one by one, neighbouring threads reading neighbours: more instructions, but
// no more memory traffic. Zeros may come in place of columns that do not exist. The loops must not be unrolled, for the
// registers that it takes.
template <typename T, int kRows, int kPackets, typename V = T, typename Table, typename Index, typename Use>
__device__ __forceinline__ void for_columns(const Walk<Table>& at, const Index& index, const Use& use) {
  constexpr int kStep = item_columns<T>(1), kSingles = singles_for<T>(kRows);
  constexpr int kSame = std::is_same_v<T, V> ? kRows : kRows - 1;
  const Span span = span_of<T, kPackets>(at);
  const auto row = [&](int t, int c) { return row_of<T>(at, index(t)) + static_cast<unsigned>(span.begin + c); };
  const auto last = [&](int c) { return row_of<V>(at, index(kRows - 1)) + static_cast<unsigned>(span.begin + c); };
  if (span.aligned) {
    int c = static_cast<int>(threadIdx.x) * Packet<T>::kSize;
    if (c + (kPackets - 1) * kStep < span.count) {
      for_packets<T, kRows, kPackets, V>(c, span.count, row, last, use);
    } else if constexpr (kPackets > 1) {
#pragma unroll 1
      for (; c < span.count; c += kStep) for_packets<T, kRows, 1, V>(c, span.count, row, last, use);
    }
  } else {
#pragma unroll 1
    for (int c = threadIdx.x; c < span.count; c += kSingles * kRowThreads) {
      T x[kSingles][kSame];
      [[maybe_unused]] V y[kSingles];
#pragma unroll
      for (int u = 0; u < kSingles; ++u) {
#pragma unroll
        for (int t = 0; t < kSame; ++t) x[u][t] = c + u * kRowThreads < span.count ? *row(t, c + u * kRowThreads) : T{};
        if constexpr (kSame < kRows) y[u] = c + u * kRowThreads < span.count ? *last(c + u * kRowThreads) : V{};
      }
#pragma unroll
      for (int u = 0; u < kSingles; ++u) {
        double v[kRows];
#pragma unroll
        for (int t = 0; t < kSame; ++t) v[t] = to_float(x[u][t]);
        if constexpr (kSame < kRows) v[kSame] = to_float(y[u]);
        use(v);
      }
    }
  }
}

}  // namespace mtlgrad::cuda
