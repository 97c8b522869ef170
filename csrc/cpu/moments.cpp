#include "kernels.h"

#include "cpu/output.h"

namespace mtlgrad::cpu {
namespace {

// One example of one regression output: two dot products, then one pass over the features.
template <typename T>
MTLGRAD_INLINE void regression_row(const T* h, T target, const T* m, const T* c, const T* s, bool bias, int64_t width,
                                   const OutputRow<T>& out) {
  if (target != target) return emit_no_label(out, 0, width);
  const T m1 = bias ? m[width] : T(0), c1 = bias ? c[width] : T(0), s1 = bias ? s[width] : T(0);
  const T r = static_cast<T>(dot(m, h, width) + (static_cast<double>(m1) - static_cast<double>(target)));
  const T v = static_cast<T>(dot(c, h, width) + static_cast<double>(c1));
  const auto z = math::logit_variance(v, noise_scale(h, s, width) + std::sqrt(s1));
  emit(out, 0, width,
       [=](int64_t d) __attribute__((always_inline)) { return math::regression(m[d], c[d], s[d], r, z); });
}

template <bool kSaturated, typename T>
MTLGRAD_INLINE math::BinarySums<T> binary_sums(math::Logistic<T> at, T deviation, const T* nodes, const T* weights,
                                               int64_t num_nodes) {
  T d = 0, du = 0, dh = 0, dd = 0, ddu = 0, ddh = 0;
#pragma omp simd reduction(+ : d, du, dh, dd, ddu, ddh)
  for (int64_t i = 0; i < num_nodes; ++i) {
    math::BinarySums<T> one{};
    math::add_node<kSaturated>(one, at, deviation, nodes[i], weights[i]);
    d += one.d, du += one.du, dh += one.dh, dd += one.dd, ddu += one.ddu, ddh += one.ddh;
  }
  return {d, du, dh, dd, ddu, ddh};
}

// One example of one binary output: two dot products, the quadrature, one pass over the features.
template <typename T>
MTLGRAD_INLINE void binary_row(const T* h, T target, const T* m, const T* k, const T* s, const T* nodes,
                               const T* weights, int64_t num_nodes, int64_t width, const OutputRow<T>& out) {
  if (target != target) return emit_no_label(out, 0, width);
  const T mu = static_cast<T>(dot(m, h, width) + static_cast<double>(m[width]));
  const T scale = noise_scale(h, s, width) + std::sqrt(s[width]);
  const auto z = math::logit_variance(static_cast<T>(dot(k, h, width) + static_cast<double>(k[width])), scale);
  const math::Logistic<T> at = math::logistic(mu);
  const T deviation = std::sqrt(z.v);
  const auto sums = math::is_saturated(at) ? binary_sums<true>(at, deviation, nodes, weights, num_nodes)
                                           : binary_sums<false>(at, deviation, nodes, weights, num_nodes);
  const auto c = math::binary_coefficients(sums, math::binary_residual(at, target), z);
  emit(out, 0, width, [=](int64_t i) __attribute__((always_inline)) { return math::binary(c, m[i], k[i], s[i]); });
}

template <typename T>
MTLGRAD_INLINE void precision_mean_row(const T* means, const T* variances, const double* power, T* out, int64_t batch,
                                       int64_t tasks, int64_t width) {
  // Tiles on the stack: the sums over tasks stay in the first cache.
  constexpr int64_t kTile = 256;
  T numerator[kTile], denominator[kTile];
  for (int64_t begin = 0; begin < width; begin += kTile) {
    const int64_t n = width - begin < kTile ? width - begin : kTile;
    for (int64_t i = 0; i < n; ++i) numerator[i] = denominator[i] = T(0);
    for (int64_t t = 0; t < tasks; ++t) {
      const T *mean = means + t * width + begin, *variance = variances + t * width + begin;
      const math::Power<T> exponent(power[t]);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const T weight = math::precision_weight(variance[i], exponent);
        numerator[i] += weight * mean[i], denominator[i] += weight;
      }
    }
    for (int64_t i = 0; i < n; ++i)
      out[begin + i] = math::weighted_mean(numerator[i], denominator[i], static_cast<T>(batch));
  }
}

#define MTLGRAD_ROWS(T)                                                                                            \
  MTLGRAD_CLONES void regression_row_of(const T* h, T target, const T* m, const T* c, const T* s, bool bias,       \
                                        int64_t width, const OutputRow<T>& out) {                                  \
    regression_row(h, target, m, c, s, bias, width, out);                                                          \
  }                                                                                                                \
  MTLGRAD_CLONES void binary_row_of(const T* h, T target, const T* m, const T* k, const T* s, const T* nodes,      \
                                    const T* weights, int64_t num_nodes, int64_t width, const OutputRow<T>& out) { \
    binary_row(h, target, m, k, s, nodes, weights, num_nodes, width, out);                                         \
  }                                                                                                                \
  MTLGRAD_CLONES void precision_mean_row_of(const T* means, const T* variances, const double* power, T* out,       \
                                            int64_t batch, int64_t tasks, int64_t width) {                         \
    precision_mean_row(means, variances, power, out, batch, tasks, width);                                         \
  }
MTLGRAD_ROWS(float)
MTLGRAD_ROWS(double)

}  // namespace

