// From expert ids to slots, in two passes over a block's own range of tokens. Every warp owns a run of consecutive
// tokens and counters of its own, so ranks among equals follow (token, position) order whatever runs first.
//
// Bins: one for each expert, then one for each rank (a token counts once there).
#pragma once

#include "cuda/memory.cuh"
#include "cuda/state.h"

namespace moe_ep {
namespace gpu {

// Which ids a pass reads and what they mean.
struct Routes {
  const std::int64_t* given;  // ids as the caller has them; read by the first pass only
  const std::int32_t* rank_of_expert;
  std::int64_t num_tokens;
  std::int32_t topk;
  std::int32_t num_experts;
  std::int32_t num_ranks;
  __device__ int bins() const { return num_experts + num_ranks; }
  __device__ int rank_of(int expert) const { return rank_of_expert[expert]; }
};

// A block's share of `count` items.
struct Span {
  std::int64_t begin;
  std::int64_t end;
};

__device__ inline Span share_of(std::int64_t count, int index, int parts) {
  const auto items = static_cast<std::uint32_t>(count);
  const std::int64_t base = items / static_cast<std::uint32_t>(parts);
  const std::int64_t extra = items % static_cast<std::uint32_t>(parts);
  const std::int64_t begin = base * index + (index < extra ? index : extra);
  return Span{begin, begin + base + (index < extra ? 1 : 0)};
}

// One (token, position) of a warp's step: whole tokens lie side by side in the lanes.
struct RouteLane {
  std::int64_t token;
  int position;
  int expert;  // -1: none
  int rank;
  int first_lane;  // of the token
  bool in_range;   // the lane stands for a position, with an expert or not
  bool first_of_rank;
};

__device__ inline RouteLane route_lane(const Routes& routes, std::int64_t first_token, std::int64_t end, int expert) {
  const int lane = threadIdx.x & 31;
  RouteLane route{};
  const int place = lane / routes.topk;
  route.position = lane - place * routes.topk;
  route.first_lane = lane - route.position;
  route.token = first_token + place;
  route.in_range = place < 32 / routes.topk && route.token < end;
  route.expert = route.in_range ? expert : -1;
  route.rank = route.expert >= 0 ? routes.rank_of(route.expert) : -1;
  // Tokens of a step have different keys, and so have lanes without an expert.
  const std::uint32_t key = route.expert >= 0 ? (static_cast<std::uint32_t>(place) << 16) | route.rank
                                              : 0x80000000u | static_cast<std::uint32_t>(lane);
  const std::uint32_t same = __match_any_sync(0xffffffffu, key);
  route.first_of_rank = route.expert >= 0 && __ffs(static_cast<int>(same)) - 1 == lane;
  return route;
}

// A warp's run of tokens, in steps of as many whole tokens as its lanes have room for. Ids are asked for a step ahead.
template <class Id>
class Steps {
 public:
  __device__ Steps(const Routes& routes, const Span& span, int count_warps, const Id* ids)
      : ids_(ids), topk_(routes.topk), tokens_a_step_(32 / routes.topk) {
    const int warp = threadIdx.x / 32;
    const Span own = share_of(span.end - span.begin, warp < count_warps ? warp : 0, count_warps);
    token_ = span.begin + own.begin;
    end_ = warp < count_warps ? span.begin + own.end : token_;
    next_ = ask(token_);
  }
  __device__ bool valid() const { return token_ < end_; }
  __device__ std::int64_t token() const { return token_; }
  __device__ std::int64_t end() const { return end_; }
  __device__ std::int64_t index() const { return token_ * topk_ + (threadIdx.x & 31); }
  // Whether the lane has a position.
  __device__ bool there() const { return has(token_); }
  // The lane's id of this step, -1 where it has none. Once a step.
  __device__ Id take() {
    const Id id = next_;
    next_ = ask(token_ + tokens_a_step_);
    return id;
  }
  __device__ void advance() { token_ += tokens_a_step_; }

 private:
  __device__ bool has(std::int64_t token) const {
    const int lane = threadIdx.x & 31;
    return lane < tokens_a_step_ * topk_ && token * topk_ + lane < end_ * topk_;
  }
  __device__ Id ask(std::int64_t token) const { return has(token) ? ids_[token * topk_ + (threadIdx.x & 31)] : Id{-1}; }

