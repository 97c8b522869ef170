// Formulas of the `adatask` stem (AdaTask, arXiv 2211.15055), shared by the host and device kernels: one element of one
// parameter, one task. With g the task's gradient (negated to maximize, plus weight decay times the parameter), m and v
// the task's own moments:
//   m <- m + first_weight (g - m),   v <- keep v + (add g) g,
//   the task's update = step x / (root_scale sqrt(s) + eps).
//             x   s            keep, add    first_weight   root_scale              step
//   Adam      m   v (amsgrad:  b2, 1 - b2   1 - b1         1 / sqrt(1 - b2^k)      -lr w / (1 - b1^k)
//                 its maximum)
//   RMSprop   g   v (centered: a, 1 - a     1 - a          1                       -lr w (with momentum: w)
//                 v - m^2)
//   Adagrad   g   v            1, 1         -              1                       -lr w / (1 + (k - 1) lr_decay)
// at the task's k-th step, w being its weight. A parameter moves by the sum of the updates of all tasks.
#pragma once
#include "kernels.h"
#include "math/scalar.h"

namespace mtlgrad::math {

// Which moments there are, and what they are for.
enum class MomentKind : int { adam = 0, amsgrad = 1, square = 2, centered = 3 };

template <MomentKind kKind>
constexpr bool has_first = kKind != MomentKind::square;

// What a rule corrects for the number of steps; zeros where it does not.
struct Corrections {
  double beta1, beta2, lr_decay;
};

// A rule's row of the table above, and its moments: null where there are none.
struct Rule {
  MomentKind kind;
  double keep, add, first_weight;
  Corrections corrections;
  double momentum;
  bool decoupled;
  void *const *first, *const *second, *const *largest, *const *buffers;
};

inline Rule rule_of(const Adam& by, const AdamMoments& moments) {
  return {moments.max_exp_avg_sqs ? MomentKind::amsgrad : MomentKind::adam,
          by.beta2,
          1.0 - by.beta2,
          1.0 - by.beta1,
          {by.beta1, by.beta2, 0.0},
          0.0,
          by.decoupled,
          moments.exp_avgs,
          moments.exp_avg_sqs,
          moments.max_exp_avg_sqs,
          nullptr};
}

inline Rule rule_of(const RMSprop& by, const RMSpropMoments& moments) {
  return {moments.grad_avgs ? MomentKind::centered : MomentKind::square,
          by.alpha,
          1.0 - by.alpha,
          1.0 - by.alpha,
          {},
          by.momentum,
          false,
          moments.grad_avgs,
          moments.square_avgs,
          nullptr,
          moments.momentum_buffers};
}

inline Rule rule_of(const Adagrad& by, const AdagradMoments& moments) {
  return {MomentKind::square, 1.0,     1.0,    0.0, {0.0, 0.0, by.lr_decay}, 0.0, false, nullptr,
          moments.state_sums, nullptr, nullptr};
}

template <typename F>
struct TaskCoefficients {
  F first_weight, keep, add, root_scale, eps, step;
};

// All but root_scale and step, which are a task's own.
template <typename F>
TaskCoefficients<F> coefficients_of(const Rule& rule, double eps) {
  return {static_cast<F>(rule.first_weight),
          static_cast<F>(rule.keep),
          static_cast<F>(rule.add),
          F(1),
          static_cast<F>(eps),
          F(0)};
}

// What depends on the task's step count, in float64. `length`: of the parameter's update for a direction of one, which is
// `step` unless a buffer comes between the two.
struct TaskStep {
  double root_scale, step, length;
};

// 1 - beta^count
MTLGRAD_INLINE double correction(double beta, double count) { return 1.0 - pow(beta, count); }

MTLGRAD_INLINE TaskStep task_step(MomentKind kind, const Corrections& by, double lr, double weight, bool buffered,
                                  double count) {
  if (kind == MomentKind::adam || kind == MomentKind::amsgrad) {
    const double step = -lr * weight / correction(by.beta1, count);
    return {1.0 / sqrt(correction(by.beta2, count)), step, step};
  }
  const double length = -lr * weight / (1.0 + (count - 1.0) * by.lr_decay);
  return {1.0, buffered ? weight : length, length};
}

template <typename V>
MTLGRAD_INLINE V square_root(V x) {  // a vector
  for (int k = 0; k < static_cast<int>(sizeof(V) / sizeof(x[0])); ++k) x[k] = square_root(x[k]);
  return x;
}

// Updates the moments and returns x / (root_scale sqrt(s) + eps). `first` is untouched without a first moment, `largest`
// but for amsgrad. V: F, or (on the host) a vector of it.
template <MomentKind kKind, typename V, typename F>
MTLGRAD_INLINE V task_direction(V g, V& first, V& second, V& largest, const TaskCoefficients<F>& c) {
  if constexpr (has_first<kKind>) first = first + c.first_weight * (g - first);
  second = c.keep * second + (c.add * g) * g;
  V square = second;
  if constexpr (kKind == MomentKind::amsgrad) {
    largest = (second > largest) | (second != second) ? second : largest;  // NaN stays, as in torch.maximum
    square = largest;
  }
  if constexpr (kKind == MomentKind::centered) {
    square = second - first * first;
    square = square < V{} ? V{} : square;  // by rounding alone; NaN stays
  }
  const V x = kKind == MomentKind::adam || kKind == MomentKind::amsgrad ? first : g;
  return x / (c.root_scale * square_root(square) + c.eps);
}

// ---- stochastic rounding to bfloat16 --------------------------------------------------------------------------------

// 32 random bits for element `index` (its lower 32 bits, or a vector of such) of a stream: a hash of two multiplications.
// The lower half is for the first moment (and for RMSprop's buffer), the upper half for the second (and amsgrad's
// largest).
template <typename U>
MTLGRAD_INLINE U random_bits(uint32_t stream, U index) {
  U x = index * 0x9E3779B9u + stream;
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The stream of a parameter (any number that tells it from the others), a task and its step. RMSprop's buffer takes the
// stream of task T at the sum of the tasks' steps.
MTLGRAD_INLINE uint32_t random_stream(int64_t key, int64_t task, double count) {
  const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32);
  const uint32_t of_key = random_bits(random_bits(0, high), low);
  return random_bits(random_bits(of_key, static_cast<uint32_t>(task)), static_cast<uint32_t>(count));
}

// The upper half of a float's bits after the lower half has been made to carry with a probability equal to its share of
// the gap between two bfloat16 numbers: unbiased. `bits` has 16 random bits, in its lower half. NaN stays NaN.
MTLGRAD_INLINE uint16_t round_stochastically(float value, uint32_t bits) {
  const uint32_t all = static_cast<uint32_t>(bits_from_float(value));
  const uint32_t rounded = (all + (bits & 0xFFFFu)) >> 16;
  return static_cast<uint16_t>((all & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

}  // namespace mtlgrad::math
