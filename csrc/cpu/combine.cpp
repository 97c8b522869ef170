// Gram matrix, dot products and weighted sums of T rows. All are bound by memory: every element is read once, in the
// float32 (or half) it is stored in, and the arithmetic is kept small enough to hide behind that.
#include <algorithm>
#include <type_traits>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "cpu/columns.h"
#include "cpu/half.h"
#include "cpu/parallel.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // the vectors below never cross a call that is not inlined
#endif

namespace mtlgrad::cpu {

namespace {

using Vec = double __attribute__((vector_size(64)));
constexpr int64_t kLanes = 8;

int64_t columns_of(const Rows& rows) { return cpu::columns_of(rows.sizes, rows.tensors); }

template <typename Visit>
void for_pieces(const Rows& rows, int64_t begin, int64_t end, int64_t most, const Visit& visit) {
  cpu::for_pieces(rows.sizes, rows.tensors, begin, end, most, visit);
}

template <typename S>
const S* row_of(const Rows& rows, int64_t tensor, int64_t task) {
  return static_cast<const S*>(rows.data[tensor * rows.tasks + task]);
}

template <typename Body>
void for_storage(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(static_cast<float*>(nullptr));
    case DType::f16: return body(static_cast<float16*>(nullptr));
    case DType::bf16: return body(static_cast<bfloat16*>(nullptr));
    case DType::f64: return body(static_cast<double*>(nullptr));
  }
}

// The same for rows and what goes with them, which is of their type, or float32 for bfloat16 rows.
template <typename Body>
void for_storages(const char* kernel, DType rows, DType other, const Body& body) {
  if (rows == DType::bf16 && other == DType::f32)
    return body(static_cast<bfloat16*>(nullptr), static_cast<float*>(nullptr));
  if (rows != other) throw std::invalid_argument(std::string(kernel) + " (cpu): these types do not go together");
  for_storage(rows, [&](auto* type) { body(type, type); });
}

// ---- gram -----------------------------------------------------------------------------------------------------------

using Floats = float __attribute__((vector_size(32), aligned(4)));  // eight, from anywhere

// A load that happens once: GCC would rather read an operand again for each use than keep it in a register.
MTLGRAD_INLINE Vec load(const double* at) { return *reinterpret_cast<const volatile Vec*>(at); }

constexpr int64_t kDirect = 4;               // up to so many rows, all sums stay in registers
constexpr int64_t kAhead = 1024;             // floats: the processor's own prefetching stops at each page of memory
constexpr int64_t kPitch = kPanel + kLanes;  // not a power of two: rows of a panel would share cache sets
constexpr int64_t kSums = 16 * kLanes;       // doubles of a tile: 4 x 4 vectors

// The sums of up to four rows of float32, all pairs i <= j, from the rows themselves. sums[(4 i + j)] are vectors.
template <int kRows>
MTLGRAD_INLINE void add_direct(const float* const* x, int64_t n, double* sums) {
  Vec* s = reinterpret_cast<Vec*>(sums);
  Vec s00 = s[0], s01 = s[1], s02 = s[2], s03 = s[3], s11 = s[5], s12 = s[6], s13 = s[7], s22 = s[10], s23 = s[11],
      s33 = s[15];
  const float *x0 = x[0], *x1 = x[kRows > 1 ? 1 : 0], *x2 = x[kRows > 2 ? 2 : 0], *x3 = x[kRows > 3 ? 3 : 0];
  const auto add = [&](Vec r0, Vec r1, Vec r2, Vec r3) __attribute__((always_inline)) {
    s00 += r0 * r0;
    if constexpr (kRows > 1) s01 += r0 * r1, s11 += r1 * r1;
    if constexpr (kRows > 2) s02 += r0 * r2, s12 += r1 * r2, s22 += r2 * r2;
    if constexpr (kRows > 3) s03 += r0 * r3, s13 += r1 * r3, s23 += r2 * r3, s33 += r3 * r3;
  };
  const auto widened = [](const float* at) __attribute__((always_inline)) {
    return __builtin_convertvector(*reinterpret_cast<const Floats*>(at), Vec);
  };
  const auto add_eight = [&](int64_t i) __attribute__((always_inline)) {
    const Vec r0 = widened(x0 + i), r1 = kRows > 1 ? widened(x1 + i) : r0, r2 = kRows > 2 ? widened(x2 + i) : r0;
    add(r0, r1, r2, kRows > 3 ? widened(x3 + i) : r0);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    __builtin_prefetch(x0 + i + kAhead);
    if constexpr (kRows > 1) __builtin_prefetch(x1 + i + kAhead);
    if constexpr (kRows > 2) __builtin_prefetch(x2 + i + kAhead);
    if constexpr (kRows > 3) __builtin_prefetch(x3 + i + kAhead);
    add_eight(i), add_eight(i + kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) add_eight(i);
  for (; i < n; ++i) add(Vec{x0[i]}, Vec{x1[i]}, Vec{x2[i]}, Vec{x3[i]});
  s[0] = s00, s[1] = s01, s[2] = s02, s[3] = s03, s[5] = s11, s[6] = s12, s[7] = s13, s[10] = s22, s[11] = s23;
  s[15] = s33;
}

MTLGRAD_CLONES void add_rows_direct(const float* const* x, int64_t rows, int64_t n, double* sums) {
  if (rows == 1) return add_direct<1>(x, n, sums);
  if (rows == 2) return add_direct<2>(x, n, sums);
  if (rows == 3) return add_direct<3>(x, n, sums);
  add_direct<4>(x, n, sums);
}

// Fetches what the next panel but one will read, so that memory works on while this panel is multiplied: the processor
// itself looks ahead only while it reads. An address past the row's end does no harm.
template <typename S>
MTLGRAD_CLONES void widen_to(double* __restrict__ out, const S* __restrict__ in, int64_t n) {
  const char* ahead = reinterpret_cast<const char*>(in) + 2 * kPanel * sizeof(S);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(S)); i += 64) __builtin_prefetch(ahead + i);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(widen(in[i]));
}

