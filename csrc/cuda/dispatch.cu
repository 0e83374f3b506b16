// Dispatch in one launch: count routes, exchange counts and addresses, give every row its slot, write every row
// there, tell the receivers. Phases are in the .cuh files; this one strings them together.
#include <algorithm>

#include "cuda/exchange.cuh"
#include "cuda/launch.h"
#include "cuda/layout.cuh"
#include "cuda/send.cuh"

namespace moe_ep {
namespace gpu {
namespace {

constexpr Operation kOperation = Operation::kDispatch;

// Dynamic shared memory. Counters are done with when the ring begins to fill, so both lie in `scratch`.
struct DispatchShared {
  Destination* destinations;   // [num_ranks]
  std::int64_t* rows_at_rank;  // [num_ranks] of the block
  std::int64_t* needed;        // [num_ranks] rows to return
  std::uint64_t* barriers;
  float* scales;
  std::uint8_t* scratch;

  __host__ __device__ static std::size_t fixed_bytes(int num_ranks, const Pipeline& pipeline, bool quantize) {
    return align_up(num_ranks * (sizeof(Destination) + 2 * sizeof(std::int64_t)) + ring_side_bytes(pipeline, quantize),
                    128);
  }
  __device__ DispatchShared(std::uint8_t* base, int num_ranks, const Pipeline& pipeline, bool quantize) {
    scratch = base + fixed_bytes(num_ranks, pipeline, quantize);
    destinations = reinterpret_cast<Destination*>(base);
    rows_at_rank = reinterpret_cast<std::int64_t*>(destinations + num_ranks);
    needed = rows_at_rank + num_ranks;
    barriers = reinterpret_cast<std::uint64_t*>(needed + num_ranks);
    scales = reinterpret_cast<float*>(barriers + pipeline.warps * send_stages(quantize));
  }
};

// What counting needs of `scratch`.
struct CountScratch {
  std::int32_t* counters;  // [count_warps][bins]
  std::int32_t* first;     // [bins] this block's first slots
  std::int32_t* totals;    // [bins] of the group
  // The group's tables, near at hand.
  std::int32_t* rank_of_expert;   // [num_experts]
  std::int32_t* experts_by_rank;  // [num_experts]
  std::int32_t* first_of_rank;    // [num_ranks + 1]

