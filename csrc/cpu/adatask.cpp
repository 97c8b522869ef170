// One step of AdaTask's optimizers. Bound by memory: (5 T + 2) elements for each of Adam's parameters are read or written
// once. A block of columns at a time, whose parameters and sums of updates stay in the first-level cache while the
// tasks' gradients and moments stream by.
#include <type_traits>
#include <vector>

#include "cpu/columns.h"
#include "cpu/half.h"
#include "cpu/parallel.h"
#include "math/adatask.h"

namespace mtlgrad::cpu {

namespace {

using math::Moments;
using math::TaskCoefficients;

template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

constexpr int64_t kBlock = 1024;  // columns

template <typename M, typename F>
MTLGRAD_INLINE M stored(F value, [[maybe_unused]] bool stochastic, [[maybe_unused]] uint32_t bits) {
  if constexpr (std::is_same_v<M, bfloat16>) {
    const bfloat16 nearest = narrow<bfloat16>(value);
    return stochastic ? bfloat16{math::round_stochastically(value, bits)} : nearest;
  } else if constexpr (std::is_same_v<M, double>) {
    return value;
  } else {
    return narrow<M>(value);
  }
}

// What the loop over a block's columns needs to know of a task.
template <typename F>
struct Task {
  TaskCoefficients<F> coefficients;
  F sign;
  uint32_t stream;
};

// Asks for what the next block will read: the processor's own prefetching stops at each page of memory, and with three
// or more streams for every task it begins anew at each block. An address past the end does no harm.
template <typename T>
MTLGRAD_INLINE void prefetch(const T* at, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(at + kBlock);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i);
}

// A task's moments in place, and its update on top of delta; the sum of its squared directions.
template <Moments kMoments, bool kStochastic, typename S, typename M, typename F>
MTLGRAD_INLINE F update_columns(const S* gradient, M* first, M* second, M* largest, const F* decay, F* delta,
                                const Task<F>& task, uint32_t index, int64_t n) {
  const TaskCoefficients<F> c = task.coefficients;
  const F sign = task.sign;
  const uint32_t stream = task.stream;
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    F g = sign * widen(gradient[i]) + decay[i];
    F m = 0, v = widen(second[i]), most = 0;
    if constexpr (math::has_first<kMoments>) m = widen(first[i]);
    if constexpr (kMoments == Moments::amsgrad) most = widen(largest[i]);
    const F direction = math::task_direction<kMoments>(g, m, v, most, c);
    uint32_t bits = 0;
    if constexpr (kStochastic) bits = math::random_bits(stream, index + static_cast<uint32_t>(i));
    if constexpr (math::has_first<kMoments>) first[i] = stored<M>(m, kStochastic, bits);
    second[i] = stored<M>(v, kStochastic, bits >> 16);
    if constexpr (kMoments == Moments::amsgrad) largest[i] = stored<M>(most, kStochastic, bits >> 16);
    delta[i] += c.step * direction;
    sum += direction * direction;
  }
  return sum;
}

template <Moments kMoments, bool kStochastic, typename S, typename M, typename F>
MTLGRAD_CLONES F update_task(const S* gradient, M* first, M* second, M* largest, const F* decay, F* delta,
                             const Task<F>& task, uint32_t index, int64_t n) {
  prefetch(gradient, n), prefetch(second, n);
  if constexpr (math::has_first<kMoments>) prefetch(first, n);
  if constexpr (kMoments == Moments::amsgrad) prefetch(largest, n);
  return update_columns<kMoments, kStochastic>(gradient, first, second, largest, decay, delta, task, index, n);
}

template <typename S, typename F>
MTLGRAD_CLONES void begin_block(const S* parameter, F weight_decay, F* theta, F* decay, F* delta, int64_t n) {
  prefetch(parameter, n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    theta[i] = widen(parameter[i]);
    delta[i] = 0;
  }
  // Not zero times the parameter, which may be infinite.
  if (weight_decay == F(0))
    for (int64_t i = 0; i < n; ++i) decay[i] = 0;
  else
    for (int64_t i = 0; i < n; ++i) decay[i] = weight_decay * theta[i];
}

