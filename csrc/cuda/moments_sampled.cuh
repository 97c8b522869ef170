// Device code of moments over weight samples.
#pragma once
#include "compat.cuh"
#include "output.cuh"

namespace mtlgrad::cuda {

// Logits to residuals in place: an element a thread (binary), a (example, sample) pair a thread (multiclass).
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    binary_residuals_kernel(T* __restrict__ logits, const T* __restrict__ targets, int64_t batch, int64_t samples,
                            int64_t classes) {
  const int64_t step = int64_t(gridDim.x) * kThreads, count = batch * samples * classes;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t c = i / (batch * samples), b = i / samples % batch;
    logits[i] = math::binary_residual(math::logistic(logits[i]), targets[b * classes + c]);
  }
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    multiclass_residuals_kernel(T* __restrict__ logits, const int64_t* __restrict__ targets, int64_t batch,
                                int64_t samples, int64_t classes) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < batch * samples; i += step)
    math::multiclass_residuals(logits + i * classes, targets[i / samples], classes);
}

// kCount numbers of shared memory, side by side, that a thread reads 16 bytes at a time.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Piece {
  T v[kCount];
};

// What a thread of sampled_kernel owns, kMyExamples x kMyFeatures, and the block of kThreads threads: a warp is two groups of
// examples by sixteen of features, and the warps are stacked along the examples. The two groups alternate from lane to
// lane, so that in every quarter of a warp pairs of lanes read the same words of shared memory.
template <typename T, int kExamplesEach, int kFeaturesEach>
struct SampledTile {
  static constexpr int kMyExamples = kExamplesEach, kMyFeatures = kFeaturesEach;
  static constexpr int kThreads = 128, kColumns = 16, kRows = 32;
  static constexpr int kExamples = kThreads / kColumns * kMyExamples, kFeatures = kColumns * kMyFeatures;
  // Examples lie this far apart in a row, so that 8 rows of 4 examples, which a warp writes, are in 32 different banks.
  static constexpr int kPitch = kExamples + 16 / static_cast<int>(sizeof(T));
};

