// Posts: what every rank tells every other at the start of an operation, and agreement on them.
#pragma once

#include "cuda/wait.cuh"

namespace moe_ep {
namespace gpu {

static_assert(sizeof(OperationPost) % sizeof(std::int64_t) == 0, "posts are copied in words");

// How all ranks, and all blocks of each, judge an operation: from the same posts, so they agree.
struct Verdict {
  Outcome outcome;
  std::int64_t values[kReportValues];
};

__device__ inline std::int32_t* counts_of(OperationPost* post) { return reinterpret_cast<std::int32_t*>(post + 1); }

// All threads of one block: writes `post` (in shared memory) and `num_counts` counts into every rank's heap.
__device__ inline void publish_post(const Group& group, std::uint64_t sequence, const OperationPost& post,
                                    const std::int32_t* counts, int num_counts) {
  constexpr int kWords = sizeof(OperationPost) / sizeof(std::int64_t);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  for (int i = warp; i < group.num_ranks; i += blockDim.x / 32) {
    const int reader = (group.rank + 1 + i) % group.num_ranks;
    OperationPost* to = post_of(group, reader, sequence, group.rank);
    for (int word = lane; word < kWords; word += 32) {
      reinterpret_cast<std::int64_t*>(to)[word] = reinterpret_cast<const std::int64_t*>(&post)[word];
    }
    for (int bin = lane; bin < num_counts; bin += 32) counts_of(to)[bin] = counts[bin];
  }
  __syncthreads();
  signal_all(group, Step::kPost, sequence);
}

__device__ inline std::int64_t post_field(const Group& group, std::uint64_t sequence, int source,
                                          std::int64_t OperationPost::* field) {
  return load_cached_in_l2(&(post_of(group, group.rank, sequence, source)->*field));
}

// All threads: the first difference between posts, by (rank, field), or the first rank with a bad id. Ends with a
// barrier after which `verdict` (in shared memory) is the same for all.
__device__ inline void judge_posts(const Group& group, std::uint64_t sequence, Verdict& verdict) {
  __shared__ std::uint32_t first;
  if (threadIdx.x == 0) {
    first = 0xffffffffu;
    verdict.outcome = Outcome::kOk;
  }
  __syncthreads();
  const int compared = group.num_ranks * kNumComparedFields;
  const auto field_of = [&](int source, int field) {
    return load_cached_in_l2(reinterpret_cast<const std::int64_t*>(post_of(group, group.rank, sequence, source)) +
                             field);
  };
  for (int i = threadIdx.x; i < compared; i += blockDim.x) {
    const int source = i / kNumComparedFields;
    const int field = i % kNumComparedFields;
    if (field_of(source, field) != field_of(group.rank, field)) atomicMin(&first, static_cast<std::uint32_t>(i));
  }
  for (int source = threadIdx.x; source < group.num_ranks; source += blockDim.x) {
    if (post_field(group, sequence, source, &OperationPost::bad_route) != 0) {
      atomicMin(&first, static_cast<std::uint32_t>(compared + source));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && first != 0xffffffffu) {
    const int found = static_cast<int>(first);
    if (found < compared) {
      const int source = found / kNumComparedFields;
      const int field = found % kNumComparedFields;
      verdict = Verdict{Outcome::kMismatch, {source, field, field_of(source, field), field_of(group.rank, field)}};
    } else {
      const int source = found - compared;
      verdict = Verdict{Outcome::kBadRoute,
                        {source, post_field(group, sequence, source, &OperationPost::bad_route),
                         post_field(group, sequence, source, &OperationPost::bad_expert),
                         post_field(group, sequence, source, &OperationPost::topk)}};
    }
  }
  __syncthreads();
}

// One thread of the grid, for a verdict that is not kOk: tells the host, through the report of the call that waits
// for one or as a failure that is found later.
__device__ inline void report_verdict(const Group& group, const Verdict& verdict, Operation operation,
                                      std::uint64_t sequence, std::uint64_t ticket) {
  if (ticket == 0 || is_fatal(verdict.outcome)) {
    record_failure(group, verdict.outcome, operation, sequence, verdict.values);
  }
  if (ticket != 0) write_outcome(group.report->call, verdict.outcome, operation, sequence, verdict.values);
}

// The last block of an operation: arrivals or acknowledgements both ways, and the operation is done.
__device__ inline void finish_operation(const Group& group, Step step, std::uint64_t sequence, Operation operation,
                                        bool crossed) {
  if (crossed) {
    signal_all(group, step, sequence);
    wait_for_all(group, step, sequence, operation);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    group.state->next_item = 0;
    group.state->sequence = sequence;
  }
}

}  // namespace gpu
}  // namespace moe_ep
