// Solvers of the `rules` stem: task weights from the T x T Gram matrix M of the gradients, shared by the host and device
// kernels. Each is written for a team of lanes that share memory: one thread of the host (Alone, below), or a warp
// (cuda/rules.cuh). All lanes call all functions together, and know all scalars; vectors lie in shared memory.
//
//   UPGrad, DualProj (arXiv 2406.16232): v = argmin {v'Mv : v >= u}, u = e_i for each i, or the preference
//   MGDA (arXiv 1810.04650):             w = argmin {w'Mw : w >= 0, 1'w = 1}
//   CAGrad (arXiv 2110.14048):           w on that simplex minimises w'Mu + k sqrt(w'Mw), u = 1/T, k = c sqrt(u'Mu);
//                                        the weights are u + k w / sqrt(w'Mw)
//   Nash-MTL (arXiv 2202.01017), FairGrad (arXiv 2402.15638): M a = a^(-1/alpha), a > 0; alpha = 1 for the former
//   IMTL-G (ICLR 2021): M a = k sqrt(diag M), 1'a = 1
//   PCGrad (arXiv 2001.06782): for each i, g_i loses its negative part along g_j, for all j in a random order; their sum
//
// The first three are one problem, x'Ax / 2 - b'x over x >= 0, which an active set solves in finitely many steps:
// v = u + x with A = M, b = -Mu; and w = x / 1'x with A = M + s 11', b = s 1, for any s > 0, since x = r w has the value
// r^2 w'Mw / 2 + s (r - 1)^2 / 2 up to a constant, least in r for r = s / (s + w'Mw), and increasing in w'Mw then.
// CAGrad's w is MGDA's for the gradients g_i + t g_0 at the t for which sqrt(w'Mw) = k t.
#pragma once
#include "math/scalar.h"

#if defined(__CUDACC__)
#define MTLGRAD_SOLVER __device__ inline
#else
#define MTLGRAD_SOLVER MTLGRAD_INLINE
#endif

namespace mtlgrad::math {

// A value and whose it is; nobody's is -1.
struct Extreme {
  double value;
  int at;
};

MTLGRAD_INLINE Extreme larger(Extreme a, Extreme b) {
  const bool second = b.at >= 0 && (a.at < 0 || b.value > a.value || (b.value == a.value && b.at < a.at));
  return second ? b : a;
}

// The team of one.
struct Alone {
  static constexpr int kLanes = 1;
  static constexpr int lane = 0;
  void sync() const {}  // what lanes wrote before, all may read after
  double sum(double x) const { return x; }
  bool any(bool p) const { return p; }
  Extreme largest(Extreme e) const { return e; }
};

constexpr double kRounding = 2.3e-16;
constexpr double kStationary = 1e-12;  // w'Mw is zero for all that float64 knows if below this times |w|'|M||w|

// Entry (i, j) of a symmetric matrix of which the upper triangle counts.
MTLGRAD_INLINE double entry(const double* gram, int n, int i, int j) { return gram[i < j ? i * n + j : j * n + i]; }

template <typename Team>
MTLGRAD_SOLVER bool is_finite(Team team, const double* gram, int n) {
  bool finite = true;
  for (int i = 0; i < n; ++i)
    for (int j = i + team.lane; j < n; j += Team::kLanes) finite = finite && fabs(gram[i * n + j]) < infinity<double>();
  return !team.any(!finite);
}

template <typename Team>
MTLGRAD_SOLVER double largest_square(Team team, const double* gram, int n) {
  Extreme most{0.0, -1};
  for (int i = team.lane; i < n; i += Team::kLanes) most = larger(most, {gram[i * n + i], i});
  return team.largest(most).value;
}

template <typename Team>
MTLGRAD_SOLVER void fill(Team team, double* x, int n, double value) {
  team.sync();
  for (int i = team.lane; i < n; i += Team::kLanes) x[i] = value;
  team.sync();
}

// ---- Cholesky of the rows and columns that take part -----------------------------------------------------------------

// R with R'R = A over `members`, in this order; R[i, r] at factor[i * n + r], its diagonal's inverses apart.
template <typename Team>
struct Cholesky {
  Team team;
  int n, size;
  const double* a;           // [n, n]
  double *factor, *inverse;  // [n, n], [n]
  double* scratch;           // [n]
  int* members;              // [n]

  // Writes the next column of R, that of number j, down to the diagonal, and returns the square of this.
  MTLGRAD_SOLVER double border(int j) {
    for (int i = team.lane; i < size; i += Team::kLanes) scratch[i] = a[j * n + members[i]];
    team.sync();
    double square = 0.0;
    for (int i = 0; i < size; ++i) {
      const double v = scratch[i] * inverse[i];
      square += v * v;
      if (team.lane == 0) factor[i * n + size] = v;
#pragma omp simd
      for (int r = i + 1 + team.lane; r < size; r += Team::kLanes) scratch[r] -= factor[i * n + r] * v;
      team.sync();
    }
    return a[j * n + j] - square;
  }

