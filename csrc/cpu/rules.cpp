// Task weights from a Gram matrix on the host: math/rules.h has the solvers, one thread does each.
#include "math/rules.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/jacobi.h"

namespace mtlgrad::cpu {

namespace {

constexpr int64_t kArena = std::max({math::dual_cone_arena(kMaxAlignTasks), math::simplex_arena(kMaxAlignTasks),
                                     math::fair_arena(kMaxAlignTasks), math::imtlg_arena(kMaxAlignTasks)});

int checked(int64_t tasks) {
  if (tasks < 1 || tasks > kMaxAlignTasks)
    throw std::invalid_argument("rules (cpu): 1 to " + std::to_string(kMaxAlignTasks) + " tasks");
  return static_cast<int>(tasks);
}

// Whether all is finite: weights are zeros then, else NaN.
bool has_answer(const double* gram, int n, double* weights) {
  const bool finite = math::is_finite(math::Alone{}, gram, n);
  std::fill_n(weights, n, finite ? 0.0 : math::not_a_number<double>());
  return finite;
}

}  // namespace

// The only one whose time is in its loops.
MTLGRAD_CLONES void upgrad(const double* gram, const double* preference, int64_t tasks, double* weights, double*,
                           Place) {
  const int n = checked(tasks);
  if (!has_answer(gram, n, weights)) return;
  double arena[kArena], v[kMaxAlignTasks];
  math::DualCone cone(math::Alone{}, gram, n, arena);
  for (int i = 0; i < n; ++i) {
    cone.project_task(i, v);
    for (int j = 0; j < n; ++j) weights[j] += (preference ? preference[i] : 1.0 / n) * v[j];
  }
}

void dualproj(const double* gram, const double* preference, int64_t tasks, double* weights, Place) {
  const int n = checked(tasks);
  if (!has_answer(gram, n, weights)) return;
  double arena[kArena];
  math::DualCone(math::Alone{}, gram, n, arena).project_preference(preference, weights);
}

void mgda(const double* gram, int64_t tasks, double* weights, Place) {
  double arena[kArena];
  math::least_norm(math::Alone{}, gram, checked(tasks), arena, weights);
}

void cagrad(const double* gram, double c, int64_t tasks, double* weights, Place) {
  double arena[kArena];
  math::conflict_averse(math::Alone{}, gram, c, checked(tasks), arena, weights);
}

void fairgrad(const double* gram, double alpha, bool normalize, int64_t tasks, double* weights, Place) {
  double arena[kArena];
  math::fair(math::Alone{}, gram, alpha, normalize, checked(tasks), arena, weights);
}

void imtlg(const double* gram, int64_t tasks, double* weights, Place) {
  const int n = checked(tasks);
  const math::Alone team;
  double arena[kArena];
  double *matrix = arena, *vectors = matrix + n * n, *lengths = vectors + n * n, *y = lengths + n, *parts = y + n;
  if (!has_answer(gram, n, weights)) return;
  math::cosines(team, gram, n, matrix, lengths);
  if (!math::inverse_times_ones(team, matrix, n, vectors, parts, y)) {
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) vectors[i * n + j] = i == j ? 1.0 : 0.0;
    diagonalise(matrix, vectors, n);
    math::pseudo_inverse_times_ones(team, matrix, n + 1, vectors, n, 1, lengths, n, parts, y);
  }
  math::equal_projections(team, y, lengths, n, weights);
}

void pcgrad(const double* gram, int64_t seed, const int64_t* step, int64_t tasks, double* weights, Place) {
  const int n = checked(tasks);
  if (!has_answer(gram, n, weights)) return;
  double v[kMaxAlignTasks];
  int order[kMaxAlignTasks];
  for (int i = 0; i < n; ++i) {
    math::resolve_conflicts(gram, n, i, seed, *step, order, v);
    for (int j = 0; j < n; ++j) weights[j] += v[j];
  }
}

}  // namespace mtlgrad::cpu
