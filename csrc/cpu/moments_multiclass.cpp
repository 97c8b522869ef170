#include <vector>

#include "cpu/output.h"
#include "kernels.h"
#include "math/moments.h"
#include "math/multiclass.h"

namespace mtlgrad::cpu {
namespace {

constexpr int kLanes = 8;      // points at a time: point_stride leaves room for as many beyond the last
constexpr int64_t kTile = 64;  // features at a time: the sums over phi stay in registers

// One example and its slice of the workspace; see math/multiclass.h for the stages and the form of the result.
template <typename T>
struct Example : math::MulticlassExample<T> {
  const double* points;  // [C, point_stride]
  int64_t num_points;
  math::MulticlassSlice slice;
  const T** rows;  // row(i) for every i: finding one costs two divisions

  MTLGRAD_INLINE double logit(const T* w) const {
    return dot(w, this->h, this->width) + static_cast<double>(w[this->width]);
  }
};

// The rounding error of h~.S h~ from the standard deviations of the weights.
template <typename T>
MTLGRAD_INLINE double slack_of(const Example<T>& e, const T* spread) {
  const double a = noise_scale(e.h, spread, e.width) + std::sqrt(spread[e.width]);
  return static_cast<double>(math::kNoise<T>) * a * a;
}

template <typename T>
MTLGRAD_INLINE double fill_factor(const Example<T>& e) {
  const auto& s = e.slice;
  const int64_t classes = e.posterior.num_classes;
  double scale = 0;
  for (int64_t c = 0; c < classes; ++c) s.mu[c] = e.logit(e.row(c));
  if (e.posterior.structure == Structure::full) {
    for (int64_t c = 0; c < classes; ++c) {
      s.slack[c] = slack_of(e, e.variances(c));
      for (int64_t k = 0; k < classes; ++k) s.factor[c * classes + k] = e.logit(e.row(classes + c * classes + k));
    }
  } else if (e.posterior.structure == Structure::block) {
    for (int64_t c = 0; c < classes; ++c) {
      s.slack[c] = slack_of(e, e.variances(c));
      s.factor[c] = e.logit(e.row(classes + c));
    }
  } else {
    const T* a = static_cast<const T*>(e.posterior.classes);
    scale = e.logit(e.row(classes));
    const double slack = slack_of(e, e.variances(0));
    scale = scale >= -slack ? (scale > 0.0 ? scale : 0.0) : math::not_a_number<double>();
    for (int64_t c = 0; c < classes; ++c) s.slack[c] = slack * static_cast<double>(a[c * classes + c]);
    for (int64_t i = 0; i < classes * classes; ++i) s.factor[i] = scale * static_cast<double>(a[i]);
  }
  math::multiclass_factor(s, e.posterior.structure, classes, math::kPivotTolerance<T>);
  return scale;
}

MTLGRAD_INLINE double sum_of(const double* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

template <typename T>
MTLGRAD_INLINE void integrate(const Example<T>& e, double scale) {
  const auto& s = e.slice;
  const int64_t classes = e.posterior.num_classes, points = e.num_points, stride = math::point_stride(points);
  const int64_t n = math::multiclass_sizes(e.posterior.structure, classes).phi;
  for (int64_t p = 0; p < points; p += kLanes)
    math::multiclass_points<kLanes>(s, e.posterior.structure, classes, e.target, e.points + p, stride, p, stride,
                                    scale);
  for (int64_t i = 0; i < n; ++i) {
    double* phi = s.phi + i * stride;
    const double mean = s.first[i] = sum_of(phi, points) / static_cast<double>(points);
    for (int64_t p = 0; p < points; ++p) phi[p] -= mean;
    for (int64_t j = 0; j <= i; j += 4) {  // four sums at a time: one alone waits for each of its additions
      const double* others[4];
      for (int64_t k = 0; k < 4; ++k) others[k] = s.phi + (j + k < i ? j + k : i) * stride;
      double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t p = 0; p < points; ++p)
        s0 += phi[p] * others[0][p], s1 += phi[p] * others[1][p], s2 += phi[p] * others[2][p],
            s3 += phi[p] * others[3][p];
      const double sums[4] = {s0, s1, s2, s3};
      for (int64_t k = 0; k < 4 && j + k <= i; ++k)
        s.second[i * (i + 1) / 2 + j + k] = sums[k] / static_cast<double>(points);
    }
  }
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t k = 0; k <= c; ++k)
      s.products[c * classes + k] = s.products[k * classes + c] =
          s.second[c * (c + 1) / 2 + k] + s.first[c] * s.first[k];
  math::multiclass_finish(s, e.posterior.structure, classes, scale, static_cast<const T*>(e.posterior.classes), 0, 1);
}

// The quadratic form at every dimension, kTile of them at a time.
template <typename T>
MTLGRAD_INLINE void evaluate(const Example<T>& e, const OutputRow<T>& out) {
  const auto& s = e.slice;
  const auto sizes = math::multiclass_sizes(e.posterior.structure, e.posterior.num_classes);
  for (int64_t i = 0; i < sizes.phi; ++i) e.rows[i] = e.row(i);
  for (int64_t begin = 0; begin < e.width; begin += kTile) {
    const int64_t m = e.width - begin < kTile ? e.width - begin : kTile;
    T mean[kTile] = {}, variance[kTile] = {};
    for (int64_t i = 0; i < sizes.phi; ++i) {
      const T* a = e.rows[i] + begin;
      T product[kTile] = {};
      for (int64_t j = 0; j < i; ++j) {
        const T* b = e.rows[j] + begin;
        const T twice = static_cast<T>(2 * s.second[i * (i + 1) / 2 + j]);
#pragma omp simd
        for (int64_t d = 0; d < m; ++d) product[d] += twice * b[d];
        asm volatile("" : : "r"(product) : "memory");  // GCC would take two j at once, and then not vectorise
      }
      const T diagonal = static_cast<T>(s.second[i * (i + 1) / 2 + i]), first = static_cast<T>(s.first[i]);
#pragma omp simd
      for (int64_t d = 0; d < m; ++d) {
        variance[d] += a[d] * (diagonal * a[d] + product[d]);
        mean[d] += first * a[d];
      }
    }
    T spread_sum[kTile] = {};
    for (int64_t q = 0; q < sizes.spread; ++q) {
      const T weight = static_cast<T>(s.spread[q]);
      const T* spread = e.spread(q) + begin;
#pragma omp simd
      for (int64_t d = 0; d < m; ++d) spread_sum[d] += weight * spread[d];
    }
    emit(out, begin, begin + m, [&](int64_t d) __attribute__((always_inline)) {
      const T spread = spread_sum[d - begin];
      return math::checked(mean[d - begin], math::if_positive(variance[d - begin] + spread, spread));
    });
  }
}

template <typename T>
MTLGRAD_INLINE void example_row(const Example<T>& e, const OutputRow<T>& out) {
  if (e.target == math::kNoClass) return emit_no_label(out, 0, e.width);
  integrate(e, fill_factor(e));
  evaluate(e, out);
}

MTLGRAD_CLONES void example_row_of(const Example<float>& e, const OutputRow<float>& out) { example_row(e, out); }
MTLGRAD_CLONES void example_row_of(const Example<double>& e, const OutputRow<double>& out) { example_row(e, out); }

}  // namespace

