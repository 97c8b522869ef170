// Device code of the `adatask` stem: one optimizer step over many tensors, moments of every task.
#pragma once
#include "kernels.h"
#include "math/adatask.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace mtlgrad::cuda {

using math::Moments;

constexpr int kMaxStepTasks = 64;

// A parameter, or a piece of one of at most 2^30 elements: its size, first work item and number among the parameter's
// pieces. Aligned: every pointer to it is a multiple of 16 bytes.
struct StepSegment {
  int32_t size, first, piece, aligned;
  int64_t key;
};

// Pointers to a segment, in the order of the table: these four, the last two perhaps null, then kStreams for each task.
enum Header : int { kParameter, kSteps, kSquares, kBuffer, kHeader };
enum Stream : int { kGradient, kSecond, kFirst, kLargest };  // of centered moments, too, the third is `first`
template <Moments kMoments>
constexpr int kStreams = kMoments == Moments::square ? 2 : kMoments == Moments::amsgrad ? 4 : 3;

// What a launch works on, passed by value as the tables of rows.cuh are, and cut into work items as those.
template <typename F, int kSegmentCapacity, int kPointerCapacity>
struct StepTable {
  using Number = F;
  static constexpr int kSegments = kSegmentCapacity, kPointers = kPointerCapacity;
  int32_t count, stride, items, tasks;
  bool buffered;
  F sign, decay;                           // of the gradient; what of the parameter is added to it
  math::TaskCoefficients<F> coefficients;  // all but root_scale and step, which are a task's own
  Adaptive by;                             // `weights` points into host memory
  double weights[kMaxStepTasks];
  StepSegment segments[kSegments + 1];  // and a last one that begins where the items end
  void* pointers[kPointers];

  __device__ __forceinline__ void* pointer(int segment, int slot) const { return pointers[segment * stride + slot]; }
};

// Columns that a thread works on at once, next to each other: no more than 16 bytes of any tensor, and so each warp's
// accesses are whole sectors of memory. Half-precision numbers stay together in one register until they are used.
template <typename S, typename M>
constexpr int kStepWidth = 16 / (sizeof(S) > sizeof(M) ? sizeof(S) : sizeof(M));
// Such groups of columns, a block's width apart, whose loads are all under way before the first use: about 96 bytes in
// flight for each of the 1024 threads of a multiprocessor. An item is as many columns.
template <typename S, typename M>
constexpr int kStepUnits = sizeof(S) + sizeof(M) == 4 ? 1 : 2;
constexpr int kStepSingles = 4;  // where pointers are not aligned, columns of one element
template <typename S, typename M>
constexpr int kStepColumns = kRowThreads * kStepWidth<S, M> * kStepUnits<S, M>;

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
template <bool kStochastic, typename Table, typename F>
__device__ __forceinline__ void open_segment(const Table& table, int segment, SegmentStep<F>& now) {
  const int t = threadIdx.x;
  if (t > table.tasks) return;
  const Adaptive& by = table.by;
  const auto* steps = static_cast<const float*>(table.pointer(segment, kSteps));
  const double lr = by.lr_tensor ? *by.lr_tensor : by.lr;
  const int64_t key = table.segments[segment].key;
  if (t < table.tasks) {
    const double count = steps[t];
    const math::TaskStep at = math::task_step(static_cast<int>(by.rule), lr, table.weights[t], by.first_decay,
                                              by.second_decay, by.lr_decay, table.buffered, count);
    now.tasks[t] = {at.length, static_cast<F>(at.root_scale), static_cast<F>(at.step),
                    kStochastic ? math::random_stream(key, t, count) : 0, by.present ? by.present[t] : true};
    for (int w = 0; w < kRowWarps; ++w) now.sums[w][t] = 0.0;
  } else {
    now.lr = static_cast<F>(lr);
    now.keep = static_cast<F>(by.decoupled ? 1.0 - lr * by.weight_decay : 1.0);
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