  MTLGRAD_SOLVER void accept(int j, double pivot) {
    if (team.lane == 0) inverse[size] = 1.0 / sqrt(pivot), members[size] = j;
    team.sync();
    ++size;
  }

  // v <- R'^-1 v
  MTLGRAD_SOLVER void forward(double* v) {
    for (int i = 0; i < size; ++i) {
      const double value = v[i] * inverse[i];
#pragma omp simd
      for (int r = i + 1 + team.lane; r < size; r += Team::kLanes) v[r] -= factor[i * n + r] * value;
      team.sync();
      if (team.lane == 0) v[i] = value;
    }
    team.sync();
  }

  // v <- R^-1 v
  MTLGRAD_SOLVER void backward(double* v) {
    for (int i = size - 1; i >= 0; --i) {
      double sum = 0.0;
#pragma omp simd reduction(+ : sum)
      for (int r = i + 1 + team.lane; r < size; r += Team::kLanes) sum += factor[i * n + r] * v[r];
      sum = team.sum(sum);
      if (team.lane == 0) v[i] = (v[i] - sum) * inverse[i];
      team.sync();
    }
  }
};

// ---- x'Ax / 2 - b'x over x >= 0 --------------------------------------------------------------------------------------

// Added to the diagonal, which is one: M is singular where gradients depend on one another. What it changes is no more
// than 1e-13 of the terms that the solution must balance, and is taken back where it matters.
constexpr double kRidge = 1e-13;

// The active set of Lawson and Hanson: whoever gains most enters; of the members' solution, and on the way to it, whoever
// would fall below zero leaves: the value falls with each step. The start is quicker, and may err: all who gain enter at
// once, and all leave whom the members' solution has below zero, as long as fewer gain each time. A has ones on its
// diagonal, to which the ridge is added here; numbers that are barred from the start stay zero.
template <typename Team>
struct NonNegative {
  static constexpr int kFree = 0, kMember = 1, kBarred = 2, kNever = 3;

  Cholesky<Team> r;
  double *b, *x, *rest, *bound, *half, *trial;
  int* state;

  static constexpr int kVectors = 10;  // and one matrix

  MTLGRAD_SOLVER NonNegative(Team team, int n, double* a, double* arena) : matrix_(a) {
    double* vectors = arena + n * n;
    r = {team, n, 0, a, arena, vectors, vectors + n, nullptr};
    b = vectors + 2 * n, x = b + n, rest = x + n, bound = rest + n, half = bound + n, trial = half + n;
    r.members = reinterpret_cast<int*>(trial + n);
    state = r.members + n;
    for (int i = team.lane; i < n; i += Team::kLanes) state[i] = kFree;
    team.sync();
  }

  MTLGRAD_SOLVER void solve() {
    const Team team = r.team;
    const int n = r.n;
    r.size = 0;
    for (int i = team.lane; i < n; i += Team::kLanes) {
      x[i] = 0.0, matrix_[i * n + i] = 1.0 + kRidge;
      if (state[i] != kNever) state[i] = kFree;
    }
    team.sync();
    for (int before = n + 1, gaining = 0; (gaining = enter_all()) > 0; before = gaining) {
      while (drop_negative()) {
      }
      if (gaining >= before) break;
    }
    for (int round = 0; round < 10 * n + 20; ++round) {
      const int entering = chosen();
      if (entering < 0) break;
      accept(entering);
      mark(entering, kMember);
      settle(entering);
    }
    refine();
  }

 private:
  double* matrix_;

  // rest = b - A x, and what its roundings are relative to.
  MTLGRAD_SOLVER void find_rest(double diagonal) {
    const Team team = r.team;
    const int n = r.n;
    team.sync();  // all have read what was there
    for (int i = team.lane; i < n; i += Team::kLanes) rest[i] = b[i], bound[i] = fabs(b[i]);
    for (int k = 0; k < r.size; ++k) {
      const int member = r.members[k];
      const double* row = r.a + member * n;
      const double factor = x[member];
#pragma omp simd
      for (int i = team.lane; i < n; i += Team::kLanes) {
        const double term = (i == member ? diagonal : row[i]) * factor;
        rest[i] -= term, bound[i] += fabs(term);
      }
    }
  }

  // Whether a number's entering would gain more than rounding.
  MTLGRAD_SOLVER bool gains(int i) const { return state[i] == kFree && rest[i] > 2.0 * kRounding * r.n * bound[i]; }

