// One step of AdaTask's optimizers. Bound by memory: (5 T + 2) elements for each of Adam's parameters are read or written
// once. A chunk of columns at a time, whose parameters and sums of updates stay in the first-level cache while the
// gradients and moments of one task after another stream by.
#include <type_traits>
#include <vector>

#include "cpu/columns.h"
#include "cpu/half.h"
#include "cpu/parallel.h"
#include "math/adatask.h"

namespace mtlgrad::cpu {

namespace {

using math::MomentKind;
using math::TaskCoefficients;

template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Columns: so few that the streams of all tasks are under way together, which memory serves a third faster than one
// after another.
#ifndef CHUNK
#define CHUNK 256
#endif
constexpr int64_t kChunk = CHUNK;

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

// A task's moments at n columns, in place; adds its updates to `delta`, and returns the sum of its squared directions.
template <MomentKind kKind, bool kStochastic, typename M, typename F>
MTLGRAD_CLONES F update_moments(const F* gradient, M* first, M* second, M* largest, F* delta,
                                const TaskCoefficients<F>& coefficients, uint32_t random, uint32_t index, int64_t n) {
  const TaskCoefficients<F> c = coefficients;
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    F m = 0, v = widen(second[i]), most = 0;
    if constexpr (math::has_first<kKind>) m = widen(first[i]);
    if constexpr (kKind == MomentKind::amsgrad) most = widen(largest[i]);
    const F direction = math::task_direction<kKind>(gradient[i], m, v, most, c);
    delta[i] += c.step * direction, sum += direction * direction;
    uint32_t bits = 0;
    if constexpr (kStochastic) bits = math::random_bits(random, index + static_cast<uint32_t>(i));
    if constexpr (math::has_first<kKind>) first[i] = stored<M>(m, kStochastic, bits);
    second[i] = stored<M>(v, kStochastic, bits >> 16);
    if constexpr (kKind == MomentKind::amsgrad) largest[i] = stored<M>(most, kStochastic, bits >> 16);
  }
  return sum;
}

template <typename M, typename F>
using Update = decltype(&update_moments<MomentKind::adam, false, M, F>);

template <bool kStochastic, typename M, typename F>
Update<M, F> update_of(MomentKind kind) {
  switch (kind) {
    case MomentKind::adam: return update_moments<MomentKind::adam, kStochastic, M, F>;
    case MomentKind::amsgrad: return update_moments<MomentKind::amsgrad, kStochastic, M, F>;
    case MomentKind::square: return update_moments<MomentKind::square, kStochastic, M, F>;
    default: return update_moments<MomentKind::centered, kStochastic, M, F>;
  }
}

// What updates are made from, where that is not the gradient as it is stored.
template <typename S, typename F>
MTLGRAD_CLONES void prepare_gradient(const S* gradient, const S* parameter, F sign, F decay, F* prepared, int64_t n) {
  if (decay == F(0)) {  // not 0 times what may be infinite
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) prepared[i] = sign * widen(gradient[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) prepared[i] = sign * widen(gradient[i]) + decay * widen(parameter[i]);
  }
}

template <typename M, typename F>
MTLGRAD_CLONES void through_buffer(M* buffer, F* delta, F momentum, F lr, bool stochastic, uint32_t random,
                                   uint32_t index, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const F b = momentum * widen(buffer[i]) + delta[i];
    buffer[i] = stored<M>(b, stochastic, math::random_bits(random, index + static_cast<uint32_t>(i)));
    delta[i] = -lr * b;
  }
}

template <typename S, typename F>
MTLGRAD_CLONES void move_parameter(S* parameter, const F* delta, F keep, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) parameter[i] = stored<S>(widen(parameter[i]) * keep + delta[i], false, 0);
}

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
    step = math::task_step(call.rule.corrections, call.lr, call.settings.task_weights[number],
                           call.rule.buffers != nullptr, count);
  }
};

std::vector<PresentTask> present_tasks(const Call& call) {
  std::vector<PresentTask> tasks;
  tasks.reserve(call.gradients.tasks);
  for (int64_t t = 0; t < call.gradients.tasks; ++t)
    if (!call.settings.present || call.settings.present[t]) tasks.push_back({t, -1.0, {}});
  return tasks;
}

// A task's gradient and moments at the first column of a piece.
template <typename S, typename M, typename F>
struct TaskPointers {
  const S* gradient;
  M *first, *second, *largest;
  F root_scale, step;
  uint32_t random;
  double sum;
};

