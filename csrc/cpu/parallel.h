// What every CPU kernel needs: threads handed in, vector width chosen at run time, a switch over the two float types.
#pragma once
#include <stdexcept>

#include "kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// One function body, three machine codes, chosen when the library is loaded: a wheel for plain x86-64 then uses AVX2 or
// AVX-512 where there is one. By level, not by processor: a clone for "arch=haswell" serves Haswells alone, and leaves
// every later machine the plain code. The attribute covers what is inlined into the function, not what OpenMP outlines
// from it, so it stands on functions without parallel regions. Sanitizers run before the choice is possible.
//
// MTLGRAD_BY_WIDTH(define) does the same for a body that is written in vectors: define(attribute, bytes) defines one of
// the functions, in vectors of so many bytes, the machine's own. The compiler takes wider ones apart, and badly.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MTLGRAD_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define MTLGRAD_BY_WIDTH(define)                                                                       \
  define(__attribute__((target("default"))), 16) define(__attribute__((target("arch=x86-64-v3"))), 32) \
      define(__attribute__((target("arch=x86-64-v4"))), 64)
#else
#define MTLGRAD_CLONES
#define MTLGRAD_BY_WIDTH(define) define(, 16)
#endif

namespace mtlgrad::cpu {

// A function of its own, so that its code is there once.
template <typename Body>
__attribute__((noinline)) void serial_for(int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end; ++i) body(i);
}

// body(i) for i in [0, n), a contiguous share for each thread. One thread is no parallel region: libgomp makes a system
// call for each, with an `if` clause too.
template <typename Body>
void parallel_for(int64_t n, [[maybe_unused]] int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && n > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), one = omp_get_thread_num();
      serial_for(n * one / team, n * (one + 1) / team, body);
    }
    return;
  }
#endif
  serial_for(0, n, body);
}

// body(typed null pointer) for the type behind `dtype`.
template <typename Body>
void for_dtype(const char* kernel, DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(static_cast<float*>(nullptr));
    case DType::f64: return body(static_cast<double*>(nullptr));
    default: throw std::invalid_argument(std::string(kernel) + " (cpu): float32 and float64 only");
  }
}

}  // namespace mtlgrad::cpu
