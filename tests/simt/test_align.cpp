// The kernels of the `align` stem, host's and emulated device's, against an eigensolver of this file's own in long
// double. For the sanitizers: every array is a heap block of exactly its size, outputs and workspace start as NaN, and
// threads run in three orders.
#include <algorithm>
#include <limits>
#include <random>

#include "cuda_emu.h"
#include "kernels.h"

using namespace mtlgrad;
using Real = long double;

static int failures = 0, passed = 0;
static std::mt19937 rng(1);

static void expect(const char* name, int64_t i, double got, double want, double tolerance) {
  const bool same =
      std::isfinite(want) ? std::fabs(got - want) <= tolerance : (std::isnan(want) ? std::isnan(got) : got == want);
  if (same)
    ++passed;
  else if (++failures < 20)
    std::printf("FAIL %s[%ld]: got %.17g, want %.17g\n", name, static_cast<long>(i), got, want);
}

struct Result {
  int64_t tasks;
  std::unique_ptr<double[]> weights, singular_values, condition_number, transform;
  std::unique_ptr<int64_t> rank;
  explicit Result(int64_t t)
      : tasks(t),
        weights(new double[t]),
        singular_values(new double[t]),
        condition_number(new double[1]),
        transform(new double[t * t]),
        rank(new int64_t(-7)) {
    const double unset = 12345.0;  // not NaN, which is a result
    std::fill_n(weights.get(), t, unset);
    std::fill_n(singular_values.get(), t, unset);
    std::fill_n(transform.get(), t * t, unset);
    condition_number[0] = unset;
  }
};

static std::unique_ptr<double[]> copy(const std::vector<double>& v) {
  std::unique_ptr<double[]> a(new double[v.size()]);
  std::copy(v.begin(), v.end(), a.get());
  return a;
}

static Result align(bool device, const std::vector<double>& gram, const std::vector<double>& preference, Scale scale,
                    double rtol) {
  const auto tasks = static_cast<int64_t>(preference.size());
  Result r(tasks);
  const int64_t size = (device ? cuda::align_workspace : cpu::align_workspace)(tasks);
  std::unique_ptr<double[]> workspace(new double[size]);
  std::fill_n(workspace.get(), size, std::numeric_limits<double>::quiet_NaN());
  const auto g = copy(gram), p = copy(preference);
  (device ? cuda::align : cpu::align)(
      g.get(), p.get(), scale, rtol, tasks,
      {r.weights.get(), r.singular_values.get(), r.rank.get(), r.condition_number.get(), r.transform.get()},
      workspace.get(), {});
  return r;
}

// The Gram matrix of `tasks` random gradients of `width` components, in float64; `copies` of them repeat the first.
static std::vector<double> random_gram(int64_t tasks, int64_t width, int64_t copies, double size) {
  std::normal_distribution<double> normal;
  std::vector<double> g(tasks * width), m(tasks * tasks, 0.0);
  for (int64_t t = 0; t < tasks; ++t)
    for (int64_t i = 0; i < width; ++i)
      g[t * width + i] = t > 0 && t <= copies ? g[i] : normal(rng) * size * (1.0 + static_cast<double>(t % 4));
  for (int64_t a = 0; a < tasks; ++a)
    for (int64_t b = 0; b < tasks; ++b) {
      for (int64_t i = 0; i < width; ++i) m[a * tasks + b] += g[a * width + i] * g[b * width + i];
      if (b < a) m[a * tasks + b] = std::nan("");  // nobody reads the lower triangle
    }
  return m;
}

// Classical Jacobi in long double: always the largest entry.
static void eigen(std::vector<Real> a, int64_t n, std::vector<Real>& values, std::vector<Real>& vectors) {
  vectors.assign(n * n, 0);
  for (int64_t i = 0; i < n; ++i) vectors[i * n + i] = 1;
  for (;;) {
    int64_t p = 0, q = 0;
    Real largest = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i + 1; j < n; ++j)
        if (std::fabs(a[i * n + j]) > largest) largest = std::fabs(a[i * n + j]), p = i, q = j;
    if (largest < 1e-19L) break;
    const Real angle = 0.5L * std::atan2(2 * a[p * n + q], a[q * n + q] - a[p * n + p]);
    const Real c = std::cos(angle), s = std::sin(angle);
    for (int64_t k = 0; k < n; ++k) {
      const Real x = a[k * n + p], y = a[k * n + q];
      a[k * n + p] = c * x - s * y, a[k * n + q] = s * x + c * y;
    }
    for (int64_t k = 0; k < n; ++k) {
      const Real x = a[p * n + k], y = a[q * n + k];
      a[p * n + k] = c * x - s * y, a[q * n + k] = s * x + c * y;
      const Real u = vectors[k * n + p], w = vectors[k * n + q];
      vectors[k * n + p] = c * u - s * w, vectors[k * n + q] = s * u + c * w;
    }
    a[p * n + q] = a[q * n + p] = 0;
  }
  values.resize(n);
  for (int64_t i = 0; i < n; ++i) values[i] = a[i * n + i];
}

struct Reference {
  std::vector<Real> values, vectors, sorted;
  Real largest = 0;
  Reference(const std::vector<double>& gram, int64_t n) {
    std::vector<Real> a(n * n);
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, static_cast<Real>(gram[i * n + i]));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) a[i * n + j] = gram[std::min(i, j) * n + std::max(i, j)] / largest;
    eigen(a, n, values, vectors);
    sorted = values;
    std::sort(sorted.rbegin(), sorted.rend());
  }
};

