// Device code of the `adatask` stem: one optimizer step over many tensors, moments of every task.
#pragma once
#include "kernels.h"
#include "math/adatask.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace mtlgrad::cuda {

using math::MomentKind;

// The largest piece of a parameter: short enough for 32-bit arithmetic.
#ifdef MTLGRAD_EMULATE
constexpr int kMaxPiece = 1 << 16;  // tests are to meet parameters of several pieces
#else
constexpr int kMaxPiece = 1 << 30;
#endif

// A parameter, or a piece of one: its size, first work item and number among the parameter's
// pieces. Aligned: every pointer to it is a multiple of 16 bytes.
struct StepSegment {
  int32_t size, first, piece, aligned;
  int64_t key;
};

// Pointers to a segment, in the order of the table: these four, the last two perhaps null, then kTaskPointers for each task.
enum Header : int { kParameter, kSteps, kSquares, kBuffer, kHeader };
enum TaskPointers : int { kGradient, kSecond, kFirst, kLargest };  // of centered moments, too, the third is `first`
template <MomentKind kKind>
constexpr int kTaskPointers = kKind == MomentKind::square    ? 2
                              : kKind == MomentKind::amsgrad ? 4
                                                             : 3;

// What a launch works on, passed by value as the tables of rows.cuh are, and cut into work items as those.
template <typename F, int kSegmentCapacity, int kPointerCapacity>
struct StepTable {
  using Number = F;
  static constexpr int kSegments = kSegmentCapacity, kPointers = kPointerCapacity;
  int32_t count, stride, items, tasks;
  bool buffered, decoupled;
  F sign, decay;                           // of the gradient; what of the parameter is added to it
  math::TaskCoefficients<F> coefficients;  // all but root_scale and step, which are a task's own
  math::Corrections corrections;
  double momentum;
  StepSettings settings;  // `task_weights` points into host memory
  double weights[kMaxStepTasks];
  StepSegment segments[kSegments + 1];  // and a last one that begins where the items end
  void* pointers[kPointers];

  __device__ __forceinline__ void* pointer(int segment, int slot) const { return pointers[segment * stride + slot]; }
};

// Columns that a thread works on at once, next to each other: no more than 16 bytes of any tensor, and so each warp's
// accesses are whole sectors of memory. Half-precision numbers stay together in one register until they are used.
template <typename S, typename M>
constexpr int kStepWidth = 16 / (sizeof(S) > sizeof(M) ? sizeof(S) : sizeof(M));
// Columns of an item.
template <typename S, typename M>
constexpr int kStepColumns = kRowThreads * kStepWidth<S, M>;
// Where pointers are not aligned, columns a block's width apart, of which a thread reads all before it uses the first.
constexpr int kStepSingles = 2;
// Blocks that a multiprocessor must have registers for; as many as there are without spilling. With the 48 bytes that each
// of 1024 threads asks for at a time, far more is in flight than memory needs to be busy.
template <MomentKind kKind, bool kStochastic, typename S, typename M>
constexpr int step_blocks() {
  if (sizeof(S) == 8) return 2;
  if (kKind == MomentKind::amsgrad) return 3;
  return sizeof(S) + sizeof(M) == 4 && (kStochastic || kKind == MomentKind::centered) ? 3 : 4;
}

template <typename T, int kWidth, bool kPairs = sizeof(T) == 2 && kWidth % 2 == 0>
struct alignas(sizeof(T) * kWidth) Lanes {
  T v[kWidth];
};

template <typename T, int kWidth>
struct __attribute__((may_alias, aligned(2 * kWidth))) Lanes<T, kWidth, true> {
  uint32_t v[kWidth / 2];
};

template <typename T, int kWidth, bool kPairs>
__device__ __forceinline__ auto lane(const Lanes<T, kWidth, kPairs>& x, int j) {
  if constexpr (kPairs)
    return __uint_as_float(j % 2 ? x.v[j / 2] & 0xffff0000u : x.v[j / 2] << 16);
  else
    return to_float(x.v[j]);
}

