// One step of AdaTask's optimizers. Bound by memory: (5 T + 2) elements for each of Adam's parameters are read or written
// once. A few columns at a time go through all tasks in registers, so that the streams of several tasks are under way
// together, which memory serves a third faster than one task's after another's.
//
// In explicit vectors, not loops for the compiler to vectorise: what a call is like (the parameters' type, weight decay,
// a buffer, squares, the number of tasks) is then a branch that the processor foresees, in the place of hundreds of loops
// that take a minute to compile.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/columns.h"
#include "cpu/half.h"
#include "cpu/parallel.h"
#include "math/adatask.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // the vectors below never cross a call that is not inlined
#endif

namespace mtlgrad::cpu {

namespace {

using math::MomentKind;
using math::TaskCoefficients;

constexpr int64_t kGroup = 4;     // tasks whose streams are under way together; more would share too few cache ways
constexpr int64_t kBlock = 1024;  // columns, whose updates stay in the first-level cache from one group to the next

template <typename T, int kBytes>
using Vector [[gnu::vector_size(kBytes)]] = T;

// ---- what is stored, as two vectors or, for the last columns of a tensor, as one number -----------------------------

template <typename V>
constexpr bool is_vector = !std::is_arithmetic_v<V>;
template <typename V>
constexpr int kCount = is_vector<V> ? 2 : 1;

template <typename V>
auto number_of(V v) {
  if constexpr (is_vector<V>)
    return v[0];
  else
    return v;
}
template <typename V>
using Number = decltype(number_of(V{}));
template <typename V>
constexpr int kLanes = sizeof(V) / sizeof(Number<V>);

// Random bits for each of a vector's numbers.
template <typename V, bool kVector = is_vector<V> && sizeof(Number<V>) == 4>
struct BitsOf {
  using Type = uint32_t;
};
template <typename V>
struct BitsOf<V, true> {
  using Type = Vector<uint32_t, sizeof(V)>;
};
template <typename V>
using Bits = typename BitsOf<V>::Type;

template <typename V>
MTLGRAD_INLINE Bits<V> random_bits(uint32_t stream, int64_t index) {
  Bits<V> indices{};
  if constexpr (is_vector<V>)
    for (int k = 0; k < kLanes<V>; ++k) indices[k] = static_cast<uint32_t>(k);
  return math::random_bits(stream, indices + static_cast<uint32_t>(index));
}

// The numbers 1, 3, ... of the two one behind the other.
template <typename H, size_t... kIndices>
MTLGRAD_INLINE H odd_ones(H first, H second, std::index_sequence<kIndices...>) {
  return __builtin_shufflevector(first, second, (2 * kIndices + 1)...);
}

// Numbers of type M in memory. Two vectors of bfloat16 are read and written at once, which takes half the instructions.
template <typename M, typename V>
class Stored {
 public:
  MTLGRAD_INLINE explicit Stored(M* at) : at_(at) {
    if constexpr (is_vector<V> && kHalf) {
      Half half;
      memcpy(&half, at, sizeof half);
      const auto bits = __builtin_convertvector(half, Vector<uint32_t, 2 * sizeof(V)>) << 16;
      memcpy(values_, &bits, sizeof values_);
    }
  }

  MTLGRAD_INLINE V get(int k) const {
    if constexpr (!is_vector<V>)
      return widen(*at_);
    else if constexpr (kHalf)
      return values_[k];
    else {
      V value;
      memcpy(&value, at_ + k * kLanes<V>, sizeof value);
      return value;
    }
  }

  // k goes up. Rounds to nearest, or with 16 random bits.
  template <bool kStochastic>
  MTLGRAD_INLINE void set(int k, V value, [[maybe_unused]] Bits<V> random) {
    if constexpr (!is_vector<V>) {
      if constexpr (kStochastic)
        *at_ = {math::round_stochastically(value, random)};
      else if constexpr (kHalf)
        *at_ = narrow<bfloat16>(value);
      else
        *at_ = value;
    } else if constexpr (kHalf) {
      Bits<V> bits, up;
      memcpy(&bits, &value, sizeof bits);
      if constexpr (kStochastic)
        up = random & 0xFFFF;
      else
        up = 0x7FFF + ((bits >> 16) & 1);
      upper_[k] = value == value ? bits + up : Bits<V>{} + 0x7FC00000;
      if (k == 0) return;
      const Half half = odd_ones((Half)upper_[0], (Half)upper_[1], std::make_index_sequence<2 * kLanes<V>>{});
      memcpy(at_, &half, sizeof half);
    } else {
      memcpy(at_ + k * kLanes<V>, &value, sizeof value);
    }
  }

