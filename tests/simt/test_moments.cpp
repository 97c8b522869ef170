// The CUDA kernels of the `moments` stem in the emulator against the host kernels, which the Python tests hold to the
// float64 reference. For the sanitizers: every array is a heap block of exactly its size, the workspace and the outputs
// start as NaN, and threads run in three orders between barriers.
#include <limits>
#include <random>

#include "cuda_emu.h"
#include "kernels.h"

using namespace mtlgrad;

static int failures = 0, passed = 0;

template <typename T>
struct Array {
  size_t size;
  std::unique_ptr<T[]> data;
  explicit Array(size_t n, T fill = std::numeric_limits<T>::quiet_NaN()) : size(n), data(new T[n]) {
    std::fill_n(data.get(), n, fill);
  }
  T* get() const { return data.get(); }
  T& operator[](size_t i) const { return data[i]; }
};

static std::mt19937 rng(1);

template <typename T>
Array<T> normal(size_t n, double scale = 1.0) {
  std::normal_distribution<double> d(0.0, scale);
  Array<T> a(n);
  for (size_t i = 0; i < n; ++i) a[i] = static_cast<T>(d(rng));
  return a;
}

// Symmetric positive definite, n x n.
static Array<double> spd(int64_t n) {
  const auto a = normal<double>(n * n);
  Array<double> s(n * n, 0.0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t k = 0; k < n; ++k) s[i * n + j] += a[i * n + k] * a[j * n + k] / n;
      if (i == j) s[i * n + j] += 0.01;
    }
  return s;
}

template <typename T>
void compare(const char* name, const Array<T>& got, const Array<T>& want, double tolerance) {
  double largest = 0;
  for (size_t i = 0; i < want.size; ++i)
    if (std::isfinite(want[i])) largest = std::max(largest, std::fabs(static_cast<double>(want[i])));
  for (size_t i = 0; i < want.size; ++i) {
    const double difference = std::fabs(static_cast<double>(got[i]) - static_cast<double>(want[i]));
    const bool same = got[i] == want[i] || difference <= tolerance * largest;
    if (same) {
      ++passed;
    } else if (++failures < 20) {
      std::printf("FAIL %s[%zu]: got %.9g, want %.9g\n", name, i, double(got[i]), double(want[i]));
    }
  }
}

template <typename T>
constexpr DType dtype_of = sizeof(T) == 4 ? DType::f32 : DType::f64;
template <typename T>
constexpr double tolerance_of = sizeof(T) == 4 ? 2e-5 : 1e-12;

// Runs a kernel on both sides, writing moments and accumulating them, and compares.
template <typename T, typename Run>
void both(const char* name, int64_t batch, int64_t tasks, int64_t width, const Run& run) {
  Array<T> mean(batch * tasks * width), variance(mean.size), mean_cpu(mean.size), variance_cpu(mean.size);
  run(true, Output{mean.get(), variance.get()});
  run(false, Output{mean_cpu.get(), variance_cpu.get()});
  compare(name, mean, mean_cpu, tolerance_of<T>);
  compare(name, variance, variance_cpu, tolerance_of<T>);

  Array<double> power(tasks), scale(tasks);
  for (int64_t t = 0; t < tasks; ++t) power[t] = t % 2 ? 1.0 : 0.3, scale[t] = t % 3 ? 1.0 : -0.5;
  Array<T> numerator(batch * width, T(0)), denominator(batch * width, T(0));
  Array<T> numerator_cpu(batch * width, T(0)), denominator_cpu(batch * width, T(0));
  run(true, Output{nullptr, nullptr, numerator.get(), denominator.get(), power.get(), scale.get()});
  run(false, Output{nullptr, nullptr, numerator_cpu.get(), denominator_cpu.get(), power.get(), scale.get()});
  Array<T> out(batch * width), out_cpu(batch * width);
  cuda::weighted_mean(dtype_of<T>, numerator.get(), denominator.get(), out.get(), batch, width, {});
  cpu::weighted_mean(dtype_of<T>, numerator_cpu.get(), denominator_cpu.get(), out_cpu.get(), batch, width, {});
  compare(name, out, out_cpu, 10 * tolerance_of<T>);

  Array<T> again(batch * width);  // the same from the moments that were written
  for (size_t i = 0; i < mean.size; ++i) mean[i] *= static_cast<T>(scale[i / width % tasks]);
  cuda::precision_mean(dtype_of<T>, mean.get(), variance.get(), power.get(), again.get(), batch, tasks, width, {});
  compare(name, again, out_cpu, 10 * tolerance_of<T>);
}