// Four rows of a panel against four others: sixteen sums, eight operands.
MTLGRAD_CLONES void add_tile(const double* a, const double* b, double* sums) {
  Vec* s = reinterpret_cast<Vec*>(sums);
  Vec s00 = s[0], s01 = s[1], s02 = s[2], s03 = s[3], s10 = s[4], s11 = s[5], s12 = s[6], s13 = s[7];
  Vec s20 = s[8], s21 = s[9], s22 = s[10], s23 = s[11], s30 = s[12], s31 = s[13], s32 = s[14], s33 = s[15];
  for (int64_t n = 0; n < kPanel; n += kLanes) {
    Vec b0 = load(b + n), b1 = load(b + kPitch + n), b2 = load(b + 2 * kPitch + n), b3 = load(b + 3 * kPitch + n);
    Vec a0 = load(a + n);
    s00 += a0 * b0, s01 += a0 * b1, s02 += a0 * b2, s03 += a0 * b3;
    Vec a1 = load(a + kPitch + n);
    s10 += a1 * b0, s11 += a1 * b1, s12 += a1 * b2, s13 += a1 * b3;
    Vec a2 = load(a + 2 * kPitch + n);
    s20 += a2 * b0, s21 += a2 * b1, s22 += a2 * b2, s23 += a2 * b3;
    Vec a3 = load(a + 3 * kPitch + n);
    s30 += a3 * b0, s31 += a3 * b1, s32 += a3 * b2, s33 += a3 * b3;
  }
  s[0] = s00, s[1] = s01, s[2] = s02, s[3] = s03, s[4] = s10, s[5] = s11, s[6] = s12, s[7] = s13;
  s[8] = s20, s[9] = s21, s[10] = s22, s[11] = s23, s[12] = s30, s[13] = s31, s[14] = s32, s[15] = s33;
}

