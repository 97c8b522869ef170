#include <algorithm>
#include <vector>

#include "cpu/output.h"
#include "kernels.h"

// A vector of 64 bytes is passed only to what is inlined, so no call depends on how it would be passed.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace mtlgrad::cpu {
namespace {

constexpr int64_t kBytes = 64;

template <typename T>
using Vector [[gnu::vector_size(kBytes)]] = T;

template <typename T>
constexpr int64_t kLanes = kBytes / sizeof(T);

template <typename T>
MTLGRAD_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <typename T, typename V>
MTLGRAD_INLINE void store(T* to, V v) {
  memcpy(to, &v, sizeof v);
}

// Four rows of `rows`, two vectors of columns each, less sum_j factor(j, k) times row j of `others`, j < count. The eight
// sums stay in registers; factors of the four rows lie side by side.
template <typename T>
MTLGRAD_INLINE void subtract_products(T* rows, int64_t stride, const T* factors, int64_t factor_stride, const T* others,
                                      int64_t other_stride, int64_t count) {
  Vector<T> a0 = load(rows), a1 = load(rows + kLanes<T>);
  Vector<T> b0 = load(rows + stride), b1 = load(rows + stride + kLanes<T>);
  Vector<T> c0 = load(rows + 2 * stride), c1 = load(rows + 2 * stride + kLanes<T>);
  Vector<T> d0 = load(rows + 3 * stride), d1 = load(rows + 3 * stride + kLanes<T>);
  for (int64_t j = 0; j < count; ++j, factors += factor_stride, others += other_stride) {
    const Vector<T> x0 = load(others), x1 = load(others + kLanes<T>);
    a0 -= factors[0] * x0, a1 -= factors[0] * x1;
    b0 -= factors[1] * x0, b1 -= factors[1] * x1;
    c0 -= factors[2] * x0, c1 -= factors[2] * x1;
    d0 -= factors[3] * x0, d1 -= factors[3] * x1;
  }
  store(rows, a0), store(rows + kLanes<T>, a1);
  store(rows + stride, b0), store(rows + stride + kLanes<T>, b1);
  store(rows + 2 * stride, c0), store(rows + 2 * stride + kLanes<T>, c1);
  store(rows + 3 * stride, d0), store(rows + 3 * stride + kLanes<T>, d1);
}

// Column blocks of the scratch, B rows: M = I + sqrt(q) G sqrt(q) and sqrt(q) K, each padded to pairs of vectors.
// Eliminating row by row turns them into L' and R = L^-1 sqrt(q) K: the Cholesky factor's columns are the eliminated rows
// of M themselves. False if a pivot is not positive.
template <typename T>
MTLGRAD_INLINE bool eliminate(T* scratch, int64_t stride, int64_t batch) {
  for (int64_t first = 0; first < batch; first += 4) {
    T* rows = scratch + first * stride;
    for (int64_t column = first / (2 * kLanes<T>)*(2 * kLanes<T>); column < stride; column += 2 * kLanes<T>)
      subtract_products(rows + column, stride, scratch + first, stride, scratch + column, stride, first);
    for (int64_t i = first; i < std::min(first + 4, batch); ++i) {
      T* row = scratch + i * stride;
      if (!(row[i] > T(0))) return false;
      const T scale = T(1) / std::sqrt(row[i]);
      for (int64_t column = i; column < stride; ++column) row[column] *= scale;
      for (int64_t k = i + 1; k < std::min(first + 4, batch); ++k) {
        const T factor = row[k];
        T* other = scratch + k * stride;
#pragma omp simd
        for (int64_t column = i + 1; column < stride; ++column) other[column] -= factor * row[column];
      }
    }
  }
  return true;
}

// R -> Y = L'^-1 R from the last row up, four rows at a time; `panel`: their entries of L' side by side.
template <typename T>
MTLGRAD_INLINE void substitute_back(T* scratch, int64_t stride, int64_t k_at, int64_t batch, T* panel) {
  for (int64_t first = (batch - 1) / 4 * 4; first >= 0; first -= 4) {
    const int64_t last = std::min(first + 4, batch), rest = batch - last;
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < rest; ++j) panel[4 * j + i] = scratch[(first + i) * stride + last + j];
    for (int64_t column = k_at; column < stride; column += 2 * kLanes<T>)
      subtract_products(scratch + first * stride + column, stride, panel, 4, scratch + last * stride + column, stride,
                        rest);
    for (int64_t i = last - 1; i >= first; --i) {
      T* row = scratch + i * stride;
      for (int64_t k = i + 1; k < last; ++k) {
        const T factor = row[k];
        const T* other = scratch + k * stride;
#pragma omp simd
        for (int64_t column = k_at; column < stride; ++column) row[column] -= factor * other[column];
      }
      const T scale = T(1) / row[i];
      for (int64_t column = k_at; column < stride; ++column) row[column] *= scale;
    }
  }
}

