#include "cpu/sink.h"
#include "kernels.h"

// A vector of 64 bytes is returned only by what is inlined, so no call depends on how it would be passed.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace mtlgrad::cpu {
namespace {

// ---- residuals -----------------------------------------------------------------------------------------------------

template <typename T>
MTLGRAD_INLINE void binary_residuals(T* z, const T* target, int64_t samples, int64_t classes) {
  if (classes < 8) {  // too few to fill a vector: run along the samples
    for (int64_t c = 0; c < classes; ++c)
#pragma omp simd
      for (int64_t s = 0; s < samples; ++s) z[s * classes + c] = math::binary_residual(math::logistic(z[s * classes + c]), target[c]);
    return;
  }
  for (int64_t s = 0; s < samples; ++s)
#pragma omp simd
    for (int64_t c = 0; c < classes; ++c) z[s * classes + c] = math::binary_residual(math::logistic(z[s * classes + c]), target[c]);
}

// ---- moments over the samples --------------------------------------------------------------------------------------

// Features at a time, as one vector of 64 bytes (two or four on narrower machines), and examples at a time: each load
// of a weight serves all of them. Per pair three accumulators stay in registers over the whole pass: the shift, the sum
// of deviations from it and the sum of their squares. The shift is the mean gradient of the first few samples: deviations
// are then of the size of the standard deviation, so that tight posteriors do not cancel.
constexpr int64_t kBytes = 64;
constexpr int kExamples = 4;

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kBytes)));
  static constexpr int64_t size = kBytes / sizeof(T);
  static MTLGRAD_INLINE type load(const T* from) {
    type v;
    memcpy(&v, from, sizeof v);
    return v;
  }
};

template <typename T>
struct Samples {
  const T *residuals, *weights;  // [B, S, C], [S, C, P]
  int64_t samples, classes, width;
};

// The gradient that classes [first, last) make together in sample s, at `Vector::size` features from `begin`, for Count
// examples from `example`.
template <typename T, int Count>
MTLGRAD_INLINE void gradients(const Samples<T>& in, int64_t example, int64_t s, int64_t first, int64_t last,
                              int64_t begin, typename Vector<T>::type* gradient) {
  const int64_t augmented = in.width + 1;
  const T* w = in.weights + (s * in.classes + first) * augmented + begin;
  const T* r = in.residuals + (example * in.samples + s) * in.classes;
  for (int k = 0; k < Count; ++k) gradient[k] = typename Vector<T>::type{};
  for (int64_t c = first; c < last; ++c, w += augmented) {
    const auto weight = Vector<T>::load(w);
#pragma GCC unroll 4
    for (int k = 0; k < Count; ++k) gradient[k] += weight * r[k * in.samples * in.classes + c];
  }
}

template <typename T, int Count>
MTLGRAD_INLINE void tile(const Samples<T>& in, int64_t example, int64_t first, int64_t last, int64_t begin, T* means,
                         T* variances) {
  using V = Vector<T>;
  using Vec = typename V::type;
  Vec shift[Count], sum[Count], squares[Count], gradient[Count];
  for (int k = 0; k < Count; ++k) shift[k] = sum[k] = squares[k] = Vec{};
  const int64_t few = math::shift_samples(in.samples);
  for (int64_t s = 0; s < few; ++s) {
    gradients<T, Count>(in, example, s, first, last, begin, gradient);
    for (int k = 0; k < Count; ++k) shift[k] += gradient[k] / static_cast<T>(few);
  }
  for (int64_t s = 0; s < in.samples; ++s) {
    gradients<T, Count>(in, example, s, first, last, begin, gradient);
#pragma GCC unroll 4
    for (int k = 0; k < Count; ++k) {
      const Vec deviation = gradient[k] - shift[k];
      sum[k] += deviation;
      squares[k] += deviation * deviation;
    }
  }
  const T scale = T(1) / static_cast<T>(in.samples);
  for (int k = 0; k < Count; ++k) {
    const Vec mean = sum[k] * scale, variance = squares[k] * scale - mean * mean;
    const Vec total = shift[k] + mean;
    memcpy(means + k * V::size, &total, sizeof total);
    memcpy(variances + k * V::size, &variance, sizeof variance);
  }
}