  // Who gains most; -1 if nobody does.
  MTLGRAD_SOLVER int chosen() {
    find_rest(1.0 + kRidge);
    Extreme most{0.0, -1};
    for (int i = r.team.lane; i < r.n; i += Team::kLanes)
      if (gains(i)) most = larger(most, {rest[i], i});
    return r.team.largest(most).at;
  }

  // All who gain; returns their number.
  MTLGRAD_SOLVER int enter_all() {
    find_rest(1.0 + kRidge);
    r.team.sync();
    int count = 0;
    for (int i = 0; i < r.n; ++i)
      if (gains(i)) {
        accept(i);
        mark(i, kMember);
        ++count;
      }
    return count;
  }

  MTLGRAD_SOLVER void mark(int i, int what) {
    if (r.team.lane == 0) state[i] = what;
    r.team.sync();
  }

  // half = R'^-1 b, one number more.
  MTLGRAD_SOLVER void accept(int j) {
    const double found = r.border(j), pivot = found > 0.1 * kRidge ? found : 0.1 * kRidge;
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int i = r.team.lane; i < r.size; i += Team::kLanes) sum += r.factor[i * r.n + r.size] * half[i];
    sum = r.team.sum(sum);
    if (r.team.lane == 0) half[r.size] = (b[j] - sum) / sqrt(pivot);
    r.accept(j, pivot);
  }

  MTLGRAD_SOLVER void leave(int place) {
    const int gone = r.members[place], before = r.size;
    r.team.sync();
    if (r.team.lane == 0) x[gone] = 0.0;
    mark(gone, kFree);
    r.size = place;
    for (int k = place + 1; k < before; ++k) accept(r.members[k]);
  }

  // Makes x the members' solution if that is positive; else those for whom it is not leave. Returns whether any did.
  MTLGRAD_SOLVER bool drop_negative() {
    const Team team = r.team;
    solve_members();
    bool positive = true;
    for (int i = team.lane; i < r.size; i += Team::kLanes) positive = positive && trial[i] > 0.0;
    if (!team.any(!positive)) {
      for (int i = team.lane; i < r.size; i += Team::kLanes) x[r.members[i]] = trial[i];
      team.sync();
      return false;
    }
    const int before = r.size;
    r.size = 0;
    for (int k = 0; k < before; ++k) {
      const int j = r.members[k];
      const bool stays = trial[k] > 0.0;
      team.sync();
      if (stays) {
        accept(j);
      } else {
        if (team.lane == 0) x[j] = 0.0;
        mark(j, kFree);
      }
    }
    return true;
  }

  // trial = the members' solution
  MTLGRAD_SOLVER void solve_members() {
    for (int i = r.team.lane; i < r.size; i += Team::kLanes) trial[i] = half[i];
    r.team.sync();
    r.backward(trial);
  }

  // From x to the solution of the members, the last of whom is `entered`, and on if that is not positive.
  MTLGRAD_SOLVER void settle(int entered) {
    const Team team = r.team;
    bool moved = false;
    while (r.size > 0) {
      solve_members();
      Extreme first{0.0, -1};  // the largest part of the way that is too much
      for (int i = team.lane; i < r.size; i += Team::kLanes)
        if (!(trial[i] > 0.0)) {
          const double now = x[r.members[i]];
          first = larger(first, {(now - trial[i]) / (now > 0.0 ? now : 1e-300), i});
        }
      first = team.largest(first);
      const double part = first.at < 0 ? 1.0 : 1.0 / first.value;
      for (int i = team.lane; i < r.size; i += Team::kLanes) {
        double& value = x[r.members[i]];
        const double next = first.at < 0 ? trial[i] : value + part * (trial[i] - value);
        value = next > 0.0 ? next : 0.0;
      }
      team.sync();
      if (first.at < 0) {
        moved = true;
        break;
      }
      const int gone = r.members[first.at];
      leave(first.at);
      if (gone == entered && !moved) mark(gone, kBarred);  // it gained by rounding alone
      moved = moved || part > 0.0;
    }
    if (!moved) return;
    for (int i = team.lane; i < r.n; i += Team::kLanes)
      if (state[i] == kBarred) state[i] = kFree;
    team.sync();
  }

  // Takes the ridge's part out of the members' solution, unless that is all that keeps them apart.
  MTLGRAD_SOLVER void refine() {
    const Team team = r.team;
    Extreme most{0.0, -1};
    for (int i = team.lane; i < r.size; i += Team::kLanes) most = larger(most, {r.inverse[i], i});
    if (!(team.largest(most).value < 1e5)) return;
    for (int pass = 0; pass < 3; ++pass) {
      find_rest(1.0);
      team.sync();
      for (int i = team.lane; i < r.size; i += Team::kLanes) trial[i] = rest[r.members[i]];
      team.sync();
      r.forward(trial);
      r.backward(trial);
      bool positive = true;
      for (int i = team.lane; i < r.size; i += Team::kLanes) positive = positive && x[r.members[i]] + trial[i] > 0.0;
      if (team.any(!positive)) return;
      for (int i = team.lane; i < r.size; i += Team::kLanes) x[r.members[i]] += trial[i];
      team.sync();
    }
  }
};