// workspace[(slot + p) * T + t]: the sum of squared directions of a share of a tensor. Slot and tensor together are a
// number of their own, for from one pair to the next one of them goes up.
template <typename S, typename M>
void update_share(const Call& call, Update<M, Compute<S>> update, int64_t begin, int64_t end, int64_t slot) {
  using F = Compute<S>;
  const auto& [gradients, tensors, rule, settings, workspace, lr] = call;
  const F sign = settings.maximize ? F(-1) : F(1);
  const F decay = static_cast<F>(rule.decoupled ? 0.0 : settings.weight_decay);
  const F keep = static_cast<F>(rule.decoupled ? 1.0 - lr * settings.weight_decay : 1.0);
  const bool as_stored = std::is_same_v<S, F> && !settings.maximize && decay == F(0);
  auto coefficients = math::coefficients_of<F>(rule, settings.eps);
  std::vector<PresentTask> tasks = present_tasks(call);
  std::vector<TaskPointers<S, M, F>> pointers(tasks.size());
  alignas(64) F prepared[kChunk], delta[kChunk];
  for_pieces(gradients.sizes, gradients.tensors, begin, end, end - begin,
             [&](int64_t p, int64_t start, int64_t count, int64_t) {
               const int64_t key = settings.stochastic && tensors.keys ? tensors.keys[p] : 0;
               for (size_t k = 0; k < tasks.size(); ++k) {
                 const int64_t t = tasks[k].number, at = p * gradients.tasks + t;
                 tasks[k].set_count(call, tensors.steps[p][t]);
                 const auto moment = [&](void* const* moments) {
                   return static_cast<M*>((moments ? moments : rule.second)[at]) +
                          start;  // what there is not stays untouched
                 };
                 pointers[k] = {static_cast<const S*>(gradients.data[at]) + start,
                                moment(rule.first),
                                moment(rule.second),
                                moment(rule.largest),
                                static_cast<F>(tasks[k].step.root_scale),
                                static_cast<F>(tasks[k].step.step),
                                settings.stochastic ? math::random_stream(key, t, tasks[k].count) : 0,
                                0.0};
               }
               uint32_t random = 0;
               if (rule.buffers && settings.stochastic) {
                 double counts = 0.0;
                 for (int64_t t = 0; t < gradients.tasks; ++t) counts += tensors.steps[p][t];
                 random = math::random_stream(key, gradients.tasks, counts);
               }
               S* const parameter = static_cast<S*>(tensors.parameters[p]) + start;
               for (int64_t i = 0; i < count; i += kChunk) {
                 const int64_t n = std::min(count - i, kChunk);
                 const auto index = static_cast<uint32_t>(start + i);
                 std::fill_n(delta, n, F(0));
                 for (auto& task : pointers) {
                   const F* gradient = prepared;
                   if constexpr (std::is_same_v<S, F>)
                     if (as_stored) gradient = task.gradient + i;
                   if (!as_stored) prepare_gradient(task.gradient + i, parameter + i, sign, decay, prepared, n);
                   coefficients.root_scale = task.root_scale, coefficients.step = task.step;
                   task.sum += update(gradient, task.first + i, task.second + i, task.largest + i, delta, coefficients,
                                      task.random, index, n);
                 }
                 if (rule.buffers)
                   through_buffer(static_cast<M*>(rule.buffers[p]) + start + i, delta, static_cast<F>(rule.momentum),
                                  static_cast<F>(lr), settings.stochastic, random, index, n);
                 move_parameter(parameter + i, delta, keep, n);
               }
               if (tensors.squares)
                 for (size_t k = 0; k < tasks.size(); ++k)
                   workspace[(slot + p) * gradients.tasks + tasks[k].number] = pointers[k].sum;
             });
}

template <typename S, typename M>
void step_types(const Call& call, int threads) {
  const auto& [gradients, tensors, rule, settings, workspace, lr] = call;
  Update<M, Compute<S>> update = update_of<false, M, Compute<S>>(rule.kind);
  if constexpr (std::is_same_v<M, bfloat16>)
    if (settings.stochastic) update = update_of<true, M, Compute<S>>(rule.kind);
  const Shares shares(columns_of(gradients.sizes, gradients.tensors), 1);
  if (tensors.squares) std::fill_n(workspace, (shares.slots + gradients.tensors) * gradients.tasks, 0.0);
  parallel_for(shares.slots, threads, [&](int64_t slot) {
    const int64_t begin = std::min(slot * shares.size, shares.columns);
    const int64_t end = std::min(begin + shares.size, shares.columns);
    update_share<S, M>(call, update, begin, end, slot);
  });
  if (!tensors.squares) return;
  std::vector<PresentTask> tasks = present_tasks(call);
  int64_t start = 0;
  for (int64_t p = 0; p < gradients.tensors; start += gradients.sizes[p++]) {
    for (int64_t t = 0; t < gradients.tasks; ++t) tensors.squares[p][t] *= settings.square_decay;
    for (PresentTask& task : tasks) {
      double sum = 0.0;
      for (int64_t slot = start / shares.size; slot < shares.slots && slot * shares.size < start + gradients.sizes[p];
           ++slot)
        sum += workspace[(slot + p) * gradients.tasks + task.number];
      task.set_count(call, tensors.steps[p][task.number]);
      tensors.squares[p][task.number] += (1.0 - settings.square_decay) * (task.step.length * task.step.length * sum);
    }
  }
}

void step(DType parameters, DType moments, Call call, int threads) {
  if (call.settings.lr_tensor) call.lr = *call.settings.lr_tensor;
  const auto run = [&](auto kernel) { kernel(call, threads); };
  if (parameters == DType::f64 && moments == DType::f64) return run(step_types<double, double>);
  if (parameters == DType::f32 && moments == DType::f32) return run(step_types<float, float>);
  if (parameters == DType::f32 && moments == DType::bf16) return run(step_types<float, bfloat16>);
  if (parameters == DType::bf16 && moments == DType::f32) return run(step_types<bfloat16, float>);
  if (parameters == DType::bf16 && moments == DType::bf16) return run(step_types<bfloat16, bfloat16>);
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
