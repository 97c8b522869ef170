// Compiles CUDA kernels with g++ and runs them on the host, one block at a time, each CUDA thread a fiber. For tests of
// indexing, barriers, shuffles and reductions without a GPU; it says nothing of speed, of warp scheduling or of the
// memory model. Kernel source needs two macros (csrc/cuda/compat.cuh) instead of syntax that no C++ compiler takes:
//   KERNEL_LAUNCH((kernel<T, N>), grid, block, smem, stream, args...)   for kernel<<<grid, block, smem, stream>>>(args...)
//   DYNAMIC_SHARED(T, name)                                             for extern __shared__ T name[]
// What it checks: divergent barriers, shuffles that read a lane which takes no part, deadlock, launch limits, shared
// memory read before it is written (it starts as NaN), and results under three orders of threads and blocks. Under
// ThreadSanitizer it also sees races inside a block, under AddressSanitizer overruns of shared memory.
// What it cannot see: races between blocks other than through the order of blocks, the memory model, clusters,
// cooperative groups, mma, cp.async, TMA, inline PTX.
#pragma once
#include <math.h>  // not <cmath> alone: device code calls expf, isnan and their like without std::
#include <sys/mman.h>

#include <algorithm>
#include <climits>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

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
  ((void)(stream), emu::launch(reinterpret_cast<const void*>(&EMU_UNPAREN kernel), grid, block, smem, \
                               [&] { EMU_UNPAREN kernel(__VA_ARGS__); }))

extern "C" {
extern char __start_emu_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emu_shared[] __attribute__((weak, visibility("hidden")));
}

#if defined(__SANITIZE_THREAD__)
#define EMU_INTERNAL __attribute__((no_sanitize("thread")))  // the emulator's own data, not the kernel's
#else
#define EMU_INTERNAL
#endif

// Switching stacks: 15 instructions on x86-64; ucontext elsewhere, with two system calls a switch.
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
__attribute__((naked, noinline, no_sanitize("address", "thread", "undefined"))) inline void emu_switch(void**, void*) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
namespace emu {
struct Context {
  void* sp = nullptr;
  EMU_INTERNAL void make(char* stack, size_t bytes, void (*f)()) {
    auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15));
    *--top = nullptr;                     // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(f);  // where the first switch returns to
    sp = top - 6;
  }
};
EMU_INTERNAL inline void switch_context(Context& from, Context& to) { emu_switch(&from.sp, to.sp); }
}  // namespace emu
#else
#include <ucontext.h>
namespace emu {
struct Context {
  ucontext_t c;
  EMU_INTERNAL void make(char* stack, size_t bytes, void (*f)()) {
    getcontext(&c);
    c.uc_stack.ss_sp = stack, c.uc_stack.ss_size = bytes, c.uc_link = nullptr;
    makecontext(&c, f, 0);
  }
};
EMU_INTERNAL inline void switch_context(Context& from, Context& to) { swapcontext(&from.c, &to.c); }
}  // namespace emu
#endif

