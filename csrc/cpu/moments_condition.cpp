#include <algorithm>
#include <vector>

#include "cpu/output.h"
#include "kernels.h"

// A vector of 64 bytes is passed only to what is inlined, so no call depends on how it would be passed.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace mtlgrad::cpu {
namespace {

template <typename T, int kBytes>
using Vector [[gnu::vector_size(kBytes)]] = T;

template <typename T, int kBytes>
constexpr int64_t kPair = 2 * kBytes / sizeof(T);  // lanes of two vectors: columns of matrices come in pairs

template <typename T>
constexpr int64_t kWidest = kPair<T, 64>;

constexpr int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <int kBytes, typename T>
MTLGRAD_INLINE Vector<T, kBytes> load(const T* from) {
  Vector<T, kBytes> v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <typename T, typename V>
MTLGRAD_INLINE void store(T* to, V v) {
  memcpy(to, &v, sizeof v);
}

// Four rows of `rows`, two vectors of columns each, less sum_j factor(j, k) times row j of `others`, j < count. The eight
// sums stay in registers; factors of the four rows lie side by side.
template <int kBytes, typename T>
MTLGRAD_INLINE void subtract_products(T* rows, int64_t stride, const T* factors, int64_t factor_stride, const T* others,
                                      int64_t other_stride, int64_t count) {
  using V = Vector<T, kBytes>;
  constexpr int64_t kLanes = kPair<T, kBytes> / 2;
  V a0 = load<kBytes>(rows), a1 = load<kBytes>(rows + kLanes);
  V b0 = load<kBytes>(rows + stride), b1 = load<kBytes>(rows + stride + kLanes);
  V c0 = load<kBytes>(rows + 2 * stride), c1 = load<kBytes>(rows + 2 * stride + kLanes);
  V d0 = load<kBytes>(rows + 3 * stride), d1 = load<kBytes>(rows + 3 * stride + kLanes);
  for (int64_t j = 0; j < count; ++j, factors += factor_stride, others += other_stride) {
    const V x0 = load<kBytes>(others), x1 = load<kBytes>(others + kLanes);
    a0 -= factors[0] * x0, a1 -= factors[0] * x1;
    b0 -= factors[1] * x0, b1 -= factors[1] * x1;
    c0 -= factors[2] * x0, c1 -= factors[2] * x1;
    d0 -= factors[3] * x0, d1 -= factors[3] * x1;
  }
  store(rows, a0), store(rows + kLanes, a1);
  store(rows + stride, b0), store(rows + stride + kLanes, b1);
  store(rows + 2 * stride, c0), store(rows + 2 * stride + kLanes, c1);
  store(rows + 3 * stride, d0), store(rows + 3 * stride + kLanes, d1);
}

// Column blocks of the scratch, B rows: M = I + sqrt(q) G sqrt(q) and sqrt(q) K, each padded to pairs of vectors.
// Eliminating row by row turns them into L' and R = L^-1 sqrt(q) K: the Cholesky factor's columns are the eliminated rows
// of M themselves. False if a pivot is not positive.
template <int kBytes, typename T>
MTLGRAD_INLINE bool eliminate(T* scratch, int64_t stride, int64_t batch) {
  for (int64_t first = 0; first < batch; first += 4) {
    T* rows = scratch + first * stride;
    for (int64_t column = first / kPair<T, kBytes> * kPair<T, kBytes>; column < stride; column += kPair<T, kBytes>)
      subtract_products<kBytes>(rows + column, stride, scratch + first, stride, scratch + column, stride, first);
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
template <int kBytes, typename T>
MTLGRAD_INLINE void substitute_back(T* scratch, int64_t stride, int64_t k_at, int64_t batch, T* panel) {
  for (int64_t first = (batch - 1) / 4 * 4; first >= 0; first -= 4) {
    const int64_t last = std::min(first + 4, batch), rest = batch - last;
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < rest; ++j) panel[4 * j + i] = scratch[(first + i) * stride + last + j];
    for (int64_t column = k_at; column < stride; column += kPair<T, kBytes>)
      subtract_products<kBytes>(scratch + first * stride + column, stride, panel, 4, scratch + last * stride + column,
                                stride, rest);
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

// The sizes of a scratch of `n` rows with a square and `width` columns beside it; then room for a panel of four rows.
template <typename T>
struct Scratch {
  int64_t rows, k_at, stride, size;
  Scratch(int64_t n, int64_t width, int64_t pair)
      : rows(padded(n, 4)), k_at(padded(n, pair)), stride(k_at + padded(width, pair)), size(rows * (stride + 4)) {}
};

template <int kBytes, typename T>
MTLGRAD_INLINE bool condition_row(T* cross, const T* gram, const T* curvature, T* spread, int64_t batch, int64_t width,
                                  T* scratch) {
  const Scratch<T> at(batch, width, kPair<T, kBytes>);
  const int64_t k_at = at.k_at, stride = at.stride;
  std::fill_n(scratch, at.rows * stride, T(0));
  for (int64_t b = 0; b < batch; ++b) {
    T* row = scratch + b * stride;
    const T root = std::sqrt(curvature[b]);
    for (int64_t i = 0; i < batch; ++i) row[i] = root * gram[b * batch + i] * std::sqrt(curvature[i]);
    row[b] += T(1);
    for (int64_t d = 0; d < width; ++d) row[k_at + d] = root * cross[b * width + d];
  }
  if (!eliminate<kBytes>(scratch, stride, batch)) return false;
  for (int64_t b = 0; b < batch; ++b) {
    const T* r = scratch + b * stride + k_at;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) spread[d] -= r[d] * r[d];
  }
  substitute_back<kBytes>(scratch, stride, k_at, batch, scratch + at.rows * stride);
  for (int64_t b = 0; b < batch; ++b) {
    const T* y = scratch + b * stride + k_at;
    const T scale = T(1) / std::sqrt(curvature[b]);
    for (int64_t d = 0; d < width; ++d) cross[b * width + d] = scale * y[d];
  }
  return true;
}

// A = prior + curvature: [A | I] -> [L' | L^-1] -> S = A^-1 in the place of I; the cross covariances are H S, four examples at a time.
template <int kBytes, typename T>
MTLGRAD_INLINE bool invert_row(const double* prior, const double* curvature, const T* hidden, T* cross, T* spread,
                               int64_t batch, int64_t width, double* scratch) {
  const Scratch<double> at(width, width, kPair<double, kBytes>);
  const int64_t k_at = at.k_at, stride = at.stride, columns = stride - k_at;
  double* panel = scratch + at.rows * stride;
  std::fill_n(scratch, at.rows * stride, 0.0);
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t j = 0; j < width; ++j) scratch[i * stride + j] = prior[i * width + j] + curvature[i * width + j];
    scratch[i * stride + k_at + i] = 1.0;
  }
  if (!eliminate<kBytes>(scratch, stride, width)) return false;
  for (int64_t d = 0; d < width; ++d) {
    double sum = 0;
    for (int64_t i = d; i < width; ++i) sum += scratch[i * stride + k_at + d] * scratch[i * stride + k_at + d];
    spread[d] = static_cast<T>(sum);
  }
  substitute_back<kBytes>(scratch, stride, k_at, width, panel);
  double* four = panel + 4 * at.rows;  // [4, columns]
  for (int64_t b = 0; b < batch; b += 4) {
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t d = 0; d < width; ++d)
        panel[4 * d + i] = b + i < batch ? -static_cast<double>(hidden[(b + i) * width + d]) : 0.0;
    std::fill_n(four, 4 * columns, 0.0);
    for (int64_t column = 0; column < columns; column += kPair<double, kBytes>)
      subtract_products<kBytes>(four + column, columns, panel, 4, scratch + k_at + column, stride, width);
    for (int64_t i = 0; i < 4 && b + i < batch; ++i)
      for (int64_t d = 0; d < width; ++d) cross[(b + i) * width + d] = static_cast<T>(four[i * columns + d]);
  }
  return true;
}

// sums += H' diag(q) H, the upper triangle in vectors. `hidden` [B, stride], as many columns of zeros behind as that needs.
template <int kBytes>
MTLGRAD_INLINE void add_curvature_row(const double* hidden, const double* curvature, double* sums, int64_t batch,
                                      int64_t width, int64_t stride, double* scratch) {
  const int64_t rows = padded(width, 4);
  double *upper = scratch, *panel = scratch + rows * stride;  // [rows, stride], [kExamples, rows]
  std::fill_n(upper, rows * stride, 0.0);
  constexpr int64_t kExamples = 128;
  for (int64_t first = 0; first < batch; first += kExamples) {
    const int64_t count = std::min(kExamples, batch - first);
    const double* some = hidden + first * stride;
    for (int64_t b = 0; b < count; ++b) {
      const double q = curvature ? -curvature[first + b] : -1.0;
#pragma omp simd
      for (int64_t d = 0; d < rows; ++d) panel[b * rows + d] = q * some[b * stride + d];
    }
    for (int64_t i = 0; i < rows; i += 4)
      for (int64_t column = i / kPair<double, kBytes> * kPair<double, kBytes>; column < stride;
           column += kPair<double, kBytes>)
        subtract_products<kBytes>(upper + i * stride + column, stride, panel + i, rows, some + column, stride, count);
  }
  for (int64_t i = 0; i < width; ++i)
    for (int64_t j = i; j < width; ++j) {
      sums[i * width + j] += upper[i * stride + j];
      if (i != j) sums[j * width + i] += upper[i * stride + j];
    }
}

// clang-format off
#define MTLGRAD_ROWS(attribute, bytes)                                                                                 \
  attribute bool condition_row_of(float* cross, const float* gram, const float* curvature, float* spread,              \
                                  int64_t batch, int64_t width, float* scratch) {                                      \
    return condition_row<bytes>(cross, gram, curvature, spread, batch, width, scratch);                                \
  }                                                                                                                    \
  attribute bool condition_row_of(double* cross, const double* gram, const double* curvature, double* spread,          \
                                  int64_t batch, int64_t width, double* scratch) {                                     \
    return condition_row<bytes>(cross, gram, curvature, spread, batch, width, scratch);                                \
  }                                                                                                                    \
  attribute bool invert_row_of(const double* prior, const double* curvature, const float* hidden, float* cross,        \
                               float* spread, int64_t batch, int64_t width, double* scratch) {                         \
    return invert_row<bytes>(prior, curvature, hidden, cross, spread, batch, width, scratch);                          \
  }                                                                                                                    \
  attribute bool invert_row_of(const double* prior, const double* curvature, const double* hidden, double* cross,      \
                               double* spread, int64_t batch, int64_t width, double* scratch) {                        \
    return invert_row<bytes>(prior, curvature, hidden, cross, spread, batch, width, scratch);                          \
  }                                                                                                                    \
  attribute void add_curvature_row_of(const double* hidden, const double* curvature, double* sums, int64_t batch,      \
                                      int64_t width, int64_t stride, double* scratch) {                                \
    add_curvature_row<bytes>(hidden, curvature, sums, batch, width, stride, scratch);                                  \
  }
MTLGRAD_BY_WIDTH(MTLGRAD_ROWS)
// clang-format on

// Whether `row(r)` was true for every row.
template <typename Row>
bool all_rows(int64_t rows, int threads, const Row& row) {
  std::vector<char> done(rows, 1);
  parallel_for(rows, threads, [&](int64_t r) { done[r] = row(r); });
  return std::all_of(done.begin(), done.end(), [](char d) { return d != 0; });
}

}  // namespace

