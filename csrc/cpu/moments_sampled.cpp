#include <algorithm>
#include <vector>

#include "cpu/output.h"
#include "kernels.h"

// A vector of 64 bytes is returned only by what is inlined, so no call depends on how it would be passed.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace mtlgrad::cpu {
namespace {

// One task's logits of one example (binary), or one example's (multiclass).
template <typename T>
MTLGRAD_INLINE void binary_residuals(T* z, T target, int64_t samples) {
#pragma omp simd
  for (int64_t s = 0; s < samples; ++s) z[s] = math::binary_residual(math::logistic(z[s]), target);
}

// Features at a time, as one vector of 64 bytes (two or four on narrower machines), and examples at a time: each load
// of a weight serves all of them. Per pair three accumulators stay in registers over the whole pass: the shift, the sum
// of deviations from it and the sum of their squares. The shift is the mean gradient of the first few samples: deviations
// are then of the size of the standard deviation, so that tight posteriors do not cancel.
constexpr int64_t kBytes = 64;
constexpr int kExamples = 4;

template <typename T>
using Vector [[gnu::vector_size(kBytes)]] = T;

template <typename T>
constexpr int64_t kWidth = kBytes / sizeof(T);

// One example's sums at kWidth features. A struct, not an array of them: GCC keeps its members in registers.
template <typename T>
struct Accumulator {
  Vector<T> shift, sum, squares, gradient;

  MTLGRAD_INLINE void add(Vector<T> weight, T residual) { gradient += weight * residual; }
  MTLGRAD_INLINE void end_sample() {
    const Vector<T> deviation = gradient - shift;
    sum += deviation;
    squares += deviation * deviation;
    gradient = Vector<T>{};
  }
  MTLGRAD_INLINE void end_shift(T samples) {
    shift = sum / samples;
    sum = squares = Vector<T>{};
  }
  MTLGRAD_INLINE void store(T samples, T* means, T* variances) const {
    const Vector<T> mean = sum / samples, variance = squares / samples - mean * mean, total = shift + mean;
    memcpy(means, &total, sizeof total);
    memcpy(variances, &variance, sizeof variance);
  }
};

// Count (1 or 4) examples, whose residuals lie `apart`; a gradient is the sum over `period` consecutive rows of weights,
// kWidth of them each, times as many residuals.
template <typename T, int Count>
MTLGRAD_INLINE void tile(const T* weights, const T* residuals, int64_t apart, int64_t samples, int64_t period, T* means,
                         T* variances) {
  const int64_t few = math::shift_samples(samples);
  Accumulator<T> a{}, b{}, c{}, d{};
  for (int pass = 0; pass < 2; ++pass) {
    const T *w = weights, *r = residuals;
    for (int64_t s = 0; s < (pass ? samples : few); ++s) {
      for (int64_t i = 0; i < period; ++i, w += kWidth<T>, ++r) {
        Vector<T> weight;
        memcpy(&weight, w, sizeof weight);
        a.add(weight, r[0]);
        if constexpr (Count == kExamples)
          b.add(weight, r[apart]), c.add(weight, r[2 * apart]), d.add(weight, r[3 * apart]);
      }
      a.end_sample();
      if constexpr (Count == kExamples) b.end_sample(), c.end_sample(), d.end_sample();
    }
    if (pass == 0) {
      const T count = static_cast<T>(few);
      a.end_shift(count), b.end_shift(count), c.end_shift(count), d.end_shift(count);
    }
  }
  const T count = static_cast<T>(samples);
  a.store(count, means, variances);
  if constexpr (Count == kExamples) {
    b.store(count, means + kWidth<T>, variances + kWidth<T>);
    c.store(count, means + 2 * kWidth<T>, variances + 2 * kWidth<T>);
    d.store(count, means + 3 * kWidth<T>, variances + 3 * kWidth<T>);
  }
}

template <typename T>
struct Samples {
  const T *residuals, *weights;
  int64_t batch, samples, classes, width;
  bool binary;
};

// All tasks of examples [from, to) at kWidth features from `begin`. A task's weights there are copied together first, `rows`
// of them, zeros beyond the last feature: in place they lie a page apart, and would be fetched anew for every example.
template <typename T>
MTLGRAD_INLINE void columns(const Samples<T>& in, const Output& output, int64_t from, int64_t to, int64_t begin,
                            T* packed) {
  const int64_t tasks = in.binary ? in.classes : 1, period = in.binary ? 1 : in.classes;
  const int64_t rows = in.samples * period, stride = (in.binary ? in.classes : 1) * (in.width + 1);
  const int64_t features = in.width - begin < kWidth<T> ? in.width - begin : kWidth<T>;
  for (int64_t t = 0; t < tasks; ++t) {
    for (int64_t q = 0; q < rows; ++q)
      memcpy(packed + q * kWidth<T>, in.weights + q * stride + t * (in.width + 1) + begin, features * sizeof(T));
    const T* residuals = in.residuals + t * in.batch * rows;
    for (int64_t example = from; example < to;) {
      T means[kExamples * kWidth<T>], variances[kExamples * kWidth<T>];
      const T* r = residuals + example * rows;
      const int64_t count = to - example < kExamples ? 1 : kExamples;
      if (count == kExamples)
        tile<T, kExamples>(packed, r, rows, in.samples, period, means, variances);
      else
        tile<T, 1>(packed, r, rows, in.samples, period, means, variances);
      for (int64_t k = 0; k < count; ++k, ++example) {
        const OutputRow<T> row = output_row<T>(output, example, t, tasks, in.width);
        if (r[k * rows] != r[k * rows]) {
          emit_no_label(row, begin, begin + features);
          continue;
        }
        emit(row, begin, begin + features, [&](int64_t d) __attribute__((always_inline)) {
          return math::checked(means[k * kWidth<T> + d - begin], variances[k * kWidth<T> + d - begin]);
        });
      }
    }
  }
}

#define MTLGRAD_ROWS(T)                                                                                               \
  MTLGRAD_CLONES void binary_residuals_of(T* z, T target, int64_t samples) { binary_residuals(z, target, samples); }  \
  MTLGRAD_CLONES void multiclass_residuals_of(T* z, int64_t target, int64_t samples, int64_t classes) {               \
    for (int64_t s = 0; s < samples; ++s) math::multiclass_residuals(z + s * classes, target, classes);               \
  }                                                                                                                   \
  MTLGRAD_CLONES void columns_of(const Samples<T>& in, const Output& output, int64_t from, int64_t to, int64_t begin, \
                                 T* packed) {                                                                         \
    columns(in, output, from, to, begin, packed);                                                                     \
  }
MTLGRAD_ROWS(float)
MTLGRAD_ROWS(double)

}  // namespace

