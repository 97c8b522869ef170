#include "combine.cuh"

#include <vector>

#include "kernels.h"
#include "launch.h"

namespace mtlgrad::cuda {

namespace {

// A kernel's parameters end at 4 KB, from CUDA 12.1 on at 32,764 bytes. The large table takes most models in one launch
// (400 tensors of up to 8 tasks); but all of it travels with every launch, so few tensors go in a small one.
using SmallTable = Table<48, 420>;
#if CUDART_VERSION >= 12010
using LargeTable = Table<400, 3400>;
static_assert(sizeof(LargeTable) <= 32764 - 64);
#else
using LargeTable = SmallTable;
#endif
static_assert(sizeof(SmallTable) <= 4096 - 64);

// Blocks of a launch, the most that leave partial sums: eight for each of the 132 multiprocessors of an H100 or H200;
// two at a time on each of an A100's 108 they are 4.9 waves. A constant, so that the order of sums is the same on every
// device.
#ifdef MTLGRAD_EMULATE
constexpr int64_t kMaxBlocks = 16;  // tests are to meet blocks that go from one tensor to the next
#else
constexpr int64_t kMaxBlocks = 8 * 132;
#endif

int64_t groups_of(int64_t tasks) { return (tasks + kGroup - 1) / kGroup; }
int64_t pairs_of(int64_t groups) { return groups * (groups + 1) / 2; }

// Parts that the columns are cut into for each of `passes` groups or pairs of groups.
int64_t max_parts(int64_t passes) { return std::max<int64_t>(kMaxBlocks / passes, 1); }

// body(typed null pointer) for the type behind `dtype`.
template <typename Body>
void for_row_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(static_cast<float*>(nullptr));
    case DType::f16: return body(static_cast<__half*>(nullptr));
    case DType::bf16: return body(static_cast<__nv_bfloat16*>(nullptr));
    case DType::f64: return body(static_cast<double*>(nullptr));
  }
}

// The same for rows and what goes with them, which is of their type, or float32 for bfloat16 rows.
template <typename Body>
void for_row_dtypes(const char* kernel, DType rows, DType other, const Body& body) {
  if (rows == DType::bf16 && other == DType::f32)
    return body(static_cast<__nv_bfloat16*>(nullptr), static_cast<float*>(nullptr));
  if (rows != other) throw std::invalid_argument(std::string(kernel) + " (cuda): these types do not go together");
  for_row_dtype(rows, [&](auto* type) { body(type, type); });
}

// body(integral constant) for a number of tasks up to kGroup; kGroup for more.
template <typename Body>
void for_tasks(int64_t tasks, const Body& body) {
  switch (tasks) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    default: return body(std::integral_constant<int, kGroup>{});
  }
}

// The same for dots, which reads a last row twice (from the cache) rather than have a kernel for every number of rows.
template <typename Body>
void for_dots_rows(int64_t tasks, const Body& body) {
  if (tasks == 1) return body(std::integral_constant<int, 1>{});
  if (tasks == 2) return body(std::integral_constant<int, 2>{});
  if (tasks <= 4) return body(std::integral_constant<int, 4>{});
  body(std::integral_constant<int, kGroup>{});
}

// Segments are short enough for 32-bit arithmetic; a tensor below kFewColumns is not worth two of them.
constexpr int64_t kMaxSegment = 1 << 30, kFewColumns = 4 * kRowThreads;

// What goes with the rows: a pointer for every tensor, to elements of this many bytes.
struct Other {
  const void* const* tensors;
  size_t size;
};
using Others = std::vector<Other>;

// Fills tables with the tensors that are not empty, `others` behind the rows, and calls launch(table) for each that is
// full and for the last. What is aligned of a tensor and what is left of it are two segments.
template <typename T, typename Table, typename Launch>
void fill_tables(const Rows& rows, const Others& others, int columns, const Launch& launch) {
  Table table;
  table.count = table.items = 0;
  table.stride = static_cast<int32_t>(rows.tasks + static_cast<int64_t>(others.size()));
  const auto flush = [&] {
    table.segments[table.count].first = table.items;
    launch(table);
    table.count = table.items = 0;
  };
  for (int64_t p = 0; p < rows.tensors; ++p) {
    const void* const* row = rows.data + p * rows.tasks;
    uintptr_t bits = 0;
    for (const Other& other : others) bits |= reinterpret_cast<uintptr_t>(other.tensors[p]);
    for (int64_t t = 0; t < rows.tasks; ++t) bits |= reinterpret_cast<uintptr_t>(row[t]);
    const int64_t size = rows.sizes[p], left = size % Packet<T>::kSize;
    const int64_t aligned = bits % 16 || (left && size < kFewColumns) ? 0 : size - left;
    for (int64_t begin = 0, end; begin < size; begin = end) {
      end = std::min(begin + kMaxSegment, begin < aligned ? aligned : size);
      if (table.count == Table::kSegments || (table.count + 1) * table.stride > Table::kPointers) flush();
      const void** pointers = table.pointers + table.count * table.stride;
      for (int64_t t = 0; t < rows.tasks; ++t) *pointers++ = static_cast<const T*>(row[t]) + begin;
      for (const Other& other : others)
        *pointers++ = static_cast<const char*>(other.tensors[p]) + begin * static_cast<int64_t>(other.size);
      table.segments[table.count++] = {static_cast<int32_t>(end - begin), table.items, begin < aligned};
      table.items += static_cast<int32_t>((end - begin + columns - 1) / columns);
    }
  }
  if (table.count) flush();
}