template <typename T>
MTLGRAD_INLINE bool condition_row(T* cross, const T* gram, const T* curvature, T* spread, int64_t batch, int64_t width,
                                  T* scratch) {
  constexpr int64_t kPair = 2 * kLanes<T>;
  const auto padded = [](int64_t n) __attribute__((always_inline)) { return (n + kPair - 1) / kPair * kPair; };
  const int64_t k_at = padded(batch), stride = k_at + padded(width), rows = (batch + 3) / 4 * 4;
  std::fill_n(scratch, rows * stride, T(0));
  for (int64_t b = 0; b < batch; ++b) {
    T* row = scratch + b * stride;
    const T root = std::sqrt(curvature[b]);
    for (int64_t i = 0; i < batch; ++i) row[i] = root * gram[b * batch + i] * std::sqrt(curvature[i]);
    row[b] += T(1);
    for (int64_t d = 0; d < width; ++d) row[k_at + d] = root * cross[b * width + d];
  }
  if (!eliminate(scratch, stride, batch)) return false;
  for (int64_t b = 0; b < batch; ++b) {
    const T* r = scratch + b * stride + k_at;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) spread[d] -= r[d] * r[d];
  }
  substitute_back(scratch, stride, k_at, batch, scratch + rows * stride);
  for (int64_t b = 0; b < batch; ++b) {
    const T* y = scratch + b * stride + k_at;
    const T scale = T(1) / std::sqrt(curvature[b]);
    for (int64_t d = 0; d < width; ++d) cross[b * width + d] = scale * y[d];
  }
  return true;
}

MTLGRAD_CLONES bool condition_row_of(float* cross, const float* gram, const float* curvature, float* spread,
                                     int64_t batch, int64_t width, float* scratch) {
  return condition_row(cross, gram, curvature, spread, batch, width, scratch);
}
MTLGRAD_CLONES bool condition_row_of(double* cross, const double* gram, const double* curvature, double* spread,
                                     int64_t batch, int64_t width, double* scratch) {
  return condition_row(cross, gram, curvature, spread, batch, width, scratch);
}

}  // namespace

bool condition_on_batch(DType dtype, void* cross_covariance, const void* gram, const void* curvature, void* variances,
                        int64_t rows, int64_t batch, int64_t width, Place place) {
  std::vector<char> done(rows, 1);
  for_dtype("condition_on_batch", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kPair = 2 * kLanes<T>;
    const int64_t stride = (batch + kPair - 1) / kPair * kPair + (width + kPair - 1) / kPair * kPair;
    parallel_for(rows, place.threads, [&](int64_t r) {
      std::vector<T> scratch((batch + 3) / 4 * 4 * (stride + 4));
      done[r] = condition_row_of(static_cast<T*>(cross_covariance) + r * batch * width,
                                 static_cast<const T*>(gram) + r * batch * batch,
                                 static_cast<const T*>(curvature) + r * batch, static_cast<T*>(variances) + r * width,
                                 batch, width, scratch.data());
    });
  });
  return std::all_of(done.begin(), done.end(), [](char d) { return d != 0; });
}

}  // namespace mtlgrad::cpu