// Four rows of a panel among themselves: of the sixteen sums the ten with i <= j.
MTLGRAD_CLONES void add_diagonal_tile(const double* a, double* sums) {
  Vec* s = reinterpret_cast<Vec*>(sums);
  Vec s00 = s[0], s01 = s[1], s02 = s[2], s03 = s[3], s11 = s[5], s12 = s[6], s13 = s[7], s22 = s[10], s23 = s[11],
      s33 = s[15];
  for (int64_t n = 0; n < kPanel; n += kLanes) {
    Vec a0 = load(a + n), a1 = load(a + kPitch + n), a2 = load(a + 2 * kPitch + n), a3 = load(a + 3 * kPitch + n);
    s00 += a0 * a0, s01 += a0 * a1, s02 += a0 * a2, s03 += a0 * a3, s11 += a1 * a1;
    s12 += a1 * a2, s13 += a1 * a3, s22 += a2 * a2, s23 += a2 * a3, s33 += a3 * a3;
  }
  s[0] = s00, s[1] = s01, s[2] = s02, s[3] = s03, s[5] = s11, s[6] = s12, s[7] = s13, s[10] = s22, s[11] = s23;
  s[15] = s33;
}

// Tiles (i, j), i <= j, of four rows against four, column by column of the upper triangle.
constexpr int64_t tiles_of(int64_t tasks) {
  const int64_t fours = (tasks + 3) / 4;
  return fours * (fours + 1) / 2;
}

struct alignas(64) Line {
  double values[kLanes];
};

// The sums of a share, 16 a tile. Few rows of float32 are multiplied as they are read; otherwise 256 columns at a time
// are widened into a panel, since a row meets T others, and float64 operands come from the cache at no cost.
template <typename S>
void gram_share(const Rows& rows, int64_t begin, int64_t end, double* partial) {
  const int64_t tasks = rows.tasks, fours = (tasks + 3) / 4, tiles = tiles_of(tasks);
  const bool direct = std::is_same_v<S, float> && tasks <= kDirect;
  std::vector<Line> memory(tiles * 16 + (direct ? 0 : 4 * fours * kPitch / kLanes), Line{});
  double* sums = memory[0].values;
  double* panel = sums + tiles * kSums;  // [4 fours, kPitch]; rows past `tasks` stay zero
  if constexpr (std::is_same_v<S, float>) {
    if (direct)
      for_pieces(rows, begin, end, end - begin, [&](int64_t p, int64_t first, int64_t count, int64_t) {
        const float* x[kDirect] = {};
        for (int64_t t = 0; t < tasks; ++t) x[t] = row_of<float>(rows, p, t) + first;
        add_rows_direct(x, tasks, count, sums);
      });
  }
  if (!direct) {
    const auto flush = [&] {
      for (int64_t j = 0, tile = 0; j < fours; ++j) {
        for (int64_t i = 0; i < j; ++i, ++tile)
          add_tile(panel + 4 * i * kPitch, panel + 4 * j * kPitch, sums + tile * kSums);
        add_diagonal_tile(panel + 4 * j * kPitch, sums + tile++ * kSums);
      }
    };
    for_pieces(rows, begin, end, kPanel, [&](int64_t p, int64_t first, int64_t count, int64_t column) {
      const int64_t at = (column - begin) % kPanel;
      for (int64_t t = 0; t < tasks; ++t) widen_to(panel + t * kPitch + at, row_of<S>(rows, p, t) + first, count);
      if (at + count == kPanel) flush();
    });
    if (const int64_t filled = (end - begin) % kPanel) {
      for (int64_t t = 0; t < tasks; ++t) std::fill(panel + t * kPitch + filled, panel + t * kPitch + kPanel, 0.0);
      flush();
    }
  }
  for (int64_t k = 0; k < tiles * 16; ++k) {
    double sum = 0.0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[k * kLanes + lane];
    partial[k] = sum;
  }
}

// ---- dots -----------------------------------------------------------------------------------------------------------

template <typename S, typename V>
MTLGRAD_CLONES double dot_piece(const S* x, const V* y, int64_t n) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(widen(x[i])) * static_cast<double>(widen(y[i]));
  return sum;
}

// ---- combine and add_weighted -------------------------------------------------------------------------------------------

