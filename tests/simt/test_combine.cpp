// The kernels of the `combine` stem, host's and emulated device's, against plain loops in float64. For the sanitizers:
// every array is a heap block of exactly its size, workspace and outputs start as NaN, and threads run in three orders,
// which must not change a bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>
#include <numeric>
#include <random>

#include "cuda_emu.h"
#include "kernels.h"

using namespace mtlgrad;

static int failures = 0, passed = 0;
static std::mt19937 rng(1);
static std::vector<double> first_order;  // every result of the first order of threads
static size_t position = 0;

static void expect(const char* name, size_t i, double got, double want, double tolerance) {
  const bool same =
      std::isfinite(want) ? std::fabs(got - want) <= tolerance : (std::isnan(want) ? std::isnan(got) : got == want);
  if (same)
    ++passed;
  else if (++failures < 20)
    std::printf("FAIL %s[%zu]: got %.17g, want %.17g\n", name, i, got, want);
}

static void same_in_every_order(const char* name, double v) {
  if (emu::options.order == emu::Order::forward)
    first_order.push_back(v);
  else
    expect(name, position, v, first_order.at(position), 0.0), ++position;
}

template <typename T>
constexpr DType dtype_of = std::is_same_v<T, float>    ? DType::f32
                           : std::is_same_v<T, double> ? DType::f64
                           : std::is_same_v<T, __half> ? DType::f16
                                                       : DType::bf16;
template <typename T>
constexpr double epsilon_of = std::is_same_v<T, float>    ? 6e-8
                              : std::is_same_v<T, double> ? 1.2e-16
                              : std::is_same_v<T, __half> ? 4.9e-4
                                                          : 3.95e-3;

static double value(double v) { return v; }
static double value(float v) { return v; }
static double value(__half v) { return __half2float(v); }
static double value(__nv_bfloat16 v) { return __bfloat162float(v); }

// `rows` arrays for each size, array r of every tensor `shift(r)` elements behind a boundary of 16 bytes.
template <typename T>
struct Tensors {
  std::vector<std::unique_ptr<T[]>> memory;
  std::vector<T*> data;
  Tensors(int64_t rows, const std::vector<int64_t>& sizes, int shift) {
    std::normal_distribution<double> normal;
    for (const int64_t size : sizes)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t skip = shift < 0 ? r % 3 : shift;  // -1: another one for each row
        memory.emplace_back(new T[size + skip]);
        data.push_back(memory.back().get() + skip);
        for (int64_t i = 0; i < size; ++i) data.back()[i] = T(static_cast<float>(normal(rng)));
      }
  }
  const void* const* pointers() const {
    return const_cast<const void* const*>(reinterpret_cast<void* const*>(data.data()));
  }
};