namespace emu {

enum class Order { forward, backward, random };

struct Options {
  Order order = Order::forward;  // of the blocks of a grid, and of the runnable threads between two barriers
  unsigned seed = 0;
};
inline Options options;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10, kPage = 4096;
constexpr size_t kMaxDynamicShared = 48 << 10, kMaxDynamicSharedOptIn = 227 << 10;

struct Site {  // where a barrier or a shuffle stands in the source
  const char *what = nullptr, *file = nullptr;
  int line = 0;
  EMU_INTERNAL bool operator==(const Site& o) const {
    return line == o.line && (what == o.what || !std::strcmp(what, o.what)) &&
           (file == o.file || !std::strcmp(file, o.file));
  }
};

struct alignas(16) Slot {
  uint64_t word[2];
};

struct Warp {
  Slot posted[kWarp];  // what each lane brought to the shuffle that it waits in
  Slot result[kWarp];  // what the lanes of the last complete shuffle brought
};

struct Thread {
  uint3 tid;
  int lane, warp;
  Context context;
  char* stack = nullptr;
  bool done = false, waits = false;
  unsigned mask = 0;  // of the lanes waited for; 0: the whole block
  Site site;
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

struct Block {
  dim3 grid, dim;
  uint3 id;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> runnable;
  int live = 0, at_barrier = 0;
  int votes = 0, votes_result = 0;
  std::unique_ptr<char[]> dynamic;
  std::function<void()> body;
  Context scheduler;
  const void* sched_stack = nullptr;
  size_t sched_stack_size = 0;
  Thread* self = nullptr;
  bool failed = false;
  std::string error;
#if defined(__SANITIZE_THREAD__)
  void* tsan_scheduler = nullptr;
  // A block starts after what the host did, and the host goes on after it: two edges, as with one a thread that starts
  // late would come after those that ended early.
  char tsan_block = 0, tsan_warp[kWarp] = {}, tsan_start = 0, tsan_end = 0;
#endif
};
inline Block* block = nullptr;
inline std::mutex one_launch_at_a_time;
inline std::map<const void*, size_t> dynamic_shared_limit;  // of kernels that opted in to more than 48 KiB

struct Fiber {  // what is costly to make, kept from launch to launch
  char* stack;
  void* tsan;
};
inline std::vector<Fiber> pool;

inline Fiber new_fiber() {
  void* p =
      mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("no memory for a thread's stack");
  mprotect(p, kPage, PROT_NONE);  // a kernel that needs more stack faults, instead of writing into another's
  Fiber f{static_cast<char*>(p) + kPage, nullptr};
#if defined(__SANITIZE_THREAD__)
  f.tsan = __tsan_create_fiber(0);
#endif
  return f;
}

EMU_INTERNAL inline Thread& self() { return *block->self; }
EMU_INTERNAL inline void* dynamic_shared() { return block->dynamic.get(); }

inline std::string where(const Thread& t) {
  char s[160];
  std::snprintf(s, sizeof s, "block (%u,%u,%u) thread (%u,%u,%u)", block->id.x, block->id.y, block->id.z, t.tid.x,
                t.tid.y, t.tid.z);
  return s;
}

inline std::string name(const Site& s) {
  const char* slash = std::strrchr(s.file, '/');
  return std::string(s.what) + " at " + (slash ? slash + 1 : s.file) + ":" + std::to_string(s.line);
}

EMU_INTERNAL inline void to_scheduler([[maybe_unused]] bool last = false) {
  Thread& t = self();
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, block->sched_stack, block->sched_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(block->tsan_scheduler, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(t.context, block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

EMU_INTERNAL inline void finish() {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&block->tsan_end);
#endif
  self().done = true;
  --block->live;
  to_scheduler(true);
}

inline void set_error(Block& b, const std::string& text) {
  b.failed = true;
  b.error = text;
}

// From inside a fiber: ends the launch. The fiber's stack is never unwound.
[[noreturn]] EMU_INTERNAL inline void fail(const char* format, ...) {
  char s[256];
  va_list args;
  va_start(args, format);
  std::vsnprintf(s, sizeof s, format, args);
  va_end(args);
  set_error(*block, where(self()) + ": " + s);
  finish();
  std::abort();
}

EMU_INTERNAL inline void wait(const Site& site, unsigned mask) {
  Thread& t = self();
  t.waits = true, t.mask = mask, t.site = site;
  if (!mask) ++block->at_barrier;
  to_scheduler();
  if (block->failed) finish();
}

// A barrier orders memory; a shuffle or a vote does not, and the race detector is not told that it does.
EMU_INTERNAL inline void barrier(const Site& site, unsigned mask) {
#if defined(__SANITIZE_THREAD__)
  char* sync = mask ? &block->tsan_warp[self().warp] : &block->tsan_block;
  __tsan_release(sync);
#endif
  wait(site, mask);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(sync);
#endif
}

EMU_INTERNAL inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->sched_stack, &block->sched_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&block->tsan_start);
#endif
  if (block->failed) finish();
  try {
    block->body();
  } catch (const std::exception& e) {
    set_error(*block, where(self()) + ": " + e.what());
  }
  finish();
}

EMU_INTERNAL inline void resume(Thread& t) {
  block->self = &t;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, t.stack, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(t.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(block->scheduler, t.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void check_barrier(Block& b) {
  const Thread* first = nullptr;
  for (const Thread& t : b.threads) {
    if (t.done || !t.waits || t.mask) continue;
    if (!first) first = &t;
    if (!(first->site == t.site)) {
      return set_error(b,
                       where(t) + ": barrier divergence: " + name(t.site) + ", another thread in " + name(first->site));
    }
  }
  const int gone = static_cast<int>(b.threads.size()) - b.live;
  if (b.at_barrier == b.live && gone)
    set_error(b, where(*first) + ": " + name(first->site) + " after " + std::to_string(gone) +
                     " threads of the block returned");
}

inline void report_deadlock(Block& b) {
  std::string text = "deadlock:";
  for (const Thread& t : b.threads)
    if (!t.done && text.size() < 400) text += " [" + where(t) + " in " + name(t.site) + "]";
  set_error(b, text);
}

// Every live thread waits. Makes those runnable whose group is complete.
EMU_INTERNAL inline void release(Block& b) {
  const int n = static_cast<int>(b.threads.size());
  if (b.at_barrier) {
    check_barrier(b);
    if (b.failed) return;
    if (b.at_barrier == b.live) {
      for (int i = 0; i < n; ++i) b.threads[i].waits = false, b.runnable.push_back(i);
      b.at_barrier = 0;
      b.votes_result = b.votes, b.votes = 0;
      return;
    }
  }
  for (int w = 0; w < static_cast<int>(b.warps.size()); ++w) {
    Thread* lanes = &b.threads[w * kWarp];
    const int count = std::min(kWarp, n - w * kWarp);
    for (int l = 0; l < count; ++l) {
      const unsigned mask = lanes[l].mask;
      if (lanes[l].done || !lanes[l].waits || !mask) continue;
      bool complete = true;
      for (int k = 0; k < kWarp && complete; ++k)
        if (mask >> k & 1)
          complete =
              k < count && !lanes[k].done && lanes[k].waits && lanes[k].mask == mask && lanes[k].site == lanes[l].site;
      if (!complete) continue;
      for (int k = 0; k < count; ++k)
        if (mask >> k & 1) {
          b.warps[w].result[k] = b.warps[w].posted[k];
          lanes[k].waits = false;
          b.runnable.push_back(w * kWarp + k);
        }
    }
  }
  if (b.runnable.empty()) report_deadlock(b);
}

__attribute__((no_sanitize("address", "thread"))) inline void poison_static_shared() {
  if (!__start_emu_shared) return;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)  // whose memset would object
  for (volatile char* p = __start_emu_shared; p != __stop_emu_shared; ++p) *p = '\xff';
#else
  std::memset(__start_emu_shared, 0xff, __stop_emu_shared - __start_emu_shared);  // NaN for float and double
#endif
}

EMU_INTERNAL inline void run_block(Block& b, size_t smem, std::mt19937& rng) {
  const int n = static_cast<int>(b.threads.size());
  b.dynamic.reset(new char[smem ? smem : 1]);  // exact size: AddressSanitizer sees overruns
  std::memset(b.dynamic.get(), 0xff, smem);
  poison_static_shared();
  b.live = n, b.at_barrier = 0, b.votes = 0;
  b.runnable.clear();
  for (int i = 0; i < n; ++i) {
    Thread& t = b.threads[i];
    t.done = t.waits = false;
    // Stacks that all began at the same offset into a page would fight for the same lines of the cache.
    t.context.make(t.stack, kStackBytes - i * 7 % 64 * 64, entry);
    b.runnable.push_back(i);
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&b.tsan_start);
#endif
  std::vector<int> now;
  while (b.live && !b.failed) {
    now.swap(b.runnable);
    b.runnable.clear();
    if (options.order == Order::backward) std::reverse(now.begin(), now.end());
    if (options.order == Order::random) std::shuffle(now.begin(), now.end(), rng);
    for (int i : now) {
      resume(b.threads[i]);
      if (b.failed) break;
    }
    if (b.live && !b.failed) release(b);
  }
  for (Thread& t : b.threads)  // after an error: each thread leaves its stack, as far as the sanitizers are concerned
    if (!t.done) resume(t);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&b.tsan_end);
#endif
}

template <typename F>
EMU_INTERNAL void launch(const void* kernel, dim3 grid, dim3 dim, size_t smem, F&& body) {
  std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  const uint64_t threads = uint64_t(dim.x) * dim.y * dim.z;
  if (threads == 0 || threads > 1024) throw Error("launch: " + std::to_string(threads) + " threads in a block");
  if (dim.z > 64) throw Error("launch: blockDim.z over 64");
  if (!grid.x || !grid.y || !grid.z) throw Error("launch: empty grid");
  if (grid.x > unsigned(INT_MAX)) throw Error("launch: grid.x over 2^31 - 1");
  if (grid.y > 65535 || grid.z > 65535) throw Error("launch: grid.y or grid.z over 65535");
  const auto limit = dynamic_shared_limit.find(kernel);
  if (smem > (limit == dynamic_shared_limit.end() ? kMaxDynamicShared : limit->second))
    throw Error("launch: " + std::to_string(smem) + " bytes of dynamic shared memory without opting in");
  const int n = static_cast<int>(threads);
  Block b;
  b.grid = grid, b.dim = dim, b.body = std::ref(body);
  b.threads.resize(n);
  b.warps.resize((n + kWarp - 1) / kWarp);
  b.runnable.reserve(n);
#if defined(__SANITIZE_THREAD__)
  b.tsan_scheduler = __tsan_get_current_fiber();
#endif
  for (int i = 0; i < n; ++i) {
    if (i == static_cast<int>(pool.size())) pool.push_back(new_fiber());
    Thread& t = b.threads[i];
    t.tid = make_uint3(i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y));
    t.lane = i % kWarp, t.warp = i / kWarp;
    t.stack = pool[i].stack;
#if defined(__SANITIZE_THREAD__)
    t.tsan = pool[i].tsan;
#endif
  }
  std::mt19937 rng(options.seed);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> shuffled;
  if (options.order == Order::random) {
    for (uint64_t i = 0; i < blocks; ++i) shuffled.push_back(i);
    std::shuffle(shuffled.begin(), shuffled.end(), rng);
  }
  block = &b;
  for (uint64_t i = 0; i < blocks && !b.failed; ++i) {
    const uint64_t k = options.order == Order::forward    ? i
                       : options.order == Order::backward ? blocks - 1 - i
                                                          : shuffled[i];
    b.id = make_uint3(k % grid.x, k / grid.x % grid.y, k / (uint64_t(grid.x) * grid.y));
    run_block(b, smem, rng);
  }
  block = nullptr;
  if (!b.failed) return;
#if defined(__SANITIZE_ADDRESS__)  // frames that were never left are still marked on these stacks
  for (const Thread& t : b.threads) __asan_unpoison_memory_region(t.stack, kStackBytes);
#endif
  throw Error(b.error);
}

template <typename T>
EMU_INTERNAL T exchange(const Site& site, unsigned mask, T v, int source) {
  static_assert(sizeof(T) <= sizeof(Slot) && std::is_trivially_copyable_v<T>);
  Thread& t = self();
  if (!(mask >> t.lane & 1)) fail("%s at line %d: the calling lane is not in the mask", site.what, site.line);
  Warp& w = block->warps[t.warp];
  __builtin_memcpy(&w.posted[t.lane], &v, sizeof v);
  wait(site, mask);
  if (source < 0) return v;
  if (!(mask >> source & 1))
    fail("%s at line %d reads lane %d, which does not take part", site.what, site.line, source);
  __builtin_memcpy(&v, &w.result[source], sizeof v);
  return v;
}

// The lane that `source` means inside the caller's segment of `width` lanes; -1: outside, the caller's own value.
EMU_INTERNAL inline int in_segment(int source, int width) {
  const int first = self().lane / width * width;
  return source >= first && source < first + width ? source : -1;
}

EMU_INTERNAL inline unsigned ballot(const Site& site, unsigned mask, bool p) {
  exchange(site, mask, static_cast<unsigned char>(p), -1);
  const Warp& w = block->warps[self().warp];
  unsigned r = 0;
  for (int l = 0; l < kWarp; ++l)
    if (mask >> l & 1) r |= static_cast<unsigned>(w.result[l].word[0] & 1) << l;
  return r;
}

EMU_INTERNAL inline int count(const Site& site, bool p) {
  block->votes += p;
  barrier(site, 0);
  return block->votes_result;
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
