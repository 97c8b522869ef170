// Compiles CUDA kernels with g++ and runs them on the host, one block at a time, each CUDA thread a fiber. For tests of
// indexing, barriers, shuffles and reductions without a GPU; it says nothing of speed, of warp scheduling or of the
// memory model. Kernel source needs two macros (csrc/cuda/compat.cuh) instead of syntax that no C++ compiler takes:
//   KERNEL_LAUNCH((kernel<T, N>), grid, block, smem, stream, args...)   for kernel<<<grid, block, smem, stream>>>(args...)
//   DYNAMIC_SHARED(T, name)                                             for extern __shared__ T name[]
// What it checks: divergent barriers, shuffles that read a lane which takes no part, deadlock, launch limits, shared
// memory read before it is written (it starts as NaN), and results under three orders of threads and blocks. Under
// ThreadSanitizer it also sees races inside a block, under AddressSanitizer overruns of shared memory.
// What it cannot see: races between blocks other than through the order of blocks, the memory model, clusters,
// cooperative groups, mma, TMA, inline PTX. A copy of cp.async is made as late as it may be,
// when the thread waits for it; in backward order as early, when it is asked for.
#pragma once
#include <math.h>  // not <cmath> alone: device code calls expf, isnan and their like without std::

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <cuda_runtime_api.h>  // dim3, cudaError_t, cudaStream_t: the toolkit's own plain C declarations
#include <vector_functions.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__ inline  // see __shared__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __constant__ static const
#define __launch_bounds__(...)
#define __grid_constant__
#define __builtin_assume(condition) ((void)0)
// All static shared memory lies in one section, so that each block can start with it poisoned. GCC wants it all of one
// kind there: the function around it is a template or inline (every kernel is made so), not static or in an unnamed
// namespace; else "section type conflict", and EMU_NO_POISON does without.
#ifdef EMU_NO_POISON
#define __shared__ static
#else
#define __shared__ static __attribute__((section("emu_shared")))
#endif
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(emu::dynamic_shared())
#define EMU_UNPAREN(...) __VA_ARGS__
#define KERNEL_LAUNCH(kernel, grid, block, smem, stream, ...)                                         \
  ((void)(stream), emu::launch(reinterpret_cast<const void*>(+EMU_UNPAREN kernel), grid, block, smem, \
                               [&]() EMU_INTERNAL { EMU_UNPAREN kernel(__VA_ARGS__); }))

#if defined(__SANITIZE_THREAD__)
#define EMU_INTERNAL __attribute__((no_sanitize("thread")))  // the emulator's own data, not the kernel's
#else
#define EMU_INTERNAL
#endif

namespace emu {

enum class Order { forward, backward, random };

// A driver under ThreadSanitizer looks for races alone: they depend on neither the numbers nor the order, and the host's
// threads share nothing but their tables.
#if defined(__SANITIZE_THREAD__)
constexpr bool kRacesAlone = true;
constexpr Order kOrders[] = {Order::forward};
#else
constexpr bool kRacesAlone = false;
constexpr Order kOrders[] = {Order::forward, Order::backward, Order::random};
#endif

struct Options {
  Order order = Order::forward;  // of the blocks of a grid, and of the runnable threads between two barriers
  unsigned seed = 0;
};
inline Options options;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kWarp = 32;
constexpr size_t kMaxDynamicShared = 48 << 10, kMaxDynamicSharedOptIn = 227 << 10;
inline std::map<const void*, size_t> dynamic_shared_limit;  // of kernels that opted in to more than 48 KiB

struct Site {  // where a barrier or a shuffle stands in the source
  const char *what = nullptr, *file = nullptr;
  int line = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  uint3 tid;
  int lane, warp;
  std::vector<std::vector<Copy>> copies = {{}};  // asked for, not yet waited for: the batches, the last one still open
};

struct Block {
  dim3 grid, dim;
  uint3 id;
  Thread* self = nullptr;  // the one that runs
  std::unique_ptr<char[]> dynamic;
};
inline Block* block = nullptr;  // the one that runs

EMU_INTERNAL inline Thread& self() { return *block->self; }
EMU_INTERNAL inline void* dynamic_shared() { return block->dynamic.get(); }

// emu_scheduler.cpp
void launch(const void* kernel, dim3 grid, dim3 dim, size_t smem, const std::function<void()>& body);
void barrier(const Site& site, unsigned mask);                                          // mask 0: the whole block
void exchange(const Site& site, unsigned mask, void* value, size_t bytes, int source);  // source < 0: the caller's own
unsigned ballot(const Site& site, unsigned mask, bool p);
int count(const Site& site, bool p);
[[noreturn]] void fail(const char* format, ...);

template <typename T>
EMU_INTERNAL T exchange(const Site& site, unsigned mask, T v, int source) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  exchange(site, mask, &v, sizeof v, source);
  return v;
}