template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// out = from (a pointer, or nullptr_t for nothing) + w0 x0 + ..., in the storage type where these are the last of the
// rows.
template <int kRows, typename Sum, typename S, typename From, typename Out>
MTLGRAD_INLINE void add_rows(const S* const* x, const Sum* w, [[maybe_unused]] From from, Out* out, int64_t n) {
  const S *x0 = x[0], *x1 = x[kRows > 1 ? 1 : 0], *x2 = x[kRows > 2 ? 2 : 0], *x3 = x[kRows > 3 ? 3 : 0];
  const Sum w0 = w[0], w1 = w[kRows > 1 ? 1 : 0], w2 = w[kRows > 2 ? 2 : 0], w3 = w[kRows > 3 ? 3 : 0];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Sum sum = w0 * widen(x0[i]);
    if constexpr (!std::is_null_pointer_v<From>) sum += widen(from[i]);
    if constexpr (kRows > 1) sum += w1 * widen(x1[i]);
    if constexpr (kRows > 2) sum += w2 * widen(x2[i]);
    if constexpr (kRows > 3) sum += w3 * widen(x3[i]);
    if constexpr (std::is_same_v<Out, double>)
      out[i] = sum;
    else
      out[i] = narrow<Out>(static_cast<float>(sum));
  }
}

template <typename Sum, typename S, typename From, typename Out>
MTLGRAD_CLONES void add_group(const S* const* x, const Sum* w, int64_t rows, From from, Out* out, int64_t n) {
  if (rows == 1) return add_rows<1>(x, w, from, out, n);
  if (rows == 2) return add_rows<2>(x, w, from, out, n);
  if (rows == 3) return add_rows<3>(x, w, from, out, n);
  return add_rows<4>(x, w, from, out, n);
}

// Outputs larger than this are written past the caches: fetching a line that is overwritten anyway costs a read.
constexpr int64_t kStreamBytes = 16 << 20;

template <typename S>
void store(S* out, const S* values, int64_t n, bool stream) {
  int64_t i = 0;
#ifdef __SSE2__
  if (stream) {
    constexpr int64_t kEach = 16 / sizeof(S);
    while (i < n && reinterpret_cast<uintptr_t>(out + i) % 16) out[i] = values[i], ++i;
    for (; i + kEach <= n; i += kEach)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i)));
  }
#endif
  std::copy(values + i, values + n, out + i);
}

constexpr int64_t kBlock = 1024;  // columns whose sums stay in the first-level cache between groups of four rows

// The sums of a share in Sum, on top of `base` where there is one, in the type B.
template <typename S, typename B, bool kBase, typename Sum>
void weighted_share(const Rows& rows, [[maybe_unused]] const void* const* base, const Sum* weights, void* const* out,
                    int64_t begin, int64_t end, bool stream) {
  std::vector<const S*> x(rows.tasks);
  alignas(64) Sum sums[kBlock];
  alignas(64) B results[kBlock];
  for_pieces(rows, begin, end, kBlock, [&](int64_t p, int64_t first, int64_t count, int64_t) {
    for (int64_t t = 0; t < rows.tasks; ++t) x[t] = row_of<S>(rows, p, t) + first;
    for (int64_t t = 0; t < rows.tasks; t += 4) {
      const int64_t group = std::min<int64_t>(4, rows.tasks - t);
      const auto add = [&](auto from) {
        if (t + group < rows.tasks)
          add_group(x.data() + t, weights + t, group, from, sums, count);
        else
          add_group(x.data() + t, weights + t, group, from, results, count);
      };
      if (t > 0)
        add(static_cast<const Sum*>(sums));
      else if constexpr (kBase)
        add(static_cast<const B*>(base[p]) + first);
      else
        add(nullptr);
    }
    store(static_cast<B*>(out[p]) + first, results, count, stream);
  });
#ifdef __SSE2__
  if (stream) _mm_sfence();  // orders this thread's stores past the caches before whatever it signals next
#endif
}

