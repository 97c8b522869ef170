// Multiclass moments (softmax cross entropy), DESIGN 4.1: the parts that do not depend on the dimension d, in float64.
// Host kernels call these with one thread's range, device kernels with a block's stride; a barrier between the stages.
//
//   z = mu + L u, L L' = V, V_ck = h~.S_ck h~: the C logits, not the C x P weights, are integrated over points u.
//   Given u, g_d = sum_c r_c w_cd has mean sum_i phi_i a_di and its residual variance is quadratic in r:
//     full:  a_d = (m_cd; K_cd,j), phi = (r_c; r_c t_j) with t = L^-T u, since k_cd.u = K_cd.t;
//            Var[g_d] = a_d' (Cov[phi] - 0 (+) E[rr'] (x) V^-1) a_d + sum_ck E[r_c r_k] S_cd,kd
//     block: V diagonal: a_d = (m_cd; K_cd), phi = (r_c; r_c u_c / sqrt(V_c)); E[r_c^2] / V_c and S_c,dd likewise
//     kron:  V = s A, s = h~.S_feature h~: a_d = (m_cd; x_d), phi = (r_c; r.L_A u / sqrt(s)); E[r' A r] / s
// so that one form serves the three: E[g_d] = first.a_d, Var[g_d] = a_d' second a_d + spread.s_d (kernels.h: variances).
#pragma once
#include "kernels.h"
#include "math/scalar.h"

namespace mtlgrad::math {

// How many phi and how many spread coefficients; `second` is kept packed: row i, columns 0 to i.
struct MulticlassSizes {
  int64_t phi, spread, factor;
};

MTLGRAD_INLINE MulticlassSizes multiclass_sizes(Structure structure, int64_t classes) {
  const int64_t square = classes * classes;
  if (structure == Structure::full) return {classes + square, square, square};
  if (structure == Structure::block) return {2 * classes, classes, classes};
  return {classes + 1, 1, square};
}

// One example, and where its vectors lie.
template <typename T>
struct MulticlassExample {
  const T* h;
  int64_t width, target;
  int64_t index, batch;
  MulticlassPosterior posterior;

  // Row i of the vectors a_d, d running: the means, then the cross covariances; the bias's entry last.
  MTLGRAD_INLINE const T* row(int64_t i) const {
    const int64_t classes = posterior.num_classes, augmented = width + 1;
    if (i < classes) return static_cast<const T*>(posterior.mean) + i * augmented;
    const T* cross = static_cast<const T*>(posterior.cross_covariance);
    i -= classes;
    if (posterior.structure == Structure::full)
      return cross + ((i % classes * batch + index) * classes + i / classes) * augmented;
    return cross + ((posterior.structure == Structure::block ? i * batch : 0) + index) * augmented;
  }