static void check(bool device, const std::vector<double>& gram, const Reference& r, int64_t n, Scale scale) {
  const double rtol = 1e-9;
  std::vector<double> preference(n);
  for (int64_t i = 0; i < n; ++i) preference[i] = 1.0 + 0.1 * static_cast<double>(i);
  const Result got = align(device, gram, preference, scale, rtol);
  int64_t rank = 0;
  Real mean = 0;
  for (const Real v : r.sorted)
    if (v > rtol * r.sorted[0]) ++rank, mean += v;
  mean /= static_cast<Real>(rank);
  const Real square = scale == Scale::min ? r.sorted[rank - 1] : scale == Scale::median ? r.sorted[rank / 2] : mean;
  std::vector<Real> b(n * n, 0), weights(n, 0);
  Real largest = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t k = 0; k < n; ++k)
        if (r.values[k] > rtol * r.sorted[0])
          b[i * n + j] += std::sqrt(square / r.values[k]) * r.vectors[i * n + k] * r.vectors[j * n + k];
      weights[i] += b[i * n + j] * preference[j];
      largest = std::max(largest, std::fabs(b[i * n + j]));
    }
  const double tolerance = 1e-10 * static_cast<double>(largest);
  expect("rank", 0, static_cast<double>(*got.rank), static_cast<double>(rank), 0.0);
  for (int64_t k = 0; k < n * n; ++k) expect("transform", k, got.transform[k], static_cast<double>(b[k]), tolerance);
  for (int64_t i = 0; i < n; ++i) {
    expect("weights", i, got.weights[i], static_cast<double>(weights[i]), tolerance * 10.0 * static_cast<double>(n));
    // squares: what is zero but for rounding has a square of eps
    const Real s = got.singular_values[i] / std::sqrt(r.largest);
    expect("singular values", i, static_cast<double>(s * s), static_cast<double>(r.sorted[i]),
           1e-14 * static_cast<double>(r.sorted[0]));
  }
  const double condition = static_cast<double>(std::sqrt(r.sorted[0] / r.sorted[n - 1]));
  if (rank == n)
    expect("condition", 0, got.condition_number[0], condition, 1e-9 * condition);
  else
    expect("condition", 0, got.condition_number[0] > 1e6, 1.0, 0.0);
}

static void check_all(bool device) {
  for (const int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20, 33, 64}) {
    if (n > 9 && n != 20 && emu::options.order != emu::Order::forward) continue;  // for time's sake
    for (const double size : {1.0, 1e-20, 1e20}) {
      if (n > 9 && size != 1.0) continue;
      for (const int64_t kind : {0, 1, 2}) {  // more components than tasks; fewer; gradients that repeat
        if (n > 20 && kind == 2) continue;
        const auto gram = random_gram(n, kind == 1 ? (n + 1) / 2 : 3 * n, kind == 2 ? n / 2 : 0, size);
        const Reference reference(gram, n);
        for (const Scale scale : {Scale::min, Scale::median, Scale::rmse})
          if (n <= 9 || scale == Scale::median) check(device, gram, reference, n, scale);
      }
    }
  }
  for (const int64_t n : {1, 3, 8, 11, 30}) {
    const std::vector<double> preference(n, 2.5);
    const Result zero = align(device, std::vector<double>(n * n, 0.0), preference, Scale::rmse, 1e-9);
    expect("rank of zeros", n, static_cast<double>(*zero.rank), 0.0, 0.0);
    expect("condition of zeros", n, zero.condition_number[0], std::nan(""), 0.0);
    for (int64_t i = 0; i < n; ++i) {
      expect("weights of zeros", i, zero.weights[i], 2.5, 0.0);
      expect("singular values of zeros", i, zero.singular_values[i], 0.0, 0.0);
      for (int64_t j = 0; j < n; ++j) expect("transform of zeros", j, zero.transform[i * n + j], i == j, 0.0);
    }
    for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL})
      for (const bool diagonal : {false, true}) {
        std::vector<double> gram(n * n, 0.5);
        for (int64_t i = 0; i < n; ++i) gram[i * n + i] = 1.0;
        gram[diagonal ? 0 : n - 1] = bad;
        const Result r = align(device, gram, preference, Scale::min, 1e-9);
        expect("rank of NaN", n, static_cast<double>(*r.rank), -1.0, 0.0);
        expect("condition of NaN", n, r.condition_number[0], std::nan(""), 0.0);
        for (int64_t i = 0; i < n; ++i) {
          expect("weights of NaN", i, r.weights[i], std::nan(""), 0.0);
          expect("singular values of NaN", i, r.singular_values[i], std::nan(""), 0.0);
        }
        for (int64_t i = 0; i < n * n; ++i) expect("transform of NaN", i, r.transform[i], std::nan(""), 0.0);
      }
  }
}

int main() {
  try {
    if (!emu::kRacesAlone) check_all(false);
    for (const auto order : emu::kOrders) {
      emu::options.order = order;
      check_all(true);
    }
  } catch (const std::exception& e) {
    std::printf("EMULATOR ERROR %s\n", e.what());
    ++failures;
  }
  std::printf("%d passed, %d failed\n", passed, failures);
  return failures != 0;
}
