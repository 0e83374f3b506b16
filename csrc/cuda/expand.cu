// The second stage of a dispatch to layout expert: rows that arrive once a (source rank, token) are written to the
// places of their local experts, which came with them. It runs beside the first stage where that tells what it has
// sent.
#include "cuda/exchange.cuh"
#include "cuda/launch.h"
#include "cuda/send.cuh"

namespace moe_ep {
namespace gpu {
namespace {

constexpr Operation kOperation = Operation::kDispatch;
constexpr int kPartLog2 = 6;  // rows from one rank, before rows from the next

struct ExpandShared {
  Destination* destination;
  std::int64_t* first_from;  // [num_ranks]
  std::int64_t* rows_from;   // [num_ranks]
  std::uint64_t* barriers;
  std::uint8_t* scratch;

  __host__ __device__ static std::size_t fixed_bytes(int num_ranks, const Pipeline& pipeline) {
    return align_up(sizeof(Destination) + 2 * num_ranks * sizeof(std::int64_t) + ring_side_bytes(pipeline, false), 128);
  }
  __device__ ExpandShared(std::uint8_t* base, int num_ranks, const Pipeline& pipeline) {
    destination = reinterpret_cast<Destination*>(base);
    first_from = reinterpret_cast<std::int64_t*>(destination + 1);
    rows_from = first_from + num_ranks;
    barriers = reinterpret_cast<std::uint64_t*>(rows_from + num_ranks);
    scratch = base + fixed_bytes(num_ranks, pipeline);
  }
};

// Rows of the block as they arrive, to the places of their experts.
struct ExpandJob : SendJob {
  PartsWalk walk;
  Progress progress;
  const ExpandParams& params;

  __device__ std::int64_t row(std::int32_t place) const { return walk.row(walk.at(place)); }
  __device__ void await(std::int32_t place) {
    if (!params.awaits_parts) return;
    const PartsWalk::Place at = walk.at(place);
    const bool some = at.index < walk.rows_from[at.rank];
    progress.await(at.rank, some ? static_cast<std::uint32_t>(at.index) + 1 : 0);
  }
  __device__ Entry entry(std::int64_t row) const {
    // A place that has not come is any number.
    if (progress.failed) return Entry{-1, -1, -1};
    if (!params.fresh) return SendJob::entry(row);
    const int lane = threadIdx.x & 31;
    const std::int64_t slot = lane < topk ? load_cached_in_l2(params.slots + row * topk + lane) : -1;
    // Those that are there, moved to the front.
    unsigned left = __ballot_sync(0xffffffffu, slot >= 0);
    int from = -1;
    for (int i = 0; left != 0; ++i, left &= left - 1) {
      if (i == lane) from = __ffs(static_cast<int>(left)) - 1;
    }
    const auto moved = static_cast<std::int32_t>(__shfl_sync(0xffffffffu, slot, from & 31));
    return from < 0 ? Entry{-1, -1, -1} : Entry{moved, 0, static_cast<std::int16_t>(from)};
  }
  // For later calls with the handle, and for the sums on the way back.
  __device__ void keep(std::int64_t row, const Entry& entry) const {
    const int lane = threadIdx.x & 31;
    if (params.fresh && lane < topk) params.fan[row * topk + lane] = entry;
  }
};

// Number of the dispatch that this is the second stage of, which may not have begun, or be over.
__device__ std::uint64_t number_of_dispatch(const DeviceState* state) {
  const std::uint64_t done = load_acquire_system(&state->sequence);
  const std::uint64_t sending = load_acquire_system(&state->sending);
  return sending != 0 ? sending : done + 1;
}

// One thread: waits for the dispatch itself, which is the one to say for which rank it waited too long.
__device__ bool has_begun(const Group& group, std::uint64_t sequence) {
  Group patient = group;
  patient.timeout_ns *= 2;
  return wait_for(patient, Step::kSent, group.rank, progress_flag(sequence, 0), kOperation);
}

template <class Path>
__global__ void __launch_bounds__(kThreads, 1) expand_kernel(const __grid_constant__ ExpandParams params) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  const Group& group = params.group;
  DeviceState* state = group.state;
  if (load_relaxed_device(&state->failed) != 0) return;
  const ExpandShared shared(memory, group.num_ranks, params.pipeline);
  std::uint64_t sequence = state->sequence;
  if (params.awaits_parts) {
    sequence = number_of_dispatch(state);
    // The first part that this rank has sent comes after everything that is known of what it will receive.
    if (__syncthreads_and(threadIdx.x != 0 || has_begun(group, sequence)) == 0) return;
  }
  const Destination all = destination_of(params.block, params.sizes, params.num_rows);
  if (load_relaxed_device(&state->given_up) == sequence) {
    const std::int64_t warp = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    for (std::int64_t row = warp; row < params.num_rows; row += static_cast<std::int64_t>(gridDim.x) * kWarps) {
      clear_row(all, params.sizes, row);
    }
  } else {
    if (threadIdx.x == 0) {
      *shared.destination = all;
      std::int64_t next = 0;
      for (int rank = 0; rank < group.num_ranks; ++rank) {
        shared.first_from[rank] = next;
        shared.rows_from[rank] = load_cached_in_l2(params.routing.rows_from + rank);
        next += shared.rows_from[rank];
      }
    }
    __syncthreads();
    clear_padding(all, params.sizes, params.routing, RowLayout::kExpert, params.num_local_experts, group.alignment,
                  params.num_rows);
    const PartsWalk walk{shared.first_from, shared.rows_from, group.num_ranks, kPartLog2};
    const Progress progress(group, Step::kSent, kOperation, sequence);
    ExpandJob job{{params.source, params.sizes, walk.places(), params.fan, nullptr, nullptr, nullptr, params.topk,
                   false, shared.destination, &state->next_place},
                  walk,
                  progress,
                  params};
    send_rows<Path>(job, params.pipeline, SendRing{shared.scratch, shared.barriers, nullptr}, [] { return true; });
  }
  if (is_last_block(&state->blocks[2]) && threadIdx.x == 0) {
    state->next_place = 0;
    state->sending = 0;
  }
}

}  // namespace

std::size_t expand_shared_bytes(const ExpandParams& params) {
  return ExpandShared::fixed_bytes(params.group.num_ranks, params.pipeline) + ring_bytes(params.pipeline, false);
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