// The lane that `source` means inside the caller's segment of `width` lanes; -1: outside, the caller's own value.
EMU_INTERNAL inline int in_segment(int source, int width) {
  const int first = self().lane / width * width;
  return source >= first && source < first + width ? source : -1;
}

template <typename T, typename F>
EMU_INTERNAL T atomic(T* p, F&& f) {  // one OS thread: nothing can come between
  const T old = *p;
  *p = f(old);
  return old;
}

template <typename To, typename From>
To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

template <typename T>
struct Same {  // keeps an argument out of the deduction of T
  using type = T;
};

}  // namespace emu

#define threadIdx (emu::self().tid)
#define blockIdx (emu::block->id)
#define blockDim (emu::block->dim)
#define gridDim (emu::block->grid)
#define warpSize 32

#define EMU_SITE(what) {what, file, line}
#define EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMU_HERE) { emu::barrier(EMU_SITE("__syncthreads"), 0); }
inline int __syncthreads_count(int p, EMU_HERE) { return emu::count(EMU_SITE("__syncthreads_count"), p); }
inline int __syncthreads_or(int p, EMU_HERE) { return emu::count(EMU_SITE("__syncthreads_or"), p) != 0; }
inline int __syncthreads_and(int p, EMU_HERE) { return emu::count(EMU_SITE("__syncthreads_and"), !p) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_HERE) { emu::barrier(EMU_SITE("__syncwarp"), mask); }
inline unsigned __ballot_sync(unsigned mask, int p, EMU_HERE) {
  return emu::ballot(EMU_SITE("__ballot_sync"), mask, p);
}
inline int __any_sync(unsigned mask, int p, EMU_HERE) { return emu::ballot(EMU_SITE("__any_sync"), mask, p) != 0; }
inline int __all_sync(unsigned mask, int p, EMU_HERE) { return emu::ballot(EMU_SITE("__all_sync"), mask, p) == mask; }
template <typename T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, EMU_HERE) {
  const int first = emu::self().lane / width * width;
  return emu::exchange(EMU_SITE("__shfl_sync"), mask, v, first + (source & (width - 1)));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32, EMU_HERE) {
  return emu::exchange(EMU_SITE("__shfl_down_sync"), mask, v, emu::in_segment(emu::self().lane + int(d), width));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32, EMU_HERE) {
  return emu::exchange(EMU_SITE("__shfl_up_sync"), mask, v, emu::in_segment(emu::self().lane - int(d), width));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, EMU_HERE) {
  return emu::exchange(EMU_SITE("__shfl_xor_sync"), mask, v, emu::in_segment(emu::self().lane ^ x, width));
}