void multiclass_moments(DType dtype, Features features, const int64_t* targets, MulticlassPosterior posterior,
                        const double* points, int64_t num_points, double* workspace, int64_t slots, Output output,
                        Place place) {
  const int64_t size = multiclass_workspace(posterior.structure, posterior.num_classes, num_points);
  const int64_t stride = math::point_stride(num_points);
  std::vector<double> by_class(posterior.num_classes * stride);
  for (int64_t p = 0; p < num_points; ++p)
    for (int64_t c = 0; c < posterior.num_classes; ++c)
      by_class[c * stride + p] = points[p * posterior.num_classes + c];
  for_dtype("multiclass_moments", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // A slot of workspace serves one share of the batch.
    parallel_for(slots, place.threads, [&](int64_t slot) {
      const auto slice =
          math::multiclass_slice(workspace + slot * size, posterior.structure, posterior.num_classes, num_points);
      std::vector<const T*> rows(math::multiclass_sizes(posterior.structure, posterior.num_classes).phi);
      for (int64_t b = slot * features.batch / slots; b < (slot + 1) * features.batch / slots; ++b)
        example_row_of(Example<T>{{static_cast<const T*>(features.data) + b * features.stride, features.width,
                                   targets[b], b, features.batch, posterior},
                                  by_class.data(),
                                  num_points,
                                  slice,
                                  rows.data()},
                       output_row<T>(output, b, 0, 1, features.width));
    });
  });
}

}  // namespace mtlgrad::cpu

namespace mtlgrad {

int64_t multiclass_workspace(Structure structure, int64_t classes, int64_t points) {
  return math::multiclass_slice_size(structure, classes, points);
}

}  // namespace mtlgrad
