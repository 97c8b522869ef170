#pragma once
#include "compat.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"

#define MTLGRAD_CUDA_CHECK(expr)                                                                                      \
  do {                                                                                                                \
    const cudaError_t err_ = (expr);                                                                                  \
    if (err_ != cudaSuccess)                                                                                          \
      throw std::runtime_error(std::string(#expr) + ": " + cudaGetErrorName(err_) + ": " + cudaGetErrorString(err_)); \
  } while (0)

namespace mtlgrad::cuda {

// Makes `device` current for the launch and puts the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    MTLGRAD_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device != previous_)
      MTLGRAD_CUDA_CHECK(cudaSetDevice(device));
    else
      previous_ = -1;
  }
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

// body(typed null pointer) for the type behind `dtype`.
template <typename Body>
void for_dtype(const char* kernel, DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(static_cast<float*>(nullptr));
    case DType::f64: return body(static_cast<double*>(nullptr));
    default: throw std::invalid_argument(std::string(kernel) + " (cuda): float32 and float64 only");
  }
}

constexpr int64_t kMaxGridY = 65535;

// Blocks for `elements` at a thread each, in a kernel that strides on over the rest.
inline unsigned blocks_for(int64_t elements, int threads) {
  return static_cast<unsigned>(std::min<int64_t>((elements + threads - 1) / threads, 1 << 16));
}

// Writing moments, tasks may go to blocks of their own; accumulating, one block owns an example's sums.
inline unsigned task_blocks(const Output& output, int64_t tasks) {
  return static_cast<unsigned>(output.numerator ? 1 : std::min(tasks, kMaxGridY));
}

}  // namespace mtlgrad::cuda