template <typename T, int kWidth, bool kPairs>
__device__ __forceinline__ void set_lane(Lanes<T, kWidth, kPairs>& x, int j, T v) {
  if constexpr (kPairs)
    x.v[j / 2] = j % 2 ? (x.v[j / 2] & 0xffffu) | bits_of(v) << 16 : (x.v[j / 2] & 0xffff0000u) | bits_of(v);
  else
    x.v[j] = v;
}

template <bool kStochastic, typename M, int kWidth, bool kPairs, typename F>
__device__ __forceinline__ void set_moment(Lanes<M, kWidth, kPairs>& x, int j, F v, [[maybe_unused]] uint32_t bits) {
  if constexpr (kStochastic)
    set_lane(x, j, M(__ushort_as_bfloat16(math::round_stochastically(v, bits))));
  else
    set_lane(x, j, round_to<M>(v));
}

// What all threads of a block need to know of a segment. `sums` are of the squared directions; each warp has its own.
template <typename F>
struct SegmentStep {
  struct Task {
    double length;
    F root_scale, step;
    uint32_t stream;
    bool present;
  };
  Task tasks[kMaxStepTasks];
  double sums[kRowWarps][kMaxStepTasks];
  F lr, keep;
  uint32_t stream;  // of the buffer
};

// Thread t computes what there is of task t, one more thread the rest; both from memory, so that a CUDA graph sees the
// values of its replay.
template <MomentKind kKind, bool kStochastic, typename Table, typename F>
__device__ __forceinline__ void open_segment(const Table& table, int segment, SegmentStep<F>& now) {
  const int t = threadIdx.x;
  if (t > table.tasks) return;
  const StepSettings& settings = table.settings;
  const auto* steps = static_cast<const float*>(table.pointer(segment, kSteps));
  const double lr = settings.lr_tensor ? *settings.lr_tensor : settings.lr;
  const int64_t key = table.segments[segment].key;
  if (t < table.tasks) {
    const double count = steps[t];
    const math::TaskStep at = math::task_step(kKind, table.corrections, lr, table.weights[t], table.buffered, count);
    now.tasks[t] = {at.length, static_cast<F>(at.root_scale), static_cast<F>(at.step),
                    kStochastic ? math::random_stream(key, t, count) : 0, !settings.present || settings.present[t]};
    for (int w = 0; w < kRowWarps; ++w) now.sums[w][t] = 0.0;
  } else {
    now.lr = static_cast<F>(lr);
    now.keep = static_cast<F>(table.decoupled ? 1.0 - lr * settings.weight_decay : 1.0);
    double counts = 0.0;
    if (kStochastic && table.buffered)
      for (int k = 0; k < table.tasks; ++k) counts += steps[k];
    now.stream = kStochastic ? math::random_stream(key, table.tasks, counts) : 0;
  }
}

// The block's share of a segment's squared updates. Pairs of block and segment are told apart by their sum, as from one
// pair to the next either goes up.
template <typename Table, typename F>
__device__ __forceinline__ void close_segment(const Table& table, int segment, const SegmentStep<F>& now,
                                              double* workspace) {
  const int t = threadIdx.x;
  if (!workspace || t >= table.tasks) return;
  double sum = 0.0;
  for (int w = 0; w < kRowWarps; ++w) sum += now.sums[w][t];
  // An absent task may not have had a step: its length is infinite then.
  workspace[static_cast<int64_t>(blockIdx.x + segment) * table.tasks + t] =
      sum == 0.0 ? 0.0 : now.tasks[t].length * now.tasks[t].length * sum;
}

// kUnits groups of kWidth columns, a block's width apart from column `begin` of a segment on; kChecked: only those before
// `end`, and then a group ends where another may begin. Every element is read and written once, by one thread: what it
// reads of a task is on its way before it waits for any of it, and the parameter and the sum of its updates stay in
// registers. The tensors are all apart; __restrict__ would say so, but a table of pointers has no place for it. The
// whole block must call this, for the sums over warps.
template <MomentKind kKind, bool kStochastic, typename S, typename M, int kWidth, int kUnits, bool kChecked,
          typename Table, typename F>