  __host__ __device__ static std::size_t bytes(const Group& group, int count_warps) {
    const std::size_t bins = static_cast<std::size_t>(group.num_experts) + group.num_ranks;
    return ((count_warps + 2) * bins + 2 * group.num_experts + group.num_ranks + 1) * sizeof(std::int32_t);
  }
  __device__ CountScratch(std::uint8_t* base, const Group& group, int count_warps) {
    const int bins = group.num_experts + group.num_ranks;
    counters = reinterpret_cast<std::int32_t*>(base);
    first = counters + static_cast<std::size_t>(count_warps) * bins;
    totals = first + bins;
    rank_of_expert = totals + bins;
    experts_by_rank = rank_of_expert + group.num_experts;
    first_of_rank = experts_by_rank + group.num_experts;
  }
  // All threads; a barrier comes before they are used.
  __device__ void load_tables(const Group& group) const {
    for (int i = threadIdx.x; i < group.num_experts; i += blockDim.x) {
      rank_of_expert[i] = group.rank_of_expert[i];
      experts_by_rank[i] = group.experts_by_rank[i];
    }
    for (int i = threadIdx.x; i <= group.num_ranks; i += blockDim.x) first_of_rank[i] = group.first_of_rank[i];
  }
};

__device__ OperationPost make_post(const DispatchParams& params) {
  OperationPost post{};
  post.operation = static_cast<std::int64_t>(kOperation);
  post.layout = static_cast<std::int64_t>(params.layout);
  post.element = static_cast<std::int64_t>(params.sizes.scale > 0 ? Element::kFloat8 : params.source.element);
  post.row_bytes = params.sizes.row;
  post.scale_bytes = params.sizes.scale;
  post.topk = params.topk;
  post.has_weights = params.sizes.weight > 0;
  post.routing_id = params.fresh ? 0 : static_cast<std::int64_t>(params.routing.header->id);
  post.max_recv_rows = params.max_recv_rows;
  post.block_rows = params.block_rows;
  post.block_offset = params.block_offset;
  post.block_bytes = params.block_bytes;
  return post;
}

// The block that is last to have counted sums up and posts; it is the only one that sees all counts.
__device__ void post_totals(const DispatchParams& params, std::uint64_t sequence, const Routes& routes,
                            std::int32_t* totals) {
  __shared__ OperationPost post;
  __shared__ std::uint32_t sent;
  const int bins = routes.bins();
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    totals[bin] = counts_to_prefixes(params.group.block_counts, bins, bin, gridDim.x);
  }
  if (threadIdx.x == 0) {
    sent = 0;
    post = make_post(params);
    const std::uint64_t bad = *reinterpret_cast<volatile std::uint64_t*>(&params.group.state->bad_route);
    if (bad != kNoBadRoute) {
      post.bad_route = static_cast<std::int64_t>(bad) + 1;
      post.bad_expert = params.topk_idx[bad];
      params.group.state->bad_route = kNoBadRoute;
    }
  }
  __syncthreads();
  publish_post(params.group, sequence, post, totals, bins);
  if (params.ticket == 0) return;
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    const bool is_rank = bin >= routes.num_experts;
    const int rank = is_rank ? bin - routes.num_experts : routes.rank_of(bin);
    if (is_rank == params.deduplicated && rank != params.group.rank)
      atomicAdd(&sent, static_cast<std::uint32_t>(totals[bin]));
  }
  __syncthreads();
  if (threadIdx.x == 0) tell(params.group, params.ticket, Word::kSentRows, sent);
}

__device__ void post_reuse(const DispatchParams& params, std::uint64_t sequence) {
  __shared__ OperationPost post;
  if (threadIdx.x == 0) post = make_post(params);
  __syncthreads();
  publish_post(params.group, sequence, post, nullptr, 0);
}

// In 32 bits, as a division of 64 takes long.
__device__ std::uint32_t aligned_rows(std::int32_t rows, std::int32_t alignment) {
  const auto unit = static_cast<std::uint32_t>(alignment);
  return unit == 1 ? rows : (static_cast<std::uint32_t>(rows) + unit - 1) / unit * unit;
}

// First slots of this block's rows in every bin, and how many rows every rank gets. All threads; ends with a barrier.
// Every block finds the same for all but its own place, and writes it to the routing alike.
__device__ void place_bins(const DispatchParams& params, std::uint64_t sequence, const Routes& routes,
                           const CountScratch& scratch, const DispatchShared& shared) {
  const Group& group = params.group;
  const int bins = routes.bins();
  const bool tells = blockIdx.x == 0 && params.ticket != 0;
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    const std::int32_t in_blocks_before =
        load_cached_in_l2(group.block_counts + static_cast<std::size_t>(blockIdx.x) * bins + bin);
    std::int32_t total = 0;
    std::int32_t before = 0;
    std::int32_t own = 0;
    constexpr int kAtOnce = 8;  // loads in flight
    for (int first = 0; first < group.num_ranks; first += kAtOnce) {
      std::int32_t counts[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int source = min(first + i, group.num_ranks - 1);
        counts[i] = load_cached_in_l2(counts_of(post_of(group, group.rank, sequence, source)) + bin);
        if (bin == routes.num_experts + group.rank) params.routing.rows_from[source] = counts[i];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= group.num_ranks) break;
        total += counts[i];
        before += first + i < group.rank ? counts[i] : 0;
        own = first + i == group.rank ? counts[i] : own;
      }
    }
    scratch.totals[bin] = total;
    scratch.first[bin] = before + in_blocks_before;
    if (bin >= routes.num_experts) {
      params.routing.sent_first[bin - routes.num_experts] = before;
      params.routing.sent_rows[bin - routes.num_experts] = own;
    }
    if (tells && bin == routes.num_experts + group.rank) {
      tell(group, params.ticket, Word::kOwnFirst, before);
      tell(group, params.ticket, Word::kOwnRows, own);
    }
  }
  __syncthreads();
  const int lane = threadIdx.x & 31;
  for (int rank = threadIdx.x / 32; rank < group.num_ranks; rank += kWarps) {
    const std::int64_t fixed = post_field(group, sequence, rank, &OperationPost::block_rows);
    const int begin = scratch.first_of_rank[rank];
    const int num_local = scratch.first_of_rank[rank + 1] - begin;
    // Every lane has a run of experts: one scan over the lanes is enough.
    const int a_lane = (num_local + 31) / 32;
    const int first_local = min(lane * a_lane, num_local);
    const int end_local = min(first_local + a_lane, num_local);
    std::int64_t mine = 0;
    for (int i = first_local; i < end_local; ++i) {
      mine += aligned_rows(scratch.totals[scratch.experts_by_rank[begin + i]], group.alignment);
    }
    std::int64_t sum = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const std::int64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += other;
    }
    std::int64_t start = sum - mine;
    for (int i = first_local; i < end_local; ++i) {
      const int expert = scratch.experts_by_rank[begin + i];
      const std::int64_t rows = scratch.totals[expert];
      const std::int64_t aligned = aligned_rows(scratch.totals[expert], group.alignment);
      scratch.first[expert] += static_cast<std::int32_t>(start);
      if (rank == group.rank) {
        params.routing.local_rows[i] = rows;
        params.routing.local_first[i] = start;
        params.routing.returned_rows[i] = params.layout == RowLayout::kExpert ? aligned : rows;
        if (tells) tell(group, params.ticket, static_cast<int>(Word::kFirstExpert) + i, rows);
      }
      start += aligned;
    }
    const std::int64_t row = __shfl_sync(0xffffffffu, sum, 31);
    if (lane == 0) {
      const std::int64_t deduplicated = scratch.totals[routes.num_experts + rank];
      shared.needed[rank] = params.layout == RowLayout::kExpert ? row : deduplicated;
      shared.rows_at_rank[rank] = fixed >= 0 ? fixed : params.deduplicated ? deduplicated : row;
      params.routing.rows_at_rank[rank] = shared.rows_at_rank[rank];
      if (rank == group.rank) {
        params.routing.header->id = sequence;
        params.routing.header->received_rows = params.deduplicated ? deduplicated : row;
      }
    }
  }
  __syncthreads();
}