// ---- the dual cone: UPGrad, DualProj ---------------------------------------------------------------------------------

// A matrix for NonNegative, and lengths: cosines and norms of the gradients, zeros for gradients of zero.
template <typename Team>
MTLGRAD_SOLVER void cosines(Team team, const double* gram, int n, double* out, double* lengths) {
  for (int i = team.lane; i < n; i += Team::kLanes) lengths[i] = gram[i * n + i] > 0.0 ? sqrt(gram[i * n + i]) : 0.0;
  team.sync();
  for (int i = 0; i < n; ++i)
    for (int j = team.lane; j < n; j += Team::kLanes) {
      const bool some = lengths[i] > 0.0 && lengths[j] > 0.0;
      out[i * n + j] = i == j ? 1.0 : some ? entry(gram, n, i, j) / lengths[i] / lengths[j] : 0.0;
    }
  team.sync();
}

constexpr int64_t dual_cone_arena(int64_t n) { return 2 * n * n + (NonNegative<Alone>::kVectors + 2) * n; }

// For a Gram matrix that is finite; in units of the gradients' lengths, so that v = u + x, x >= 0, has ones on the diagonal.
template <typename Team>
struct DualCone {
  Team team;
  int n;
  double *matrix, *lengths, *wanted;
  NonNegative<Team> problem;

  MTLGRAD_SOLVER DualCone(Team team, const double* gram, int n, double* arena)
      : team(team),
        n(n),
        matrix(arena),
        lengths(arena + n * n),
        wanted(lengths + n),
        problem(team, n, matrix, wanted + n) {
    cosines(team, gram, n, matrix, lengths);
    for (int i = team.lane; i < n; i += Team::kLanes)
      if (lengths[i] == 0.0) problem.state[i] = NonNegative<Team>::kNever;
    team.sync();
  }

  // UPGrad's part of task i: v >= e_i, [n].
  MTLGRAD_SOLVER void project_task(int i, double* v) {
    for (int j = team.lane; j < n; j += Team::kLanes) problem.b[j] = i == j ? -1.0 : -matrix[i * n + j];
    team.sync();
    problem.solve();
    for (int j = team.lane; j < n; j += Team::kLanes)
      v[j] = (i == j ? 1.0 : 0.0) + (problem.x[j] > 0.0 ? lengths[i] * problem.x[j] / lengths[j] : 0.0);
    team.sync();
  }

  // DualProj: v >= u.
  MTLGRAD_SOLVER void project_preference(const double* u, double* v) {
    Extreme most{0.0, -1};
    for (int j = team.lane; j < n; j += Team::kLanes) {
      wanted[j] = (u ? u[j] : 1.0 / n) * lengths[j];
      most = larger(most, {fabs(wanted[j]), j});
    }
    const double scale = team.largest(most).value;
    fill(team, problem.b, n, 0.0);
    for (int i = 0; i < n && scale > 0.0; ++i) {
      const double factor = wanted[i] / scale;
      for (int j = team.lane; j < n; j += Team::kLanes) problem.b[j] -= matrix[i * n + j] * factor;
    }
    team.sync();
    problem.solve();
    for (int j = team.lane; j < n; j += Team::kLanes)
      v[j] = (u ? u[j] : 1.0 / n) + (problem.x[j] > 0.0 ? scale * problem.x[j] / lengths[j] : 0.0);
    team.sync();
  }
};

// ---- the simplex: MGDA, CAGrad ---------------------------------------------------------------------------------------

constexpr int64_t simplex_arena(int64_t n) { return 2 * n * n + (NonNegative<Alone>::kVectors + 5) * n; }

// The point of least norm in the convex hull of g_i + t g_0, for a Gram matrix of the g_i whose largest square is
// `largest`: all is relative to that.
template <typename Team>
struct Hull {
  Team team;
  int n;
  const double* gram;
  double largest;
  double *means, mean;     // <g_i, g_0>, [n], and |g_0|^2
  double *matrix, *scale;  // [n, n], [n]
  double *w, *products;    // [n], the point's weights, and M w
  NonNegative<Team> problem;

  MTLGRAD_SOLVER Hull(Team team, const double* gram, int n, double largest, double* arena)
      : team(team),
        n(n),
        gram(gram),
        largest(largest),
        means(arena + n * n),
        mean(0.0),
        matrix(arena),
        scale(means + n),
        w(scale + n),
        products(w + n),
        problem(team, n, matrix, products + 2 * n) {
    double total = 0.0;
    for (int i = team.lane; i < n; i += Team::kLanes) {
      double sum = 0.0;
      for (int j = 0; j < n; ++j) sum += entry(gram, n, i, j) / largest;
      means[i] = sum / n;
      total += means[i];
    }
    mean = team.sum(total) / n;
    team.sync();
  }