// The features that do not fill a vector, one at a time.
template <typename T>
MTLGRAD_INLINE void tail(const Samples<T>& in, int64_t example, int64_t first, int64_t last, int64_t d, T* mean,
                         T* variance) {
  const auto gradient = [&](int64_t s) __attribute__((always_inline)) {
    T g = 0;
    for (int64_t c = first; c < last; ++c)
      g += in.residuals[(example * in.samples + s) * in.classes + c] *
           in.weights[(s * in.classes + c) * (in.width + 1) + d];
    return g;
  };
  T shift = 0, sum = 0, squares = 0;
  const int64_t few = math::shift_samples(in.samples);
  for (int64_t s = 0; s < few; ++s) shift += gradient(s) / static_cast<T>(few);
  for (int64_t s = 0; s < in.samples; ++s) {
    const T deviation = gradient(s) - shift;
    sum += deviation;
    squares += deviation * deviation;
  }
  const T scale = T(1) / static_cast<T>(in.samples);
  *mean = shift + sum * scale;
  *variance = squares * scale - (sum * scale) * (sum * scale);
}

template <typename T>
MTLGRAD_INLINE void examples(const Samples<T>& in, const Sink& sink, bool binary, int64_t batch, int64_t example,
                             int64_t begin) {
  constexpr int64_t kWidth = Vector<T>::size;
  const int64_t tasks = binary ? in.classes : 1;
  const int64_t count = batch - example < kExamples ? batch - example : kExamples;
  const int64_t features = in.width - begin < kWidth ? in.width - begin : kWidth;
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t first = binary ? t : 0, last = binary ? t + 1 : in.classes;
    T means[kExamples * kWidth], variances[kExamples * kWidth];
    if (features < kWidth)
      for (int64_t k = 0; k < count; ++k)
        for (int64_t d = 0; d < features; ++d)
          tail(in, example + k, first, last, begin + d, means + k * kWidth + d, variances + k * kWidth + d);
    else if (count == kExamples)
      tile<T, kExamples>(in, example, first, last, begin, means, variances);
    else
      for (int64_t k = 0; k < count; ++k)
        tile<T, 1>(in, example + k, first, last, begin, means + k * kWidth, variances + k * kWidth);
    for (int64_t k = 0; k < count; ++k) {
      const SinkRow<T> row = sink_row<T>(sink, example + k, t, tasks, in.width);
      const T mark = in.residuals[(example + k) * in.samples * in.classes + first];
      if (mark != mark) {
        emit_no_label(row, begin, begin + features);
        continue;
      }
      emit(row, begin, begin + features, [&](int64_t d) __attribute__((always_inline)) {
        return math::checked(means[k * kWidth + d - begin], variances[k * kWidth + d - begin]);
      });
    }
  }
}

#define MTLGRAD_ROWS(T)                                                                                             \
  MTLGRAD_CLONES void binary_residuals_of(T* z, const T* target, int64_t samples, int64_t classes) {               \
    binary_residuals(z, target, samples, classes);                                                                 \
  }                                                                                                                \
  MTLGRAD_CLONES void multiclass_residuals_of(T* z, int64_t target, int64_t samples, int64_t classes) {            \
    for (int64_t s = 0; s < samples; ++s) math::multiclass_residuals(z + s * classes, target, classes);             \
  }                                                                                                                \
  MTLGRAD_CLONES void examples_of(const Samples<T>& in, const Sink& sink, bool binary, int64_t batch,              \
                                  int64_t example, int64_t begin) {                                                \
    examples(in, sink, binary, batch, example, begin);                                                             \
  }
MTLGRAD_ROWS(float)
MTLGRAD_ROWS(double)

}  // namespace

void sample_residuals(DType dtype, Likelihood likelihood, void* logits, const void* targets, int64_t batch,
                      int64_t samples, int64_t classes, Place place) {
  for_dtype("sample_residuals", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(batch, place.threads, [&](int64_t b) {
      T* z = static_cast<T*>(logits) + b * samples * classes;
      if (likelihood == Likelihood::binary)
        binary_residuals_of(z, static_cast<const T*>(targets) + b * classes, samples, classes);
      else
        multiclass_residuals_of(z, static_cast<const int64_t*>(targets)[b], samples, classes);
    });
  });
}

void sampled_moments(DType dtype, Likelihood likelihood, const void* residuals, const void* samples, int64_t batch,
                     int64_t num_samples, int64_t classes, int64_t width, Sink sink, Place place) {
  for_dtype("sampled_moments", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Samples<T> in{static_cast<const T*>(residuals), static_cast<const T*>(samples), num_samples, classes, width};
    const int64_t tiles = (width + Vector<T>::size - 1) / Vector<T>::size;
    // Examples fastest: consecutive ones of a thread read the same weights.
    const int64_t groups = (batch + kExamples - 1) / kExamples;
    parallel_for(tiles * groups, place.threads, [&](int64_t i) {
      examples_of(in, sink, likelihood == Likelihood::binary, batch, i % groups * kExamples,
                  i / groups * Vector<T>::size);
    });
  });
}

}  // namespace mtlgrad::cpu
