// The emulator itself, and reduce.cuh on it: right kernels give right results under three orders, wrong ones are found.
// With an argument, runs one kernel that only a sanitizer can object to (tests/test_simt.py expects its report).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "reduce.cuh"

namespace {
int passed = 0, failed = 0;

void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok) std::printf("FAIL %s\n", what.c_str());
}

template <typename F>
void check_error(const char* fragment, F&& f) {
  std::string got = "no error";
  try {
    f();
  } catch (const emu::Error& e) {
    got = e.what();
  }
  check(got.find(fragment) != std::string::npos, std::string("wanted '") + fragment + "', got: " + got);
}
}  // namespace

using mtlgrad::cuda::block_sum;
using mtlgrad::cuda::warp_sum;

// Two sums in a row through the same shared array, and the result wanted in every thread.
template <typename T>
__global__ void sums_kernel(const T* x, T* out) {
  const T v = x[blockIdx.x * blockDim.x + threadIdx.x];
  const T first = block_sum(v);
  const T second = block_sum(v * v);
  out[blockIdx.x * blockDim.x + threadIdx.x] = first + 1000 * second;
}

template <typename T>
void test_sums(int blocks, int threads) {
  const int n = blocks * threads;
  std::unique_ptr<T[]> x(new T[n]), out(new T[n]);
  for (int i = 0; i < n; ++i) x[i] = T(i % 7);  // sums of small integers: exact in any order
  KERNEL_LAUNCH((sums_kernel<T>), blocks, threads, 0, nullptr, x.get(), out.get());
  for (int b = 0; b < blocks; ++b) {
    T first = 0, second = 0;
    for (int i = 0; i < threads; ++i) first += x[b * threads + i], second += x[b * threads + i] * x[b * threads + i];
    for (int i = 0; i < threads; ++i) check(out[b * threads + i] == first + 1000 * second, "block_sum");
  }
}

// A tile through dynamic shared memory, two-dimensional blocks and grids.
template <typename T>
__global__ void transpose_kernel(const T* in, T* out, int rows, int cols) {
  DYNAMIC_SHARED(T, tile);
  const int c = blockIdx.x * blockDim.x + threadIdx.x, r = blockIdx.y * blockDim.y + threadIdx.y;
  if (r < rows && c < cols) tile[threadIdx.y * (blockDim.x + 1) + threadIdx.x] = in[r * cols + c];
  __syncthreads();
  const int oc = blockIdx.y * blockDim.y + threadIdx.x, orow = blockIdx.x * blockDim.x + threadIdx.y;
  if (orow < cols && oc < rows) out[orow * rows + oc] = tile[threadIdx.x * (blockDim.x + 1) + threadIdx.y];
}

template <typename T>
void test_transpose(int rows, int cols) {
  std::unique_ptr<T[]> in(new T[rows * cols]), out(new T[rows * cols]);
  for (int i = 0; i < rows * cols; ++i) in[i] = T(float(i % 251));
  const dim3 grid((cols + 15) / 16, (rows + 15) / 16), block(16, 16);
  KERNEL_LAUNCH((transpose_kernel<T>), grid, block, 16 * 17 * sizeof(T), nullptr, in.get(), out.get(), rows, cols);
  bool ok = true;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) ok = ok && float(out[c * rows + r]) == float(in[r * cols + c]);
  check(ok, "transpose");
}

// Shuffles, votes and the functions that kernels call without std::.
__global__ void warp_kernel(double* out, float4* quad) {
  const unsigned lane = threadIdx.x, all = 0xffffffffu;
  double bad = 0;
  bad += __shfl_sync(all, lane, 3) != 3;
  bad += __shfl_xor_sync(all, double(lane), 5) != double(lane ^ 5);
  bad += __shfl_down_sync(all, lane, 4) != (lane + 4 < 32 ? lane + 4 : lane);
  bad += __shfl_up_sync(all, lane, 4, 8) != (lane % 8 >= 4 ? lane - 4 : lane);
  if (lane < 16) bad += warpSize / 2 - __popc(__ballot_sync(0xffffu, lane < 16));  // half a warp on its own
  bad += __ballot_sync(all, lane % 2) != 0xaaaaaaaau;
  bad += !__any_sync(all, lane == 7) || __all_sync(all, lane == 7);
  bad += __syncthreads_count(lane < 5) != 5;
  bad += warp_sum(1.5) != 48.0;
  bad += min(3, 5u) != 3 || max(1.0f, NAN) != 1.0f || fmaxf(2.0f, 1.0f) != 2.0f || isnan(sqrtf(4.0f)) || isinf(1.0f);
  bad += expm1f(0.0f) != 0.0f || rsqrtf(4.0f) != 0.5f || __expf(0.0f) != 1.0f || fmaf(2.0f, 3.0f, 4.0f) != 10.0f;
  bad += __half2float(__float2half(1.5f)) != 1.5f || __bfloat162float(__float2bfloat16(2.5f)) != 2.5f;
  const float4 q = make_float4(lane, lane, lane, lane);
  quad[lane] = q;
  bad += __ldg(&quad[lane]).w != float(lane) || __float_as_int(1.0f) != 0x3f800000;
  atomicAdd(out, bad);
}