void regression_moments(DType dtype, Features features, const void* targets, OutputsPosterior posterior, Output output,
                        Place place) {
  for_dtype("regression_moments", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t width = features.width;
    parallel_for(features.batch, place.threads, [&](int64_t b) {
      const T* h = static_cast<const T*>(features.data) + b * features.stride;
      for (int64_t o = 0; o < posterior.outputs; ++o) {
        const auto at = math::posterior_row<T>(posterior, o, b);
        regression_row_of(h, static_cast<const T*>(targets)[b * posterior.outputs + o], at.mean, at.cross_covariance,
                          at.variances, posterior.weights > width, width,
                          output_row<T>(output, b, o, posterior.outputs, width));
      }
    });
  });
}

void binary_moments(DType dtype, Features features, const void* targets, OutputsPosterior posterior, const void* nodes,
                    const void* weights, int64_t num_nodes, Output output, Place place) {
  for_dtype("binary_moments", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t width = features.width;
    parallel_for(features.batch, place.threads, [&](int64_t b) {
      const T* h = static_cast<const T*>(features.data) + b * features.stride;
      for (int64_t o = 0; o < posterior.outputs; ++o) {
        const auto at = math::posterior_row<T>(posterior, o, b);
        binary_row_of(h, static_cast<const T*>(targets)[b * posterior.outputs + o], at.mean, at.cross_covariance,
                      at.variances, static_cast<const T*>(nodes), static_cast<const T*>(weights), num_nodes, width,
                      output_row<T>(output, b, o, posterior.outputs, width));
      }
    });
  });
}

void precision_mean(DType dtype, const void* means, const void* variances, const double* power, void* out,
                    int64_t batch, int64_t tasks, int64_t width, Place place) {
  for_dtype("precision_mean", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(batch, place.threads, [&](int64_t b) {
      const int64_t row = b * tasks * width;
      precision_mean_row_of(static_cast<const T*>(means) + row, static_cast<const T*>(variances) + row, power,
                            static_cast<T*>(out) + b * width, batch, tasks, width);
    });
  });
}

void weighted_mean(DType dtype, const void* numerator, const void* denominator, void* out, int64_t batch, int64_t width,
                   Place place) {
  for_dtype("weighted_mean", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(batch, place.threads, [&](int64_t b) {
      const T *n = static_cast<const T*>(numerator) + b * width, *d = static_cast<const T*>(denominator) + b * width;
      T* to = static_cast<T*>(out) + b * width;
      for (int64_t i = 0; i < width; ++i) to[i] = math::weighted_mean(n[i], d[i], static_cast<T>(batch));
    });
  });
}

}  // namespace mtlgrad::cpu
