// Runs the threads of a block as fibers on one thread of the host, block after block.
#include <sys/mman.h>

#include <algorithm>
#include <climits>
#include <cstdarg>
#include <mutex>
#include <random>

#include "cuda_emu.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

extern "C" {
extern char __start_emu_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emu_shared[] __attribute__((weak, visibility("hidden")));
}

// Switching stacks: 15 instructions on x86-64; ucontext elsewhere, with two system calls a switch.
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
__attribute__((naked, noinline, no_sanitize("address", "thread", "undefined"))) static void emu_switch(void**, void*) {
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
EMU_INTERNAL static void switch_context(Context& from, Context& to) { emu_switch(&from.sp, to.sp); }
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
EMU_INTERNAL static void switch_context(Context& from, Context& to) { swapcontext(&from.c, &to.c); }
}  // namespace emu
#endif

namespace emu {
namespace {

constexpr size_t kStackBytes = 256 << 10, kPage = 4096;

EMU_INTERNAL bool operator==(const Site& a, const Site& b) {
  return a.line == b.line && (a.what == b.what || !std::strcmp(a.what, b.what)) &&
         (a.file == b.file || !std::strcmp(a.file, b.file));
}

struct alignas(16) Slot {
  uint64_t word[2];
};

struct Warp {
  Slot posted[kWarp];  // what each lane brought to the shuffle that it waits in
  Slot result[kWarp];  // what the lanes of the last complete shuffle brought
};

struct Fiber : Thread {
  Context context;
  char* stack = nullptr;
  bool done = false, waits = false;
  unsigned mask = 0;  // of the lanes waited for; 0: the whole block
  Site site;
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

struct Running : Block {
  std::vector<Fiber> threads;
  std::vector<Warp> warps;
  std::vector<int> runnable;
  int live = 0, at_barrier = 0;
  int votes = 0, votes_result = 0;
  const std::function<void()>* body = nullptr;
  Context scheduler;
  const void* sched_stack = nullptr;
  size_t sched_stack_size = 0;
  bool failed = false;
  std::string error;
#if defined(__SANITIZE_THREAD__)
  void* tsan_scheduler = nullptr;
  // A block starts after what the host did, and the host goes on after it: two edges, as with one a thread that starts
  // late would come after those that ended early.
  char tsan_block = 0, tsan_warp[kWarp] = {}, tsan_start = 0, tsan_end = 0;
#endif
};

struct Stack {  // what is costly to make, kept from launch to launch
  char* bytes;
  void* tsan;
};
std::vector<Stack> pool;
std::mutex one_launch_at_a_time;

Stack new_stack() {
  void* p =
      mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("no memory for a thread's stack");
  mprotect(p, kPage, PROT_NONE);  // a kernel that needs more stack faults, instead of writing into another's
  Stack s{static_cast<char*>(p) + kPage, nullptr};
#if defined(__SANITIZE_THREAD__)
  s.tsan = __tsan_create_fiber(0);
#endif
  return s;
}

EMU_INTERNAL Running& running() { return *static_cast<Running*>(block); }
EMU_INTERNAL Fiber& current() { return *static_cast<Fiber*>(block->self); }

std::string where(const Thread& t) {
  char s[160];
  std::snprintf(s, sizeof s, "block (%u,%u,%u) thread (%u,%u,%u)", block->id.x, block->id.y, block->id.z, t.tid.x,
                t.tid.y, t.tid.z);
  return s;
}

std::string name(const Site& s) {
  const char* slash = std::strrchr(s.file, '/');
  return std::string(s.what) + " at " + (slash ? slash + 1 : s.file) + ":" + std::to_string(s.line);
}

void set_error(Running& b, const std::string& text) {
  b.failed = true;
  b.error = text;
}

// The frames that a fiber ends in are never left, so that their red zones would stay on its stack, in the way of the next
// fiber's arguments: no red zones here, nor in finish().
EMU_INTERNAL __attribute__((no_sanitize("address"))) void to_scheduler([[maybe_unused]] bool last = false) {
  Running& b = running();
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, b.sched_stack, b.sched_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(b.tsan_scheduler, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(current().context, b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

EMU_INTERNAL __attribute__((no_sanitize("address"))) void finish() {
  Running& b = running();
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&b.tsan_end);
#endif
  current().done = true;
  --b.live;
  to_scheduler(true);
}

EMU_INTERNAL void wait(const Site& site, unsigned mask) {
  Fiber& t = current();
  t.waits = true, t.mask = mask, t.site = site;
  if (!mask) ++running().at_barrier;
  to_scheduler();
  if (running().failed) finish();
}

EMU_INTERNAL void entry() {
  Running& b = running();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.sched_stack, &b.sched_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&b.tsan_start);
#endif
  if (b.failed) finish();
  try {
    (*b.body)();
  } catch (const std::exception& e) {
    set_error(b, where(self()) + ": " + e.what());
  }
  finish();
}

EMU_INTERNAL void resume(Running& b, Fiber& t) {
  b.self = &t;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, t.stack, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(t.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(b.scheduler, t.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void check_barrier(Running& b) {
  const Fiber* first = nullptr;
  for (const Fiber& t : b.threads) {
    if (t.done || !t.waits || t.mask) continue;
    if (!first) first = &t;
    if (!(first->site == t.site))
      return set_error(b,
                       where(t) + ": barrier divergence: " + name(t.site) + ", another thread in " + name(first->site));
  }
  const int gone = static_cast<int>(b.threads.size()) - b.live;
  if (b.at_barrier == b.live && gone)
    set_error(b, where(*first) + ": " + name(first->site) + " after " + std::to_string(gone) +
                     " threads of the block returned");
}

void report_deadlock(Running& b) {
  std::string text = "deadlock:";
  for (const Fiber& t : b.threads)
    if (!t.done && text.size() < 400) text += " [" + where(t) + " in " + name(t.site) + "]";
  set_error(b, text);
}

// Every live thread waits. Makes those runnable whose group is complete.
EMU_INTERNAL void release(Running& b) {
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
    Fiber* lanes = &b.threads[w * kWarp];
    const int lane_count = std::min(kWarp, n - w * kWarp);
    for (int l = 0; l < lane_count; ++l) {
      const unsigned mask = lanes[l].mask;
      if (lanes[l].done || !lanes[l].waits || !mask) continue;
      bool complete = true;
      for (int k = 0; k < kWarp && complete; ++k)
        if (mask >> k & 1)
          complete = k < lane_count && !lanes[k].done && lanes[k].waits && lanes[k].mask == mask &&
                     lanes[k].site == lanes[l].site;
      if (!complete) continue;
      for (int k = 0; k < lane_count; ++k)
        if (mask >> k & 1) {
          b.warps[w].result[k] = b.warps[w].posted[k];
          lanes[k].waits = false;
          b.runnable.push_back(w * kWarp + k);
        }
    }
  }
  if (b.runnable.empty()) report_deadlock(b);
}

// 0xff bytes: NaN for float and double.
__attribute__((no_sanitize("address", "thread"))) void poison_static_shared() {
  if (!__start_emu_shared) return;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)  // whose memset would object
  for (volatile char* p = __start_emu_shared; p != __stop_emu_shared; ++p) *p = '\xff';
#else
  std::memset(__start_emu_shared, 0xff, __stop_emu_shared - __start_emu_shared);
#endif
}

EMU_INTERNAL void run_block(Running& b, size_t smem, std::mt19937& rng) {
  const int n = static_cast<int>(b.threads.size());
  b.dynamic.reset(new char[smem ? smem : 1]);  // exact size: AddressSanitizer sees overruns
  std::memset(b.dynamic.get(), 0xff, smem);
  poison_static_shared();
  b.live = n, b.at_barrier = 0, b.votes = 0;
  b.runnable.clear();
  for (int i = 0; i < n; ++i) {
    Fiber& t = b.threads[i];
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
      resume(b, b.threads[i]);
      if (b.failed) break;
    }
    if (b.live && !b.failed) release(b);
  }
  for (Fiber& t : b.threads)  // after an error: each thread leaves its stack, as far as the sanitizers are concerned
    if (!t.done) resume(b, t);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&b.tsan_end);
#endif
}

void check_limits(const void* kernel, dim3 grid, dim3 dim, size_t smem) {
  const uint64_t threads = uint64_t(dim.x) * dim.y * dim.z;
  if (threads == 0 || threads > 1024) throw Error("launch: " + std::to_string(threads) + " threads in a block");
  if (dim.z > 64) throw Error("launch: blockDim.z over 64");
  if (!grid.x || !grid.y || !grid.z) throw Error("launch: empty grid");
  if (grid.x > unsigned(INT_MAX)) throw Error("launch: grid.x over 2^31 - 1");
  if (grid.y > 65535 || grid.z > 65535) throw Error("launch: grid.y or grid.z over 65535");
  const auto limit = dynamic_shared_limit.find(kernel);
  if (smem > (limit == dynamic_shared_limit.end() ? kMaxDynamicShared : limit->second))
    throw Error("launch: " + std::to_string(smem) + " bytes of dynamic shared memory without opting in");
}

}  // namespace

EMU_INTERNAL void launch(const void* kernel, dim3 grid, dim3 dim, size_t smem, const std::function<void()>& body) {
  std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  check_limits(kernel, grid, dim, smem);
  const int n = static_cast<int>(dim.x * dim.y * dim.z);
  Running b;
  b.grid = grid, b.dim = dim, b.body = &body;
  b.threads.resize(n);
  b.warps.resize((n + kWarp - 1) / kWarp);
  b.runnable.reserve(n);
#if defined(__SANITIZE_THREAD__)
  b.tsan_scheduler = __tsan_get_current_fiber();
#endif
  for (int i = 0; i < n; ++i) {
    if (i == static_cast<int>(pool.size())) pool.push_back(new_stack());
    Fiber& t = b.threads[i];
    t.tid = make_uint3(i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y));
    t.lane = i % kWarp, t.warp = i / kWarp;
    t.stack = pool[i].bytes;
#if defined(__SANITIZE_THREAD__)
    t.tsan = pool[i].tsan;
#endif
  }
  std::mt19937 rng(options.seed);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order;
  for (uint64_t i = 0; i < blocks; ++i) order.push_back(i);
  if (options.order == Order::backward) std::reverse(order.begin(), order.end());
  if (options.order == Order::random) std::shuffle(order.begin(), order.end(), rng);
  block = &b;
  for (uint64_t i : order) {
    b.id = make_uint3(i % grid.x, i / grid.x % grid.y, i / (uint64_t(grid.x) * grid.y));
    run_block(b, smem, rng);
    if (b.failed) break;
  }
  block = nullptr;
  if (!b.failed) return;
#if defined(__SANITIZE_ADDRESS__)  // frames that were never left are still marked on these stacks
  for (const Fiber& t : b.threads) __asan_unpoison_memory_region(t.stack, kStackBytes);
#endif
  throw Error(b.error);
}

// A barrier orders memory; a shuffle or a vote does not, and the race detector is not told that it does.
EMU_INTERNAL void barrier(const Site& site, unsigned mask) {
#if defined(__SANITIZE_THREAD__)
  char* sync = mask ? &running().tsan_warp[current().warp] : &running().tsan_block;
  __tsan_release(sync);
#endif
  wait(site, mask);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(sync);
#endif
}

EMU_INTERNAL void exchange(const Site& site, unsigned mask, void* value, size_t bytes, int source) {
  Fiber& t = current();
  if (!(mask >> t.lane & 1)) fail("%s at line %d: the calling lane is not in the mask", site.what, site.line);
  Warp& w = running().warps[t.warp];
  Slot v{};
  for (size_t i = 0; i < bytes; ++i) reinterpret_cast<char*>(&v)[i] = static_cast<const char*>(value)[i];
  w.posted[t.lane] = v;
  wait(site, mask);
  if (source < 0) return;
  if (!(mask >> source & 1))
    fail("%s at line %d reads lane %d, which does not take part", site.what, site.line, source);
  v = w.result[source];
  for (size_t i = 0; i < bytes; ++i) static_cast<char*>(value)[i] = reinterpret_cast<char*>(&v)[i];
}

EMU_INTERNAL unsigned ballot(const Site& site, unsigned mask, bool p) {
  exchange(site, mask, &p, sizeof p, -1);
  const Warp& w = running().warps[current().warp];
  unsigned r = 0;
  for (int l = 0; l < kWarp; ++l)
    if (mask >> l & 1) r |= static_cast<unsigned>(w.result[l].word[0] & 1) << l;
  return r;
}

EMU_INTERNAL int count(const Site& site, bool p) {
  running().votes += p;
  barrier(site, 0);
  return running().votes_result;
}

// From inside a fiber: ends the launch. The fiber's stack is never unwound.
[[noreturn]] EMU_INTERNAL void fail(const char* format, ...) {
  char s[256];
  va_list args;
  va_start(args, format);
  std::vsnprintf(s, sizeof s, format, args);
  va_end(args);
  set_error(running(), where(self()) + ": " + s);
  finish();
  std::abort();
}

}  // namespace emu