template <typename S, typename F>
MTLGRAD_CLONES void end_block(S* parameter, const F* theta, const F* delta, F keep, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) parameter[i] = stored<S>(theta[i] * keep + delta[i], false, 0);
}

template <typename M, typename F>
MTLGRAD_CLONES void through_buffer(M* buffer, F* delta, F momentum, F lr, bool stochastic, uint32_t stream,
                                   uint32_t index, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const F b = momentum * widen(buffer[i]) + delta[i];
    buffer[i] = stored<M>(b, stochastic, math::random_bits(stream, index + static_cast<uint32_t>(i)));
    delta[i] = -lr * b;
  }
}

// What a call does, and the coefficients of every parameter and task.
template <typename F>
struct Step {
  const TaskMoments& table;
  const Adaptive& by;
  double lr;
  std::vector<Task<F>> tasks;     // [P, T]
  std::vector<double> lengths;    // [P, T]
  std::vector<uint32_t> streams;  // [P], of the buffers

  Step(const TaskMoments& table, const Adaptive& by) : table(table), by(by), lr(by.lr_tensor ? *by.lr_tensor : by.lr) {
    const bool adagrad = by.rule == Rule::adagrad;
    const double first = by.rule == Rule::adam ? by.first_decay : by.second_decay;
    TaskCoefficients<F> c{};
    c.first_weight = static_cast<F>(1.0 - first);
    c.keep = static_cast<F>(adagrad ? 1.0 : by.second_decay);
    c.add = static_cast<F>(adagrad ? 1.0 : 1.0 - by.second_decay);
    c.eps = static_cast<F>(by.eps);
    const F sign = by.maximize ? F(-1) : F(1);
    tasks.reserve(table.tensors * table.tasks), lengths.reserve(table.tensors * table.tasks);
    for (int64_t p = 0; p < table.tensors; ++p) {
      double counts = 0.0;
      for (int64_t t = 0; t < table.tasks; ++t) {
        const double count = table.steps[p][t];
        const math::TaskStep at = math::task_step(static_cast<int>(by.rule), lr, by.weights[t], by.first_decay,
                                                  by.second_decay, by.lr_decay, table.buffers != nullptr, count);
        c.root_scale = static_cast<F>(at.root_scale), c.step = static_cast<F>(at.step);
        tasks.push_back({c, sign, by.stochastic ? math::random_stream(table.keys[p], t, count) : 0});
        lengths.push_back(at.length);
        counts += count;
      }
      streams.push_back(by.stochastic ? math::random_stream(table.keys[p], table.tasks, counts) : 0);
    }
  }
};

template <Moments kMoments, bool kStochastic, typename S, typename M>
void update_share(const Step<Compute<S>>& step, int64_t begin, int64_t end, int64_t slot, double* workspace) {
  using F = Compute<S>;
  const TaskMoments& table = step.table;
  const Adaptive& by = step.by;
  const F through_gradient = static_cast<F>(by.decoupled ? 0.0 : by.weight_decay);
  const F keep = static_cast<F>(by.decoupled ? 1.0 - step.lr * by.weight_decay : 1.0);
  alignas(64) F theta[kBlock], decay[kBlock], delta[kBlock];
  for_pieces(table.sizes, table.tensors, begin, end, kBlock, [&](int64_t p, int64_t first, int64_t count, int64_t) {
    S* parameter = static_cast<S*>(table.parameters[p]) + first;
    const auto index = static_cast<uint32_t>(first);
    begin_block(parameter, through_gradient, theta, decay, delta, count);
    for (int64_t t = 0; t < table.tasks; ++t) {
      if (table.present && !table.present[t]) continue;
      const int64_t at = p * table.tasks + t;
      const auto moment = [&](void* const* moments) {
        return moments ? static_cast<M*>(moments[at]) + first : static_cast<M*>(nullptr);
      };
      const F sum = update_task<kMoments, kStochastic>(static_cast<const S*>(table.gradients[at]) + first,
                                                       moment(table.first), moment(table.second), moment(table.largest),
                                                       decay, delta, step.tasks[at], index, count);
      if (table.squares) workspace[(slot + p) * table.tasks + t] += static_cast<double>(sum);
    }
    if (table.buffers)
      through_buffer(static_cast<M*>(table.buffers[p]) + first, delta, static_cast<F>(by.first_decay),
                     static_cast<F>(step.lr), by.stochastic, step.streams[p], index, count);
    end_block(parameter, theta, delta, keep, count);
  });
}