__device__ __forceinline__ void step_columns(const Table& table, int segment, SegmentStep<F>& now, int begin, int end,
                                             bool summed) {
  constexpr int kStep = kRowThreads * kWidth;
  const int column = begin + static_cast<int>(threadIdx.x) * kWidth;
  const uint32_t index =
      static_cast<uint32_t>(table.segments[segment].piece) * kMaxPiece + static_cast<uint32_t>(column);
  const auto active = [&](int u) { return !kChecked || column + u * kStep < end; };
  const auto at = [&](int slot, auto* type, int u) {
    using T = std::remove_pointer_t<decltype(type)>;
    return reinterpret_cast<Lanes<T, kWidth>*>(static_cast<T*>(table.pointer(segment, slot)) +
                                               static_cast<unsigned>(column)) +
           u * kRowThreads;
  };
  S* const parameters = nullptr;
  M* const moments = nullptr;

  Lanes<S, kWidth> theta[kUnits];
  F delta[kUnits][kWidth];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (active(u)) theta[u] = *at(kParameter, parameters, u);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) delta[u][j] = F(0);
  }

#pragma unroll 1
  for (int t = 0; t < table.tasks; ++t) {
    const auto& task = now.tasks[t];
    if (!task.present) continue;
    const int slot = kHeader + t * kTaskPointers<kKind>;
    Lanes<S, kWidth> gradient[kUnits];
    Lanes<M, kWidth> first[kUnits], second[kUnits], largest[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      if (active(u)) {
        gradient[u] = *at(slot + kGradient, parameters, u);
        second[u] = *at(slot + kSecond, moments, u);
        if constexpr (math::has_first<kKind>) first[u] = *at(slot + kFirst, moments, u);
        if constexpr (kKind == MomentKind::amsgrad) largest[u] = *at(slot + kLargest, moments, u);
      }
    math::TaskCoefficients<F> c = table.coefficients;
    c.root_scale = task.root_scale, c.step = task.step;
    F sum = F(0);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!active(u)) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        F g = table.sign * lane(gradient[u], j);
        if (table.decay != F(0)) g += table.decay * lane(theta[u], j);  // not 0 times what may be infinite
        F m = F(0), v = lane(second[u], j), most = F(0);
        if constexpr (math::has_first<kKind>) m = lane(first[u], j);
        if constexpr (kKind == MomentKind::amsgrad) most = lane(largest[u], j);
        const F direction = math::task_direction<kKind>(g, m, v, most, c);
        delta[u][j] += c.step * direction;
        sum += direction * direction;
        uint32_t bits = 0;
        if constexpr (kStochastic) bits = math::random_bits(task.stream, index + static_cast<uint32_t>(u * kStep + j));
        if constexpr (math::has_first<kKind>) set_moment<kStochastic>(first[u], j, m, bits);
        set_moment<kStochastic>(second[u], j, v, bits >> 16);
        if constexpr (kKind == MomentKind::amsgrad) set_moment<kStochastic>(largest[u], j, most, bits >> 16);
      }
      if constexpr (math::has_first<kKind>) *at(slot + kFirst, moments, u) = first[u];
      *at(slot + kSecond, moments, u) = second[u];
      if constexpr (kKind == MomentKind::amsgrad) *at(slot + kLargest, moments, u) = largest[u];
    }
    if (summed) {
      const double all = warp_sum(static_cast<double>(sum));
      if (threadIdx.x % kWarp == 0) now.sums[threadIdx.x / kWarp][t] += all;
    }
  }

#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (!active(u)) continue;
    if (kKind == MomentKind::square || kKind == MomentKind::centered) {
      if (table.buffered) {
        Lanes<M, kWidth> buffer = *at(kBuffer, moments, u);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const F b = static_cast<F>(table.momentum) * lane(buffer, j) + delta[u][j];
          uint32_t bits = 0;
          if constexpr (kStochastic) bits = math::random_bits(now.stream, index + static_cast<uint32_t>(u * kStep + j));
          set_moment<kStochastic>(buffer, j, b, bits);
          delta[u][j] = -now.lr * b;
        }
        *at(kBuffer, moments, u) = buffer;
      }
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) set_lane(theta[u], j, round_to<S>(now.keep * lane(theta[u], j) + delta[u][j]));
    *at(kParameter, parameters, u) = theta[u];
  }
}