// <cuda_pipeline_primitives.h>, as far as it is used: cp.async of 4, 8 or 16 bytes.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  const auto both = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || both % bytes)
    emu::fail("__pipeline_memcpy_async: %zu bytes, misaligned or not 4, 8 or 16", bytes);
  if (emu::options.order == emu::Order::backward)
    std::memcpy(to, from, bytes);
  else
    emu::self().copies.back().push_back({to, from, bytes});
}
inline void __pipeline_commit() { emu::self().copies.emplace_back(); }
inline void __pipeline_wait_prior(size_t batches) {
  auto& copies = emu::self().copies;
  while (copies.size() > batches + 1) {
    for (const emu::Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    copies.erase(copies.begin());
  }
}

template <typename T>
T atomicAdd(T* p, typename emu::Same<T>::type v) {
  return emu::atomic(p, [=](T old) { return T(old + v); });
}
template <typename T>
T atomicMax(T* p, typename emu::Same<T>::type v) {
  return emu::atomic(p, [=](T old) { return old < v ? v : old; });
}
template <typename T>
T atomicMin(T* p, typename emu::Same<T>::type v) {
  return emu::atomic(p, [=](T old) { return v < old ? v : old; });
}
template <typename T>
T atomicOr(T* p, typename emu::Same<T>::type v) {
  return emu::atomic(p, [=](T old) { return T(old | v); });
}
template <typename T>
T atomicExch(T* p, typename emu::Same<T>::type v) {
  return emu::atomic(p, [=](T) { return v; });
}
template <typename T>
T atomicCAS(T* p, typename emu::Same<T>::type expected, typename emu::Same<T>::type v) {
  return emu::atomic(p, [=](T old) { return old == expected ? v : old; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emu::fail("__trap"); }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, typename emu::Same<T>::type v) {
  *p = v;
}
template <typename T>
void __stcg(T* p, typename emu::Same<T>::type v) {
  *p = v;
}

// CUDA's min and max: fmin and fmax for floating point (a NaN loses), the usual conversions for integers.
template <typename A, typename B, typename C = std::common_type_t<A, B>>
std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, C> min(A a, B b) {
  if constexpr (std::is_floating_point_v<C>)
    return std::fmin(C(a), C(b));
  else
    return C(b) < C(a) ? C(b) : C(a);
}
template <typename A, typename B, typename C = std::common_type_t<A, B>>
std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, C> max(A a, B b) {
  if constexpr (std::is_floating_point_v<C>)
    return std::fmax(C(a), C(b));
  else
    return C(a) < C(b) ? C(b) : C(a);
}

// Device functions that <math.h> lacks. Macros where the C library has the name for itself, or may come to.
#define rsqrtf(x) (1.0f / std::sqrt(float(x)))
#define rsqrt(x) (1.0 / std::sqrt(double(x)))
#define __expf(x) std::exp(float(x))
#define __exp10f(x) std::pow(10.0f, float(x))
#define __logf(x) std::log(float(x))
#define __log2f(x) std::log2(float(x))
#define __log10f(x) std::log10(float(x))
#define __powf(x, y) std::pow(float(x), float(y))
#define __sinf(x) std::sin(float(x))
#define __cosf(x) std::cos(float(x))
#define normcdff(x) (0.5f * std::erfc(-float(x) * 0.70710678118654752f))
#define normcdf(x) (0.5 * std::erfc(-double(x) * 0.70710678118654752))
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return 1.0f / std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __double2float_rn(double a) { return float(a); }
inline float __int2float_rn(int a) { return float(a); }
inline int __float2int_rn(float a) { return int(std::nearbyint(a)); }
inline int __float2int_rd(float a) { return int(std::floor(a)); }
inline int __float2int_rz(float a) { return int(a); }
inline int __float_as_int(float a) { return emu::bits<int>(a); }
inline float __int_as_float(int a) { return emu::bits<float>(a); }
inline unsigned __float_as_uint(float a) { return emu::bits<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return emu::bits<float>(a); }
inline long long __double_as_longlong(double a) { return emu::bits<long long>(a); }
inline double __longlong_as_double(long long a) { return emu::bits<double>(a); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll(static_cast<unsigned long long>(a)) : 64; }
inline int __ffs(int a) { return __builtin_ffs(a); }

// What <cuda_runtime.h> adds to the C interface for kernels.
template <typename R, typename... A>
cudaError_t cudaFuncSetAttribute(R (*kernel)(A...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > emu::kMaxDynamicSharedOptIn) return cudaErrorInvalidValue;
  emu::dynamic_shared_limit[reinterpret_cast<const void*>(kernel)] = std::max(size_t(value), emu::kMaxDynamicShared);
  return cudaSuccess;
}
template <typename R, typename... A>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, R (*)(A...), int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
