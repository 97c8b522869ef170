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

constexpr int64_t kLanes = 8;                // a sum is kept as eight, of every eighth column
constexpr int64_t kPitch = kPanel + kLanes;  // not a power of two: rows of a panel would share cache sets
constexpr int64_t kSums = 16 * kLanes;       // doubles of a tile: 4 x 4 sums

template <int kBytes>
using Doubles [[gnu::vector_size(kBytes)]] = double;

// A load that happens once: GCC would rather read an operand again for each use than keep it in a register.
template <int kBytes>
MTLGRAD_INLINE Doubles<kBytes> load(const double* at) {
  return *reinterpret_cast<const volatile Doubles<kBytes>*>(at);
}

template <int kBytes>
MTLGRAD_INLINE Doubles<kBytes>& vector_at(double* at) {
  return *reinterpret_cast<Doubles<kBytes>*>(at);
}

// Four rows of a panel against four others, two of them and a vector of lanes at a time: eight sums, which together with
// their operands fit sixteen registers.
template <int kBytes>
MTLGRAD_INLINE void add_tile(const double* a, const double* b, double* sums) {
  using V = Doubles<kBytes>;
  for (int64_t j = 0; j < 4; j += 2)
    for (int64_t lane = 0; lane < kLanes; lane += kBytes / 8) {
      double* s = sums + j * kLanes + lane;
      V &s00 = vector_at<kBytes>(s), &s01 = vector_at<kBytes>(s + kLanes);
      V &s10 = vector_at<kBytes>(s + 4 * kLanes), &s11 = vector_at<kBytes>(s + 5 * kLanes);
      V &s20 = vector_at<kBytes>(s + 8 * kLanes), &s21 = vector_at<kBytes>(s + 9 * kLanes);
      V &s30 = vector_at<kBytes>(s + 12 * kLanes), &s31 = vector_at<kBytes>(s + 13 * kLanes);
      V r00 = s00, r01 = s01, r10 = s10, r11 = s11, r20 = s20, r21 = s21, r30 = s30, r31 = s31;
      const double *x = a + lane, *y = b + j * kPitch + lane;
      for (int64_t n = 0; n < kPanel; n += kLanes, x += kLanes, y += kLanes) {
        const V y0 = load<kBytes>(y), y1 = load<kBytes>(y + kPitch);
        const V x0 = load<kBytes>(x);
        r00 += x0 * y0, r01 += x0 * y1;
        const V x1 = load<kBytes>(x + kPitch);
        r10 += x1 * y0, r11 += x1 * y1;
        const V x2 = load<kBytes>(x + 2 * kPitch);
        r20 += x2 * y0, r21 += x2 * y1;
        const V x3 = load<kBytes>(x + 3 * kPitch);
        r30 += x3 * y0, r31 += x3 * y1;
      }
      s00 = r00, s01 = r01, s10 = r10, s11 = r11, s20 = r20, s21 = r21, s30 = r30, s31 = r31;
    }
}

// Up to four rows of a panel among themselves: of the sixteen sums those with i <= j.
template <int kBytes, int kRows>
MTLGRAD_INLINE void add_square(const double* a, double* sums) {
  using V = Doubles<kBytes>;
  for (int64_t lane = 0; lane < kLanes; lane += kBytes / 8) {
    const auto sum = [=](int64_t i, int64_t j) -> V& { return vector_at<kBytes>(sums + (4 * i + j) * kLanes + lane); };
    V s00 = sum(0, 0), s01 = sum(0, 1), s02 = sum(0, 2), s03 = sum(0, 3), s11 = sum(1, 1);
    V s12 = sum(1, 2), s13 = sum(1, 3), s22 = sum(2, 2), s23 = sum(2, 3), s33 = sum(3, 3);
    const double* x = a + lane;
    for (int64_t n = 0; n < kPanel; n += kLanes, x += kLanes) {
      const V x0 = load<kBytes>(x);
      s00 += x0 * x0;
      if constexpr (kRows > 1) {
        const V x1 = load<kBytes>(x + kPitch);
        s01 += x0 * x1, s11 += x1 * x1;
        if constexpr (kRows > 2) {
          const V x2 = load<kBytes>(x + 2 * kPitch);
          s02 += x0 * x2, s12 += x1 * x2, s22 += x2 * x2;
          if constexpr (kRows > 3) {
            const V x3 = load<kBytes>(x + 3 * kPitch);
            s03 += x0 * x3, s13 += x1 * x3, s23 += x2 * x3, s33 += x3 * x3;
          }
        }
      }
    }
    sum(0, 0) = s00, sum(0, 1) = s01, sum(0, 2) = s02, sum(0, 3) = s03, sum(1, 1) = s11;
    sum(1, 2) = s12, sum(1, 3) = s13, sum(2, 2) = s22, sum(2, 3) = s23, sum(3, 3) = s33;
  }
}