// A block walks over an even share of all work items, through the segments that they belong to. At each new one some
// threads compute what depends on the tasks' step counts, in float64, for all to use from shared memory: two powers for
// each task, about a microsecond, in which other blocks of the multiprocessor go on. Two barriers there: before, since
// slower warps may still read the previous segment's numbers and add to its sums; after, since no warp may go on before
// the new ones are there. Within a segment there is none. `workspace` is null, or gets what is in close_segment.
template <MomentKind kKind, bool kStochastic, typename S, typename M, typename Table>
__global__ void __launch_bounds__(kRowThreads, step_blocks<kKind, kStochastic, S, M>())
    adatask_kernel(const __grid_constant__ Table table, double* workspace) {
  using F = Accumulator<S>;
  constexpr int kColumns = kStepColumns<S, M>, kWidth = kStepWidth<S, M>, kSingles = kStepSingles;
  __shared__ SegmentStep<F> now;
  int open = -1;
  for (Walk<Table> at(table, blockIdx.x, gridDim.x); at.more(); at.next()) {
    if (at.segment != open) {
      __syncthreads();
      if (open >= 0) close_segment(table, open, now, workspace);
      open = at.segment;
      open_segment<kKind, kStochastic>(table, open, now);
      __syncthreads();
    }
    const StepSegment& segment = table.segments[open];
    int begin = (at.item - segment.first) * kColumns;
    const int end = segment.size - begin < kColumns ? segment.size : begin + kColumns;
    if (segment.aligned && end - begin == kColumns) {
      step_columns<kKind, kStochastic, S, M, kWidth, 1, false>(table, open, now, begin, end, workspace != nullptr);
      continue;
    }
    if (segment.aligned) {
      const int whole = end - (end - begin) % kWidth;
      step_columns<kKind, kStochastic, S, M, kWidth, 1, true>(table, open, now, begin, whole, workspace != nullptr);
      begin = whole;
    }
#pragma unroll 1
    for (; begin < end; begin += kSingles * kRowThreads)
      step_columns<kKind, kStochastic, S, M, 1, kSingles, true>(table, open, now, begin, end, workspace != nullptr);
  }
  __syncthreads();  // every warp has added its sums
  close_segment(table, open, now, workspace);
}

// The block, of `parts`, that works on an item: the inverse of Walk's shares.
__device__ __forceinline__ int part_of(int item, int items, int parts) {
  const int each = items / parts, more = items % parts, longer = more * (each + 1);
  return item < longer ? item / (each + 1) : more + (item - longer) / each;
}

// squares of task blockIdx.x and the parameter whose first segment in the table is blockIdx.y: what its blocks have left,
// in a fixed order. The first piece of a parameter, perhaps in an earlier table, makes the average decay.
template <typename Table>
__global__ void __launch_bounds__(kFinishThreads)
    adatask_finish_kernel(const __grid_constant__ Table table, const double* workspace, int parts) {
  const int t = blockIdx.x, begin = blockIdx.y;
  if (begin > 0 && table.segments[begin].piece > 0) return;  // the whole block
  double sum = 0.0;
  for (int p = begin; p < table.count && (p == begin || table.segments[p].piece > 0); ++p) {
    const int first = part_of(table.segments[p].first, table.items, parts);
    const int last = part_of(table.segments[p + 1].first - 1, table.items, parts);
    for (int part = first + static_cast<int>(threadIdx.x); part <= last; part += kFinishThreads)
      sum += workspace[static_cast<int64_t>(part + p) * table.tasks + t];
  }
  sum = block_sum(sum);
  if (threadIdx.x > 0) return;
  double& average = static_cast<double*>(table.pointer(begin, kSquares))[t];
  const double decay = table.settings.square_decay;
  average = (table.segments[begin].piece ? average : decay * average) + (1.0 - decay) * sum;
}

}  // namespace mtlgrad::cuda
