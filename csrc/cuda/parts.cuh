// Two stages at the same time: what one has done is told in parts, and what waits for it knows how far it is. A
// dispatch's second stage waits for rows that are sent, a combine for sums that are made. See kMostParts.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/wait.cuh"

namespace moe_ep {
namespace gpu {

// All lanes of a warp that has nothing left to do in `part` and those before it: the last one of `warps` tells all
// ranks, each `done(rank)`, after the parts before have been told.
template <class Done>
__device__ inline void pass_part(const Group& group, Step step, int part, int parts, int warps, Done&& done) {
  __syncwarp();
  if ((threadIdx.x & 31) != 0) return;
  DeviceState* state = group.state;
  fence_device();
  if (atomicAdd(&state->warps_past[part], 1u) + 1 != static_cast<unsigned>(warps)) return;
  state->warps_past[part] = 0;
  while (load_acquire_device(&state->parts_told) != static_cast<std::uint32_t>(part)) {
  }
  fence_for_peers(group);
  for (int i = 0; i < group.num_ranks; ++i) {
    const int reader = (group.rank + 1 + i) % group.num_ranks;
    store_relaxed_system(flag_of(group, reader, step, group.rank), progress_flag(state->sequence + 1, done(reader)));
  }
  fence_device();
  store_relaxed_device(&state->parts_told, part + 1 == parts ? 0u : static_cast<std::uint32_t>(part + 1));
}

// Parts of a run of rows from one rank.
__device__ __forceinline__ int parts_of(std::int64_t rows, int part_log2) {
  return static_cast<int>((rows + (std::int64_t{1} << part_log2) - 1) >> part_log2);
}

// Of the longest of all ranks' runs.
__device__ inline int most_parts(const std::int64_t* rows, int num_ranks, int part_log2) {
  int most = 0;
  for (int rank = 0; rank < num_ranks; ++rank) most = max(most, parts_of(rows[rank], part_log2));
  return most;
}

// The rows of a block in the order in which parts of them come: so many that came from rank 0, as many from rank 1,
// ..., then the next. Places are numbered as if each rank had as many rows in every part; some have none.
struct PartsWalk {
  const std::int64_t* first_from;  // [num_ranks], in shared memory: a rank's first row
  const std::int64_t* rows_from;   // [num_ranks], likewise: how many it has
  int num_ranks;
  int part_log2;  // rows from a rank in a part

  struct Place {
    int rank;
    int index;  // among the rows of that rank
  };
  __device__ int part(std::int32_t place) const {
    return static_cast<int>(static_cast<std::uint32_t>(place >> part_log2) / static_cast<std::uint32_t>(num_ranks));
  }
  __device__ Place at(std::int32_t place) const {
    const int its_part = part(place);
    return Place{(place >> part_log2) - its_part * num_ranks,
                 (its_part << part_log2) + (place & ((1 << part_log2) - 1))};
  }
  // -1: none.
  __device__ std::int64_t row(const Place& place) const {
    return place.index < rows_from[place.rank] ? first_from[place.rank] + place.index : -1;
  }
  __device__ int parts() const { return most_parts(rows_from, num_ranks, part_log2); }
  __device__ std::int64_t places() const { return (static_cast<std::int64_t>(parts()) * num_ranks) << part_log2; }
};

// Sums of a block's rows, part by part.
struct PartsJob : ReduceJob {
  const Group& group;
  PartsWalk walk;
  int parts;
  bool tells;
  int told = 0;  // parts in which this warp has nothing left to do

  __device__ PartsJob(const ReduceJob& job, const Group& its_group, const PartsWalk& its_walk, bool tells_parts)
      : ReduceJob(job), group(its_group), walk(its_walk), parts(its_walk.parts()), tells(tells_parts) {
    num_tokens = walk.places();
  }

  __device__ Entry entry(const ItemCursor& item) const {
    const int lane = threadIdx.x & 31;
    const std::int64_t at = item.valid() ? row(item) : -1;
    if (at < 0 || lane >= topk) return Entry{-1, -1, -1};
    return entries[at * topk + lane];
  }
  __device__ std::int64_t row(const ItemCursor& item) const { return walk.row(walk.at(item.token)); }
  __device__ void reached(const ItemCursor& next, int warps) {
    if (!tells) return;
    const int part = next.valid() ? walk.part(next.token) : parts;
    for (; told < part; ++told) {
      pass_part(group, Step::kReduced, told, parts, warps, [&](int) { return static_cast<std::uint32_t>(told) + 1; });
    }
  }
};

// Long, and not often: not in line.
static __device__ __noinline__ bool wait_for_progress(const Group& group, Step step, int source, std::uint64_t flag,
                                                      Operation operation) {
  return wait_for(group, step, source, flag, operation);
}

// What a warp knows of how far ranks are in an operation, at most 32 of them: lane r of rank r.
struct Progress {
  const Group& group;
  Step step;
  Operation operation;
  std::uint64_t none;  // flag of nothing done
  std::uint32_t done = 0;
  bool failed = false;  // a wait has: rows may not be there, and nobody will look at what is made of them

  __device__ Progress(const Group& its_group, Step its_step, Operation its_operation, std::uint64_t sequence)
      : group(its_group), step(its_step), operation(its_operation), none(progress_flag(sequence, 0)) {}

  // All lanes: returns when the rank that a lane names has done as much as it wants; 0: nothing.
  __device__ void await(int rank, std::uint32_t wanted) {
    const int lane = threadIdx.x & 31;
    const bool waits = wanted > __shfl_sync(0xffffffffu, done, rank & 31);
    if (!__any_sync(0xffffffffu, waits)) return;
    const bool ok = !waits || wait_for_progress(group, step, rank, none + wanted, operation);
    failed = __any_sync(0xffffffffu, !ok) || failed;
    if (lane < group.num_ranks) {
      const std::uint64_t seen = load_acquire_system(flag_of(group, group.rank, step, lane));
      done = seen > none ? static_cast<std::uint32_t>(seen - none) : 0;
    }
    __syncwarp();
    fence_bulk_to_global();
  }
};

// Rows that are being summed on their ranks.
struct AwaitingJob : ReduceJob {
  Progress progress;
  const std::int64_t* sent_first;  // [num_ranks], in shared memory
  int part_log2;

  __device__ AwaitingJob(const ReduceJob& job, const Progress& its_progress, const std::int64_t* first, int log2)
      : ReduceJob(job), progress(its_progress), sent_first(first), part_log2(log2) {}

  __device__ void await(const Entry& entry) {
    std::uint32_t wanted = 0;
    if (entry.rank >= 0) wanted = static_cast<std::uint32_t>((entry.slot - sent_first[entry.rank]) >> part_log2) + 1;
    progress.await(entry.rank, wanted);
  }
};

}  // namespace gpu
}  // namespace moe_ep