template <typename T, typename Launch>
void for_tables(const char* kernel, const Rows& rows, const Others& others, int columns, const Launch& launch) {
  const auto behind = static_cast<int64_t>(others.size()), stride = rows.tasks + behind;
  if (stride > LargeTable::kPointers)
    throw std::invalid_argument(std::string(kernel) + " (cuda): at most " +
                                std::to_string(LargeTable::kPointers - behind) + " tasks");
  // twice: a tensor may be two segments
  if (2 * rows.tensors <= SmallTable::kSegments && 2 * rows.tensors * stride <= SmallTable::kPointers)
    fill_tables<T, SmallTable>(rows, others, columns, launch);
  else
    fill_tables<T, LargeTable>(rows, others, columns, launch);
}

unsigned parts_for(int64_t items, int64_t limit) { return static_cast<unsigned>(std::min(items, limit)); }

template <typename T, typename B, bool kBase>
void weighted_sums(const char* kernel, const Rows& rows, const Others& others, const double* weights, Place place) {
  if (rows.tensors == 0) return;
  DeviceGuard guard(place.device);
  for_tables<T>(kernel, rows, others, item_columns<T>(combine_packets<T, kBase>()), [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    KERNEL_LAUNCH((combine_kernel<T, B, kBase, Table>), parts_for(table.items, kMaxBlocks), kRowThreads, 0,
                  static_cast<cudaStream_t>(place.stream), table, weights);
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

// No more parts than columns, as every item has one at least.
int64_t gram_workspace(int64_t tasks, int64_t columns) {
  if (tasks <= 0) return 0;
  const int64_t pairs = pairs_of(groups_of(tasks));
  return (tasks <= kGroup ? pairs_of(tasks) : pairs * kGroup * kGroup) * std::min(max_parts(pairs), columns);
}

int64_t dots_workspace(int64_t tasks, int64_t columns) {
  return tasks <= 0 ? 0 : tasks * std::min(max_parts(groups_of(tasks)), columns);
}

// Every table is two launches, the sums of the parts and their sum; the next table's use the workspace after it.
void gram(DType dtype, Rows rows, double* out, double* workspace, Place place) {
  if (rows.tasks == 0 || rows.tensors == 0) return;
  DeviceGuard guard(place.device);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const auto tasks = static_cast<unsigned>(rows.tasks);
  const int64_t pairs = pairs_of(groups_of(tasks)), limit = max_parts(pairs);
  for_row_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_tasks(tasks, [&](auto constant) {
      constexpr int kTasks = decltype(constant)::value;
      const int packets = tasks <= kGroup ? packets_for(kTasks) : 1;
      for_tables<T>("gram", rows, {}, item_columns<T>(packets), [&](const auto& table) {
        using Table = std::decay_t<decltype(table)>;
        const unsigned parts = parts_for(table.items, limit);
        if (tasks <= kGroup)
          KERNEL_LAUNCH((gram_kernel<T, kTasks, Table>), parts, kRowThreads, 0, stream, table, workspace);
        else if constexpr (kTasks == kGroup)
          KERNEL_LAUNCH((gram_groups_kernel<T, Table>), dim3(static_cast<unsigned>(pairs), parts), kRowThreads, 0,
                        stream, table, workspace);
        KERNEL_LAUNCH((gram_finish_kernel<double>), dim3(tasks, tasks), kFinishThreads, 0, stream, workspace,
                      static_cast<int>(parts), out);
      });
    });
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

void dots(DType row_type, DType vector_type, Rows rows, const void* const* vector, double* out, double* workspace,
          Place place) {
  if (rows.tasks == 0 || rows.tensors == 0) return;
  DeviceGuard guard(place.device);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const auto groups = static_cast<unsigned>(groups_of(rows.tasks));
  for_row_dtypes("dots", row_type, vector_type, [&](auto* row, auto* other) {
    using T = std::remove_pointer_t<decltype(row)>;
    using V = std::remove_pointer_t<decltype(other)>;
    for_dots_rows(rows.tasks, [&](auto constant) {
      constexpr int kRows = decltype(constant)::value, kColumns = item_columns<T>(dots_packets<T, V>(kRows));
      for_tables<T>("dots", rows, {{vector, sizeof(V)}}, kColumns, [&](const auto& table) {
        using Table = std::decay_t<decltype(table)>;
        const unsigned parts = parts_for(table.items, max_parts(groups));
        KERNEL_LAUNCH((dots_kernel<T, V, kRows, Table>), dim3(groups, parts), kRowThreads, 0, stream, table, workspace);
        KERNEL_LAUNCH((dots_finish_kernel<double>), static_cast<unsigned>(rows.tasks), kFinishThreads, 0, stream,
                      workspace, static_cast<int>(parts), out);
      });
    });
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

void combine(DType dtype, Rows rows, const double* weights, void* const* out, Place place) {
  for_row_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    weighted_sums<T, T, false>("combine", rows, {{out, sizeof(T)}}, weights, place);
  });
}

void add_weighted(DType row_type, DType base_type, Rows rows, const void* const* base, const double* weights,
                  void* const* out, Place place) {
  for_row_dtypes("add_weighted", row_type, base_type, [&](auto* row, auto* other) {
    using T = std::remove_pointer_t<decltype(row)>;
    using B = std::remove_pointer_t<decltype(other)>;
    weighted_sums<T, B, true>("add_weighted", rows, {{base, sizeof(B)}, {out, sizeof(B)}}, weights, place);
  });
}

}  // namespace mtlgrad::cuda
