// The kernels of the `rules` stem, and the host's, under the sanitizers: the same weights from both, whatever the order
// of the threads, for sizes around a warp and for systems with and without a solution.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda_emu.h"
#include "kernels.h"

using namespace mtlgrad;

namespace {

int passed = 0, failures = 0;

void expect(const char* what, int64_t n, const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0.0, worst = 0.0;
  bool same_nan = true;
  for (size_t i = 0; i < a.size(); ++i) {
    same_nan = same_nan && std::isnan(a[i]) == std::isnan(b[i]);
    if (std::isnan(a[i]) || std::isnan(b[i])) continue;
    largest = std::max(largest, std::fabs(b[i])), worst = std::max(worst, std::fabs(a[i] - b[i]));
  }
  if (same_nan && worst <= 1e-7 * largest) {
    ++passed;
  } else {
    std::printf("FAILED %s, T = %d: off by %g of %g\n", what, static_cast<int>(n), worst, largest);
    ++failures;
  }
}

// T gradients of so many numbers: below T they depend on one another.
std::vector<double> gram_of(int64_t tasks, int64_t columns, unsigned seed, double common) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> rows(tasks * columns), gram(tasks * tasks), shared(columns);
  for (double& x : shared) x = common * normal(random);
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t k = 0; k < columns; ++k)
      rows[i * columns + k] = (normal(random) + shared[k]) * (1.0 + static_cast<double>(i % 3));
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t j = 0; j < tasks; ++j)
      for (int64_t k = 0; k < columns; ++k) gram[i * tasks + j] += rows[i * columns + k] * rows[j * columns + k];
  return gram;
}

void check(const std::vector<double>& gram, int64_t n, bool well_posed) {
  std::vector<double> host(n), device(n), workspace(n * n), preference(n, 0.5);
  preference[0] = 2.0;
  const int64_t step = 3;
  const Place place{};
  for (const double* p : {static_cast<const double*>(nullptr), static_cast<const double*>(preference.data())}) {
    cpu::upgrad(gram.data(), p, n, host.data(), workspace.data(), place);
    cuda::upgrad(gram.data(), p, n, device.data(), workspace.data(), place);
    if (well_posed) expect("upgrad", n, device, host);
    cpu::dualproj(gram.data(), p, n, host.data(), place);
    cuda::dualproj(gram.data(), p, n, device.data(), place);
    if (well_posed) expect("dualproj", n, device, host);
  }
  cpu::mgda(gram.data(), n, host.data(), place);
  cuda::mgda(gram.data(), n, device.data(), place);
  if (well_posed) expect("mgda", n, device, host);
  for (const double c : {0.0, 0.5}) {
    cpu::cagrad(gram.data(), c, n, host.data(), place);
    cuda::cagrad(gram.data(), c, n, device.data(), place);
    if (well_posed) expect("cagrad", n, device, host);
  }
  for (const double alpha : {0.5, 1.0, 2.0}) {
    cpu::fairgrad(gram.data(), alpha, alpha == 1.0, n, host.data(), place);
    cuda::fairgrad(gram.data(), alpha, alpha == 1.0, n, device.data(), place);
    if (well_posed) expect("fairgrad", n, device, host);
  }
  cpu::imtlg(gram.data(), n, host.data(), place);
  cuda::imtlg(gram.data(), n, device.data(), place);
  if (well_posed) expect("imtlg", n, device, host);
  cpu::pcgrad(gram.data(), 7, &step, n, host.data(), place);
  cuda::pcgrad(gram.data(), 7, &step, n, device.data(), place);
  expect("pcgrad", n, device, host);
}

void check_all() {
  for (const int64_t n : {1, 2, 3, 8, 31, 33, 64}) {
    if (n > 33 && emu::options.order != emu::Order::forward) continue;  // for time's sake
    check(gram_of(n, 2 * n, 1, 0.3), n, true);
    if (n <= 8) check(gram_of(n, 2 * n, 2, 0.0), n, true);
    if (n == 3 || n == 8 || n == 33) check(gram_of(n, n / 2, 3, 0.1), n, false);  // several weights for one update
    check(std::vector<double>(n * n, 0.0), n, true);
    std::vector<double> bad = gram_of(n, 2 * n, 4, 0.3);
    bad[n - 1] = std::nan("");
    check(bad, n, true);
  }
  bool refused = false;
  std::vector<double> weights(65), gram(65 * 65);
  try {
    cuda::mgda(gram.data(), 65, weights.data(), Place{});
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect("65 tasks are refused", 65, {refused ? 1.0 : 0.0}, {1.0});
}

}  // namespace

int main() {
  try {
    for (const auto order : emu::kOrders) {
      emu::options.order = order;
      check_all();
    }
  } catch (const std::exception& e) {
    std::printf("EMULATOR ERROR %s\n", e.what());
    ++failures;
  }
  std::printf("%d passed, %d failed\n", passed, failures);
  return failures != 0;
}