// Of two stages: after which tokens a part of this rank's rows has been sent, and how many rows for each rank then.
// Parts are what blocks have counted, or some blocks together. All threads of one block.
__device__ void write_parts(const DispatchParams& params, const Routes& routes) {
  const Group& group = params.group;
  const RoutingView& routing = params.routing;
  const int blocks = static_cast<int>(gridDim.x);
  const int parts = min(blocks, kMostSentParts);
  if (threadIdx.x == 0) routing.header->num_parts = parts;
  for (int i = threadIdx.x; i < parts * group.num_ranks; i += blockDim.x) {
    const int part = i / group.num_ranks;
    const int rank = i - part * group.num_ranks;
    const int past = (part + 1) * blocks / parts;
    const std::size_t bin = static_cast<std::size_t>(past) * routes.bins() + routes.num_experts + rank;
    routing.part_rows[i] = past < blocks ? load_cached_in_l2(group.block_counts + bin)
                                         : static_cast<std::int32_t>(load_cached_in_l2(routing.sent_rows + rank));
    if (rank == 0)
      routing.part_tokens[part] = static_cast<std::int32_t>(share_of(params.num_tokens, past - 1, blocks).end);
  }
}

// Whether every rank's rows fit. All threads; ends with a barrier.
__device__ void judge_room(const DispatchParams& params, std::uint64_t sequence, const DispatchShared& shared,
                           Verdict& verdict) {
  __shared__ std::uint32_t first;
  if (threadIdx.x == 0) first = 0xffffffffu;
  __syncthreads();
  const bool fresh = params.fresh;
  for (int rank = threadIdx.x; rank < params.group.num_ranks; rank += blockDim.x) {
    const std::int64_t limit = post_field(params.group, sequence, rank, &OperationPost::max_recv_rows);
    const std::int64_t bytes = post_field(params.group, sequence, rank, &OperationPost::block_bytes);
    Outcome outcome = Outcome::kOk;
    if (fresh && shared.needed[rank] > 0x7fffffff) {
      outcome = Outcome::kTooMany;
    } else if (fresh && limit >= 0 && shared.needed[rank] > limit) {
      outcome = Outcome::kOverflow;
    } else if (static_cast<std::int64_t>(params.sizes.block(shared.rows_at_rank[rank]).total) > bytes) {
      outcome = Outcome::kNoRoom;
    }
    if (outcome == Outcome::kOk) continue;
    // A limit that is too small comes before a block that is: all ranks must name the same.
    const std::uint32_t kind = outcome == Outcome::kNoRoom ? 1 : 0;
    atomicMin(&first, (kind << 31) | (static_cast<std::uint32_t>(rank) << 8) | static_cast<std::uint32_t>(outcome));
  }
  __syncthreads();
  if (threadIdx.x == 0 && first != 0xffffffffu) {
    const int rank = static_cast<int>((first & 0x7fffffffu) >> 8);
    verdict.outcome = static_cast<Outcome>(first & 0xffu);
    verdict.values[0] = rank;
    verdict.values[1] = verdict.outcome == Outcome::kNoRoom
                            ? static_cast<std::int64_t>(params.sizes.block(shared.rows_at_rank[rank]).total)
                            : shared.needed[rank];
    verdict.values[2] =
        post_field(params.group, sequence, rank,
                   verdict.outcome == Outcome::kNoRoom ? &OperationPost::block_bytes : &OperationPost::max_recv_rows);
    // Whether a rank has nobody waiting, who could try again.
    verdict.values[3] = 0;
    for (int other = 0; other < params.group.num_ranks; ++other) {
      if (post_field(params.group, sequence, other, &OperationPost::max_recv_rows) >= 0) verdict.values[3] = 1;
    }
  }
  __syncthreads();
}