template <Moments kMoments, typename S, typename M>
void update(const TaskMoments& table, const Adaptive& by, double* workspace, int threads) {
  const Shares shares(columns_of(table.sizes, table.tensors), 1);
  const Step<Compute<S>> step(table, by);
  // Slot s and tensor p are pair s + p: from one pair to the next, slot or tensor goes up.
  const int64_t sums = table.squares ? (shares.slots + table.tensors) * table.tasks : 0;
  std::fill(workspace, workspace + sums, 0.0);
  parallel_for(shares.slots, threads, [&](int64_t slot) {
    const int64_t begin = std::min(slot * shares.size, shares.columns);
    const int64_t end = std::min(begin + shares.size, shares.columns);
    if constexpr (std::is_same_v<M, bfloat16>)
      if (by.stochastic) return update_share<kMoments, true, S, M>(step, begin, end, slot, workspace);
    update_share<kMoments, false, S, M>(step, begin, end, slot, workspace);
  });
  if (!table.squares) return;
  int64_t start = 0;
  for (int64_t p = 0; p < table.tensors; start += table.sizes[p++])
    for (int64_t t = 0; t < table.tasks; ++t) {
      double sum = 0.0;
      for (int64_t slot = start / shares.size; slot < shares.slots && slot * shares.size < start + table.sizes[p];
           ++slot)
        sum += workspace[(slot + p) * table.tasks + t];
      const double length = step.lengths[p * table.tasks + t];
      // An absent task may not have had a step: its length is infinite then.
      const double update = sum == 0.0 ? 0.0 : length * length * sum;
      double& average = table.squares[p][t];
      average = by.square_decay * average + (1.0 - by.square_decay) * update;
    }
}

template <typename S, typename M>
void update_types(const TaskMoments& table, const Adaptive& by, double* workspace, int threads) {
  if (by.rule == Rule::adam && by.extra) return update<Moments::amsgrad, S, M>(table, by, workspace, threads);
  if (by.rule == Rule::adam) return update<Moments::adam, S, M>(table, by, workspace, threads);
  if (by.rule == Rule::rmsprop && by.extra) return update<Moments::centered, S, M>(table, by, workspace, threads);
  update<Moments::square, S, M>(table, by, workspace, threads);
}

}  // namespace

int64_t adatask_workspace(int64_t tasks, int64_t tensors, int64_t columns) {
  return (Shares(columns, 1).slots + tensors) * tasks;
}

void adatask(DType parameters, DType moments, const TaskMoments& table, const Adaptive& by, double* workspace,
             Place place) {
  const auto run = [&](auto kernel) { kernel(table, by, workspace, place.threads); };
  if (parameters == DType::f64 && moments == DType::f64) return run(update_types<double, double>);
  if (parameters == DType::f32 && moments == DType::f32) return run(update_types<float, float>);
  if (parameters == DType::f32 && moments == DType::bf16) return run(update_types<float, bfloat16>);
  if (parameters == DType::bf16 && moments == DType::f32) return run(update_types<bfloat16, float>);
  if (parameters == DType::bf16 && moments == DType::bf16) return run(update_types<bfloat16, bfloat16>);
  throw std::invalid_argument("adatask (cpu): float32 or bfloat16 parameters and moments, or float64 both");
}

}  // namespace mtlgrad::cpu
