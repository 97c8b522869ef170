// Jacobi's method on the host: one pair of tasks after another.
#pragma once
#include "cpu/parallel.h"
#include "math/align.h"

namespace mtlgrad::cpu {

// (x, y) <- (c x - s y, s x + c y)
MTLGRAD_CLONES inline void turn(double* x, double* y, double c, double s, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const double old_x = x[k], old_y = y[k];
    x[k] = c * old_x - s * old_y, y[k] = s * old_x + c * old_y;
  }
}

// Turns a (T x T, symmetric, both triangles) to diagonal and v to its eigenvectors, in rows.
inline void diagonalise(double* a, double* v, int64_t tasks) {
  for (int sweep = 0; sweep < math::kMaxSweeps; ++sweep) {
    bool turned = false;
    for (int64_t p = 0; p < tasks; ++p)
      for (int64_t q = p + 1; q < tasks; ++q) {
        double *ap = a + p * tasks, *aq = a + q * tasks;
        const double app = ap[p], aqq = aq[q], apq = ap[q];
        if (math::negligible(app, aqq, apq)) continue;
        turned = true;
        const math::Rotation r = math::rotation(app, aqq, apq);
        turn(ap, aq, r.c, r.s, tasks);
        ap[p] = app - r.t * apq, aq[q] = aqq + r.t * apq, ap[q] = aq[p] = 0.0;
        for (int64_t k = 0; k < tasks; ++k) a[k * tasks + p] = ap[k], a[k * tasks + q] = aq[k];
        turn(v + p * tasks, v + q * tasks, r.c, r.s, tasks);
      }
    if (!turned) return;
  }
}

}  // namespace mtlgrad::cpu
