// Combine: tell peers where this rank's rows are, read every token's rows where they lie, sum them, and hear that
// all peers have read theirs. Beside it the local reduction that comes first in two stages.
#include "cuda/exchange.cuh"
#include "cuda/launch.h"
#include "cuda/parts.cuh"
#include "cuda/reduce.cuh"

namespace moe_ep {
namespace gpu {
namespace {

constexpr Operation kOperation = Operation::kCombine;

struct CombineShared {
  static constexpr int kTables = 5;
  const std::uint8_t** rows;  // [num_ranks]
  const float** weights;      // [num_ranks]
  const float** values;       // [num_ranks]
  std::int64_t* run_first;    // [num_ranks] of the rows that a rank has for another, in the block where they lie
  std::int64_t* run_rows;     // [num_ranks]
  std::uint64_t* barriers;
  std::uint8_t* stages;

  __host__ __device__ static std::size_t fixed_bytes(int num_ranks, const Pipeline& pipeline) {
    return align_up((kTables * static_cast<std::size_t>(num_ranks) + pipeline.warps * pipeline.stages) * sizeof(void*),
                    128);
  }
  __device__ CombineShared(std::uint8_t* base, int num_ranks, const Pipeline& pipeline) {
    rows = reinterpret_cast<const std::uint8_t**>(base);
    weights = reinterpret_cast<const float**>(rows + num_ranks);
    values = weights + num_ranks;
    run_first = reinterpret_cast<std::int64_t*>(values + num_ranks);
    run_rows = run_first + num_ranks;
    barriers = reinterpret_cast<std::uint64_t*>(run_rows + num_ranks);
    stages = base + fixed_bytes(num_ranks, pipeline);
  }
};

std::size_t shared_bytes(const Pipeline& pipeline, int num_ranks, int stage_rows) {
  const std::size_t stage = static_cast<std::size_t>(stage_rows) * pipeline.chunk_bytes;
  const std::size_t ring = pipeline.use_bulk ? static_cast<std::size_t>(pipeline.warps) * pipeline.stages * stage : 0;
  return CombineShared::fixed_bytes(num_ranks, pipeline) + ring;
}

__device__ void post_rows(const CombineParams& params, std::uint64_t sequence) {
  __shared__ OperationPost post;
  if (threadIdx.x == 0) {
    post = OperationPost{};
    post.operation = static_cast<std::int64_t>(kOperation);
    post.layout = static_cast<std::int64_t>(params.layout);
    post.element = static_cast<std::int64_t>(params.element);
    post.row_bytes = static_cast<std::int64_t>(params.hidden * element_bytes(params.element));
    post.topk = params.topk;
    post.has_weights = params.has_weights;
    post.has_values = params.has_values;
    post.routing_id = static_cast<std::int64_t>(params.routing.header->id);
    post.block_offset = params.rows_offset;
    post.block_bytes = params.block_bytes;
    post.side_offset = params.weights_offset;
    post.values_offset = params.values_offset;
  }
  __syncthreads();
  publish_post(params.group, sequence, post, nullptr, 0);
}

// Values of this rank's tokens, from beside the rows.
__device__ void gather_values(const CombineParams& params, const float* const* values) {
  const std::int64_t all = params.num_tokens * params.topk;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += step) {
    const std::int64_t token = i / params.topk;
    const int position = static_cast<int>(i % params.topk);
    const std::int32_t expert = params.routing.ids[i];
    const int expert_rank = expert >= 0 ? params.group.rank_of_expert[expert] : -1;
    float value = 0.0f;
    for (int j = 0; j < params.topk && expert_rank >= 0; ++j) {
      const Entry entry = params.routing.entries[token * params.topk + j];
      if (entry.rank < 0) break;
      if (params.deduplicated ? entry.rank != expert_rank : entry.position != position) continue;
      const std::size_t slot = static_cast<std::size_t>(entry.slot);
      value = load_cached_in_l2(values[entry.rank] + (params.deduplicated ? slot * params.topk + position : slot));
      break;
    }
    params.values_out[i] = value;
  }
}

// A combine that all ranks give up gives zeros.
__device__ void clear_results(const CombineParams& params) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto vectors =
      static_cast<std::int64_t>(params.num_tokens * params.hidden * element_bytes(params.element) / sizeof(uint4));
  for (std::int64_t i = first; i < vectors; i += step) reinterpret_cast<uint4*>(params.out)[i] = make_uint4(0, 0, 0, 0);
  for (std::int64_t i = first; params.has_values && i < params.num_tokens * params.topk; i += step) {
    params.values_out[i] = 0.0f;
  }
}

// All threads of a block. False: a rank's first part, with which its values come, was waited for in vain.
__device__ bool await_values(const Group& group, std::uint64_t sequence, const std::int64_t* sent_rows) {
  bool ok = true;
  for (int rank = threadIdx.x; rank < group.num_ranks; rank += blockDim.x) {
    if (sent_rows[rank] > 0) {
      ok = wait_for(group, Step::kReduced, rank, progress_flag(sequence, 1), kOperation) && ok;
    }
  }
  return __syncthreads_and(ok) != 0;
}

// One thread, before the operation ends: no part is told under a later one's number.
__device__ void await_own_parts(const CombineParams& params, std::uint64_t sequence) {
  const Group& group = params.group;
  const int parts = most_parts(params.routing.rows_from, group.num_ranks, params.part_log2);
  const auto all = progress_flag(sequence, static_cast<std::uint32_t>(parts));
  if (parts > 0) wait_for_progress(group, Step::kReduced, group.rank, all, kOperation);
}

template <class R, bool kAwaits>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(const __grid_constant__ CombineParams params) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  __shared__ Verdict verdict;
  const Group& group = params.group;
  if (load_relaxed_device(&group.state->failed) != 0) return;
  const std::uint64_t sequence = group.state->sequence + 1;
  const CombineShared shared(memory, group.num_ranks, params.pipeline);
  if (blockIdx.x == 0) post_rows(params, sequence);
  if (!wait_for_all(group, Step::kPost, sequence, kOperation)) return;
  judge_posts(group, sequence, verdict);
  if (threadIdx.x == 0 && verdict.outcome == Outcome::kOk) {
    for (int rank = 0; rank < group.num_ranks && verdict.outcome == Outcome::kOk; ++rank) {
      const std::int64_t bytes = post_field(group, sequence, rank, &OperationPost::block_bytes);
      if (bytes < 0) verdict = Verdict{Outcome::kNoRoom, {rank, 0, bytes, 0}};
    }
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0 && verdict.outcome != Outcome::kOk) {
    report_verdict(group, verdict, kOperation, sequence, 0);
  }
  if (is_fatal(verdict.outcome)) return;
  const bool goes_on = verdict.outcome == Outcome::kOk;
  if (goes_on) {
    for (int rank = threadIdx.x; rank < group.num_ranks; rank += blockDim.x) {
      const std::uint8_t* heap = group.bases[rank];
      const bool elsewhere = rank == group.rank && params.own_rows != nullptr;
      shared.rows[rank] =
          elsewhere ? params.own_rows : heap + post_field(group, sequence, rank, &OperationPost::block_offset);
      shared.weights[rank] =
          reinterpret_cast<const float*>(heap + post_field(group, sequence, rank, &OperationPost::side_offset));
      shared.values[rank] =
          reinterpret_cast<const float*>(heap + post_field(group, sequence, rank, &OperationPost::values_offset));
      if constexpr (kAwaits) {
        shared.run_first[rank] = params.routing.sent_first[rank];
        shared.run_rows[rank] = params.routing.sent_rows[rank];
      }
    }
    __syncthreads();
    if (!kAwaits && params.has_values) gather_values(params, shared.values);
    const ReduceJob job{{},
                        params.routing.entries,
                        params.num_tokens,
                        params.topk,
                        params.most_entries,
                        params.hidden,
                        shared.rows,
                        params.weights_at_rows ? shared.weights : nullptr,
                        params.out};
    const ReduceRing ring{shared.stages, shared.barriers};
    if constexpr (kAwaits) {
      const Progress progress(group, Step::kReduced, kOperation, sequence);
      AwaitingJob awaiting(job, progress, shared.run_first, params.part_log2);
      reduce_rows<R>(awaiting, params.pipeline, ring);
      if (params.has_values && await_values(group, sequence, shared.run_rows)) gather_values(params, shared.values);
    } else {
      reduce_rows<R>(job, params.pipeline, ring);
    }
  }
  if (!goes_on) clear_results(params);
  // The caller may write its rows again once every peer has read them.
  if (is_last_block(&group.state->blocks[1])) {
    if constexpr (kAwaits) {
      if (threadIdx.x == 0 && params.reduces) await_own_parts(params, sequence);
      __syncthreads();
    }
    finish_operation(group, Step::kRead, sequence, kOperation, goes_on);
  }
}