  MTLGRAD_SOLVER double product(int i, int j, double t) const {
    return entry(gram, n, i, j) / largest + t * (means[i] + means[j] + t * mean);
  }

  // w for t; where gradients g_i + t g_0 are zero they share the weight.
  MTLGRAD_SOLVER void solve(double t) {
    Extreme least{0.0, -1};
    for (int i = team.lane; i < n; i += Team::kLanes) {
      const double rounding = 1e-15 * t * (2.0 * fabs(means[i]) + t * mean);  // what is left of a difference
      scale[i] = product(i, i, t);
      scale[i] = scale[i] > rounding ? scale[i] : rounding;
      least = larger(least, {-scale[i], i});
    }
    const double s = -team.largest(least).value;
    if (!(s > 0.0)) {
      double zeros = 0.0;
      for (int i = team.lane; i < n; i += Team::kLanes) zeros += scale[i] > 0.0 ? 0.0 : 1.0;
      zeros = team.sum(zeros);
      for (int i = team.lane; i < n; i += Team::kLanes) w[i] = scale[i] > 0.0 ? 0.0 : 1.0 / zeros;
      team.sync();
      return;
    }
    for (int i = team.lane; i < n; i += Team::kLanes) {
      scale[i] = sqrt(scale[i] + s);
      problem.b[i] = sqrt(s) / scale[i];
    }
    team.sync();
    for (int i = 0; i < n; ++i)
      for (int j = team.lane; j < n; j += Team::kLanes)
        matrix[i * n + j] = i == j ? 1.0 : (product(i, j, t) + s) / scale[i] / scale[j];
    team.sync();
    problem.solve();
    double total = 0.0;
    for (int i = team.lane; i < n; i += Team::kLanes) total += problem.x[i] / scale[i];
    total = team.sum(total);
    for (int i = team.lane; i < n; i += Team::kLanes) w[i] = problem.x[i] / scale[i] / total;
    team.sync();
  }

  // products = M w; returns w'Mw, and w'|M|w.
  MTLGRAD_SOLVER double square(double* absolute) {
    double sum = 0.0, bound = 0.0;
    for (int i = team.lane; i < n; i += Team::kLanes) {
      double own = 0.0, size = 0.0;
      for (int j = 0; j < n; ++j) {
        const double term = entry(gram, n, i, j) / largest * w[j];
        own += term, size += fabs(term);
      }
      products[i] = own;
      sum += w[i] * own, bound += w[i] * size;
    }
    sum = team.sum(sum);
    *absolute = team.sum(bound);
    team.sync();
    return sum > 0.0 ? sum : 0.0;
  }

  // |dw/dt|^2 in the norm of M, while the members stay: w moves by q, the solution of A q = -b + v 1 with 1'q = 0.
  MTLGRAD_SOLVER double speed_square(double* y) {
    Cholesky<Team>& r = problem.r;
    for (int k = team.lane; k < r.size; k += Team::kLanes) y[k] = means[r.members[k]] / scale[r.members[k]];
    team.sync();
    r.forward(y);
    r.backward(y);
    double sum = 0.0, along = 0.0, mean_of_w = 0.0;
    for (int k = team.lane; k < r.size; k += Team::kLanes) {
      const int i = r.members[k];
      sum += y[k] / scale[i], along += y[k] / scale[i] * means[i], mean_of_w += w[i] * means[i];
    }
    const double found = team.sum(along) - team.sum(sum) * team.sum(mean_of_w);
    team.sync();
    return found > 0.0 ? found : 0.0;
  }
};

// MGDA.
template <typename Team>
MTLGRAD_SOLVER void least_norm(Team team, const double* gram, int n, double* arena, double* weights) {
  if (!is_finite(team, gram, n)) return fill(team, weights, n, not_a_number<double>());
  const double largest = largest_square(team, gram, n);
  if (!(largest > 0.0)) return fill(team, weights, n, 1.0 / n);
  Hull<Team> hull(team, gram, n, largest, arena);
  hull.solve(0.0);
  for (int i = team.lane; i < n; i += Team::kLanes) weights[i] = hull.w[i];
  team.sync();
}