template <typename T>
void rows(int64_t batch, int64_t outputs, int64_t width, int64_t padding, bool bias, bool binary) {
  const int64_t stride = width + padding, size = width + bias;
  const auto features = normal<T>(batch ? (batch - 1) * stride + width : 0);
  auto targets = normal<T>(batch * outputs);
  if (binary)
    for (size_t i = 0; i < targets.size; ++i) targets[i] = targets[i] > 0;
  if (targets.size > 2) targets[2] = std::numeric_limits<T>::quiet_NaN();
  const auto mean = normal<T>(outputs * size, 0.3);
  Array<T> cross(outputs * batch * size), spread(outputs * size);
  for (int64_t o = 0; o < outputs; ++o) {
    const auto s = spd(size);
    for (int64_t i = 0; i < size; ++i) spread[o * size + i] = static_cast<T>(s[i * size + i]);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < size; ++i) {
        double sum = bias ? s[i * size + width] : 0.0;
        for (int64_t j = 0; j < width; ++j) sum += s[i * size + j] * features[b * stride + j];
        cross[(o * batch + b) * size + i] = static_cast<T>(sum);
      }
  }
  const Features h{features.get(), stride, batch, width};
  const OutputsPosterior posterior{mean.get(), cross.get(), spread.get(), batch * size, size, outputs, size};
  if (!binary) {
    both<T>("regression", batch, outputs, width, [&](bool device, Output output) {
      (device ? cuda::regression_moments : cpu::regression_moments)(dtype_of<T>, h, targets.get(), posterior, output,
                                                                    {});
    });
    return;
  }
  // Three nodes are exact for 1, u and u^2; 37 equal ones leave a ragged warp, and are not, which both sides share.
  for (const int64_t count : {3, 37}) {
    Array<T> nodes(count), weights(count, static_cast<T>(1.0 / count));
    for (int64_t i = 0; i < count; ++i) nodes[i] = static_cast<T>(4.0 * i / (count - 1) - 2.0);
    both<T>("binary", batch, outputs, width, [&](bool device, Output output) {
      (device ? cuda::binary_moments : cpu::binary_moments)(dtype_of<T>, h, targets.get(), posterior, nodes.get(),
                                                            weights.get(), count, output, {});
    });
  }
}

template <typename T>
void multiclass(Structure structure, int64_t batch, int64_t classes, int64_t width, int64_t points, int64_t slots) {
  const int64_t size = width + 1, n = classes * size;
  const auto features = normal<T>(batch * width);
  Array<int64_t> targets(batch, 0);
  for (int64_t b = 0; b < batch; ++b) targets[b] = b == 1 ? -100 : static_cast<int64_t>(rng() % classes);
  const auto mean = normal<T>(classes * size, 0.3);
  const auto s = spd(structure == Structure::full ? n : size), a = spd(classes);
  const auto at = [&](int64_t c, int64_t i, int64_t k, int64_t j) {  // covariance of weights (c, i) and (k, j)
    if (structure == Structure::full) return s[(c * size + i) * n + k * size + j];
    return c == k ? s[i * size + j] : 0.0;
  };
  const auto times = [&](int64_t c, int64_t i, int64_t k, int64_t b) {
    double sum = at(c, i, k, width);
    for (int64_t j = 0; j < width; ++j) sum += at(c, i, k, j) * features[b * width + j];
    return static_cast<T>(sum);
  };
  const bool full = structure == Structure::full, block = structure == Structure::block;
  Array<T> cross((full ? classes * classes : block ? classes : 1) * batch * size);
  Array<T> spread((full ? classes * classes : block ? classes : 1) * size), class_covariance(classes * classes);
  size_t x = 0, y = 0;
  for (int64_t k = 0; k < (full || block ? classes : 1); ++k)
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = full ? 0 : k; c < (full ? classes : k + 1); ++c)
        for (int64_t i = 0; i < size; ++i) cross[x++] = times(c, i, k, b);
  for (int64_t c = 0; c < (full || block ? classes : 1); ++c)
    for (int64_t k = full ? 0 : c; k < (full ? classes : c + 1); ++k)
      for (int64_t i = 0; i < size; ++i) spread[y++] = static_cast<T>(at(c, i, k, i));
  for (size_t i = 0; i < class_covariance.size; ++i) class_covariance[i] = static_cast<T>(a[i]);
  const auto u = normal<double>(points * classes);
  const MulticlassPosterior posterior{structure, mean.get(), cross.get(), spread.get(), class_covariance.get(),
                                      classes};
  both<T>("multiclass", batch, 1, width, [&](bool device, Output output) {
    Array<double> workspace(slots * multiclass_workspace(structure, classes, points));
    (device ? cuda::multiclass_moments : cpu::multiclass_moments)(dtype_of<T>, {features.get(), width, batch, width},
                                                                  targets.get(), posterior, u.get(), points,
                                                                  workspace.get(), slots, output, {});
  });
}

