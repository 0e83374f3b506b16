// Launchers of the kernels, one file each. They return CUDA's error code and start nothing that waits for the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cuda/state.h"

namespace moe_ep {
namespace gpu {

// Shared memory that a kernel needs.
std::size_t dispatch_shared_bytes(const DispatchParams& params);
std::size_t expand_shared_bytes(const ExpandParams& params);

// Allows kernels the device's largest shared memory; once per process and device.
cudaError_t prepare_dispatch(std::size_t most_shared_bytes);
cudaError_t prepare_expand(std::size_t most_shared_bytes);
cudaError_t prepare_combine(std::size_t most_shared_bytes);

cudaError_t launch_dispatch(const DispatchParams& params, int blocks, cudaStream_t stream);
cudaError_t launch_expand(const ExpandParams& params, int blocks, cudaStream_t stream);
cudaError_t launch_combine(const CombineParams& params, int blocks, cudaStream_t stream);
cudaError_t launch_reduce(const ReduceParams& params, int blocks, cudaStream_t stream);

}  // namespace gpu
}  // namespace moe_ep
