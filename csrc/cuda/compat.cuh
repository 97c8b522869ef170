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
#endif
