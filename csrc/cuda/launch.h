// Launchers of the kernels, one file each. They return CUDA's error code and start nothing that waits for the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cuda/low_state.h"
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

// Low-latency mode.
// Fills in what follows from the rest; returns the shared memory that it takes.
std::size_t complete_low_dispatch(LowDispatchParams& params, int blocks);
std::size_t complete_low_combine(LowCombineParams& params);
cudaError_t prepare_low_dispatch(std::size_t most_shared_bytes);
cudaError_t prepare_low_combine(std::size_t most_shared_bytes);
// Without the send half, one block that waits.
cudaError_t launch_low_dispatch(const LowDispatchParams& params, int blocks, cudaStream_t stream);
cudaError_t launch_low_combine(const LowCombineParams& params, int blocks, cudaStream_t stream);
// Leaves out the ranks `first` + i whose bit i is set, from the next operation on.
cudaError_t launch_low_mask(const LowGroup& low, std::uint64_t ranks, int first, cudaStream_t stream);

// Launches a kernel that calls wait_for_stream() before it writes memory, or reads what other kernels may write: on
// sm_90 and later its launch need not wait for the end of what comes before it in the stream.
template <class... Parameters>
cudaError_t launch_early(void (*kernel)(Parameters...), int blocks, int threads, std::size_t shared_bytes,
                         cudaStream_t stream, bool early, const Parameters&... parameters) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

}  // namespace gpu
}  // namespace moe_ep