// CAGrad. |g_w| / t decreases in t: where the members stay, |g_w|^2 = d^2 + t^2 q^2, of which the root is known; a bracket
// guards the search for the members. If zero is in the hull, |g_w| / t stays the same from some t downwards.
template <typename Team>
MTLGRAD_SOLVER void conflict_averse(Team team, const double* gram, double c, int n, double* arena, double* weights) {
  if (!is_finite(team, gram, n)) return fill(team, weights, n, not_a_number<double>());
  const double largest = largest_square(team, gram, n);
  fill(team, weights, n, 1.0 / n);
  if (!(largest > 0.0) || c == 0.0) return;
  Hull<Team> hull(team, gram, n, largest, arena);
  double bound = 0.0;
  Extreme shortest{0.0, -1};
  for (int i = team.lane; i < n; i += Team::kLanes) {
    for (int j = 0; j < n; ++j) bound += fabs(entry(gram, n, i, j)) / largest;
    if (gram[i * n + i] > 0.0) shortest = larger(shortest, {-gram[i * n + i] / largest, i});
  }
  if (!(hull.mean > kStationary * team.sum(bound) / n / n)) return;  // g_0 is zero
  const double k = c * sqrt(hull.mean), least = -team.largest(shortest).value;
  double absolute = 0.0;
  hull.solve(0.0);
  double square = hull.square(&absolute);
  double low = sqrt(square) / k, high = 1.0 / k, t = 0.0;
  if (!(square > kStationary * absolute)) {
    t = 1e-6 * sqrt(absolute > least ? absolute : least) / k;
    hull.solve(t);
    square = hull.square(&absolute);
    if (square <= k * t * (k * t)) return;
    low = t;
  }
  for (int round = 0; round < 100; ++round) {
    const double speed = hull.speed_square(hull.products), fixed = square - t * t * speed;
    double next = k * k > speed && fixed > 0.0 ? sqrt(fixed / (k * k - speed)) : high;
    if (!(next > low && next < high)) next = sqrt(low) * sqrt(high);
    if (fabs(next - t) <= kRounding * t) break;
    t = next;
    hull.solve(t);
    square = hull.square(&absolute);
    const double gap = square - k * t * (k * t);
    if (fabs(gap) <= 8.0 * kRounding * absolute) break;
    if (gap > 0.0)
      low = t;
    else
      high = t;
  }
  for (int i = team.lane; i < n; i += Team::kLanes) weights[i] += k / sqrt(square) * hull.w[i];
  team.sync();
}

// ---- fairness: Nash-MTL, FairGrad ------------------------------------------------------------------------------------

constexpr int64_t fair_arena(int64_t n) { return simplex_arena(n); }  // which has one vector more

// x^e. Not pow: on a device that is a call, which makes the caller spill its registers.
MTLGRAD_SOLVER double power(double x, double e) { return e == 0.0 ? 1.0 : exp(e * log(x)); }

// What the utility x^(1 - p) / (1 - p), log x for p = 1, gains from x to x + step.
MTLGRAD_SOLVER double utility_gain(double x, double step, double p) {
  const double grown = log1p(step / x);
  return p == 1.0 ? grown : power(x, 1.0 - p) * expm1((1.0 - p) * grown) / (1.0 - p);
}

// Row i of `matrix`, whose diagonal is apart, times x; returns that, and what its roundings are relative to. Each product's
// and each sum's rounding is added up, too: where the row nearly cancels, that is what is left.
MTLGRAD_SOLVER double exact_product(const double* matrix, const double* diagonal, const double* x, int n, int i,
                                    double* size) {
  double sum = diagonal[i] * x[i], left = fma(diagonal[i], x[i], -sum);
  *size = sum;
  for (int j = 0; j < n; ++j) {
    if (j == i) continue;
    const double e = matrix[j * n + i], term = e * x[j], next = sum + term, back = next - sum;
    left += fma(e, x[j], -term) + ((sum - (next - back)) + (term - back));
    sum = next, *size += fabs(term);
  }
  return sum + left;
}

