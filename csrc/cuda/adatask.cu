#include "adatask.cuh"

#include "launch.h"

namespace mtlgrad::cuda {

namespace {

// As in combine.cu: a kernel's parameters end at 4 KB, from CUDA 12.1 on at 32,764 bytes; the large table takes 220
// parameters of 3 tasks with Adam in one launch, and few parameters go in a small one.
template <typename F>
using SmallTable = StepTable<F, 24, 320>;
#if CUDART_VERSION >= 12010
template <typename F>
using LargeTable = StepTable<F, 240, 3200>;
static_assert(sizeof(LargeTable<double>) <= 32764 - 64);
#else
template <typename F>
using LargeTable = SmallTable<F>;
#endif
static_assert(sizeof(SmallTable<double>) <= 4096 - 64);
static_assert(SmallTable<float>::kPointers >= kHeader + kMaxStepTasks * kStreams<Moments::amsgrad>);

// Blocks of a launch: two waves of four on each of the 132 multiprocessors of an H100 or H200. A constant, so that the
// order of sums is the same on every device.
constexpr int64_t kMaxBlocks = 8 * 132;

// body(typed null pointers) for the types of parameters and moments.
template <typename Body>
void for_types(DType parameters, DType moments, const Body& body) {
  float* const f32 = nullptr;
  __nv_bfloat16* const bf16 = nullptr;
  double* const f64 = nullptr;
  if (parameters == DType::f32 && moments == DType::f32) return body(f32, f32);
  if (parameters == DType::f32 && moments == DType::bf16) return body(f32, bf16);
  if (parameters == DType::bf16 && moments == DType::f32) return body(bf16, f32);
  if (parameters == DType::bf16 && moments == DType::bf16) return body(bf16, bf16);
  if (parameters == DType::f64 && moments == DType::f64) return body(f64, f64);
  throw std::invalid_argument("adatask (cuda): float32 or bfloat16 parameters and moments, or float64 both");
}

template <Moments kMoments>
using MomentsConstant = std::integral_constant<Moments, kMoments>;

template <typename Body>
void for_moments(const Adaptive& by, const Body& body) {
  if (by.rule == Rule::adam && by.extra) return body(MomentsConstant<Moments::amsgrad>{});
  if (by.rule == Rule::adam) return body(MomentsConstant<Moments::adam>{});
  if (by.rule == Rule::rmsprop && by.extra) return body(MomentsConstant<Moments::centered>{});
  body(MomentsConstant<Moments::square>{});
}

// Whether moments are rounded stochastically, which only bfloat16 can be.
template <typename M, typename Body>
void for_rounding(const Adaptive& by, const Body& body) {
  if constexpr (sizeof(M) == 2)
    if (by.stochastic) return body(std::true_type{});
  body(std::false_type{});
}

// What is the same for all segments.
template <typename Table>
void set_rule(Table& table, const TaskMoments& moments, const Adaptive& by) {
  using F = typename Table::Number;
  const bool adagrad = by.rule == Rule::adagrad;
  table.tasks = static_cast<int32_t>(moments.tasks);
  table.buffered = moments.buffers != nullptr;
  table.sign = by.maximize ? F(-1) : F(1);
  table.decay = static_cast<F>(by.decoupled ? 0.0 : by.weight_decay);
  table.coefficients = {};
  table.coefficients.first_weight = static_cast<F>(1.0 - (by.rule == Rule::adam ? by.first_decay : by.second_decay));
  table.coefficients.keep = static_cast<F>(adagrad ? 1.0 : by.second_decay);
  table.coefficients.add = static_cast<F>(adagrad ? 1.0 : 1.0 - by.second_decay);
  table.coefficients.eps = static_cast<F>(by.eps);
  table.present = moments.present;
  table.by = by;
  std::copy_n(by.weights, moments.tasks, table.weights);
}

// Fills tables with the parameters and calls launch(table) for each that is full and for the last. An empty parameter
// has a work item of no columns if its averages are to decay.
template <Moments kMoments, typename Table, typename Launch>
void fill_tables(const TaskMoments& moments, const Adaptive& by, int64_t parameter_bytes, int64_t moment_bytes,
                 int64_t columns, const Launch& launch) {
  Table table;
  set_rule(table, moments, by);
  table.stride = static_cast<int32_t>(kHeader + moments.tasks * kStreams<kMoments>);
  table.count = table.items = 0;
  const auto flush = [&] {
    table.segments[table.count].first = table.items;
    launch(table);
    table.count = table.items = 0;
  };
  for (int64_t p = 0; p < moments.tensors; ++p) {
    const int64_t size = moments.sizes[p];
    for (int64_t begin = 0; begin < size || (begin == 0 && moments.squares); begin += kMaxPiece) {
      if (table.count == Table::kSegments || (table.count + 1) * table.stride > Table::kPointers) flush();
      const int64_t count = std::min<int64_t>(size - begin, kMaxPiece);
      void** pointers = table.pointers + table.count * table.stride;
      uintptr_t bits = 0;
      const auto put = [&](int64_t slot, const void* data, int64_t bytes) {
        bits |= reinterpret_cast<uintptr_t>(data);
        pointers[slot] = data ? const_cast<char*>(static_cast<const char*>(data)) + begin * bytes : nullptr;
      };
      put(kParameter, moments.parameters[p], parameter_bytes);
      put(kBuffer, moments.buffers ? moments.buffers[p] : nullptr, moment_bytes);
      for (int64_t t = 0; t < moments.tasks; ++t) {
        const int64_t from = p * moments.tasks + t, to = kHeader + t * kStreams<kMoments>;
        put(to + kGradient, moments.gradients[from], parameter_bytes);
        put(to + kSecond, moments.second[from], moment_bytes);
        if (math::has_first<kMoments>) put(to + kFirst, moments.first[from], moment_bytes);
        if (kMoments == Moments::amsgrad) put(to + kLargest, moments.largest[from], moment_bytes);
      }
      pointers[kSteps] = const_cast<float*>(moments.steps[p]);
      pointers[kSquares] = moments.squares ? moments.squares[p] : nullptr;
      table.segments[table.count++] = {static_cast<int32_t>(count), table.items,
                                       static_cast<int32_t>(begin / kMaxPiece), bits % 16 == 0,
                                       moments.keys ? moments.keys[p] : 0};
      table.items += static_cast<int32_t>(std::max<int64_t>((count + columns - 1) / columns, 1));
    }
  }
  if (table.count) flush();
}

template <Moments kMoments, bool kStochastic, typename S, typename M>
void step(const TaskMoments& moments, const Adaptive& by, double* workspace, cudaStream_t stream) {
  using F = Accumulator<S>;
  const auto launch = [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const auto parts = static_cast<unsigned>(std::min<int64_t>(table.items, kMaxBlocks));
    KERNEL_LAUNCH((adatask_kernel<kMoments, kStochastic, S, M, Table>), parts, kRowThreads, 0, stream, table,
                  moments.squares ? workspace : nullptr);
    if (moments.squares && table.tasks > 0)
      KERNEL_LAUNCH((adatask_finish_kernel<Table>),
                    dim3(static_cast<unsigned>(table.tasks), static_cast<unsigned>(table.count)), kFinishThreads, 0,
                    stream, table, workspace, static_cast<int>(parts));
  };
  const int64_t slots = kHeader + moments.tasks * kStreams<kMoments>;
  if (moments.tensors <= SmallTable<F>::kSegments && moments.tensors * slots <= SmallTable<F>::kPointers)
    fill_tables<kMoments, SmallTable<F>>(moments, by, sizeof(S), sizeof(M), kStepColumns<S, M>, launch);
  else
    fill_tables<kMoments, LargeTable<F>>(moments, by, sizeof(S), sizeof(M), kStepColumns<S, M>, launch);
}

}  // namespace

// A slot for each block and segment of a launch. Each table's two launches are over before the next one's begin, so that
// all use the same slots.
int64_t adatask_workspace(int64_t tasks, int64_t tensors, int64_t columns) {
  const int64_t pieces = tensors + columns / kMaxPiece;
  return tasks * (std::min(kMaxBlocks, columns + tensors) + pieces);
}

void adatask(DType parameters, DType moments, const TaskMoments& table, const Adaptive& by, double* workspace,
             Place place) {
  if (table.tasks > kMaxStepTasks)
    throw std::invalid_argument("adatask (cuda): at most " + std::to_string(kMaxStepTasks) + " tasks");
  DeviceGuard guard(place.device);
  for_types(parameters, moments, [&](auto* parameter, auto* moment) {
    using S = std::remove_pointer_t<decltype(parameter)>;
    using M = std::remove_pointer_t<decltype(moment)>;
    for_moments(by, [&](auto kind) {
      for_rounding<M>(by, [&](auto stochastic) {
        step<decltype(kind)::value, decltype(stochastic)::value, S, M>(table, by, workspace,
                                                                       static_cast<cudaStream_t>(place.stream));
      });
    });
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace mtlgrad::cuda