// All pairs of a panel's rows, tile by tile.
template <int kBytes>
MTLGRAD_INLINE void add_panel(const double* panel, int64_t rows, double* sums) {
  for (int64_t j = 0; j < rows; j += 4) {
    for (int64_t i = 0; i < j; i += 4, sums += kSums) add_tile<kBytes>(panel + i * kPitch, panel + j * kPitch, sums);
    const double* last = panel + j * kPitch;
    switch (rows - j) {
      case 1: add_square<kBytes, 1>(last, sums); break;
      case 2: add_square<kBytes, 2>(last, sums); break;
      case 3: add_square<kBytes, 3>(last, sums); break;
      default: add_square<kBytes, 4>(last, sums);
    }
    sums += kSums;
  }
}

#define MTLGRAD_ADD_PANEL(attribute, bytes) \
  attribute void add_panel_of(const double* panel, int64_t rows, double* sums) { add_panel<bytes>(panel, rows, sums); }
MTLGRAD_BY_WIDTH(MTLGRAD_ADD_PANEL)

// Fetches what the next panel but one will read, so that memory works on while this panel is multiplied: the processor
// itself looks ahead only while it reads. An address past the row's end does no harm.
template <typename S>
MTLGRAD_CLONES void widen_to(double* __restrict__ out, const S* __restrict__ in, int64_t n) {
  const char* ahead = reinterpret_cast<const char*>(in) + 2 * kPanel * sizeof(S);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(S)); i += 64) __builtin_prefetch(ahead + i);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(widen(in[i]));
}

// Tiles (i, j), i <= j, of four rows against four, column by column of the upper triangle.
constexpr int64_t tiles_of(int64_t tasks) {
  const int64_t fours = (tasks + 3) / 4;
  return fours * (fours + 1) / 2;
}

struct alignas(64) Line {
  double values[kLanes];
};

// The sums of a share, 16 a tile. 256 columns at a time are widened into a panel, since a row meets T others, and float64
// operands come from the cache at no cost.
template <typename S>
void gram_share(const Rows& rows, int64_t begin, int64_t end, double* partial) {
  const int64_t tasks = rows.tasks, fours = (tasks + 3) / 4, tiles = tiles_of(tasks);
  std::vector<Line> memory(tiles * 16 + 4 * fours * kPitch / kLanes, Line{});
  double* sums = memory[0].values;
  double* panel = sums + tiles * kSums;  // [4 fours, kPitch]; rows past `tasks` stay zero
  for_pieces(rows, begin, end, kPanel, [&](int64_t p, int64_t first, int64_t count, int64_t column) {
    const int64_t at = (column - begin) % kPanel;
    for (int64_t t = 0; t < tasks; ++t) widen_to(panel + t * kPitch + at, row_of<S>(rows, p, t) + first, count);
    if (at + count == kPanel) add_panel_of(panel, tasks, sums);
  });
  if (const int64_t filled = (end - begin) % kPanel) {
    for (int64_t t = 0; t < tasks; ++t) std::fill(panel + t * kPitch + filled, panel + t * kPitch + kPanel, 0.0);
    add_panel_of(panel, tasks, sums);
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
MTLGRAD_CLONES void add_up_to_four(const S* const* x, const Sum* w, int64_t rows, From from, Out* out, int64_t n) {
  if (rows == 1) return add_rows<1>(x, w, from, out, n);
  if (rows == 2) return add_rows<2>(x, w, from, out, n);
  if (rows == 3) return add_rows<3>(x, w, from, out, n);
  return add_rows<4>(x, w, from, out, n);
}

template <typename Sum, typename S, typename Out>
MTLGRAD_CLONES void add_four(const S* const* x, const Sum* w, const Sum* from, Out* out, int64_t n) {
  add_rows<4>(x, w, from, out, n);
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

// The sums of a share in Sum, on top of `base` where there is one, in the type B. Rows go by four, the first ones may be
// fewer: that way round it takes the fewest functions.
template <typename S, typename B, bool kBase, typename Sum>
void weighted_share(const Rows& rows, [[maybe_unused]] const void* const* base, const Sum* weights, void* const* out,
                    int64_t begin, int64_t end, bool stream) {
  std::vector<const S*> x(rows.tasks);
  alignas(64) Sum sums[kBlock];
  alignas(64) B results[kBlock];
  const int64_t few = rows.tasks - (rows.tasks - 1) / 4 * 4;
  for_pieces(rows, begin, end, kBlock, [&](int64_t p, int64_t first, int64_t count, int64_t) {
    for (int64_t t = 0; t < rows.tasks; ++t) x[t] = row_of<S>(rows, p, t) + first;
    const auto begin_with = [&](auto from) {
      if (few == rows.tasks)
        add_up_to_four(x.data(), weights, few, from, results, count);
      else
        add_up_to_four(x.data(), weights, few, from, sums, count);
    };
    if constexpr (kBase)
      begin_with(static_cast<const B*>(base[p]) + first);
    else
      begin_with(nullptr);
    for (int64_t t = few; t < rows.tasks; t += 4)
      if (t + 4 < rows.tasks)
        add_four(x.data() + t, weights + t, sums, sums, count);
      else
        add_four(x.data() + t, weights + t, sums, results, count);
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