template <typename S, typename B, bool kBase, typename Sum>
void weighted(const Rows& rows, const void* const* base, const Sum* weights, void* const* out, const Place& place) {
  const Shares shares(columns_of(rows), 1);
  parallel_for(shares.slots, place.threads, [&](int64_t slot) {
    // Last columns first: they are what gram, just before, left in the caches.
    const int64_t begin = std::min((shares.slots - 1 - slot) * shares.size, shares.columns);
    const int64_t end = std::min(begin + shares.size, shares.columns);
    const bool stream = shares.columns * int64_t{sizeof(B)} > kStreamBytes;
    weighted_share<S, B, kBase>(rows, base, weights, out, begin, end, stream);
  });
}

}  // namespace

int64_t gram_workspace(int64_t tasks, int64_t columns) {
  return Shares(columns, tiles_of(tasks) * 16).slots * tiles_of(tasks) * 16;
}

void gram(DType dtype, Rows rows, double* out, double* workspace, Place place) {
  const int64_t tiles = tiles_of(rows.tasks), fours = (rows.tasks + 3) / 4;
  const Shares shares(columns_of(rows), tiles * 16);
  for_storage(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    parallel_for(shares.slots, place.threads, [&](int64_t slot) {
      const int64_t begin = std::min(slot * shares.size, shares.columns);
      gram_share<S>(rows, begin, std::min(begin + shares.size, shares.columns), workspace + slot * tiles * 16);
    });
  });
  for (int64_t j = 0, tile = 0; j < fours; ++j)
    for (int64_t i = 0; i <= j; ++i, ++tile)
      for (int64_t k = 0; k < 16; ++k) {
        const int64_t row = 4 * i + k / 4, column = 4 * j + k % 4;
        if (row > column || column >= rows.tasks) continue;
        double sum = 0.0;
        for (int64_t slot = 0; slot < shares.slots; ++slot) sum += workspace[(slot * tiles + tile) * 16 + k];
        out[row * rows.tasks + column] += sum;
        if (row != column) out[column * rows.tasks + row] += sum;
      }
}

int64_t dots_workspace(int64_t tasks, int64_t columns) { return Shares(columns, tasks).slots * tasks; }

void dots(DType row_type, DType vector_type, Rows rows, const void* const* vector, double* out, double* workspace,
          Place place) {
  const Shares shares(columns_of(rows), rows.tasks);
  for_storages("dots", row_type, vector_type, [&](auto* row, auto* other) {
    using S = std::remove_pointer_t<decltype(row)>;
    using V = std::remove_pointer_t<decltype(other)>;
    parallel_for(shares.slots, place.threads, [&](int64_t slot) {
      const int64_t begin = std::min(slot * shares.size, shares.columns);
      const int64_t end = std::min(begin + shares.size, shares.columns);
      double* partial = workspace + slot * rows.tasks;
      std::fill(partial, partial + rows.tasks, 0.0);
      for_pieces(rows, begin, end, kBlock, [&](int64_t p, int64_t first, int64_t count, int64_t) {
        const V* y = static_cast<const V*>(vector[p]) + first;
        for (int64_t t = 0; t < rows.tasks; ++t) partial[t] += dot_piece(row_of<S>(rows, p, t) + first, y, count);
      });
    });
  });
  for (int64_t t = 0; t < rows.tasks; ++t)
    for (int64_t slot = 0; slot < shares.slots; ++slot) out[t] += workspace[slot * rows.tasks + t];
}

void combine(DType dtype, Rows rows, const double* weights, void* const* out, Place place) {
  for_storage(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const std::vector<Compute<S>> rounded(weights, weights + rows.tasks);
    weighted<S, S, false>(rows, nullptr, rounded.data(), out, place);
  });
}

void add_weighted(DType row_type, DType base_type, Rows rows, const void* const* base, const double* weights,
                  void* const* out, Place place) {
  for_storages("add_weighted", row_type, base_type, [&](auto* row, auto* other) {
    using S = std::remove_pointer_t<decltype(row)>;
    using B = std::remove_pointer_t<decltype(other)>;
    weighted<S, B, true>(rows, base, weights, out, place);
  });
}

}  // namespace mtlgrad::cpu