bool condition_on_batch(DType dtype, void* cross_covariance, const void* gram, const void* curvature, void* variances,
                        int64_t rows, int64_t batch, int64_t width, Place place) {
  bool done = false;
  for_dtype("condition_on_batch", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    done = all_rows(rows, place.threads, [&](int64_t r) {
      std::vector<T> scratch(Scratch<T>(batch, width, kWidest<T>).size);
      return condition_row_of(static_cast<T*>(cross_covariance) + r * batch * width,
                              static_cast<const T*>(gram) + r * batch * batch,
                              static_cast<const T*>(curvature) + r * batch, static_cast<T*>(variances) + r * width,
                              batch, width, scratch.data());
    });
  });
  return done;
}

bool condition_by_precision(DType dtype, const double* prior, const double* curvature, const void* hidden,
                            void* cross_covariance, void* variances, int64_t prior_stride, int64_t curvature_stride,
                            int64_t rows, int64_t batch, int64_t width, Place place) {
  bool done = false;
  for_dtype("condition_by_precision", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    done = all_rows(rows, place.threads, [&](int64_t r) {
      const Scratch<double> at(width, width, kWidest<double>);
      std::vector<double> scratch(at.size + 4 * at.stride);
      return invert_row_of(prior + r * prior_stride, curvature + r * curvature_stride, static_cast<const T*>(hidden),
                           static_cast<T*>(cross_covariance) + r * batch * width,
                           static_cast<T*>(variances) + r * width, batch, width, scratch.data());
    });
  });
  return done;
}

void add_curvature(const double* hidden, const double* curvature, double* sums, int64_t rows, int64_t batch,
                   int64_t width, Place place) {
  const int64_t stride = padded(width, kWidest<double>);
  std::vector<double> wide(batch * stride);
  for (int64_t b = 0; b < batch; ++b) std::copy_n(hidden + b * width, width, wide.data() + b * stride);
  parallel_for(rows, place.threads, [&](int64_t r) {
    std::vector<double> scratch(padded(width, 4) * (stride + 128));
    add_curvature_row_of(wide.data(), curvature ? curvature + r * batch : nullptr, sums + r * width * width, batch,
                         width, stride, scratch.data());
  });
}

}  // namespace mtlgrad::cpu