  // Row q of the (co)variances s_d.
  MTLGRAD_INLINE const T* spread(int64_t q) const {
    return static_cast<const T*>(posterior.variances) + q * (width + 1);
  }
  // The variances of class c's weights among them.
  MTLGRAD_INLINE const T* variances(int64_t c) const {
    const bool full = posterior.structure == Structure::full, block = posterior.structure == Structure::block;
    return spread(full ? c * posterior.num_classes + c : (block ? c : 0));
  }
};

// One example's slice of the workspace.
struct MulticlassSlice {
  double *mu, *slack;               // [C] logits at the posterior mean; rounding error of V_cc
  double *factor, *inverse;         // V, then L (block: sqrt V_c); V^-1
  double* phi;                      // [n, point_stride(S)]
  double* products;                 // E[r_c r_k], [C, C]
  double *first, *second, *spread;  // the result
};

// Rows of phi lie this far apart: not a power of two, which would put a point's phi into two sets of the first cache.
MTLGRAD_INLINE int64_t point_stride(int64_t points) { return points + 8; }

MTLGRAD_INLINE int64_t multiclass_slice_size(Structure structure, int64_t classes, int64_t points) {
  const MulticlassSizes n = multiclass_sizes(structure, classes);
  return 2 * classes + 2 * n.factor + n.phi * point_stride(points) + classes * classes + n.phi +
         n.phi * (n.phi + 1) / 2 + n.spread;
}

MTLGRAD_INLINE MulticlassSlice multiclass_slice(double* at, Structure structure, int64_t classes, int64_t points) {
  const MulticlassSizes n = multiclass_sizes(structure, classes);
  MulticlassSlice s;
  s.mu = at, at += classes;
  s.slack = at, at += classes;
  s.factor = at, at += n.factor;
  s.inverse = at, at += n.factor;
  s.phi = at, at += n.phi * point_stride(points);
  s.products = at, at += classes * classes;
  s.first = at, at += n.phi;
  s.second = at, at += n.phi * (n.phi + 1) / 2;
  s.spread = at;
  return s;
}

// Pivots under this share of their diagonal entry count as zero: below it V, made in float32, is noise.
template <typename T>
constexpr double kPivotTolerance = sizeof(T) == 4 ? 1e-6 : 1e-13;

// In place V -> L, lower triangle; a direction without variance gets a zero column; one whose variance is negative by
// more than rounding (`slack`, see kNoise in math/moments.h) makes all of it NaN. `inverse` gets V^-1 (of the directions
// with variance), full square. C is small: one thread does it.
MTLGRAD_INLINE void semidefinite_cholesky(double* v, double* inverse, const double* slack, int64_t n,
                                          double tolerance) {
  for (int64_t j = 0; j < n; ++j) {
    const double diagonal = v[j * n + j];
    double pivot = diagonal;
    for (int64_t k = 0; k < j; ++k) pivot -= v[j * n + k] * v[j * n + k];
    double root = pivot > tolerance * diagonal ? sqrt(pivot) : 0.0;
    if (!(pivot >= -slack[j])) root = not_a_number<double>();
    for (int64_t i = j + 1; i < n; ++i) {
      double x = v[i * n + j];
      for (int64_t k = 0; k < j; ++k) x -= v[i * n + k] * v[j * n + k];
      v[i * n + j] = root == 0.0 ? 0.0 : x / root;
    }
    v[j * n + j] = root;
  }
  // Columns of V^-1 by forward, then backward substitution, zero where there is no variance.
  for (int64_t column = 0; column < n; ++column) {
    for (int64_t i = 0; i < n; ++i) {
      double x = i == column ? 1.0 : 0.0;
      for (int64_t k = 0; k < i; ++k) x -= v[i * n + k] * inverse[k * n + column];
      inverse[i * n + column] = v[i * n + i] == 0.0 ? 0.0 : x / v[i * n + i];
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      double x = inverse[i * n + column];
      for (int64_t k = i + 1; k < n; ++k) x -= v[k * n + i] * inverse[k * n + column];
      inverse[i * n + column] = v[i * n + i] == 0.0 ? 0.0 : x / v[i * n + i];
    }
  }
}

// Stage 2 (after mu and V): V -> L and V^-1. kron: `factor` holds A scaled by s on entry.
MTLGRAD_INLINE void multiclass_factor(const MulticlassSlice& s, Structure structure, int64_t classes,
                                      double tolerance) {
  if (structure != Structure::block) return semidefinite_cholesky(s.factor, s.inverse, s.slack, classes, tolerance);
  for (int64_t c = 0; c < classes; ++c) {
    const double v = s.factor[c];
    s.inverse[c] = v > 0.0 ? 1.0 / v : 0.0;
    s.factor[c] = v >= -s.slack[c] ? sqrt(v > 0.0 ? v : 0.0) : not_a_number<double>();
  }
}

// Stage 3, for kLanes points side by side, the first being number `point`: residuals r and, times r, the second kind of
// phi. Coordinate j of the points begins at u + j * u_stride; `stride` is point_stride. The inner loops have a fixed
// length, so that they become vectors on the host; a device thread has one point.
template <int kLanes>
MTLGRAD_INLINE void multiclass_points(const MulticlassSlice& s, Structure structure, int64_t classes, int64_t target,
                                      const double* u, int64_t u_stride, int64_t point, int64_t stride, double scale) {
  double* r = s.phi + point;
  double largest[kLanes], sum[kLanes];
  for (int l = 0; l < kLanes; ++l) largest[l] = -infinity<double>(), sum[l] = 0.0;
  for (int64_t c = 0; c < classes; ++c) {
    const bool alone = structure == Structure::block;
    double z[kLanes];
    for (int l = 0; l < kLanes; ++l) z[l] = s.mu[c];
    for (int64_t j = alone ? c : 0; j <= c; ++j) {
      const double factor = s.factor[alone ? c : c * classes + j];
      for (int l = 0; l < kLanes; ++l) z[l] += factor * u[j * u_stride + l];
    }
    for (int l = 0; l < kLanes; ++l) {
      r[c * stride + l] = z[l];
      largest[l] = z[l] > largest[l] ? z[l] : largest[l];
    }
  }
  for (int64_t c = 0; c < classes; ++c)
    for (int l = 0; l < kLanes; ++l) {
      const double e = exp_pair(r[c * stride + l] - largest[l]).exp;
      r[c * stride + l] = e, sum[l] += e;
    }
  for (int l = 0; l < kLanes; ++l) sum[l] = 1.0 / sum[l];
  for (int64_t c = 0; c < classes; ++c) {
    const double one = c == target ? 1.0 : 0.0;
    for (int l = 0; l < kLanes; ++l) r[c * stride + l] = r[c * stride + l] * sum[l] - one;
  }
  double* more = r + classes * stride;
  if (structure == Structure::block) {
    for (int64_t c = 0; c < classes; ++c) {
      const double by = 1.0 / s.factor[c];
      const bool none = !(s.factor[c] > 0.0);
      for (int l = 0; l < kLanes; ++l)
        more[c * stride + l] = none ? s.factor[c] : r[c * stride + l] * u[c * u_stride + l] * by;  // keeps NaN
    }
  } else if (structure == Structure::full) {
    double* t = more + (classes - 1) * classes * stride;  // by back substitution, in the place of the last class's phi
    for (int64_t j = classes - 1; j >= 0; --j) {
      double left[kLanes];
      for (int l = 0; l < kLanes; ++l) left[l] = u[j * u_stride + l];
      for (int64_t i = j + 1; i < classes; ++i)
        for (int l = 0; l < kLanes; ++l) left[l] -= s.factor[i * classes + j] * t[i * stride + l];
      const double pivot = s.factor[j * classes + j];
      for (int l = 0; l < kLanes; ++l) t[j * stride + l] = pivot == 0.0 ? 0.0 : left[l] / pivot;
    }
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t j = 0; j < classes; ++j)
        for (int l = 0; l < kLanes; ++l) more[(c * classes + j) * stride + l] = r[c * stride + l] * t[j * stride + l];
  } else {
    double product[kLanes];  // factor is sqrt(s) L_A: r.L_A u / sqrt(s) = r.factor u / s
    for (int l = 0; l < kLanes; ++l) product[l] = 0.0;
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t j = 0; j <= c; ++j)
        for (int l = 0; l < kLanes; ++l)
          product[l] += r[c * stride + l] * s.factor[c * classes + j] * u[j * u_stride + l];
    for (int l = 0; l < kLanes; ++l) more[l] = scale > 0.0 ? product[l] / scale : 0.0;
  }
}

