// Placeholder: the lead writes this driver.
#include "cuda_emu.h"
#include "kernels.h"

int main() {
  std::puts("0 passed, 0 failed");
  return mtlgrad::cuda::device_count() == 1 ? 0 : 1;
}