 private:
  static constexpr bool kHalf = std::is_same_v<std::remove_const_t<M>, bfloat16>;
  using Half = Vector<uint16_t, std::max<size_t>(sizeof(V), 16)>;  // of two vectors' numbers; of one number none
  M* at_;
  std::conditional_t<kHalf, V[2], char> values_;
  std::conditional_t<kHalf, Bits<V>[2], char> upper_;
};

// ---- the step of some columns ---------------------------------------------------------------------------------------

// A task's gradient and moments from the first column of a piece on, what its step count makes of it, and the sum of its
// squared directions: of the columns so far in `sum`, in a block's in `sums`.
template <typename S, typename M, typename F>
struct TaskPointers {
  const S* gradient;
  M *first, *second, *largest;
  F root_scale, step;
  uint32_t random;
  double sum;
  F sums[64 / sizeof(F)];
};

// A piece of a parameter, and what is done to all of it.
template <typename S, typename M, typename F>
struct Piece {
  S* parameter;
  M* buffer;
  F sign, decay, keep;  // of the gradient; what of the parameter is added to it; what of the parameter remains
  F momentum, lr;
  int64_t start;    // in the tensor
  uint32_t random;  // of the buffer
  bool squares;
};

// V from `column` of the piece on, for some tasks; `deltas`: the sums of the updates of those before and, unless these
// are the last, after them.
template <MomentKind kKind, bool kStochastic, typename V, typename S, typename M, typename F>
MTLGRAD_INLINE void update_columns(const Piece<S, M, F>& piece, TaskCoefficients<F> c, TaskPointers<S, M, F>* tasks,
                                   int64_t count, bool first_tasks, bool last_tasks, F* deltas, int64_t column) {
  constexpr int kWidth = sizeof(V) / sizeof(F);
  Stored<S, V> parameter(piece.parameter + column);
  V decay[kCount<V>], delta[kCount<V>];
#pragma GCC unroll 2
  for (int k = 0; k < kCount<V>; ++k) {
    decay[k] = delta[k] = V{};
    if (piece.decay != F(0)) decay[k] = piece.decay * parameter.get(k);  // not 0 times what may be infinite
    if (!first_tasks) memcpy(&delta[k], deltas + k * kWidth, sizeof(V));
  }
  for (TaskPointers<S, M, F>* task = tasks; task < tasks + count; ++task) {
    c.root_scale = task->root_scale, c.step = task->step;
    const Stored<const S, V> gradient(task->gradient + column);
    Stored<M, V> first(task->first + column), second(task->second + column), largest(task->largest + column);
#pragma GCC unroll 2
    for (int k = 0; k < kCount<V>; ++k) {
      V m{}, v = second.get(k), most{};
      if constexpr (math::has_first<kKind>) m = first.get(k);
      if constexpr (kKind == MomentKind::amsgrad) most = largest.get(k);
      const V direction = math::task_direction<kKind>(piece.sign * gradient.get(k) + decay[k], m, v, most, c);
      delta[k] += c.step * direction;
      if (piece.squares) {
        if constexpr (is_vector<V>) {
          V sums;
          memcpy(&sums, task->sums, sizeof sums);
          sums += direction * direction;
          memcpy(task->sums, &sums, sizeof sums);
        } else {
          task->sum += static_cast<double>(direction * direction);
        }
      }
      Bits<V> random{};
      if constexpr (kStochastic) random = random_bits<V>(task->random, piece.start + column + k * kWidth);
      if constexpr (math::has_first<kKind>) first.template set<kStochastic>(k, m, random);
      second.template set<kStochastic>(k, v, random >> 16);
      if constexpr (kKind == MomentKind::amsgrad) largest.template set<kStochastic>(k, most, random >> 16);
    }
  }
  if (!last_tasks) {
    memcpy(deltas, delta, sizeof delta);
    return;
  }
  if constexpr (kKind == MomentKind::square || kKind == MomentKind::centered)
    if (piece.buffer) {
      Stored<M, V> buffer(piece.buffer + column);
#pragma GCC unroll 2
      for (int k = 0; k < kCount<V>; ++k) {
        const V b = piece.momentum * buffer.get(k) + delta[k];
        Bits<V> random{};
        if constexpr (kStochastic) random = random_bits<V>(piece.random, piece.start + column + k * kWidth);
        buffer.template set<kStochastic>(k, b, random);
        delta[k] = -piece.lr * b;
      }
    }
#pragma GCC unroll 2
  for (int k = 0; k < kCount<V>; ++k)
    parameter.template set<false>(k, parameter.get(k) * piece.keep + delta[k], Bits<V>{});
}

// Columns [begin, end) of a piece, a block at most.
template <int kBytes, MomentKind kKind, bool kStochastic, typename S, typename M, typename F>
MTLGRAD_INLINE void update_columns_between(const Piece<S, M, F>& whole, const TaskCoefficients<F>& coefficients,
                                           TaskPointers<S, M, F>* tasks, int64_t count, int64_t begin, int64_t end) {
  using V = Vector<F, kBytes>;
  const Piece<S, M, F> piece = whole;  // which no store can change
  alignas(64) F deltas[kBlock];
  int64_t done = 0;
  do {
    const int64_t group = std::min(kGroup, count - done);
    const bool first_tasks = done == 0, last_tasks = done + group == count;
    TaskPointers<S, M, F>* const some = tasks + done;
    for (int64_t t = 0; t < group; ++t) std::fill_n(some[t].sums, kLanes<V>, F(0));
    int64_t column = begin;
    for (; column + 2 * kLanes<V> <= end; column += 2 * kLanes<V>)
      update_columns<kKind, kStochastic, V>(piece, coefficients, some, group, first_tasks, last_tasks,
                                            deltas + (column - begin), column);
    for (; column < end; ++column)
      update_columns<kKind, kStochastic, F>(piece, coefficients, some, group, first_tasks, last_tasks,
                                            deltas + (column - begin), column);
    for (int64_t t = 0; t < group; ++t)
      for (int k = 0; k < kLanes<V>; ++k) some[t].sum += static_cast<double>(some[t].sums[k]);
    done += group;
  } while (done < count);
}

#define MTLGRAD_UPDATE_BLOCK(attribute, bytes)                                                            \
  template <int kBytes, MomentKind kKind, bool kStochastic, typename S, typename M, typename F>           \
  attribute std::enable_if_t<kBytes == bytes> update_block(                                               \
      const Piece<S, M, F>& piece, const TaskCoefficients<F>& coefficients, TaskPointers<S, M, F>* tasks, \
      int64_t count, int64_t begin, int64_t end) {                                                        \
    update_columns_between<bytes, kKind, kStochastic>(piece, coefficients, tasks, count, begin, end);     \
  }
MTLGRAD_BY_WIDTH(MTLGRAD_UPDATE_BLOCK)

#define MTLGRAD_VECTOR_BYTES(attribute, bytes) \
  attribute int vector_bytes() { return bytes; }
MTLGRAD_BY_WIDTH(MTLGRAD_VECTOR_BYTES)

template <typename S, typename M, typename F>
using Update = void (*)(const Piece<S, M, F>&, const TaskCoefficients<F>&, TaskPointers<S, M, F>*, int64_t, int64_t,
                        int64_t);

template <int kBytes, bool kStochastic, typename S, typename M, typename F>
Update<S, M, F> update_of_kind(MomentKind kind) {
  switch (kind) {
    case MomentKind::adam: return update_block<kBytes, MomentKind::adam, kStochastic, S, M, F>;
    case MomentKind::amsgrad: return update_block<kBytes, MomentKind::amsgrad, kStochastic, S, M, F>;
    case MomentKind::square: return update_block<kBytes, MomentKind::square, kStochastic, S, M, F>;
    default: return update_block<kBytes, MomentKind::centered, kStochastic, S, M, F>;
  }
}

template <bool kStochastic, typename S, typename M, typename F>
Update<S, M, F> update_of(MomentKind kind) {
  switch (vector_bytes()) {
#define MTLGRAD_CASE(attribute, bytes) \
  case bytes: return update_of_kind<bytes, kStochastic, S, M, F>(kind);
    MTLGRAD_BY_WIDTH(MTLGRAD_CASE)
#undef MTLGRAD_CASE
  }
  return nullptr;
}

// ---- the step of all tensors ----------------------------------------------------------------------------------------

// A call's arguments.
struct Call {
  const Rows& gradients;
  const StepTensors& tensors;
  math::Rule rule;
  const StepSettings& settings;
  double* workspace;
  double lr;
};

// A task that takes part, and what its step count makes of it: two powers, for which counts repeat from one parameter to
// the next.
struct PresentTask {
  int64_t number;
  double count;
  math::TaskStep step;