  const Id* ids_;
  int topk_;
  int tokens_a_step_;
  std::int64_t token_;
  std::int64_t end_;
  Id next_;
};

// The first pass: counters[warp][bin] of the warps that count, ids kept as int32. All threads of the block; ends
// with a barrier. An id out of range counts as none and is reported in `bad_route`.
__device__ inline void count_routes(const Routes& routes, const Span& span, int count_warps, std::int32_t* counters,
                                    std::int32_t* ids, std::uint64_t* bad_route) {
  Steps<std::int64_t> steps(routes, span, count_warps, routes.given);
  const int bins = routes.bins();
  for (int i = threadIdx.x; i < count_warps * bins; i += blockDim.x) counters[i] = 0;
  __syncthreads();
  std::int32_t* mine = counters + threadIdx.x / 32 * bins;
  for (; steps.valid(); steps.advance()) {
    const std::int64_t id = steps.take();
    const bool fits = id >= -1 && id < routes.num_experts;
    const int expert = fits ? static_cast<int>(id) : -1;
    if (!fits) {
      atomicMin(reinterpret_cast<unsigned long long*>(bad_route), static_cast<unsigned long long>(steps.index()));
    }
    if (steps.there()) ids[steps.index()] = expert;
    const RouteLane route = route_lane(routes, steps.token(), steps.end(), expert);
    if (route.expert >= 0) atomicAdd(&mine[route.expert], 1);
    if (route.first_of_rank) atomicAdd(&mine[routes.num_experts + route.rank], 1);
  }
  __syncthreads();
}

// The block's sums of all its warps, for the other blocks.
__device__ inline void publish_block_counts(const Routes& routes, int count_warps, const std::int32_t* counters,
                                            std::int32_t* block_counts) {
  const int bins = routes.bins();
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    std::int32_t sum = 0;
    for (int warp = 0; warp < count_warps; ++warp) sum += counters[warp * bins + bin];
    block_counts[static_cast<std::size_t>(blockIdx.x) * bins + bin] = sum;
  }
}

// One thread a bin, of one block that sees all counts: puts in each block's place what the blocks before it counted.
// Returns the sum of all.
__device__ inline std::int32_t counts_to_prefixes(std::int32_t* block_counts, int bins, int bin, int blocks) {
  constexpr int kAtOnce = 16;  // loads in flight
  std::int32_t sum = 0;
  for (int first = 0; first < blocks; first += kAtOnce) {
    std::int32_t counts[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const std::int32_t* at = block_counts + static_cast<std::size_t>(first + i) * bins + bin;
      counts[i] = first + i < blocks ? load_cached_in_l2(at) : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < blocks) block_counts[static_cast<std::size_t>(first + i) * bins + bin] = sum;
      sum += counts[i];
    }
  }
  return sum;
}

// Turns counts into next slots: `first` is the block's first slot of every bin. All threads; ends with a barrier.
__device__ inline void counts_to_slots(int bins, int count_warps, const std::int32_t* first, std::int32_t* counters) {
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    std::int32_t next = first[bin];
    for (int warp = 0; warp < count_warps; ++warp) {
      const std::int32_t count = counters[warp * bins + bin];
      counters[warp * bins + bin] = next;
      next += count;
    }
  }
  __syncthreads();
}

// A warp's lanes: the next slot of each lane's bin, in the order of lanes; -1 in those that have none.
__device__ inline std::int32_t take_slots(std::int32_t* counters, bool takes, int bin) {
  const int lane = threadIdx.x & 31;
  const std::uint32_t key = takes ? static_cast<std::uint32_t>(bin) : 0x80000000u | lane;
  const std::uint32_t same = __match_any_sync(0xffffffffu, key);
  const int before = __popc(same & ((1u << lane) - 1));
  const std::int32_t slot = takes ? counters[bin] + before : -1;
  __syncwarp();
  if (takes && before == 0) counters[bin] += __popc(same);
  __syncwarp();
  return slot;
}

// The second pass: the entries of the block's tokens, and with `expert_slots` the places of their rows among those of
// their experts. `ids` are those that the first pass kept. All threads; ends with a barrier.
__device__ inline void assign_slots(const Routes& routes, const Span& span, bool deduplicated, int count_warps,
                                    std::int32_t* counters, const std::int32_t* ids, Entry* entries,
                                    std::int32_t* expert_slots) {
  std::int32_t* mine = counters + threadIdx.x / 32 * routes.bins();
  for (Steps<std::int32_t> steps(routes, span, count_warps, ids); steps.valid(); steps.advance()) {
    const std::int64_t index = steps.index();
    const RouteLane route = route_lane(routes, steps.token(), steps.end(), steps.take());
    const bool crosses = deduplicated ? route.first_of_rank : route.expert >= 0;
    const int bin = deduplicated ? routes.num_experts + route.rank : route.expert;
    const std::int32_t slot = take_slots(mine, crosses, bin);
    if (expert_slots != nullptr) {
      const std::int32_t at = take_slots(mine, route.expert >= 0, route.expert);
      if (route.in_range) expert_slots[index] = at;
    }
    // Ranks ascending, then positions; lanes that send nothing come last.
    const int order = crosses ? route.rank : 0x7fffffff;
    int place = 0;
    for (int position = 0; position < routes.topk; ++position) {
      const int other = __shfl_sync(0xffffffffu, order, (route.first_lane + position) & 31);
      place += other < order || (other == order && position < route.position);
    }
    if (!route.in_range) continue;
    Entry entry{};
    entry.slot = slot;
    entry.rank = static_cast<std::int16_t>(crosses ? route.rank : -1);
    entry.position = static_cast<std::int16_t>(deduplicated ? -1 : route.position);
    entries[route.token * routes.topk + place] = entry;
  }
  __syncthreads();
}

}  // namespace gpu
}  // namespace moe_ep