template <class R>
__global__ void __launch_bounds__(kThreads, 1) reduce_kernel(const __grid_constant__ ReduceParams params) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  const Group& group = params.group;
  // What a failed dispatch left is no routing.
  if (load_relaxed_device(&group.state->failed) != 0) return;
  const CombineShared shared(memory, group.num_ranks, params.pipeline);
  if (threadIdx.x == 0) {
    shared.rows[0] = params.rows;
    shared.weights[0] = params.weights;
    std::int64_t next = 0;
    for (int rank = 0; rank < group.num_ranks; ++rank) {
      const std::int64_t rows = params.routing.rows_from[rank];
      shared.run_first[rank] = next;
      shared.run_rows[rank] = rows;
      next += rows;
    }
  }
  __syncthreads();
  const std::int64_t received = params.routing.header->received_rows;
  const ReduceJob job{{},
                      params.fan,
                      received,
                      params.topk,
                      params.stage_rows,
                      params.hidden,
                      shared.rows,
                      params.weights != nullptr ? shared.weights : nullptr,
                      params.out};
  if (params.values != nullptr) {
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
    for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < received;
         row += step) {
      float* out = params.values_out + row * params.topk;
      for (int j = 0; j < params.topk; ++j) out[j] = 0.0f;
      for (int j = 0; j < params.topk; ++j) {
        const Entry entry = params.fan[row * params.topk + j];
        if (entry.rank >= 0) out[entry.position] = params.values[entry.slot];
      }
    }
    // Told with the first part, by warps that need not be those that wrote them.
    __syncthreads();
  }
  const PartsWalk walk{shared.run_first, shared.run_rows, group.num_ranks, params.part_log2};
  PartsJob in_parts(job, group, walk, params.tells_parts);
  reduce_rows<R, true>(in_parts, params.pipeline, ReduceRing{shared.stages, shared.barriers});
}

