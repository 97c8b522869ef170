#pragma once
#include "compat.cuh"

#include <stdexcept>
#include <string>

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

}  // namespace mtlgrad::cuda