// One block: the verdict for the call that waits, whose counts have been told, or for a later one.
__device__ void report_call(const DispatchParams& params, std::uint64_t sequence, const DispatchShared& shared,
                            const Verdict& verdict) {
  const Group& group = params.group;
  if (threadIdx.x != 0) return;
  if (verdict.outcome != Outcome::kOk) report_verdict(group, verdict, kOperation, sequence, params.ticket);
  if (params.ticket == 0) return;
  // A block that is too small is replaced by one of the size that is told here.
  if (verdict.outcome == Outcome::kOk || verdict.outcome == Outcome::kNoRoom) {
    tell(group, params.ticket, Word::kNumRows, shared.needed[group.rank]);
    tell(group, params.ticket, Word::kBlockRows, shared.rows_at_rank[group.rank]);
  }
  if (verdict.outcome != Outcome::kOk) fence_system();
  tell(group, params.ticket, Word::kOutcome, static_cast<std::int64_t>(verdict.outcome));
}

// A fresh routing that all ranks give up: no rows to combine.
__device__ void empty_routing(const DispatchParams& params, std::uint64_t sequence, const Span& span) {
  const Group& group = params.group;
  const RoutingView& routing = params.routing;
  for (std::int64_t i = span.begin * params.topk + threadIdx.x; i < span.end * params.topk; i += blockDim.x) {
    routing.entries[i] = Entry{-1, -1, -1};
    routing.ids[i] = -1;
  }
  const int local = group.first_of_rank[group.rank + 1] - group.first_of_rank[group.rank];
  for (int i = threadIdx.x; i < local; i += blockDim.x) {
    routing.local_rows[i] = routing.returned_rows[i] = routing.local_first[i] = 0;
  }
  for (int rank = threadIdx.x; rank < group.num_ranks; rank += blockDim.x) {
    const std::int64_t fixed = post_field(group, sequence, rank, &OperationPost::block_rows);
    routing.rows_at_rank[rank] = fixed < 0 ? 0 : fixed;
    routing.sent_first[rank] = routing.sent_rows[rank] = routing.rows_from[rank] = 0;
    routing.part_rows[rank] = 0;
  }
  if (threadIdx.x == 0) {
    routing.header->num_parts = 1;
    routing.part_tokens[0] = static_cast<std::int32_t>(params.num_tokens);
    routing.header->id = sequence;
    routing.header->received_rows = 0;
  }
}