// With p = 1 / alpha and N the norm to divide by, x = d a solves C x = k x^-p, C_ij = M_ij / (d_i d_j), k = N d^(p - 1):
// the minimum of x'Cx / 2 - sum_i k_i utility(x_i). d are the gradients' lengths, rounded to powers of two, so that C has
// all digits of M. Newton's method, each step halved until it gains enough. Without a solution (a convex combination of
// the gradients is zero) the weights are that combination's, MGDA's.
template <typename Team>
MTLGRAD_SOLVER void fair(Team team, const double* gram, double alpha, bool normalize, int n, double* arena,
                         double* weights) {
  if (!is_finite(team, gram, n)) return fill(team, weights, n, not_a_number<double>());
  const double largest = largest_square(team, gram, n);
  if (!(largest > 0.0)) return fill(team, weights, n, 1.0);
  double norm = 0.0;
  for (int i = team.lane; i < n; i += Team::kLanes)
    for (int j = 0; j < n; ++j) {
      const double e = entry(gram, n, i, j) / largest;
      norm += e * e;
    }
  const double log_norm = normalize ? 0.5 * log(team.sum(norm)) + log(largest) : 0.0;
  const double p = 1.0 / alpha;

  double *factor = arena, *matrix = factor + n * n, *x = matrix + n * n;
  double *k = x + n, *gains = k + n, *slopes = gains + n, *step = slopes + n, *lengths = step + n;
  double *inverse = lengths + n, *scratch = inverse + n, *diagonal = scratch + n;
  int *members = reinterpret_cast<int*>(diagonal + n), *of = members + n;

  int count = 0;  // tasks whose gradient is not zero
  for (int i = 0; i < n; ++i)
    if (gram[i * n + i] > 0.0) {
      if (team.lane == 0) of[count] = i, lengths[count] = exp2(rint(0.5 * log2(gram[i * n + i])));
      ++count;
    }
  team.sync();
  for (int i = 0; i < count; ++i)
    for (int j = team.lane; j < count; j += Team::kLanes)
      matrix[i * count + j] = entry(gram, n, of[i], of[j]) / lengths[i] / lengths[j];
  Extreme most{0.0, -1};
  for (int i = team.lane; i < count; i += Team::kLanes) {
    k[i] = log_norm + (p - 1.0) * log(lengths[i]);
    most = larger(most, {k[i], i});
  }
  const double log_k = team.largest(most).value;  // x and k are relative to it
  for (int i = team.lane; i < count; i += Team::kLanes) {
    k[i] = exp(k[i] - log_k);
    diagonal[i] = gram[of[i] * n + of[i]] / lengths[i] / lengths[i];
    x[i] = power(k[i] / diagonal[i], 1.0 / (1.0 + p));
  }
  team.sync();

  bool found = false;
  double before = infinity<double>();
  for (int round = 0; round < 200; ++round) {
    // gains_i = k_i x_i^(1 - p) and slopes_i = x_i (C x)_i are equal at the solution.
    double quadratic = 0.0, absolute = 0.0, total = 0.0;
    Extreme off{0.0, -1};
    for (int i = team.lane; i < count; i += Team::kLanes) {
      double size;
      slopes[i] = x[i] * exact_product(matrix, diagonal, x, count, i, &size);
      gains[i] = k[i] * power(x[i], 1.0 - p);
      quadratic += slopes[i], absolute += x[i] * size, total += gains[i];
      off = larger(off, {fabs(gains[i] - slopes[i]) / gains[i], i});
    }
    quadratic = team.sum(quadratic), absolute = team.sum(absolute), total = team.sum(total);
    const double worst = team.largest(off).value;
    const bool stationary = !(quadratic > kStationary * absolute);
    found = !stationary && worst * total <= 1e-9 * absolute;
    if (stationary || worst <= 4.0 * kRounding || (worst < 1e-6 && worst >= 0.5 * before)) break;
    before = worst;
    if (round == 0) {  // the best multiple of the start
      const double best = power(total / quadratic, 1.0 / (1.0 + p));
      team.sync();
      for (int i = team.lane; i < count; i += Team::kLanes) x[i] *= best;
      team.sync();
      continue;
    }
    for (int i = team.lane; i < count; i += Team::kLanes) {
      matrix[i * count + i] = diagonal[i] + p * gains[i] / (x[i] * x[i]);
      step[i] = (gains[i] - slopes[i]) / x[i];
    }
    team.sync();
    Cholesky<Team> r{team, count, 0, matrix, factor, inverse, scratch, members};
    for (int i = 0; i < count; ++i) {
      const double pivot = r.border(i);
      r.accept(i, pivot > 0.0 ? pivot : kRounding * matrix[i * count + i]);
    }
    r.forward(step);
    r.backward(step);

    double decrement = 0.0, linear = 0.0, curved = 0.0;
    Extreme down{0.0, -1};
    for (int i = team.lane; i < count; i += Team::kLanes) {
      double size;
      const double relative = step[i] / x[i];
      decrement += relative * (gains[i] - slopes[i]), linear += relative * slopes[i];
      curved += step[i] * exact_product(matrix, diagonal, step, count, i, &size);
      down = larger(down, {-relative, i});
    }
    decrement = team.sum(decrement), linear = team.sum(linear), curved = team.sum(curved);
    down = team.largest(down);
    double part = down.value > 0.9 ? 0.9 / down.value : 1.0;
    for (int halving = 0; halving < 40 && decrement > 1e-10 * quadratic; ++halving, part *= 0.5) {
      double change = 0.0;  // of the utilities
      for (int i = team.lane; i < count; i += Team::kLanes) change += k[i] * utility_gain(x[i], part * step[i], p);
      if (part * (linear + 0.5 * part * curved) - team.sum(change) <= -1e-4 * part * decrement) break;
    }
    for (int i = team.lane; i < count; i += Team::kLanes) x[i] += part * step[i];
    team.sync();
  }
  if (!found) return least_norm(team, gram, n, arena, weights);
  fill(team, weights, n, 0.0);
  const double size = exp(log_k / (1.0 + p));
  for (int i = team.lane; i < count; i += Team::kLanes) weights[of[i]] = size * x[i] / lengths[i];
  team.sync();
}