// Mean and variance over the samples of gradient = sum over `period` rows of residual x weight.
//
// A product of two matrices, [examples, rows] and [rows, features], but for what becomes of it after every `period` rows.
// A thread owns a few examples by a few features, and for each pair four registers over the whole pass: the gradient, the
// shift, the sum of deviations from it and the sum of their squares. The shift is the mean gradient of the first few
// samples, in a short pass of its own: deviations are then of the size of the standard deviation, so that tight
// posteriors do not cancel. A gradient starts at minus the shift, so that it ends as the deviation.
//
// Rows stream past in tiles of kRows, whatever the number of classes: residuals kMyExamples side by side, weights
// kMyFeatures, in shared memory. While one tile is worked on, the next is on its way into the other of two buffers. In
// place of examples and features beyond the last one it reads the last one, without use.
//   barrier 1: nobody reads the last pass's tiles any more
//   barrier 2: everyone's copies have arrived, and nobody reads the buffer any more that the next ones go to
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    sampled_kernel(const T* __restrict__ residuals, const T* __restrict__ samples, int64_t batch, int64_t num_samples,
                   int64_t classes, int64_t width, bool binary, Output output) {
  constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kExamples = Tile::kExamples;
  constexpr int kFeatures = Tile::kFeatures, kMyExamples = Tile::kMyExamples, kMyFeatures = Tile::kMyFeatures;
  alignas(16) __shared__ T of_examples[2][kRows][Tile::kPitch];
  alignas(16) __shared__ T of_features[2][kRows][kFeatures];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int my_examples = (thread / 32 * 2 + lane % 2) * kMyExamples, my_features = lane / 2 * kMyFeatures;
  const int64_t feature = int64_t(blockIdx.x) * kFeatures, example = int64_t(blockIdx.y) * kExamples;
  const int last = static_cast<int>(min(batch - example, int64_t(kExamples))) - 1;
  const int64_t tasks = binary ? classes : 1, stride = binary ? classes : 1, pitch = stride * (width + 1);
  const int period = binary ? 1 : static_cast<int>(classes);
  const int64_t few = math::shift_samples(num_samples), all = num_samples * period;
  for (int64_t t = blockIdx.z; t < tasks; t += gridDim.z) {
    const T* of_task = residuals + t * batch * all;  // [B, all]
    // Where the thread's next copies come from; both move on by a tile.
    constexpr int kEach = kThreads / 8, kStep = kThreads / kFeatures;
    const T *from_examples[kExamples / kEach], *from_features;
    const auto rewind = [&] {
#pragma unroll
      for (int k = 0; k < kExamples / kEach; ++k)
        from_examples[k] = of_task + (example + min(thread / 8 + k * kEach, last)) * all + thread % 8;
      from_features =
          samples + thread / kFeatures * pitch + t * (width + 1) + min(feature + thread % kFeatures, width - 1);
    };
    // The next `count` rows, a warp 8 rows of 4 examples at a time: a sector of memory for each.
    const auto copy = [&](int count, int buffer) {
      const AsyncCopies<T> to_examples(&of_examples[buffer][thread % 8][thread / 8]);
#pragma unroll
      for (int k = 0; k < kExamples / kEach; ++k) {
#pragma unroll
        for (int i = 0; i < kRows; i += 8)
          if (thread % 8 + i < count) to_examples(i * Tile::kPitch + k * kEach, from_examples[k] + i);
        from_examples[k] += kRows;
      }
      const AsyncCopies<T> to_features(&of_features[buffer][thread / kFeatures][thread % kFeatures]);
#pragma unroll
      for (int i = 0; i < kRows; i += kStep, from_features += kStep * pitch)
        if (thread / kFeatures + i < count) to_features(i * kFeatures, from_features);
    };

    T gradient[kMyExamples][kMyFeatures], shift[kMyExamples][kMyFeatures];
    T sum[kMyExamples][kMyFeatures], squares[kMyExamples][kMyFeatures];
    const auto for_mine = [&](const auto& body) {
#pragma unroll
      for (int k = 0; k < kMyExamples; ++k)
#pragma unroll
        for (int j = 0; j < kMyFeatures; ++j) body(k, j);
    };
    for_mine([&](int k, int j) { shift[k][j] = sum[k][j] = squares[k][j] = T(0); });
    for (int pass = 0; pass < 2; ++pass) {
      const int64_t rows = pass ? all : few * period;
      const auto count_from = [&](int64_t begin) { return static_cast<int>(min(rows - begin, int64_t(kRows))); };
      int in_sample = 0, buffer = 0;
      __syncthreads();
      rewind();
      copy(count_from(0), 0);
      for (int64_t begin = 0; begin < rows; begin += kRows, buffer ^= 1) {
        await_copies();
        __syncthreads();
        if (begin + kRows < rows) copy(count_from(begin + kRows), buffer ^ 1);
        const auto add_to = [&](int q, const auto& base) {
          const auto r = *reinterpret_cast<const Piece<T, kMyExamples>*>(&of_examples[buffer][q][my_examples]);
          const auto w = *reinterpret_cast<const Piece<T, kMyFeatures>*>(&of_features[buffer][q][my_features]);
          for_mine([&](int k, int j) { gradient[k][j] = base(k, j) + r.v[k] * w.v[j]; });
        };
        for (int q = 0, count = count_from(begin); q < count;) {
          if (in_sample == 0) {
            add_to(q++, [&](int k, int j) { return -shift[k][j]; });
            ++in_sample;
          }
          const int end = min(count, q + period - in_sample);
          in_sample += end - q;
#pragma unroll 4
          for (; q < end; ++q) add_to(q, [&](int k, int j) { return gradient[k][j]; });
          if (in_sample < period) break;
          in_sample = 0;
          for_mine([&](int k, int j) {
            sum[k][j] += gradient[k][j];
            squares[k][j] += gradient[k][j] * gradient[k][j];
          });
        }
      }
      if (pass == 0)
        for_mine([&](int k, int j) {
          shift[k][j] = sum[k][j] / static_cast<T>(few);
          sum[k][j] = squares[k][j] = T(0);
        });
    }
    const math::Power<T> power = power_of<T>(output, t);
    const T scale = T(1) / static_cast<T>(num_samples);
    for_mine([&](int k, int j) {
      const int64_t b = example + my_examples + k, d = feature + my_features + j;
      if (b >= batch || d >= width) return;
      const T mark = of_task[b * all];
      const T mean = sum[k][j] * scale, variance = squares[k][j] * scale - mean * mean;
      emit(output, b, t, tasks, d, width, power,
           mark != mark ? math::no_label<T>() : math::checked(shift[k][j] + mean, variance));
    });
  }
}

}  // namespace mtlgrad::cuda