void sample_residuals(DType dtype, Likelihood likelihood, void* logits, const void* targets, int64_t batch,
                      int64_t samples, int64_t classes, Place place) {
  for_dtype("sample_residuals", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* z = static_cast<T*>(logits);
    if (likelihood == Likelihood::binary)
      parallel_for(classes * batch, place.threads, [&](int64_t i) {
        const int64_t c = i / batch, b = i % batch;
        binary_residuals_of(z + i * samples, static_cast<const T*>(targets)[b * classes + c], samples);
      });
    else
      parallel_for(batch, place.threads, [&](int64_t b) {
        multiclass_residuals_of(z + b * samples * classes, static_cast<const int64_t*>(targets)[b], samples, classes);
      });
  });
}

void sampled_moments(DType dtype, Likelihood likelihood, const void* residuals, const void* samples, int64_t batch,
                     int64_t num_samples, int64_t classes, int64_t width, Output output, Place place) {
  for_dtype("sampled_moments", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool binary = likelihood == Likelihood::binary;
    const Samples<T> in{
        static_cast<const T*>(residuals), static_cast<const T*>(samples), batch, num_samples, classes, width, binary};
    // A thread owns some features of some examples, for all tasks: sums over tasks need no atomics. The examples are cut
    // only where there are fewer tiles of features than threads, since every cut packs the weights once more.
    const int64_t tiles = (width + kWidth<T> - 1) / kWidth<T>;
    const int64_t cuts = tiles == 0 ? 1 : std::min<int64_t>(batch, (place.threads + tiles - 1) / tiles);
    parallel_for(tiles * cuts, place.threads, [&](int64_t i) {
      std::vector<T> packed(num_samples * (binary ? 1 : classes) * kWidth<T>);
      const int64_t cut = i % cuts;
      columns_of(in, output, cut * batch / cuts, (cut + 1) * batch / cuts, i / cuts * kWidth<T>, packed.data());
    });
  });
}

}  // namespace mtlgrad::cpu