// Calls `visit` with the Reduction that fits. Wide chunks of few rows keep as many bytes in flight.
template <class Visit>
cudaError_t visit_reduction(Element element, bool plain, int chunk_bytes, Visit&& visit) {
  return visit_element_on_host(element, [&](auto tag) -> cudaError_t {
    using T = decltype(tag);
    if (plain && chunk_bytes == kWideReduceChunk) return visit(Reduction<T, kWideReduceChunk / 512, true>{});
    if (plain && chunk_bytes == kReduceChunk) return visit(Reduction<T, kReduceChunk / 512, true>{});
    if (!plain && chunk_bytes == kReduceChunk) return visit(Reduction<T, kReduceChunk / 512, false>{});
    if (!plain && chunk_bytes == kWideReduceChunk) return visit(Reduction<T, kWideReduceChunk / 512, false>{});
    return cudaErrorInvalidValue;
  });
}

// Wide chunks with weights are for a first stage, which splits tokens that have many rows.
template <class R>
constexpr bool kCombines = R::kPlain || R::kChunk == kReduceChunk;

}  // namespace

cudaError_t prepare_combine(std::size_t most_shared_bytes) {
  const int bytes = static_cast<int>(most_shared_bytes);
  for (const Element element : {Element::kFloat32, Element::kBFloat16, Element::kFloat16}) {
    for (const bool plain : {false, true}) {
      for (const int chunk : {kReduceChunk, kWideReduceChunk}) {
        const cudaError_t error = visit_reduction(element, plain, chunk, [&](auto reduction) {
          using R = decltype(reduction);
          constexpr auto kMost = cudaFuncAttributeMaxDynamicSharedMemorySize;
          cudaError_t set = cudaFuncSetAttribute(reduce_kernel<R>, kMost, bytes);
          if constexpr (kCombines<R>) {
            if (set == cudaSuccess) set = cudaFuncSetAttribute(combine_kernel<R, false>, kMost, bytes);
          }
          if constexpr (R::kPlain) {
            if (set == cudaSuccess) set = cudaFuncSetAttribute(combine_kernel<R, true>, kMost, bytes);
          }
          return set;
        });
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

cudaError_t launch_combine(const CombineParams& params, int blocks, cudaStream_t stream) {
  const std::size_t shared = shared_bytes(params.pipeline, params.group.num_ranks, params.most_entries);
  const bool plain = params.deduplicated && !params.weights_at_rows;
  return visit_reduction(params.element, plain, params.pipeline.chunk_bytes, [&](auto reduction) {
    using R = decltype(reduction);
    // In two stages weights are applied before rows cross.
    if constexpr (R::kPlain) {
      if (params.awaits_parts) {
        combine_kernel<R, true><<<blocks, kThreads, shared, stream>>>(params);
        return cudaGetLastError();
      }
    }
    if constexpr (kCombines<R>) {
      combine_kernel<R, false><<<blocks, kThreads, shared, stream>>>(params);
      return cudaGetLastError();
    }
    return cudaErrorInvalidValue;
  });
}

cudaError_t launch_reduce(const ReduceParams& params, int blocks, cudaStream_t stream) {
  const std::size_t shared = shared_bytes(params.pipeline, params.group.num_ranks, params.stage_rows);
  const bool plain = params.weights == nullptr;
  return visit_reduction(params.element, plain, params.pipeline.chunk_bytes, [&](auto reduction) {
    reduce_kernel<decltype(reduction)><<<blocks, kThreads, shared, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace gpu
}  // namespace moe_ep