__global__ void leave_early_kernel() {
  if (threadIdx.x == 0) return;
  __syncthreads();
}
__global__ void divergent_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void absent_lane_kernel(int* out) {
  if (threadIdx.x < 16) *out = __shfl_sync(0xffffu, 1, 20);
}
__global__ void waiting_kernel(int* out) {
  if (threadIdx.x < 31) *out = __shfl_sync(0xffffffffu, 1, 0);
}
__global__ void unwritten_kernel(float* out) {
  __shared__ float never[32];
  out[threadIdx.x] = never[threadIdx.x];
}
__global__ void empty_kernel() {}
__global__ void deep_kernel(float* out) {
  volatile float local[40000];  // 160 KB on a thread's stack
  for (int i = 0; i < 40000; i += 1000) local[i] = float(i);
  out[threadIdx.x] = local[39000];
}

// For the sanitizers.
__global__ void overrun_kernel(float* out) {
  __shared__ float tile[32];
  const int next = threadIdx.x + 1;  // 32 for the last thread
  tile[threadIdx.x] = 1.0f;
  __syncthreads();
  const float* p = tile;
  out[threadIdx.x] = p[next];
}
__global__ void dynamic_overrun_kernel(float* out) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + 1];
}
__global__ void race_kernel(float* out) {
  __shared__ float tile[64];
  tile[threadIdx.x] = float(threadIdx.x);  // no barrier
  out[threadIdx.x] = tile[63 - threadIdx.x];
}
__global__ void shuffle_is_no_barrier_kernel(float* out) {
  __shared__ float tile[32];
  tile[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
  __shfl_sync(0xffffffffu, 1.0f, 0);
  out[threadIdx.x] = tile[31 - threadIdx.x];
}

int main(int argc, char** argv) {
  std::unique_ptr<float[]> f(new float[64]());
  int i = 0;
  if (argc > 1) {
    const std::string wrong = argv[1];
    if (wrong == "overrun") KERNEL_LAUNCH((overrun_kernel), 1, 32, 0, nullptr, f.get());
    if (wrong == "dynamic_overrun") KERNEL_LAUNCH((dynamic_overrun_kernel), 1, 32, 32 * 4, nullptr, f.get());
    if (wrong == "race") KERNEL_LAUNCH((race_kernel), 1, 64, 0, nullptr, f.get());
    if (wrong == "shuffle_is_no_barrier") KERNEL_LAUNCH((shuffle_is_no_barrier_kernel), 1, 32, 0, nullptr, f.get());
    return 0;
  }
  for (auto order : {emu::Order::forward, emu::Order::backward, emu::Order::random}) {
    emu::options.order = order;
    for (int threads : {32, 64, 256, 1024}) test_sums<float>(3, threads), test_sums<double>(3, threads);
    for (int n : {1, 15, 16, 17, 40})
      test_transpose<float>(n, 2 * n + 1), test_transpose<__half>(n, n), test_transpose<__nv_bfloat16>(2 * n + 1, n);
    double bad = 0;
    alignas(16) float4 quad[32];
    KERNEL_LAUNCH((warp_kernel), 1, 32, 0, nullptr, &bad, quad);
    check(bad == 0, "warp_kernel");
    check_error("after 1 threads of the block returned",
                [] { KERNEL_LAUNCH((leave_early_kernel), 1, 64, 0, nullptr); });
    check_error("barrier divergence", [] { KERNEL_LAUNCH((divergent_kernel), 1, 64, 0, nullptr); });
    check_error("reads lane 20, which does not take part",
                [&] { KERNEL_LAUNCH((absent_lane_kernel), 1, 32, 0, nullptr, &i); });
    check_error("deadlock", [&] { KERNEL_LAUNCH((waiting_kernel), 1, 32, 0, nullptr, &i); });
  }
  KERNEL_LAUNCH((unwritten_kernel), 1, 32, 0, nullptr, f.get());
  check(isnan(f[0]) && isnan(f[31]), "shared memory starts as NaN");
  KERNEL_LAUNCH((deep_kernel), 1, 32, 0, nullptr, f.get());
  check(f[5] == 39000.0f, "deep_kernel");
  check_error("2048 threads", [] { KERNEL_LAUNCH((empty_kernel), 1, 2048, 0, nullptr); });
  check_error("empty grid", [] { KERNEL_LAUNCH((empty_kernel), 0u, 32, 0, nullptr); });
  check_error("grid.y", [] { KERNEL_LAUNCH((empty_kernel), dim3(1, 65536), 32, 0, nullptr); });
  check_error("without opting in", [] { KERNEL_LAUNCH((empty_kernel), 1, 32, 100000, nullptr); });
  check(cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000) == cudaSuccess,
        "opt in");
  KERNEL_LAUNCH((empty_kernel), 1, 32, 100000, nullptr);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
