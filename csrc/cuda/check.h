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

}  // namespace gpu
}  // namespace moe_ep

#define MOE_EP_CUDA_CHECK(call) ::moe_ep::gpu::check((call), #call, __FILE__, __LINE__)