template <typename T>
void run(bool device, int64_t tasks, const std::vector<int64_t>& sizes, int shift, double special = 0.0) {
  const auto tensors = static_cast<int64_t>(sizes.size());
  const int64_t columns = std::accumulate(sizes.begin(), sizes.end(), int64_t(0));
  Tensors<T> x(tasks, sizes, shift), y(1, sizes, shift);
  if (special != 0.0) x.data.at((tensors - 1) * tasks + 1)[sizes.back() / 2] = T(static_cast<float>(special));
  const Rows rows{x.pointers(), sizes.data(), tasks, tensors};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto row = [&](int64_t p, int64_t t, int64_t i) { return value(x.data[p * tasks + t][i]); };
  const auto workspace = [&](int64_t size) {
    std::unique_ptr<double[]> w(new double[size]);
    std::fill_n(w.get(), size, nan);
    return w;
  };

  std::unique_ptr<double[]> out(new double[tasks * tasks]);
  for (int64_t k = 0; k < tasks * tasks; ++k) out[k] = static_cast<double>(k);
  const auto space = workspace((device ? cuda::gram_workspace : cpu::gram_workspace)(tasks, columns));
  (device ? cuda::gram : cpu::gram)(dtype_of<T>, rows, out.get(), space.get(), {});
  for (int64_t a = 0; a < tasks; ++a)
    for (int64_t b = 0; b < tasks; ++b) {
      long double want = a * tasks + b, terms = want;
      for (int64_t p = 0; p < tensors; ++p)
        for (int64_t i = 0; i < sizes[p]; ++i) {
          want += static_cast<long double>(row(p, a, i)) * row(p, b, i);
          terms += std::fabs(row(p, a, i) * row(p, b, i));
        }
      expect("gram", a * tasks + b, out[a * tasks + b], static_cast<double>(want), static_cast<double>(1e-14L * terms));
      if (device) same_in_every_order("gram", out[a * tasks + b]);
    }

  std::unique_ptr<double[]> products(new double[tasks]);
  for (int64_t t = 0; t < tasks; ++t) products[t] = static_cast<double>(t);
  const auto dots_space = workspace((device ? cuda::dots_workspace : cpu::dots_workspace)(tasks, columns));
  (device ? cuda::dots : cpu::dots)(dtype_of<T>, rows, y.pointers(), products.get(), dots_space.get(), {});
  for (int64_t t = 0; t < tasks; ++t) {
    long double want = t, terms = want;
    for (int64_t p = 0; p < tensors; ++p)
      for (int64_t i = 0; i < sizes[p]; ++i) {
        want += static_cast<long double>(row(p, t, i)) * value(y.data[p][i]);
        terms += std::fabs(row(p, t, i) * value(y.data[p][i]));
      }
    expect("dots", t, products[t], static_cast<double>(want), static_cast<double>(1e-14L * terms));
    if (device) same_in_every_order("dots", products[t]);
  }

  // Into tensors of its own, then into the last row.
  std::unique_ptr<double[]> weights(new double[tasks]);
  for (int64_t t = 0; t < tasks; ++t) weights[t] = 0.3 * static_cast<double>(t) - 0.7;
  std::vector<std::vector<double>> wants, terms;
  for (int64_t p = 0; p < tensors; ++p) {
    wants.emplace_back(sizes[p], 0.0), terms.emplace_back(sizes[p], 0.0);
    for (int64_t t = 0; t < tasks; ++t)
      for (int64_t i = 0; i < sizes[p]; ++i) {
        wants[p][i] += weights[t] * row(p, t, i);
        terms[p][i] += std::fabs(weights[t] * row(p, t, i));
      }
  }
  Tensors<T> sum(1, sizes, shift);
  for (int64_t p = 0; p < tensors; ++p) std::fill_n(sum.data[p], sizes[p], T(static_cast<float>(nan)));
  for (const bool in_place : {false, true}) {
    std::vector<void*> outputs;
    for (int64_t p = 0; p < tensors; ++p) outputs.push_back(in_place ? x.data[p * tasks + tasks - 1] : sum.data[p]);
    (device ? cuda::combine : cpu::combine)(dtype_of<T>, rows, weights.get(), outputs.data(), {});
    for (int64_t p = 0; p < tensors; ++p)
      for (int64_t i = 0; i < sizes[p]; ++i)
        expect("combine", i, value(static_cast<T*>(outputs[p])[i]), wants[p][i],
               epsilon_of<T> * std::fabs(wants[p][i]) +
                   std::min(6e-8, epsilon_of<T>) * (static_cast<double>(tasks) + 2.0) * terms[p][i] +
                   1e-7 * (sizeof(T) == 2));
  }
}

template <typename T>
void sizes_and_tasks(bool device) {
  const std::vector<int64_t> usual = {0, 1, 31, 32, 33, 255, 257, 1000, 0};
  for (const int64_t tasks : {1, 2, 3, 4, 5, 6, 7, 8, 9, 20})
    for (const int shift : {0, 1, -1}) {
      if (tasks < 8 && tasks > 3 && shift != 0) continue;
      run<T>(device, tasks, usual, shift);
    }
  for (const int64_t tasks : {1, 3, 8}) run<T>(device, tasks, {4096, 8197, 20001}, 0);  // whole items, and remainders
  for (const int64_t tasks : {2, 9})
    for (const double special : {HUGE_VAL, std::nan("")}) run<T>(device, tasks, {40, 1030}, 0, special);
}

static void all(bool device) {
  for (const int64_t size : {0, 1, 31, 32, 33, 255, 257, 1000, 1024, 1025, 1028})
    run<float>(device, 2, {size}, size % 2);
  run<float>(device, 3, {}, 0);
  sizes_and_tasks<float>(device);
  sizes_and_tasks<__half>(device);
  sizes_and_tasks<__nv_bfloat16>(device);
  sizes_and_tasks<double>(device);
}

int main() {
  try {
    all(false);
    for (const auto order : {emu::Order::forward, emu::Order::backward, emu::Order::random}) {
      emu::options.order = order;
      rng.seed(2);
      position = 0;
      all(true);
    }
    // More than a table holds: of segments, of pointers, both with an uneven end.
    for (const bool device : {false, true}) {
      emu::options.order = emu::Order::forward;
      std::vector<int64_t> many(1000);
      for (size_t p = 0; p < many.size(); ++p) many[p] = static_cast<int64_t>(p % 7);
      many[500] = 3001;
      run<float>(device, 2, many, 0);
      many.resize(90);
      run<float>(device, 64, many, -1);
    }
  } catch (const std::exception& e) {
    std::printf("EMULATOR ERROR %s\n", e.what());
    ++failures;
  }
  std::printf("%d passed, %d failed\n", passed, failures);
  return failures != 0;
}
