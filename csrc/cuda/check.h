// CUDA's error codes as exceptions that say where and in which call.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "common/errors.h"

namespace moe_ep {
namespace gpu {

inline void check(cudaError_t code, const char* call, const char* file, int line) {
  if (code == cudaSuccess) return;
  const std::string path = file;
  throw Error(ErrorKind::kDevice, path.substr(path.rfind('/') + 1) + ":" + std::to_string(line) + ": " + call +
                                      " returned " + cudaGetErrorName(code) + ": " + cudaGetErrorString(code));
}

// Makes a device the current one for a while: kernels and events go where the heap is, whatever the caller's is.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess || before_ == device) return;
    changed_ = cudaSetDevice(device) == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace gpu
}  // namespace moe_ep

#define MOE_EP_CUDA_CHECK(call) ::moe_ep::gpu::check((call), #call, __FILE__, __LINE__)
