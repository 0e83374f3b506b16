// The second stage of a dispatch to layout expert: rows that arrived once a (source rank, token) are written to the
// place of each of their local experts. Rank-major order in, so ranks among an expert's rows come out right.
#include "cuda/launch.h"
#include "cuda/layout.cuh"
#include "cuda/send.cuh"
#include "cuda/wait.cuh"

namespace moe_ep {
namespace gpu {
namespace {

struct ExpandShared {
  Destination* destination;
  std::uint64_t* barriers;
  std::uint8_t* scratch;

  __host__ __device__ static std::size_t fixed_bytes(const Pipeline& pipeline) {
    return align_up(sizeof(Destination) + ring_side_bytes(pipeline, false), 128);
  }
  __device__ ExpandShared(std::uint8_t* base, const Pipeline& pipeline) {
    destination = reinterpret_cast<Destination*>(base);
    barriers = reinterpret_cast<std::uint64_t*>(destination + 1);
    scratch = base + fixed_bytes(pipeline);
  }
};

template <class Path>
__global__ void __launch_bounds__(kThreads, 1) expand_kernel(const __grid_constant__ ExpandParams params) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  DeviceState* state = params.group.state;
  if (load_relaxed_device(&state->failed) != 0) return;
  const ExpandShared shared(memory, params.pipeline);
  const std::int64_t received = params.routing.header->received_rows;
  const Span span = share_of(received, blockIdx.x, gridDim.x);
  const Routes routes{params.local_ids, nullptr, received, params.topk, params.num_local_experts, 1};
  const int count_warps = params.pipeline.count_warps;
  if (state->given_up == state->sequence) {
    const Destination all = destination_of(params.block, params.sizes, params.num_rows);
    const std::int64_t warp = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    for (std::int64_t row = warp; row < params.num_rows; row += static_cast<std::int64_t>(gridDim.x) * kWarps) {
      clear_row(all, params.sizes, row);
    }
    return;
  }
  if (params.fresh) {
    const int bins = routes.bins();
    auto* counters = reinterpret_cast<std::int32_t*>(shared.scratch);
    std::int32_t* first = counters + static_cast<std::size_t>(count_warps) * bins;
    count_routes(routes, span, count_warps, counters, params.ids, &state->bad_route);
    publish_block_counts(routes, count_warps, counters, params.group.block_counts);
    std::int32_t* block_counts = params.group.block_counts;
    const std::uint32_t mark = mark_of(state->sequence, Pass::kExpand);
    arrive_at_blocks(params.group, mark, [&] {
      for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) counts_to_prefixes(block_counts, bins, bin, gridDim.x);
    });
    if (!wait_for_blocks(params.group, mark)) return;
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
      const std::int64_t start = bin < params.num_local_experts ? params.routing.local_first[bin] : 0;
      first[bin] = static_cast<std::int32_t>(start) +
                   load_cached_in_l2(block_counts + static_cast<std::size_t>(blockIdx.x) * bins + bin);
    }
    __syncthreads();
    counts_to_slots(bins, count_warps, first, counters);
    assign_slots(routes, span, false, count_warps, counters, params.ids, params.fan);
    arrive_at_blocks(params.group, mark_of(state->sequence, Pass::kSend));
  }
  if (threadIdx.x == 0) *shared.destination = destination_of(params.block, params.sizes, params.num_rows);
  __syncthreads();
  clear_padding(*shared.destination, params.sizes, params.routing, RowLayout::kExpert, params.num_local_experts,
                params.group.alignment, params.num_rows);
  const SendJob job{params.source, params.sizes, received, params.fan,         nullptr,          nullptr,
                    nullptr,       params.topk,  false,    shared.destination, &state->next_item};
  const auto ready = [&] {
    return !params.fresh || wait_for_blocks(params.group, mark_of(state->sequence, Pass::kSend));
  };
  if (!send_rows<Path>(job, params.pipeline, SendRing{shared.scratch, shared.barriers, nullptr}, ready)) return;
  if (is_last_block(&state->blocks[1]) && threadIdx.x == 0) state->next_item = 0;
}

}  // namespace

std::size_t expand_shared_bytes(const ExpandParams& params) {
  const Pipeline& pipeline = params.pipeline;
  const std::size_t bins = static_cast<std::size_t>(params.num_local_experts) + 1;
  const std::size_t counters = params.fresh ? bins * (pipeline.count_warps + 1) * sizeof(std::int32_t) : 0;
  const std::size_t ring = ring_bytes(pipeline, false);
  return ExpandShared::fixed_bytes(pipeline) + (counters > ring ? counters : ring);
}

// What arrives is copied as it is, so there are two paths only.
cudaError_t prepare_expand(std::size_t most_shared_bytes) {
  const int bytes = static_cast<int>(most_shared_bytes);
  const cudaError_t error =
      cudaFuncSetAttribute(expand_kernel<BulkCopy>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(expand_kernel<AnyRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

cudaError_t launch_expand(const ExpandParams& params, int blocks, cudaStream_t stream) {
  const auto kernel = params.pipeline.use_bulk ? expand_kernel<BulkCopy> : expand_kernel<AnyRows>;
  kernel<<<blocks, kThreads, expand_shared_bytes(params), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace gpu
}  // namespace moe_ep