// ---- IMTL-G ----------------------------------------------------------------------------------------------------------

// weights = y / d over their sum, for y = C^+ 1; zeros where that is zero, as for opposites: no other combination than
// zero has equal projections.
template <typename Team>
MTLGRAD_SOLVER void equal_projections(Team team, const double* y, const double* lengths, int n, double* weights) {
  Extreme most{0.0, -1};
  for (int i = team.lane; i < n; i += Team::kLanes) most = larger(most, {lengths[i], i});
  const double longest = team.largest(most).value;
  if (!(longest > 0.0)) return fill(team, weights, n, 1.0 / n);
  double total = 0.0, absolute = 0.0;
  for (int i = team.lane; i < n; i += Team::kLanes) {
    weights[i] = lengths[i] > 0.0 ? y[i] * (longest / lengths[i]) : 0.0;
    total += weights[i], absolute += fabs(weights[i]);
  }
  total = team.sum(total), absolute = team.sum(absolute);
  const bool none = !(fabs(total) > kStationary * absolute);
  for (int i = team.lane; i < n; i += Team::kLanes) weights[i] = none ? 0.0 : weights[i] / total;
  team.sync();
}

constexpr int64_t imtlg_arena(int64_t n) { return 2 * (n + 1) * (n + 1) + 7 * n; }

// y = C^-1 1 of cosines [n, n] that are far from singular; returns whether they are. Zero gradients: y = 1.
template <typename Team>
MTLGRAD_SOLVER bool inverse_times_ones(Team team, const double* matrix, int n, double* factor, double* vectors,
                                       double* y) {
  Cholesky<Team> r{team, n, 0, matrix, factor, vectors, vectors + n, reinterpret_cast<int*>(vectors + 2 * n)};
  for (int i = 0; i < n; ++i) {
    const double pivot = r.border(i);
    if (!(pivot > 1e-6)) return false;
    r.accept(i, pivot);
  }
  fill(team, y, n, 1.0);
  r.forward(y);
  r.backward(y);
  return true;
}

// y = C^+ 1, without the eigenvalues that are rounding: C's eigenvalue k at values[k * stride], element i of its
// eigenvector at vectors[k * across + i * along].
template <typename Team>
MTLGRAD_SOLVER void pseudo_inverse_times_ones(Team team, const double* values, int stride, const double* vectors,
                                              int across, int along, const double* lengths, int n, double* parts,
                                              double* y) {
  Extreme most{0.0, -1};
  for (int k = team.lane; k < n; k += Team::kLanes) most = larger(most, {values[k * stride], k});
  const double least = 1e-14 * n * team.largest(most).value;
  for (int k = team.lane; k < n; k += Team::kLanes) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) sum += lengths[i] > 0.0 ? vectors[k * across + i * along] : 0.0;
    parts[k] = values[k * stride] > least && fabs(sum) > kStationary ? sum / values[k * stride] : 0.0;
  }
  team.sync();
  for (int i = team.lane; i < n; i += Team::kLanes) {
    y[i] = 0.0;
    for (int k = 0; k < n; ++k) y[i] += parts[k] * vectors[k * across + i * along];
  }
  team.sync();
}

// ---- PCGrad ----------------------------------------------------------------------------------------------------------

// 64 bits that look random, of a counter (splitmix64).
MTLGRAD_INLINE uint64_t scrambled(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Task i's gradient without its conflicts, v [n], the others met in an order drawn from seed, step and task alone; `order`
// has n entries. One lane does it.
MTLGRAD_SOLVER void resolve_conflicts(const double* gram, int n, int i, int64_t seed, int64_t step, int* order,
                                      double* v) {
  const uint64_t key = scrambled(scrambled(scrambled(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(step)) +
                                 static_cast<uint64_t>(i));
  for (int j = 0; j < n; ++j) v[j] = i == j ? 1.0 : 0.0, order[j] = j;
  for (int j = n - 1; j > 0; --j) {
    const int other = static_cast<int>(scrambled(key + static_cast<uint64_t>(j)) % static_cast<uint64_t>(j + 1));
    const int kept = order[j];
    order[j] = order[other], order[other] = kept;
  }
  for (int k = 0; k < n; ++k) {
    const int j = order[k];
    if (j == i) continue;
    double product = 0.0;
    for (int l = 0; l < n; ++l) product += entry(gram, n, j, l) * v[l];
    if (product < 0.0) v[j] -= product / gram[j * n + j];
  }
}

}  // namespace mtlgrad::math
