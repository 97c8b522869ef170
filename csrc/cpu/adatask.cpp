// One step of AdaTask's optimizers. Bound by memory: (5 T + 2) elements for each of Adam's parameters are read or written
// once. A block of columns at a time, whose parameters and sums of updates stay in the first-level cache while the
// gradients and moments of up to four tasks at once stream by. Software prefetch gains nothing here.
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

// What a task's gradient and moments are at a block's first column.
template <typename S, typename M, typename F>
struct Stream {
  const S* gradient;
  M *first, *second, *largest;
  TaskCoefficients<F> coefficients;
  uint32_t random;
};

// A task's moments at column i, in place; its direction.
template <Moments kMoments, bool kStochastic, typename S, typename M, typename F>
MTLGRAD_INLINE F update_column(const Stream<S, M, F>& task, F sign, F decay, uint32_t index, int64_t i) {
  F first = 0, second = widen(task.second[i]), largest = 0;
  if constexpr (math::has_first<kMoments>) first = widen(task.first[i]);
  if constexpr (kMoments == Moments::amsgrad) largest = widen(task.largest[i]);
  const F g = sign * widen(task.gradient[i]) + decay;
  const F direction = math::task_direction<kMoments>(g, first, second, largest, task.coefficients);
  uint32_t bits = 0;
  if constexpr (kStochastic) bits = math::random_bits(task.random, index + static_cast<uint32_t>(i));
  if constexpr (math::has_first<kMoments>) task.first[i] = stored<M>(first, kStochastic, bits);
  task.second[i] = stored<M>(second, kStochastic, bits >> 16);
  if constexpr (kMoments == Moments::amsgrad) task.largest[i] = stored<M>(largest, kStochastic, bits >> 16);
  return direction;
}

// A block of a parameter's columns: what gradients are multiplied with, what of the parameter is added to them and what of
// it remains; and, where one loop does not see all tasks, the parameter's values, what is added to gradients, and the sum
// of the updates so far.
template <typename S, typename F>
struct Block {
  S* parameter;
  F sign, weight_decay, keep;
  F *theta, *decay, *delta;
};

// Tasks in one loop, at columns [0, n): their moments in place, and the sums of their squared directions. All streams are
// then under way together, which memory serves a third faster than one task's after another's. kAlone: there are no
// other tasks, and nothing is added to gradients; the parameter is then changed at once, a fifth faster again.
template <Moments kMoments, bool kStochastic, bool kAlone, int kTasks, typename S, typename M, typename F>
MTLGRAD_INLINE void update_columns(const Block<S, F>& block, const Stream<S, M, F>* tasks, double* sums, uint32_t index,
                                   int64_t n) {
  const Stream<S, M, F> task0 = tasks[0], task1 = tasks[kTasks > 1 ? 1 : 0], task2 = tasks[kTasks > 2 ? 2 : 0],
                        task3 = tasks[kTasks > 3 ? 3 : 0];
  const F sign = block.sign, keep = block.keep;
  S* parameter = block.parameter;
  F *delta = block.delta, *decays = block.decay;
  F sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
  for (int64_t i = 0; i < n; ++i) {
    F decay = 0, update = 0;
    if constexpr (!kAlone) decay = decays[i], update = delta[i];
    const F d0 = update_column<kMoments, kStochastic>(task0, sign, decay, index, i);
    update += task0.coefficients.step * d0, sum0 += d0 * d0;
    if constexpr (kTasks > 1) {
      const F d1 = update_column<kMoments, kStochastic>(task1, sign, decay, index, i);
      update += task1.coefficients.step * d1, sum1 += d1 * d1;
    }
    if constexpr (kTasks > 2) {
      const F d2 = update_column<kMoments, kStochastic>(task2, sign, decay, index, i);
      update += task2.coefficients.step * d2, sum2 += d2 * d2;
    }
    if constexpr (kTasks > 3) {
      const F d3 = update_column<kMoments, kStochastic>(task3, sign, decay, index, i);
      update += task3.coefficients.step * d3, sum3 += d3 * d3;
    }
    if constexpr (kAlone)
      parameter[i] = stored<S>(widen(parameter[i]) * keep + update, false, 0);
    else
      delta[i] = update;
  }
  sums[0] = sum0, sums[1] = sum1, sums[2] = sum2, sums[3] = sum3;
}

