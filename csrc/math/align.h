// Formulas of the `align` stem (Aligned-MTL, arXiv 2305.19000), shared by the host and device kernels.
//
// The T x T Gram matrix M of the gradients, scaled so that its largest diagonal entry is one, has eigenpairs
// (l_1 >= l_2 >= ..., v_k), found by Jacobi rotations. R of them are kept, l_k > rtol l_1, and
//   B = s sum_{k <= R} v_k v_k' / sqrt(l_k),   weights = B preference,
// with s^2 the smallest, the median or the mean of the l_k kept. With R = 0 there is nothing to align: B = I.
#pragma once
#include "math/scalar.h"

namespace mtlgrad::math {

constexpr int kMaxSweeps =
    40;  // Jacobi's convergence is quadratic: 6 to 10 are usual, this is a stop for the unforeseen

// The rotation of the plane (p, q) that makes a_pq zero: a_pp <- a_pp - t a_pq, a_qq <- a_qq + t a_pq, and for the
// other entries, and the eigenvectors, (x_p, x_q) <- (c x_p - s x_q, s x_p + c x_q).
struct Rotation {
  double c, s, t;
};

MTLGRAD_INLINE Rotation rotation(double app, double aqq, double apq) {
  const double theta = (aqq - app) / (2.0 * apq);
  const double t = (theta < 0.0 ? -1.0 : 1.0) / (fabs(theta) + sqrt(theta * theta + 1.0));
  const double c = 1.0 / sqrt(t * t + 1.0);
  return {c, t * c, t};
}

// Whether a_pq is zero for all that float64 knows: relative to its own rows, so that small eigenvalues keep their
// digits beside large ones, or below the square of eps of the largest entry, which is one.
MTLGRAD_INLINE bool negligible(double app, double aqq, double apq) {
  return apq * apq <= 1e-33 * fabs(app * aqq) || fabs(apq) <= 1e-31;
}

// Where eigenvalue i stands in descending order; equal ones by number, so that no two share a place.
MTLGRAD_INLINE int64_t place_of(const double* values, int64_t i, int64_t tasks) {
  int64_t place = 0;
  for (int64_t j = 0; j < tasks; ++j) place += values[j] > values[i] || (values[j] == values[i] && j < i);
  return place;
}

// R of the descending eigenvalues.
MTLGRAD_INLINE int64_t numerical_rank(const double* descending, int64_t tasks, double rtol) {
  int64_t rank = 0;
  for (int64_t k = 0; k < tasks; ++k) rank += descending[k] > rtol * descending[0] && descending[k] > 0.0;
  return rank;
}

// s^2 over the first `rank` >= 1 of the descending eigenvalues; of two middle ones the smaller, as published.
MTLGRAD_INLINE double scale_square(const double* descending, int64_t rank, int scale) {
  if (scale == 0) return descending[rank - 1];
  if (scale == 1) return descending[rank / 2];
  double sum = 0.0;
  for (int64_t k = 0; k < rank; ++k) sum += descending[k];
  return sum / static_cast<double>(rank);
}

// The largest over the smallest singular value; infinite if the latter is zero, NaN if all are.
MTLGRAD_INLINE double condition_number(double largest, double smallest) {
  if (smallest > 0.0) return sqrt(largest / smallest);
  return largest > 0.0 ? infinity<double>() : not_a_number<double>();
}

}  // namespace mtlgrad::math
