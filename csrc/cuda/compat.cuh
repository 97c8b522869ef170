// The two things that a C++ compiler cannot parse, as macros: nvcc gets CUDA's syntax, the host emulator its own.
#pragma once
#ifdef MTLGRAD_EMULATE
#include "cuda_emu.h"
#else
#include <cuda_runtime.h>
#define DYNAMIC_SHARED(T, name) extern __shared__ T name[]
#define EMU_UNPAREN(...) __VA_ARGS__
#define KERNEL_LAUNCH(kernel, grid, block, smem, stream, ...) \
  EMU_UNPAREN kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#include <cuda_pipeline_primitives.h>
#endif

namespace mtlgrad::cuda {

// Where copies into shared memory go: operator()(i, from) asks for *from to be copied to element i behind the thread's
// back. The thread may read it after await_copies(), others after a barrier behind that. On a device it holds the address
// in shared memory's own window, which __pipeline_memcpy_async would work out anew for every copy.
template <typename T>
class AsyncCopies {
 public:
#ifdef MTLGRAD_EMULATE
  explicit AsyncCopies(T* to) : to_(to) {}
  void operator()(int i, const T* from) const { __pipeline_memcpy_async(to_ + i, from, sizeof(T)); }

 private:
  T* to_;
#else
  __device__ __forceinline__ explicit AsyncCopies(T* to) : to_(static_cast<unsigned>(__cvta_generic_to_shared(to))) {}
  __device__ __forceinline__ void operator()(int i, const T* from) const {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to_ + i * static_cast<unsigned>(sizeof(T))),
                 "l"(from), "n"(sizeof(T))
                 : "memory");
  }

 private:
  unsigned to_;
#endif
};

__device__ __forceinline__ void await_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

}  // namespace mtlgrad::cuda
