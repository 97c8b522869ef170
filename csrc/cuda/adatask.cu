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
static_assert(SmallTable<float>::kPointers >= kHeader + kMaxStepTasks * kTaskPointers<MomentKind::amsgrad>);

// Blocks of a launch: two waves of four on each of the 132 multiprocessors of an H100 or H200. A constant, so that the
// order of sums is the same on every device.
#ifdef MTLGRAD_EMULATE
constexpr int64_t kMaxBlocks = 16;  // tests are to meet blocks that go from one tensor to the next
#else
constexpr int64_t kMaxBlocks = 8 * 132;
#endif

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

template <typename Body>
void for_kind(MomentKind kind, const Body& body) {
  switch (kind) {
    case MomentKind::adam: return body(std::integral_constant<MomentKind, MomentKind::adam>{});
    case MomentKind::amsgrad: return body(std::integral_constant<MomentKind, MomentKind::amsgrad>{});
    case MomentKind::square: return body(std::integral_constant<MomentKind, MomentKind::square>{});
    default: return body(std::integral_constant<MomentKind, MomentKind::centered>{});
  }
}

// Whether moments are rounded stochastically, which only bfloat16 can be.
template <typename M, typename Body>
void for_rounding(bool stochastic, const Body& body) {
  if constexpr (sizeof(M) == 2)
    if (stochastic) return body(std::true_type{});
  body(std::false_type{});
}

// A call's arguments.
struct Call {
  const Rows& gradients;
  const StepTensors& tensors;
  math::Rule rule;
  const StepSettings& settings;
  double* workspace;
  cudaStream_t stream;
};

// What is the same for all segments.
template <typename Table>
void set_rule(Table& table, const Call& call) {
  using F = typename Table::Number;
  const math::Rule& rule = call.rule;
  table.tasks = static_cast<int32_t>(call.gradients.tasks);
  table.buffered = rule.buffers != nullptr, table.decoupled = rule.decoupled;
  table.sign = call.settings.maximize ? F(-1) : F(1);
  table.decay = static_cast<F>(rule.decoupled ? 0.0 : call.settings.weight_decay);
  table.coefficients = math::coefficients_of<F>(rule, call.settings.eps);
  table.corrections = rule.corrections, table.momentum = rule.momentum;
  table.settings = call.settings;
  std::copy_n(call.settings.task_weights, call.gradients.tasks, table.weights);
}

// Fills tables with the parameters and calls launch(table) for each that is full and for the last. An empty parameter
// has a work item of no columns if its averages are to decay.
template <MomentKind kKind, typename Table, typename Launch>
void fill_tables(const Call& call, int64_t parameter_bytes, int64_t moment_bytes, int64_t columns,
                 const Launch& launch) {
  const Rows& gradients = call.gradients;
  const StepTensors& tensors = call.tensors;
  const math::Rule& rule = call.rule;
  Table table;
  set_rule(table, call);
  table.stride = static_cast<int32_t>(kHeader + gradients.tasks * kTaskPointers<kKind>);
  table.count = table.items = 0;
  const auto flush = [&] {
    table.segments[table.count].first = table.items;
    launch(table);
    table.count = table.items = 0;
  };
  for (int64_t p = 0; p < gradients.tensors; ++p) {
    const int64_t size = gradients.sizes[p];
    for (int64_t begin = 0; begin < size || (begin == 0 && tensors.squares); begin += kMaxPiece) {
      if (table.count == Table::kSegments || (table.count + 1) * table.stride > Table::kPointers) flush();
      const int64_t count = std::min<int64_t>(size - begin, kMaxPiece);
      void** pointers = table.pointers + table.count * table.stride;
      uintptr_t bits = 0;
      const auto put = [&](int64_t slot, const void* data, int64_t bytes) {
        bits |= reinterpret_cast<uintptr_t>(data);
        pointers[slot] = data ? const_cast<char*>(static_cast<const char*>(data)) + begin * bytes : nullptr;
      };
      put(kParameter, tensors.parameters[p], parameter_bytes);
      put(kBuffer, rule.buffers ? rule.buffers[p] : nullptr, moment_bytes);
      for (int64_t t = 0; t < gradients.tasks; ++t) {
        const int64_t from = p * gradients.tasks + t, to = kHeader + t * kTaskPointers<kKind>;
        put(to + kGradient, gradients.data[from], parameter_bytes);
        put(to + kSecond, rule.second[from], moment_bytes);
        if (math::has_first<kKind>) put(to + kFirst, rule.first[from], moment_bytes);
        if (kKind == MomentKind::amsgrad) put(to + kLargest, rule.largest[from], moment_bytes);
      }
      pointers[kSteps] = const_cast<float*>(tensors.steps[p]);
      pointers[kSquares] = tensors.squares ? tensors.squares[p] : nullptr;
      table.segments[table.count++] = {static_cast<int32_t>(count), table.items,
                                       static_cast<int32_t>(begin / kMaxPiece), bits % 16 == 0,
                                       tensors.keys ? tensors.keys[p] : 0};
      table.items += static_cast<int32_t>(std::max<int64_t>((count + columns - 1) / columns, 1));
    }
  }
  if (table.count) flush();
}