// Stage 6, once `second` holds Cov[phi] and `products` E[r r']: the spread coefficients, and what the conditional
// variance takes off. `scale` is s (kron).
template <typename T>
MTLGRAD_INLINE void multiclass_finish(const MulticlassSlice& s, Structure structure, int64_t classes, double scale,
                                      const T* class_covariance, int64_t begin, int64_t step) {
  const int64_t square = classes * classes;
  if (structure == Structure::full) {
    for (int64_t i = begin; i < square; i += step) s.spread[i] = s.products[i];
    for (int64_t i = begin; i < square; i += step) {
      const int64_t c = i / classes, j = i % classes, row = classes + i;
      for (int64_t k = 0; k <= c; ++k)
        for (int64_t l = 0; l < (k == c ? j + 1 : classes); ++l)
          s.second[row * (row + 1) / 2 + classes + k * classes + l] -=
              s.products[c * classes + k] * s.inverse[j * classes + l];
    }
  } else if (structure == Structure::block) {
    for (int64_t c = begin; c < classes; c += step) {
      const int64_t row = classes + c;
      s.spread[c] = s.products[c * classes + c];
      s.second[row * (row + 1) / 2 + row] -= s.products[c * classes + c] * s.inverse[c];
    }
  } else if (begin == 0) {
    double sum = 0.0;
    for (int64_t i = 0; i < square; ++i) sum += class_covariance[i] * s.products[i];
    s.spread[0] = sum;
    s.second[classes * (classes + 1) / 2 + classes] -= scale > 0.0 ? sum / scale : 0.0;
  }
}

// The variance of a mixture must not fall below zero by more than rounding of its largest part, spread.s_d.
template <typename T>
MTLGRAD_INLINE T if_positive(T variance, T spread) {
  return spread >= T(0) && variance >= T(-1e-3) * spread ? variance : not_a_number<T>();
}

}  // namespace mtlgrad::math