// An operation that all ranks give up, with nobody waiting on the host: a result of no rows. A routing that is reused
// stays as it is. Of two stages, the second one clears what it returns.
__device__ void give_up(const DispatchParams& params, std::uint64_t sequence, const Span& span) {
  const Group& group = params.group;
  if (params.fresh) empty_routing(params, sequence, span);
  if (threadIdx.x == 0) group.state->given_up = sequence;
  __syncthreads();
  const bool staged = params.is_staged();
  if (params.tells_parts && blockIdx.x == 0 && threadIdx.x == 0) {
    // The second stage waits for rows, and learns that there are none.
    fence_device();
    store_relaxed_system(flag_of(group, group.rank, Step::kSent, group.rank), progress_flag(sequence, 0));
  }
  const std::int64_t rows = load_cached_in_l2(params.routing.rows_at_rank + group.rank);
  if (staged || static_cast<std::int64_t>(params.sizes.block(rows).total) > params.block_bytes) return;
  const Destination own = destination_of(group.bases[group.rank] + params.block_offset, params.sizes, rows);
  const std::int64_t warp = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (std::int64_t row = warp; row < rows; row += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    clear_row(own, params.sizes, row);
  }
}

template <class Path>
__global__ void __launch_bounds__(kThreads, 1) dispatch_kernel(const __grid_constant__ DispatchParams params) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  __shared__ Verdict verdict;
  const Group& group = params.group;
  if (load_relaxed_device(&group.state->failed) != 0) return;
  const std::uint64_t sequence = group.state->sequence + 1;
  if (params.tells_parts && blockIdx.x == 0 && threadIdx.x == 0) {
    // Before the host hears of this dispatch, and so before its second stage is launched if that needs sizes.
    store_relaxed_device(&group.state->sending, sequence);
    fence_system();
  }
  if (params.ticket != 0 && blockIdx.x == 0 && threadIdx.x == 0) {
    *reinterpret_cast<volatile std::uint64_t*>(&group.report->started) = params.ticket;
  }
  const DispatchShared shared(memory, group.num_ranks, params.pipeline, params.source.quantize);
  const int count_warps = params.pipeline.count_warps;
  const CountScratch scratch(shared.scratch, group, count_warps);
  const Routes routes{params.topk_idx, scratch.rank_of_expert, params.num_tokens,
                      params.topk,     group.num_experts,      group.num_ranks};
  const Span span = share_of(params.num_tokens, blockIdx.x, gridDim.x);

  const bool fresh = params.fresh;
  if (fresh) {
    scratch.load_tables(group);
    count_routes(routes, span, count_warps, scratch.counters, params.routing.ids, &group.state->bad_route);
    publish_block_counts(routes, count_warps, scratch.counters, group.block_counts);
    if (is_last_block(&group.state->blocks[0])) post_totals(params, sequence, routes, scratch.totals);
  } else if (blockIdx.x == 0) {
    post_reuse(params, sequence);
  }
  // This rank's own post is among those awaited: with it come the counts of all its blocks.
  if (!wait_for_all(group, Step::kPost, sequence, kOperation)) return;
  judge_posts(group, sequence, verdict);
  if (verdict.outcome == Outcome::kOk) {
    if (fresh) {
      place_bins(params, sequence, routes, scratch, shared);
    } else {
      for (int rank = threadIdx.x; rank < group.num_ranks; rank += blockDim.x) {
        shared.rows_at_rank[rank] = params.routing.rows_at_rank[rank];
      }
      __syncthreads();
    }
    judge_room(params, sequence, shared, verdict);
  }
  if (blockIdx.x == 0) report_call(params, sequence, shared, verdict);
  if (is_fatal(verdict.outcome)) return;

  const bool goes_on = verdict.outcome == Outcome::kOk;
  const bool staged = params.is_staged();
  if (goes_on) {
    if (fresh) {
      counts_to_slots(routes.bins(), count_warps, scratch.first, scratch.counters);
      if (staged && blockIdx.x == 0) write_parts(params, routes);
      assign_slots(routes, span, params.deduplicated, count_warps, scratch.counters, params.routing.ids,
                   params.routing.entries, staged ? params.routing.expert_slots : nullptr);
      arrive_at_blocks(group, mark_of(sequence));
    }
    for (int rank = threadIdx.x; rank < group.num_ranks; rank += blockDim.x) {
      const std::int64_t offset = post_field(group, sequence, rank, &OperationPost::block_offset);
      shared.destinations[rank] = destination_of(group.bases[rank] + offset, params.sizes, shared.rows_at_rank[rank]);
    }
    __syncthreads();
    if (!staged && (group.alignment > 1 || params.max_recv_rows >= 0)) {
      const int local = group.first_of_rank[group.rank + 1] - group.first_of_rank[group.rank];
      clear_padding(shared.destinations[group.rank], params.sizes, params.routing, params.layout, local,
                    group.alignment, shared.rows_at_rank[group.rank]);
    }
    SendJob job{params.source,       params.sizes,         params.num_tokens,      params.routing.entries,
                params.routing.ids,  group.rank_of_expert, group.local_of_expert,  params.topk,
                params.deduplicated, shared.destinations,  &group.state->next_item};
    if (staged) job.expert_slots = params.routing.expert_slots;
    if (params.tells_parts)
      job.parts = SentParts{&group, params.routing.header, params.routing.part_tokens, params.routing.part_rows};
    // Warps take rows as they come, of other blocks' tokens too.
    const auto ready = [&] { return !fresh || wait_for_blocks(group, mark_of(sequence)); };
    if (!send_rows<Path>(job, params.pipeline, SendRing{shared.scratch, shared.barriers, shared.scales}, ready)) return;
  } else {
    give_up(params, sequence, span);
  }
  if (is_last_block(&group.state->blocks[1])) {
    finish_operation(group, Step::kArrival, sequence, kOperation, goes_on);
  }
}

}  // namespace

std::size_t dispatch_shared_bytes(const DispatchParams& params) {
  const std::size_t counters = params.fresh ? CountScratch::bytes(params.group, params.pipeline.count_warps) : 0;
  const std::size_t ring = ring_bytes(params.pipeline, params.source.quantize);
  const std::size_t fixed =
      DispatchShared::fixed_bytes(params.group.num_ranks, params.pipeline, params.source.quantize);
  return fixed + std::max(counters, ring);
}

cudaError_t prepare_dispatch(std::size_t most_shared_bytes) {
  return for_each_path([&](auto path) {
    return cudaFuncSetAttribute(dispatch_kernel<decltype(path)>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(most_shared_bytes));
  });
}

cudaError_t launch_dispatch(const DispatchParams& params, int blocks, cudaStream_t stream) {
  return visit_path(params.source, params.pipeline, [&](auto path) {
    dispatch_kernel<decltype(path)><<<blocks, kThreads, dispatch_shared_bytes(params), stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace gpu
}  // namespace moe_ep
