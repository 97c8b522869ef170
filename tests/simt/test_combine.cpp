// The kernels of the `combine` stem, host's and emulated device's, against plain loops in float64. For the sanitizers:
// every array is a heap block of exactly its size, workspaces start as NaN, and threads run in three orders, which must
// not change a bit.
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
static void expect(const char* name, size_t i, double got, double want, double tolerance) {
  const bool same =
      std::isfinite(want) ? std::fabs(got - want) <= tolerance : (std::isnan(want) ? std::isnan(got) : got == want);
  if (same)
    ++passed;
  else if (++failures < 20)
    std::printf("FAIL %s[%zu]: got %.17g, want %.17g\n", name, i, got, want);
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
  // compute(out, workspace) in every order of threads, on top of 0, 1, 2, ...; the first results.
  const auto results = [&](int64_t count, int64_t workspace_size, const auto& compute) {
    std::unique_ptr<double[]> first;
    for (const auto order : emu::kOrders) {
      if (order != emu::Order::forward && (!device || tasks % 4 == 0 || columns > 3000)) continue;  // for time's sake
      emu::options.order = order;
      std::unique_ptr<double[]> out(new double[count]), workspace(new double[workspace_size]);
      std::iota(out.get(), out.get() + count, 0.0);
      std::fill_n(workspace.get(), workspace_size, nan);
      compute(out.get(), workspace.get());
      if (!first) first = std::move(out);
      for (int64_t i = 0; out && i < count; ++i) expect("order", i, out[i], first[i], 0.0);
    }
    emu::options.order = emu::Order::forward;
    return first;
  };

  // A large table is slow in the emulator, where every thread copies it: gram for one, dots for the other.
  if (tensors != 40) {
    const auto products = results(tasks * tasks, (device ? cuda::gram_workspace : cpu::gram_workspace)(tasks, columns),
                                  [&](double* out, double* workspace) {
                                    (device ? cuda::gram : cpu::gram)(dtype_of<T>, rows, out, workspace, {});
                                  });
    for (int64_t a = 0; a < tasks; ++a)
      for (int64_t b = 0; b < tasks; ++b) {
        long double want = a * tasks + b, terms = want;
        for (int64_t p = 0; p < tensors; ++p)
          for (int64_t i = 0; i < sizes[p]; ++i) {
            want += static_cast<long double>(row(p, a, i)) * row(p, b, i);
            terms += std::fabs(row(p, a, i) * row(p, b, i));
          }
        expect("gram", a * tasks + b, products[a * tasks + b], static_cast<double>(want),
               static_cast<double>(1e-14L * terms));
      }
  }
  if (tensors <= 40) {
    const auto along =
        results(tasks, (device ? cuda::dots_workspace : cpu::dots_workspace)(tasks, columns),
                [&](double* out, double* workspace) {
                  (device ? cuda::dots : cpu::dots)(dtype_of<T>, dtype_of<T>, rows, y.pointers(), out, workspace, {});
                });
    for (int64_t t = 0; t < tasks; ++t) {
      long double want = t, terms = want;
      for (int64_t p = 0; p < tensors; ++p)
        for (int64_t i = 0; i < sizes[p]; ++i) {
          want += static_cast<long double>(row(p, t, i)) * value(y.data[p][i]);
          terms += std::fabs(row(p, t, i) * value(y.data[p][i]));
        }
      expect("dots", t, along[t], static_cast<double>(want), static_cast<double>(1e-14L * terms));
    }
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
    if (in_place && tensors >= 40) break;
    emu::options.order = in_place ? emu::Order::backward : emu::Order::forward;
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
  emu::options.order = emu::Order::forward;
}

// add_weighted, into tensors of its own and then over base; and dots with a vector of base's type where that is another one.
template <typename T, typename B>
void displaced(bool device, int64_t tasks, const std::vector<int64_t>& sizes, int shift, double special = 0.0) {
  const auto tensors = static_cast<int64_t>(sizes.size());
  Tensors<T> x(tasks, sizes, shift);
  Tensors<B> base(1, sizes, shift), sum(1, sizes, shift);
  if (special != 0.0) x.data.at((tensors - 1) * tasks + tasks - 1)[sizes.back() / 2] = T(static_cast<float>(special));
  const Rows rows{x.pointers(), sizes.data(), tasks, tensors};
  std::unique_ptr<double[]> weights(new double[tasks]);
  for (int64_t t = 0; t < tasks; ++t) weights[t] = 0.3 * static_cast<double>(t) - 0.7;
  if (special != 0.0) weights[tasks - 1] = 0.0;  // which hides nothing
  if constexpr (!std::is_same_v<T, B>) {
    const int64_t columns = std::accumulate(sizes.begin(), sizes.end(), int64_t(0));
    const int64_t size = (device ? cuda::dots_workspace : cpu::dots_workspace)(tasks, columns);
    std::unique_ptr<double[]> out(new double[tasks]), workspace(new double[size]);
    std::fill_n(out.get(), tasks, 1.0), std::fill_n(workspace.get(), size, std::nan(""));
    (device ? cuda::dots : cpu::dots)(dtype_of<T>, dtype_of<B>, rows, base.pointers(), out.get(), workspace.get(), {});
    for (int64_t t = 0; t < tasks; ++t) {
      long double want = 1.0, terms = want;
      for (int64_t p = 0; p < tensors; ++p)
        for (int64_t i = 0; i < sizes[p]; ++i) {
          const long double term = static_cast<long double>(value(x.data[p * tasks + t][i])) * value(base.data[p][i]);
          want += term, terms += std::fabs(term);
        }
      expect("mixed dots", t, out[t], static_cast<double>(want), static_cast<double>(1e-14L * terms));
    }
  }
  std::vector<std::vector<double>> wants, limits;
  for (int64_t p = 0; p < tensors; ++p) {
    wants.emplace_back(sizes[p]), limits.emplace_back(sizes[p]);
    for (int64_t i = 0; i < sizes[p]; ++i) {
      double want = value(base.data[p][i]), terms = std::fabs(want);
      for (int64_t t = 0; t < tasks; ++t) {
        const double term = weights[t] * value(x.data[p * tasks + t][i]);
        want += term, terms += std::fabs(term);
      }
      wants[p][i] = want;
      limits[p][i] = epsilon_of<B> * std::fabs(want) + 1e-15 * terms + 1e-7 * (sizeof(B) == 2);
    }
    std::fill_n(sum.data[p], sizes[p], B(static_cast<float>(std::nan(""))));
  }
  for (const bool in_place : {false, true}) {
    emu::options.order = in_place ? emu::Order::backward : emu::Order::forward;
    std::vector<void*> outputs;
    for (int64_t p = 0; p < tensors; ++p) outputs.push_back(in_place ? base.data[p] : sum.data[p]);
    (device ? cuda::add_weighted : cpu::add_weighted)(dtype_of<T>, dtype_of<B>, rows, base.pointers(), weights.get(),
                                                      outputs.data(), {});
    for (int64_t p = 0; p < tensors; ++p)
      for (int64_t i = 0; i < sizes[p]; ++i)
        expect("add_weighted", i, value(static_cast<B*>(outputs[p])[i]), wants[p][i], limits[p][i]);
  }
  emu::options.order = emu::Order::forward;
}

template <typename T, typename B = T>
void all_displaced(bool device) {
  const bool mixed = !std::is_same_v<T, B>;
  for (const int64_t tasks : {1, 2, 3, 4, 5, 8, 9})
    for (const int shift : {0, 1, -1})
      if (mixed || tasks < 4 || shift == 0)
        displaced<T, B>(device, tasks, {0, 1, 31, 32, 33, 255, 257, 1000, 0}, shift);
  for (const int64_t tasks : {1, 3, 8}) displaced<T, B>(device, tasks, {4096, 8197, 20001}, 0);
  for (const double special : {HUGE_VAL, std::nan("")}) displaced<T, B>(device, 3, {40, 1030}, 0, special);
}

template <typename T>
void all(bool device) {
  for (const int64_t tasks : {1, 2, 3, 4, 5, 6, 7, 8, 9})
    for (const int shift : {0, 1, -1})
      if (shift == 0 ? tasks < 4 || tasks > 6 || sizeof(T) == 4 : tasks == 3 || tasks >= 8)
        run<T>(device, tasks, {0, 1, 31, 32, 33, 255, 257, 1000, 0}, shift);
  for (const int64_t size : {0, 1, 31, 32, 33, 255, 257, 1000, 1024, 1028})
    run<T>(device, 2, {size}, static_cast<int>(size % 2));
  for (const int64_t tasks : {1, 3, 8}) run<T>(device, tasks, {4096, 8197, 20001}, 0);  // whole items, and remainders
  for (const double special : {HUGE_VAL, std::nan("")})
    for (const int64_t tasks : {2, 9}) run<T>(device, tasks, {40, 1030}, 0, special);
}

// More than a table holds, of segments, then of pointers, both with an uneven end.
static void full_tables(bool device) {
  std::vector<int64_t> sizes(420);
  for (size_t p = 0; p < sizes.size(); ++p) sizes[p] = 1 + static_cast<int64_t>(p % 7);
  sizes[20] = 3002;
  run<float>(device, 2, sizes, 0);
  sizes.resize(40);
  run<float>(device, 100, sizes, -1);
  run<float>(device, 64, {3, 300}, 0);
  run<float>(device, 20, {33, 1000}, -1);
  sizes.assign(200, 5), sizes[20] = 3002;
  displaced<__nv_bfloat16, float>(device, 20, sizes, 0);
}

// More work items than blocks, so that a block goes from one tensor to the next.
static void long_walks() {
  std::vector<int64_t> sizes;
  for (int64_t p = 0; p < 22; ++p) sizes.push_back(1025 + 37 * p);
  sizes.push_back(30001);
  run<double>(true, 3, sizes, 0);
}

int main() {
  try {
    for (const bool device : {false, true}) {
      if (emu::kRacesAlone && !device) continue;
      run<float>(device, 3, {}, 0);
      all<float>(device);
      all<__half>(device);
      if (!emu::kRacesAlone) all<__nv_bfloat16>(device);  // as wide as __half
      all<double>(device);
      displaced<float, float>(device, 3, {}, 0);
      all_displaced<float>(device);
      all_displaced<__half>(device);
      if (!emu::kRacesAlone) all_displaced<__nv_bfloat16>(device);
      all_displaced<__nv_bfloat16, float>(device);
      all_displaced<double>(device);
      if (!emu::kRacesAlone) full_tables(device);
    }
    long_walks();
  } catch (const std::exception& e) {
    std::printf("EMULATOR ERROR %s\n", e.what());
    ++failures;
  }
  std::printf("%d passed, %d failed\n", passed, failures);
  return failures != 0;
}