template <typename T>
void sampled(Likelihood likelihood, int64_t batch, int64_t samples, int64_t classes, int64_t width) {
  const bool binary = likelihood == Likelihood::binary;
  const auto weights = normal<T>(samples * classes * (width + 1));
  const auto logits = normal<T>(batch * samples * classes);
  Array<T> labels(batch * classes, T(1));  // logits: [C, B, S] here, [B, S, C] for multiclass
  Array<int64_t> targets(batch, 0);
  labels[0] = std::numeric_limits<T>::quiet_NaN();
  for (int64_t b = 0; b < batch; ++b) targets[b] = b == 1 ? -100 : static_cast<int64_t>(rng() % classes);
  const void* y = binary ? static_cast<const void*>(labels.get()) : targets.get();
  Array<T> residuals(logits.size), residuals_cpu(logits.size);
  std::copy_n(logits.get(), logits.size, residuals.get());
  std::copy_n(logits.get(), logits.size, residuals_cpu.get());
  cuda::sample_residuals(dtype_of<T>, likelihood, residuals.get(), y, batch, samples, classes, {});
  cpu::sample_residuals(dtype_of<T>, likelihood, residuals_cpu.get(), y, batch, samples, classes, {});
  for (size_t i = 0; i < logits.size; ++i)
    if (std::isnan(residuals[i]) && std::isnan(residuals_cpu[i])) residuals[i] = residuals_cpu[i] = T(-1);
  compare("residuals", residuals, residuals_cpu, tolerance_of<T>);
  cpu::sample_residuals(dtype_of<T>, likelihood, logits.get(), y, batch, samples, classes, {});
  both<T>("sampled", batch, binary ? classes : 1, width, [&](bool device, Output output) {
    (device ? cuda::sampled_moments : cpu::sampled_moments)(dtype_of<T>, likelihood, logits.get(), weights.get(), batch,
                                                            samples, classes, width, output, {});
  });
}

template <typename T>
void all() {
  for (const int64_t width : {1, 31, 32, 33, 130})
    for (const int64_t batch : {1, 3})
      for (const bool bias : {false, true})
        for (const bool binary : {false, bias}) rows<T>(batch, 2, width, width % 3, bias, binary);
  rows<T>(2, 0, 5, 0, true, true);
  for (const Structure structure : {Structure::full, Structure::block, Structure::kron}) {
    multiclass<T>(structure, 3, 3, 33, 37, 2);
    multiclass<T>(structure, 2, 1, 1, 5, 1);
  }
  for (const Likelihood likelihood : {Likelihood::binary, Likelihood::multiclass}) {
    sampled<T>(likelihood, 9, 130, 2, 33);
    sampled<T>(likelihood, 1, 1, 3, 1);
    sampled<T>(likelihood, 5, 50, 3, 130);
  }
}

int main() {
  try {
    for (const auto order : emu::kOrders) {
      emu::options.order = order;
      all<float>();
      all<double>();
    }
  } catch (const std::exception& e) {
    std::printf("EMULATOR ERROR %s\n", e.what());
    ++failures;
  }
  std::printf("%d passed, %d failed\n", passed, failures);
  return failures != 0;
}
