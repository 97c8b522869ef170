// Formulas of the `moments` stem (BayesAgg-MTL, arXiv 2402.04005), shared by the host and device kernels.
#pragma once
#include "kernels.h"
#include "math/scalar.h"

namespace mtlgrad::math {

constexpr double kSmallestVariance = 1e-8;  // variances are clamped here before they become weights, as published

template <typename T>
struct Moments {
  T mean, variance;
};

// A posterior's rows of `weights` numbers for one output at one example.
template <typename T>
struct PosteriorRow {
  const T *mean, *cross_covariance, *variances;
};

template <typename T>
MTLGRAD_INLINE PosteriorRow<T> posterior_row(const OutputsPosterior& at, int64_t output, int64_t example) {
  return {static_cast<const T*>(at.mean) + output * at.weights,
          static_cast<const T*>(at.cross_covariance) + output * at.covariance_stride + example * at.weights,
          static_cast<const T*>(at.variances) + output * at.variance_stride};
}

// A missing label has no gradient: mean zero, variance infinite, weight zero.
template <typename T>
MTLGRAD_INLINE Moments<T> no_label() {
  return {T(0), infinity<T>()};
}

// Infinity means "no label" downstream, so a variance that overflows must not be taken for it. One that rounding left
// below zero is zero.
template <typename T>
MTLGRAD_INLINE Moments<T> checked(T mean, T variance) {
  const T positive = variance < T(0) ? T(0) : variance;
  return {mean, positive < infinity<T>() ? positive : not_a_number<T>()};
}

// Rounding leaves c = S h wrong by about kNoise sqrt(S_dd) A and v = h.c by kNoise A^2, A = sum_d |h_d| sqrt(S_dd).
template <typename T>
constexpr T kNoise = sizeof(T) == 4 ? T(1e-5) : T(1e-13);

// The variance v of z = w.h, and what Cauchy and Schwarz allow: c_d^2 <= S_dd limit. The moments at d depend on the
// covariance through (S_dd, c_d, v) alone, so where this holds they are those of some Gaussian; where it does not, the
// matrix is not positive semi-definite, and the answer is NaN.
template <typename T>
struct LogitVariance {
  T v, limit;
};

template <typename T>
MTLGRAD_INLINE LogitVariance<T> logit_variance(T v, T a) {
  const T slack = kNoise<T> * a * a;
  if (v < -slack) return {not_a_number<T>(), not_a_number<T>()};
  const T positive = v < T(0) ? T(0) : v;
  const T root = square_root(positive + slack) + kNoise<T> * a;
  return {positive, root * root};
}

template <typename T>
MTLGRAD_INLINE T if_possible(T variance, T c, T s, T limit) {
  return c * c <= s * limit ? variance : not_a_number<T>();
}

// Squared error (w.h - y)^2, w ~ N(m, S): c = S h, v = h.c, r = m.h - y, s = S_dd.
//   E[g_d] = 2 (m_d r + c_d),  Var[g_d] = 4 (m_d^2 v + 2 m_d r c_d + s r^2 + s v + c_d^2)
template <typename T>
MTLGRAD_INLINE Moments<T> regression(T m, T c, T s, T r, LogitVariance<T> z) {
  const T mean = T(2) * (m * r + c);
  const T variance = T(4) * (m * (m * z.v + T(2) * r * c) + (s * (r * r + z.v) + c * c));
  return checked(mean, if_possible(variance, c, s, z.limit));
}

// What a binary or multiclass task needs to know of one example, whatever the dimension d:
//   E[g_d] = first . a_d,  Var[g_d] = a_d' second a_d + spread . s_d
// with a_d = (m_d, K_d) and s_d the (co)variances of the weights at d. The form for one logit:
template <typename T>
struct BinaryCoefficients {
  T first_m, first_k;
  T second_mm, second_mk, second_kk;
  T spread;
  T limit;  // see LogitVariance
};

// Binary cross entropy with logit z = mu + sqrt(v) u, u ~ N(0, 1). Given u, w_d is Gaussian with mean m_d + K_d u /
// sqrt(v) and variance s_d - K_d^2 / v. With r = r0 + delta(u), r0 the residual at mu, and since the quadrature is
// exact for 1, u and u^2, everything that would cancel does so on paper: what is left are sums of order v.
template <typename T>
struct BinarySums {
  T d, du, dh;     // E[delta], E[delta u], E[delta (u^2 - 1)]
  T dd, ddu, ddh;  // the same with delta^2
};

template <bool kSaturated, typename T>
MTLGRAD_INLINE void add_node(BinarySums<T>& sums, Logistic<T> at, T deviation, T node, T weight) {
  const T delta = logistic_step<kSaturated>(at, deviation * node);
  const T h = node * node - T(1);
  const T wd = weight * delta, wdd = wd * delta;
  sums.d += wd, sums.du += wd * node, sums.dh += wd * h;
  sums.dd += wdd, sums.ddu += wdd * node, sums.ddh += wdd * h;
}

template <typename T>
MTLGRAD_INLINE BinaryCoefficients<T> binary_coefficients(const BinarySums<T>& s, T r0, LogitVariance<T> z) {
  const T v = z.v, deviation = square_root(v);
  const T by_deviation = v > T(0) ? T(1) / deviation : T(0);  // v = 0: K = 0 too, whatever stands before it
  BinaryCoefficients<T> c;
  c.first_m = r0 + s.d;
  c.first_k = s.du * by_deviation;
  c.second_mm = s.dd - s.d * s.d;
  c.second_mk = (r0 * s.du + s.ddu - s.d * s.du) * by_deviation;
  c.second_kk = (T(2) * r0 * s.dh + s.ddh - s.du * s.du) * by_deviation * by_deviation;
  c.spread = r0 * r0 + T(2) * r0 * s.d + s.dd;
  c.limit = z.limit;
  return c;
}

template <typename T>
MTLGRAD_INLINE Moments<T> binary(const BinaryCoefficients<T>& c, T m, T k, T s) {
  const T mean = c.first_m * m + c.first_k * k;
  const T variance = c.second_mm * m * m + T(2) * c.second_mk * m * k + c.second_kk * k * k + c.spread * s;
  return checked(mean, if_possible(variance, k, s, c.limit));
}

// The residual of a binary logit, without the cancellation of p - 1.
template <typename T>
MTLGRAD_INLINE T binary_residual(Logistic<T> at, T target) {
  return target == T(1) ? -at.q : at.p - target;
}

// How many samples' mean is the shift of sums over all of them: one alone may be far out.
MTLGRAD_INLINE int64_t shift_samples(int64_t samples) { return samples < 8 ? samples : 8; }

constexpr int64_t kNoClass = -100;  // the target of an example without a label

// softmax(z) - onehot(target) in place. The target's own residual is minus the others' sum: no cancellation. All NaN
// where there is no label, or where the target is no class.
template <typename T>
MTLGRAD_INLINE void multiclass_residuals(T* z, int64_t target, int64_t classes) {
  T largest = z[0];
  for (int64_t c = 1; c < classes; ++c) largest = z[c] > largest ? z[c] : largest;
  T sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += z[c] = exp_pair(z[c] - largest).exp;
  const T scale = target >= 0 && target < classes ? T(1) / sum : not_a_number<T>();
  T others = 0;
  for (int64_t c = 0; c < classes; ++c) {
    z[c] *= scale;
    others += c == target ? T(0) : z[c];
  }
  if (scale == scale) z[target] = -others;
}

// The weight of a task at one dimension. float and double differ in how the power is held.
template <typename T>
struct Power;

template <>
struct Power<float> {
  SplitPower value;
  bool is_one;
  MTLGRAD_INLINE explicit Power(double power) : value(split_power(power)), is_one(power == 1.0) {}
  MTLGRAD_INLINE float weight(float clamped) const { return is_one ? 1.0f / clamped : inverse_power(clamped, value); }
};

template <>
struct Power<double> {
  double value;
  MTLGRAD_INLINE explicit Power(double power) : value(power) {}
  MTLGRAD_INLINE double weight(double clamped) const { return inverse_power(clamped, value); }
};

// lambda = max(variance, 1e-8)^-power; zero where there is no label; NaN stays NaN.
template <typename T>
MTLGRAD_INLINE T precision_weight(T variance, const Power<T>& power) {
  const T floor = static_cast<T>(kSmallestVariance);
  const T weight = power.weight(variance < floor ? floor : variance);
  return variance == infinity<T>() ? T(0) : weight;
}

// The weighted mean over the tasks, over the batch size; zero where no task has a label. A labelled task's weight is at
// least 2^-126 (inverse_power), so a sum below 2^-100 means that all weights left float32's range: NaN, not a guess.
template <typename T>
MTLGRAD_INLINE T weighted_mean(T numerator, T denominator, T batch) {
  const T value = denominator < static_cast<T>(7.8886e-31) ? not_a_number<T>() : numerator / denominator / batch;
  return denominator == T(0) ? T(0) : value;
}

}  // namespace mtlgrad::math