template <MomentKind kKind, bool kStochastic, typename S, typename M>
void launch_step(const Call& call) {
  using F = Accumulator<S>;
  const bool squares = call.tensors.squares != nullptr;
  const auto launch = [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const auto parts = static_cast<unsigned>(std::min<int64_t>(table.items, kMaxBlocks));
    KERNEL_LAUNCH((adatask_kernel<kKind, kStochastic, S, M, Table>), parts, kRowThreads, 0, call.stream, table,
                  squares ? call.workspace : nullptr);
    if (squares && table.tasks > 0)
      KERNEL_LAUNCH((adatask_finish_kernel<Table>),
                    dim3(static_cast<unsigned>(table.tasks), static_cast<unsigned>(table.count)), kFinishThreads, 0,
                    call.stream, table, call.workspace, static_cast<int>(parts));
  };
  const int64_t tensors = call.gradients.tensors, slots = kHeader + call.gradients.tasks * kTaskPointers<kKind>;
  if (tensors <= SmallTable<F>::kSegments && tensors * slots <= SmallTable<F>::kPointers)
    fill_tables<kKind, SmallTable<F>>(call, sizeof(S), sizeof(M), kStepColumns<S, M>, launch);
  else
    fill_tables<kKind, LargeTable<F>>(call, sizeof(S), sizeof(M), kStepColumns<S, M>, launch);
}

void step(DType parameters, DType moments, const Call& call, int device) {
  if (call.gradients.tasks > kMaxStepTasks)
    throw std::invalid_argument("adatask (cuda): at most " + std::to_string(kMaxStepTasks) + " tasks");
  DeviceGuard guard(device);
  for_types(parameters, moments, [&](auto* parameter, auto* moment) {
    using S = std::remove_pointer_t<decltype(parameter)>;
    using M = std::remove_pointer_t<decltype(moment)>;
    for_kind(call.rule.kind, [&](auto kind) {
      for_rounding<M>(call.settings.stochastic, [&](auto stochastic) {
        launch_step<decltype(kind)::value, decltype(stochastic)::value, S, M>(call);
      });
    });
  });
  MTLGRAD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

// A slot for each block and segment of a launch. Each table's two launches are over before the next one's begin, so that
// all use the same slots.
int64_t adatask_workspace(int64_t tasks, int64_t tensors, int64_t columns) {
  const int64_t pieces = tensors + columns / kMaxPiece;
  return tasks * (std::min(kMaxBlocks, columns + tensors) + pieces);
}

void adam(DType parameters, DType moments, const Rows& gradients, const StepTensors& tensors, const AdamMoments& state,
          const Adam& by, const StepSettings& settings, double* workspace, Place place) {
  step(parameters, moments,
       {gradients, tensors, math::rule_of(by, state), settings, workspace, static_cast<cudaStream_t>(place.stream)},
       place.device);
}

void rmsprop(DType parameters, DType moments, const Rows& gradients, const StepTensors& tensors,
             const RMSpropMoments& state, const RMSprop& by, const StepSettings& settings, double* workspace,
             Place place) {
  step(parameters, moments,
       {gradients, tensors, math::rule_of(by, state), settings, workspace, static_cast<cudaStream_t>(place.stream)},
       place.device);
}

void adagrad(DType parameters, DType moments, const Rows& gradients, const StepTensors& tensors,
             const AdagradMoments& state, const Adagrad& by, const StepSettings& settings, double* workspace,
             Place place) {
  step(parameters, moments,
       {gradients, tensors, math::rule_of(by, state), settings, workspace, static_cast<cudaStream_t>(place.stream)},
       place.device);
}

}  // namespace mtlgrad::cuda
