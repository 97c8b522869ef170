// The alignment of T tasks on the host.
#include "math/align.h"

#include <algorithm>

#include "cpu/jacobi.h"

namespace mtlgrad::cpu {

namespace {

void fill_nan(int64_t tasks, Alignment out) {
  const double nan = math::not_a_number<double>();
  std::fill_n(out.weights, tasks, nan);
  std::fill_n(out.singular_values, tasks, nan);
  std::fill_n(out.transform, tasks * tasks, nan);
  *out.condition_number = nan;
  *out.rank = -1;
}

}  // namespace

int64_t align_workspace(int64_t tasks) { return 2 * tasks * tasks + 2 * tasks; }

void align(const double* gram, const double* preference, Scale scale, double rtol, int64_t tasks, Alignment out,
           double* workspace, Place) {
  double largest = 0.0;
  for (int64_t i = 0; i < tasks; ++i) {
    for (int64_t j = i; j < tasks; ++j)
      if (!std::isfinite(gram[i * tasks + j])) return fill_nan(tasks, out);
    largest = std::max(largest, gram[i * tasks + i]);
  }
  double* a = workspace;  // [T, T], then its eigenvalues on the diagonal
  double* v = a + tasks * tasks;
  double* values = v + tasks * tasks;   // [T] as found
  double* descending = values + tasks;  // [T]
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t j = 0; j < tasks; ++j) {
      a[i * tasks + j] = largest > 0.0 ? gram[std::min(i, j) * tasks + std::max(i, j)] / largest : 0.0;
      v[i * tasks + j] = i == j ? 1.0 : 0.0;
    }
  diagonalise(a, v, tasks);
  for (int64_t k = 0; k < tasks; ++k) values[k] = std::max(a[k * tasks + k], 0.0);
  for (int64_t k = 0; k < tasks; ++k) descending[math::place_of(values, k, tasks)] = values[k];
  const int64_t rank = math::numerical_rank(descending, tasks, rtol);
  const double square = rank > 0 ? math::scale_square(descending, rank, static_cast<int>(scale)) : 0.0;

  double* b = out.transform;
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t j = 0; j < tasks; ++j) b[i * tasks + j] = rank == 0 && i == j ? 1.0 : 0.0;
  for (int64_t k = 0; k < tasks; ++k) {
    if (rank == 0 || values[k] < descending[rank - 1]) continue;
    const double* vk = v + k * tasks;
    const double stretch = std::sqrt(square / values[k]);
    for (int64_t i = 0; i < tasks; ++i)
      for (int64_t j = 0; j < tasks; ++j) b[i * tasks + j] += stretch * vk[i] * vk[j];
  }
  for (int64_t i = 0; i < tasks; ++i) {
    out.weights[i] = 0.0;
    for (int64_t j = 0; j < tasks; ++j) out.weights[i] += b[i * tasks + j] * (preference ? preference[j] : 1.0);
    out.singular_values[i] = std::sqrt(descending[i]) * std::sqrt(largest);
  }
  *out.rank = rank;
  *out.condition_number = math::condition_number(descending[0], descending[tasks - 1]);
}

int64_t merge_workspace(int64_t tasks, int64_t columns) {
  return tasks * tasks + std::max(gram_workspace(tasks, columns), align_workspace(tasks));
}

void merge(DType dtype, Rows rows, const double* preference, Scale scale, double rtol, Alignment alignment,
           void* const* out, double* workspace, Place place) {
  double *products = workspace, *rest = workspace + rows.tasks * rows.tasks;
  std::fill_n(products, rows.tasks * rows.tasks, 0.0);
  gram(dtype, rows, products, rest, place);
  align(products, preference, scale, rtol, rows.tasks, alignment, rest, place);
  combine(dtype, rows, alignment.weights, out, place);
}

}  // namespace mtlgrad::cpu