constexpr int64_t kGroup = 4;  // tasks in one loop at most: more would not leave it registers for their pointers

template <Moments kMoments, bool kStochastic, bool kAlone, typename S, typename M, typename F>
MTLGRAD_CLONES void update_tasks(const Block<S, F>& block, const Stream<S, M, F>* tasks, int64_t count, double* sums,
                                 uint32_t index, int64_t n) {
  if (count == 1) return update_columns<kMoments, kStochastic, kAlone, 1>(block, tasks, sums, index, n);
  if (count == 2) return update_columns<kMoments, kStochastic, kAlone, 2>(block, tasks, sums, index, n);
  if (count == 3) return update_columns<kMoments, kStochastic, kAlone, 3>(block, tasks, sums, index, n);
  update_columns<kMoments, kStochastic, kAlone, 4>(block, tasks, sums, index, n);
}

template <typename S, typename F>
MTLGRAD_CLONES void begin_block(const Block<S, F>& block, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    block.theta[i] = widen(block.parameter[i]);
    block.delta[i] = 0;
  }
  for (int64_t i = 0; i < n; ++i)
    block.decay[i] = block.weight_decay == F(0) ? F(0) : block.weight_decay * block.theta[i];
}

template <typename S, typename F>
MTLGRAD_CLONES void end_block(const Block<S, F>& block, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    block.parameter[i] = stored<S>(block.theta[i] * block.keep + block.delta[i], false, 0);
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

// The coefficients of a call, for every parameter and task.
template <typename F>
struct Coefficients {
  double lr;
  std::vector<TaskCoefficients<F>> tasks;  // [P, T]
  std::vector<double> lengths;             // [P, T]
  std::vector<uint32_t> random;            // [P, T], then [P] for the buffers

  Coefficients(const TaskMoments& table, const Adaptive& by) : lr(by.lr_tensor ? *by.lr_tensor : by.lr) {
    const bool adagrad = by.rule == Rule::adagrad;
    const double first = by.rule == Rule::adam ? by.first_decay : by.second_decay;
    TaskCoefficients<F> c{};
    c.first_weight = static_cast<F>(1.0 - first);
    c.keep = static_cast<F>(adagrad ? 1.0 : by.second_decay);
    c.add = static_cast<F>(adagrad ? 1.0 : 1.0 - by.second_decay);
    c.eps = static_cast<F>(by.eps);
    const int64_t tensors = table.tensors, entries = tensors * table.tasks;
    tasks.reserve(entries), lengths.reserve(entries), random.resize(entries + tensors);
    for (int64_t p = 0; p < tensors; ++p) {
      double counts = 0.0;
      for (int64_t t = 0; t < table.tasks; ++t) {
        const double count = table.steps[p][t];
        const math::TaskStep at = math::task_step(static_cast<int>(by.rule), lr, by.weights[t], by.first_decay,
                                                  by.second_decay, by.lr_decay, table.buffers != nullptr, count);
        c.root_scale = static_cast<F>(at.root_scale), c.step = static_cast<F>(at.step);
        tasks.push_back(c), lengths.push_back(at.length);
        if (by.stochastic) random[p * table.tasks + t] = math::random_stream(table.keys[p], t, count);
        counts += count;
      }
      if (by.stochastic) random[entries + p] = math::random_stream(table.keys[p], table.tasks, counts);
    }
  }
};

// workspace[(slot + p) * T + t]: the sum of squared directions of a share of a tensor. Slot and tensor together are a
// number of their own, for from one pair to the next one of them goes up.
template <Moments kMoments, bool kStochastic, typename S, typename M>
void update_share(const TaskMoments& table, const Adaptive& by, const Coefficients<Compute<S>>& coefficients,
                  int64_t begin, int64_t end, int64_t slot, double* workspace) {
  using F = Compute<S>;
  alignas(64) F theta[kBlock], decay[kBlock], delta[kBlock];
  Block<S, F> block{nullptr,
                    by.maximize ? F(-1) : F(1),
                    static_cast<F>(by.decoupled ? 0.0 : by.weight_decay),
                    static_cast<F>(by.decoupled ? 1.0 - coefficients.lr * by.weight_decay : 1.0),
                    theta,
                    decay,
                    delta};
  std::vector<int64_t> present;
  for (int64_t t = 0; t < table.tasks; ++t)
    if (!table.present || table.present[t]) present.push_back(t);
  const auto tasks = static_cast<int64_t>(present.size());
  const bool alone = tasks >= 1 && tasks <= kGroup && !table.buffers && block.weight_decay == F(0);
  for_pieces(table.sizes, table.tensors, begin, end, kBlock, [&](int64_t p, int64_t start, int64_t count, int64_t) {
    block.parameter = static_cast<S*>(table.parameters[p]) + start;
    const auto index = static_cast<uint32_t>(start);
    if (!alone) begin_block(block, count);
    for (int64_t done = 0; done < tasks; done += kGroup) {
      const int64_t group = std::min(kGroup, tasks - done);
      Stream<S, M, F> streams[kGroup];
      for (int64_t k = 0; k < group; ++k) {
        const int64_t at = p * table.tasks + present[done + k];
        const auto moment = [&](void* const* moments) {
          return moments ? static_cast<M*>(moments[at]) + start : static_cast<M*>(nullptr);
        };
        streams[k] = {static_cast<const S*>(table.gradients[at]) + start,
                      moment(table.first),
                      moment(table.second),
                      moment(table.largest),
                      coefficients.tasks[at],
                      coefficients.random[at]};
      }
      double sums[kGroup];
      if (alone)
        update_tasks<kMoments, kStochastic, true>(block, streams, group, sums, index, count);
      else
        update_tasks<kMoments, kStochastic, false>(block, streams, group, sums, index, count);
      if (table.squares)
        for (int64_t k = 0; k < group; ++k) workspace[(slot + p) * table.tasks + present[done + k]] += sums[k];
    }
    if (alone) return;
    if (table.buffers)
      through_buffer(static_cast<M*>(table.buffers[p]) + start, delta, static_cast<F>(by.first_decay),
                     static_cast<F>(coefficients.lr), by.stochastic,
                     coefficients.random[table.tensors * table.tasks + p], index, count);
    end_block(block, count);
  });
}

template <Moments kMoments, typename S, typename M>
void update(const TaskMoments& table, const Adaptive& by, double* workspace, int threads) {
  const Shares shares(columns_of(table.sizes, table.tensors), 1);
  const Coefficients<Compute<S>> coefficients(table, by);
  const int64_t sums = table.squares ? (shares.slots + table.tensors) * table.tasks : 0;
  std::fill(workspace, workspace + sums, 0.0);
  parallel_for(shares.slots, threads, [&](int64_t slot) {
    const int64_t begin = std::min(slot * shares.size, shares.columns);
    const int64_t end = std::min(begin + shares.size, shares.columns);
    if constexpr (std::is_same_v<M, bfloat16>)
      if (by.stochastic)
        return update_share<kMoments, true, S, M>(table, by, coefficients, begin, end, slot, workspace);
    update_share<kMoments, false, S, M>(table, by, coefficients, begin, end, slot, workspace);
  });
  if (!table.squares) return;
  int64_t start = 0;
  for (int64_t p = 0; p < table.tensors; start += table.sizes[p++])
    for (int64_t t = 0; t < table.tasks; ++t) {
      double sum = 0.0;
      for (int64_t slot = start / shares.size; slot < shares.slots && slot * shares.size < start + table.sizes[p];
           ++slot)
        sum += workspace[(slot + p) * table.tasks + t];
      const double length = coefficients.lengths[p * table.tasks + t];
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