  void set_count(const Call& call, double found) {
    if (found == count) return;
    count = found;
    step = math::task_step(call.rule.kind, call.rule.corrections, call.lr, call.settings.task_weights[number],
                           call.rule.buffers != nullptr, count);
  }
};

std::vector<PresentTask> present_tasks(const Call& call) {
  std::vector<PresentTask> tasks;
  tasks.reserve(static_cast<size_t>(call.gradients.tasks));
  for (int64_t t = 0; t < call.gradients.tasks; ++t)
    if (!call.settings.present || call.settings.present[t]) tasks.push_back({t, -1.0, {}});
  return tasks;
}

// workspace[(slot + p) * T + t]: the sum of squared directions of a share of a tensor. Slot and tensor together are a
// number of their own, for from one pair to the next one of them goes up.
template <typename S, typename M, typename F>
void update_share(const Call& call, Update<S, M, F> update, int64_t begin, int64_t end, int64_t slot) {
  const Rows& gradients = call.gradients;
  const StepTensors& tensors = call.tensors;
  const math::Rule& rule = call.rule;
  const StepSettings& settings = call.settings;
  const auto coefficients = math::coefficients_of<F>(rule, settings.eps);
  Piece<S, M, F> piece{};
  piece.sign = settings.maximize ? F(-1) : F(1);
  piece.decay = static_cast<F>(rule.decoupled ? 0.0 : settings.weight_decay);
  piece.keep = static_cast<F>(rule.decoupled ? 1.0 - call.lr * settings.weight_decay : 1.0);
  piece.momentum = static_cast<F>(rule.momentum), piece.lr = static_cast<F>(call.lr);
  piece.squares = tensors.squares != nullptr;
  std::vector<PresentTask> tasks = present_tasks(call);
  std::vector<TaskPointers<S, M, F>> pointers(tasks.size());
  const auto count = static_cast<int64_t>(tasks.size());
  for_pieces(gradients.sizes, gradients.tensors, begin, end, end - begin,
             [&](int64_t p, int64_t start, int64_t columns, int64_t) {
               const int64_t key = settings.stochastic && tensors.keys ? tensors.keys[p] : 0;
               for (size_t k = 0; k < tasks.size(); ++k) {
                 const int64_t t = tasks[k].number, at = p * gradients.tasks + t;
                 tasks[k].set_count(call, static_cast<double>(tensors.steps[p][t]));
                 const auto moment = [&](void* const* moments) {
                   return static_cast<M*>((moments ? moments : rule.second)[at]) + start;  // unused if there are none
                 };
                 TaskPointers<S, M, F>& task = pointers[k];
                 task.gradient = static_cast<const S*>(gradients.data[at]) + start;
                 task.first = moment(rule.first), task.second = moment(rule.second),
                 task.largest = moment(rule.largest);
                 task.root_scale = static_cast<F>(tasks[k].step.root_scale);
                 task.step = static_cast<F>(tasks[k].step.step);
                 task.random = settings.stochastic ? math::random_stream(key, t, tasks[k].count) : 0;
                 task.sum = 0.0;
               }
               piece.parameter = static_cast<S*>(tensors.parameters[p]) + start;
               piece.start = start;
               if (rule.buffers) piece.buffer = static_cast<M*>(rule.buffers[p]) + start;
               if (rule.buffers && settings.stochastic) {
                 double counts = 0.0;
                 for (int64_t t = 0; t < gradients.tasks; ++t) counts += static_cast<double>(tensors.steps[p][t]);
                 piece.random = math::random_stream(key, gradients.tasks, counts);
               }
               for (int64_t i = 0; i < columns; i += kBlock)
                 update(piece, coefficients, pointers.data(), count, i, std::min(i + kBlock, columns));
               if (tensors.squares)
                 for (size_t k = 0; k < tasks.size(); ++k)
                   call.workspace[(slot + p) * gradients.tasks + tasks[k].number] = pointers[k].sum;
             });
}

template <typename S, typename M, typename F>
void step_types(const Call& call, int threads) {
  const Rows& gradients = call.gradients;
  const StepTensors& tensors = call.tensors;
  Update<S, M, F> update = update_of<false, S, M, F>(call.rule.kind);
  if constexpr (std::is_same_v<M, bfloat16>)
    if (call.settings.stochastic) update = update_of<true, S, M, F>(call.rule.kind);
  const Shares shares(columns_of(gradients.sizes, gradients.tensors), 1);
  if (tensors.squares) std::fill_n(call.workspace, (shares.slots + gradients.tensors) * gradients.tasks, 0.0);
  parallel_for(shares.slots, threads, [&](int64_t slot) {
    const int64_t begin = std::min(slot * shares.size, shares.columns);
    update_share<S, M, F>(call, update, begin, std::min(begin + shares.size, shares.columns), slot);
  });
  if (!tensors.squares) return;
  const double decay = call.settings.square_decay;
  std::vector<PresentTask> tasks = present_tasks(call);
  int64_t start = 0;
  for (int64_t p = 0; p < gradients.tensors; start += gradients.sizes[p++]) {
    for (int64_t t = 0; t < gradients.tasks; ++t) tensors.squares[p][t] *= decay;
    for (PresentTask& task : tasks) {
      double sum = 0.0;
      for (int64_t slot = start / shares.size; slot < shares.slots && slot * shares.size < start + gradients.sizes[p];
           ++slot)
        sum += call.workspace[(slot + p) * gradients.tasks + task.number];
      task.set_count(call, static_cast<double>(tensors.steps[p][task.number]));
      tensors.squares[p][task.number] += (1.0 - decay) * (task.step.length * task.step.length * sum);
    }
  }
}

void step(DType parameters, DType moments, Call call, int threads) {
  if (call.settings.lr_tensor) call.lr = *call.settings.lr_tensor;
  const auto run = [&](auto kernel) { kernel(call, threads); };
  if (parameters == DType::f64 && moments == DType::f64) return run(step_types<double, double, double>);
  if (parameters == DType::f32 && moments == DType::f32) return run(step_types<float, float, float>);
  if (parameters == DType::f32 && moments == DType::bf16) return run(step_types<float, bfloat16, float>);
  if (parameters == DType::bf16 && moments == DType::f32) return run(step_types<bfloat16, float, float>);
  if (parameters == DType::bf16 && moments == DType::bf16) return run(step_types<bfloat16, bfloat16, float>);
  throw std::invalid_argument("adatask (cpu): float32 or bfloat16 parameters and moments, or float64 both");
}

}  // namespace

void count_steps(void* const* steps, int64_t tensors, int64_t tasks, const bool* present) {
  for (int64_t p = 0; p < tensors; ++p)
    for (int64_t t = 0; t < tasks; ++t)
      if (!present || present[t]) static_cast<float*>(steps[p])[t] += 1.0f;
}

int64_t adatask_workspace(int64_t tasks, int64_t tensors, int64_t columns) {
  return (Shares(columns, 1).slots + tensors) * tasks;
}

void adam(DType parameters, DType moments, const Rows& gradients, const StepTensors& tensors, const AdamMoments& state,
          const Adam& by, const StepSettings& settings, double* workspace, Place place) {
  step(parameters, moments, {gradients, tensors, math::rule_of(by, state), settings, workspace, settings.lr},
       place.threads);
}

void rmsprop(DType parameters, DType moments, const Rows& gradients, const StepTensors& tensors,
             const RMSpropMoments& state, const RMSprop& by, const StepSettings& settings, double* workspace,
             Place place) {
  step(parameters, moments, {gradients, tensors, math::rule_of(by, state), settings, workspace, settings.lr},
       place.threads);
}

void adagrad(DType parameters, DType moments, const Rows& gradients, const StepTensors& tensors,
             const AdagradMoments& state, const Adagrad& by, const StepSettings& settings, double* workspace,
             Place place) {
  step(parameters, moments, {gradients, tensors, math::rule_of(by, state), settings, workspace, settings.lr},
       place.threads);
}

}  // namespace mtlgrad::cpu
