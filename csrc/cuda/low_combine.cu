// Low-latency combine: tell peers that this rank's rows are there, read every token's rows where they lie, and sum them
// with the token's own weights. Of rows in the heap nothing is told after the reads: they are written again only after
// the rank's next dispatch into the same buffer, for which every peer has to have come past this combine. Rows in
// registered memory are the caller's, who may write them as soon as the combine is over: so it ends when all have read.
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/low_copy.cuh"
#include "cuda/low_words.cuh"
#include "cuda/reduce.cuh"

namespace moe_ep {
namespace gpu {
namespace {

constexpr Operation kOperation = Operation::kLowCombine;
constexpr LowKind kKind = LowKind::kCombine;

struct LowCombineShared {
  const std::uint8_t** rows;     // [num_ranks]
  std::uint8_t** heaps;          // [num_ranks]
  std::uint64_t* barriers;       // [warps][stages]
  std::uint64_t* copy_barriers;  // [kWarps][kCopyStages]
  float* scales;                 // [kWarps][kMostScalesAChunk]
  std::int32_t* ends;            // [num_local_experts]
  std::uint8_t* masked;          // [num_ranks]
  std::uint8_t* lost;            // [num_ranks]
  std::uint8_t* ready;           // [num_ranks] whose rows are there when they have posted, or that are lost
  std::uint8_t* segment;         // [num_ranks] whether rows are in registered memory
  std::uint8_t* some_segments;   // whether any are
  std::uint8_t* stages;          // rings of both parts: one is done with when the other begins

  __host__ __device__ static std::size_t fixed_bytes(const LowCombineParams& params) {
    const std::size_t ranks = static_cast<std::size_t>(params.low.group.num_ranks);
    const std::size_t words = 2 * ranks + static_cast<std::size_t>(params.pipeline.warps * params.pipeline.stages);
    return align_up(words * sizeof(void*) + CopyRing::kSideBytes +
                        (static_cast<std::size_t>(params.low.num_local_experts) + 1) * sizeof(std::int32_t) +
                        4 * ranks + 1,
                    128);
  }
  __host__ static std::size_t bytes(const LowCombineParams& params) {
    const bool reduces = params.pipeline.use_bulk && (params.halves & kLowReceive) != 0;
    const std::size_t stage = static_cast<std::size_t>(params.topk) * params.pipeline.chunk_bytes;
    const std::size_t ring = reduces ? stage * params.pipeline.warps * params.pipeline.stages : 0;
    const std::size_t copy = params.pipeline.use_bulk && params.rows != nullptr ? CopyRing::kBytes : 0;
    return fixed_bytes(params) + (ring > copy ? ring : copy);
  }
  __device__ LowCombineShared(std::uint8_t* base, const LowCombineParams& params) {
    const int ranks = params.low.group.num_ranks;
    rows = reinterpret_cast<const std::uint8_t**>(base);
    heaps = reinterpret_cast<std::uint8_t**>(base + ranks * sizeof(void*));
    barriers = reinterpret_cast<std::uint64_t*>(heaps + ranks);
    copy_barriers = barriers + params.pipeline.warps * params.pipeline.stages;
    scales = reinterpret_cast<float*>(copy_barriers + kWarps * kCopyStages);
    ends = reinterpret_cast<std::int32_t*>(scales + kWarps * kMostScalesAChunk);
    masked = reinterpret_cast<std::uint8_t*>(ends + params.low.num_local_experts + 1);
    lost = masked + ranks;
    ready = lost + ranks;
    segment = ready + ranks;
    some_segments = segment + ranks;
    stages = base + fixed_bytes(params);
  }
};

// A row of a token that is summed, and its weight.
struct LowEntry {
  std::int32_t slot;
  std::int16_t rank;  // -1: none
  float factor;
};

// See ReduceJob. Routes of ranks that are lost, and those that the caller leaves out, are passed over.
struct LowJob {
  const LowCombineParams& params;
  const std::uint8_t* lost;  // [num_ranks], in shared memory
  std::int64_t num_tokens;
  std::int32_t topk;
  std::int32_t most_entries;
  std::int32_t hidden;
  const std::uint8_t* const* rows;  // [num_ranks], in shared memory
  std::uint8_t* out;

  using LaneEntry = LowEntry;

  __device__ LowEntry entry(const ItemCursor& item) const {
    return item.valid() ? entry_of(item.token) : LowEntry{-1, -1, 0.0f};
  }
  __device__ float weight(const LowEntry& entry) const { return entry.factor; }

  // All lanes: lane j's entry of a token.
  __device__ LowEntry entry_of(int token) const {
    const int lane = threadIdx.x & 31;
    const int at = token * topk + lane;
    Entry entry{-1, -1, -1};
    float factor = 1.0f;
    bool wanted = true;
    if (lane < topk) {
      entry = params.routing.entries[at];
      if (params.has_weights) factor = params.weights[at];
      wanted = params.topk_idx[at] == params.routing.ids[at];
    }
    if (params.low.row_layout == RowLayout::kExpert) {
      const int position = entry.position >= 0 ? entry.position : 0;
      const unsigned all_wanted = __ballot_sync(0xffffffffu, wanted);
      factor = __shfl_sync(0xffffffffu, factor, position);
      if ((all_wanted >> position & 1) == 0) entry.rank = -1;
    }
    if (entry.rank >= 0 && lost[entry.rank] != 0) entry.rank = -1;
    LowEntry found{entry.slot, entry.rank, factor};
    const unsigned there = __ballot_sync(0xffffffffu, entry.rank >= 0);
    // Usually the first ones; otherwise they move up.
    if ((there & (there + 1)) == 0) return found;
    const int from = static_cast<int>(__fns(there, 0, lane + 1));
    const bool some = lane < __popc(there);
    found.slot = __shfl_sync(0xffffffffu, found.slot, some ? from : lane);
    found.factor = __shfl_sync(0xffffffffu, found.factor, some ? from : lane);
    const int rank = __shfl_sync(0xffffffffu, static_cast<int>(found.rank), some ? from : lane);
    found.rank = static_cast<std::int16_t>(some ? rank : -1);
    return found;
  }
};

// Rows of e4m3, dequantised: a warp takes 512 elements of a token, 16 a lane.
template <class T>
__device__ void reduce_quantized(const LowJob& job) {
  constexpr int kALane = 16;
  constexpr int kChunkElements = 32 * kALane;
  constexpr int kVectors = kALane / T::kPerVector;
  constexpr int kUnroll = 4;
  const int lane = threadIdx.x & 31;
  const int chunks = (job.hidden + kChunkElements - 1) / kChunkElements;
  const auto hidden = static_cast<std::size_t>(job.hidden);
  const std::size_t row = quantized_row_bytes(hidden);
  const std::size_t row_scales = (hidden + kFp8Block - 1) / kFp8Block;
  const std::size_t scales_at = quantized_scales_offset(job.params.low.slots.slots(), hidden);
  ItemCursor item(0, job.num_tokens, chunks, static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32,
                  static_cast<int>(gridDim.x) * kWarps);
#pragma unroll 1
  for (; item.valid(); item.advance()) {
    const LowEntry entry = job.entry(item);
    const int count = __popc(__ballot_sync(0xffffffffu, entry.rank >= 0));
    const int column = item.chunk * kChunkElements + lane * kALane;
    float total[kALane] = {};
    float partial[kALane] = {};
    int last_rank = -1;
#pragma unroll 1
    for (int first = 0; first < count; first += kUnroll) {
      uint4 held[kUnroll];
      float scales[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), (first + u) & 31);
        const auto slot = static_cast<std::size_t>(__shfl_sync(0xffffffffu, entry.slot, (first + u) & 31));
        held[u] = make_uint4(0, 0, 0, 0);
        scales[u] = 0.0f;
        if (first + u < count && column < job.hidden) {
          const std::uint8_t* base = job.rows[rank];
          held[u] = load_streaming(reinterpret_cast<const uint4*>(base + slot * row + column));
          scales[u] = load_cached_in_l2(reinterpret_cast<const float*>(base + scales_at) + slot * row_scales +
                                        column / static_cast<int>(kFp8Block));
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), (first + u) & 31);
        const float factor = __shfl_sync(0xffffffffu, entry.factor, (first + u) & 31);
        if (first + u >= count) continue;
        const bool starts = rank != last_rank;
        last_rank = rank;
        const std::uint32_t words[4] = {held[u].x, held[u].y, held[u].z, held[u].w};
#pragma unroll
        for (int i = 0; i < kALane; ++i) {
          __nv_fp8_e4m3 code;
          code.__x = static_cast<__nv_fp8_storage_t>(words[i / 4] >> (i % 4 * 8));
          const float product = __fmul_rn(__fmul_rn(static_cast<float>(code), scales[u]), factor);
          if (starts) {
            total[i] = __fadd_rn(total[i], partial[i]);
            partial[i] = product;
          } else {
            partial[i] = __fadd_rn(partial[i], product);
          }
        }
      }
    }
    std::uint8_t* out =
        job.out + (static_cast<std::size_t>(item.token) * hidden + static_cast<std::size_t>(column)) * T::kBytes;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float values[T::kPerVector];
#pragma unroll
      for (int i = 0; i < T::kPerVector; ++i) {
        values[i] = __fadd_rn(total[v * T::kPerVector + i], partial[v * T::kPerVector + i]);
      }
      if (column + v * T::kPerVector < job.hidden) reinterpret_cast<uint4*>(out)[v] = T::pack(values);
    }
  }
}

// Weights of routes that are missing from the sums, and routes that are not those of the dispatch. `warp` of `warps`.
__device__ void tell_lost(const LowJob& job, std::uint32_t sequence, int warp, int warps) {
  const LowCombineParams& params = job.params;
  const Group& group = params.low.group;
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int token = warp; token < job.num_tokens; token += warps) {
    const int at = token * job.topk + lane;
    const bool in = lane < job.topk;
    const std::int32_t id = in ? params.routing.ids[at] : -1;
    const std::int64_t asked = in ? params.topk_idx[at] : -1;
    const Entry entry = in ? params.routing.entries[at] : Entry{-1, -1, -1};
    const float weight = in && params.has_weights ? params.weights[at] : 1.0f;
    const bool by_expert = params.low.row_layout == RowLayout::kExpert;
    if (by_expert && asked != id && asked != -1) {
      const std::int64_t values[kReportValues] = {group.rank, at + 1, asked, job.topk};
      record_failure(group, Outcome::kOtherRoute, kOperation, sequence, values);
    }
    const bool counts = id >= 0 && (!by_expert || asked == id);
    const int rank_of = id >= 0 ? group.rank_of_expert[id] : -1;
    bool summed = false;
#pragma unroll 1
    for (int j = 0; j < job.topk; ++j) {
      const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), j);
      const int position = __shfl_sync(0xffffffffu, static_cast<int>(entry.position), j);
      if (rank < 0 || job.lost[rank] != 0) continue;
      summed = summed || (by_expert ? position == lane : rank == rank_of);
    }
    unsigned missing = __ballot_sync(0xffffffffu, counts && !summed);
    float lost = 0.0f;
#pragma unroll 1
    for (; missing != 0; missing &= missing - 1) {
      lost = __fadd_rn(lost, __shfl_sync(0xffffffffu, weight, __ffs(static_cast<int>(missing)) - 1));
    }
    if (lane == 0) params.lost[token] = lost;
  }
}

// What a kernel begins with: everything that it needs from global memory before it can do anything, in one go.
struct LowCombineStart {
  std::uint32_t failed;
  std::uint32_t begun;    // the last operation that has
  std::uint32_t dropped;  // the last dispatch into this buffer that was
  std::uint64_t registered;
  LowHeader header;
  std::uint32_t since;
  std::uint32_t gave_up;
  std::uint8_t* base;

  __device__ explicit LowCombineStart(const LowCombineParams& params) {
    const LowGroup& low = params.low;
    failed = load_relaxed_device(&low.group.state->failed);
    begun = load_relaxed_device(&low.state->sequence);
    dropped = load_relaxed_device(low.state->gave_up + params.index);
    registered = params.segment >= 0 ? low.registered[params.segment] : 0;
    header = *params.routing.header;
    since = gave_up = 0;
    base = nullptr;
    if (static_cast<int>(threadIdx.x) >= low.group.num_ranks) return;
    since = load_relaxed_device(low.masked_since + threadIdx.x);
    gave_up = params.routing.gave_up[threadIdx.x];
    base = low.group.bases[threadIdx.x];
  }
};

// Waits until all ranks have come to this combine. All threads; ends with a barrier. False: this rank has failed.
__device__ __noinline__ bool await_posts(const LowCombineParams& params, const LowCombineShared& shared,
                                         std::uint32_t sequence) {
  const LowGroup& low = params.low;
  const LowAwaited awaited{kKind, params.index, sequence, Step::kPost};
  bool failed = false;
#pragma unroll 1
  for (int source = threadIdx.x; source < low.group.num_ranks; source += kThreads) {
    if (shared.masked[source] != 0) continue;
    std::uint64_t seen = 0;
    const std::uint64_t* post = low_post_of(low, shared.heaps[low.group.rank], kKind, params.index, source);
    failed = await_word(low, post, awaited, source, seen) == Wait::kFailed || failed;
  }
  return __syncthreads_or(failed) == 0;
}

// The rows of `source`, which are in registered memory number `segment` - 1; `offset` is the word that says where in
// it. One thread. False: this rank has failed. `memory` is all of shared memory, as in finish_reading(): references to
// its parts would keep these in local memory, in all of the kernel.
__device__ __noinline__ bool find_rows(const LowCombineParams& params, std::uint8_t* memory,
                                       const std::uint64_t* offset, std::uint32_t sequence, int source,
                                       std::uint32_t segment) {
  const LowGroup& low = params.low;
  if (source == low.group.rank) return true;
  const LowCombineShared shared(memory, params);
  const LowAwaited awaited{kKind, params.index, sequence, Step::kPost};
  std::uint64_t seen = 0;
  const Wait wait = await_late_word(low, offset, awaited, source, seen);
  if (wait == Wait::kMissing) shared.lost[source] = 1;
  if (wait != Wait::kCame) return wait == Wait::kMissing;
  shared.segment[source] = 1;
  *shared.some_segments = 1;
  shared.rows[source] = low.segments[source * kMostRowSegments + static_cast<int>(segment) - 1] +
                        static_cast<std::size_t>(low_value(seen)) * 16;
  return true;
}

// Waits for what all ranks post, and for their rows. Which ones bring nothing is in `lost` then, and where rows are in
// `rows`. All threads; ends with a barrier. False: this rank has failed.
__device__ bool await_rows(const LowCombineParams& params, const LowCombineShared& shared, std::uint8_t* memory,
                           std::uint32_t sequence, const LowPost& mine) {
  const LowGroup& low = params.low;
  const Group& group = low.group;
  constexpr int kWords = static_cast<int>(LowWord::kSegment) + 1;
  const std::uint64_t* posts = low_post_of(low, shared.heaps[group.rank], kKind, params.index, 0);
  const std::size_t stride = low.layout.post_stride() / sizeof(std::uint64_t);
  const LowAwaited awaited{kKind, params.index, sequence, Step::kPost};
  bool failed = false;
  bool copies = false;
#pragma unroll 1
  for (int i = threadIdx.x; i < group.num_ranks * kWords; i += kThreads) {
    const int source = i / kWords;
    const int word = i % kWords;
    if (word == static_cast<int>(LowWord::kBlocks)) shared.ready[source] = 1;
    if (word == static_cast<int>(LowWord::kSegment)) shared.segment[source] = 0;
    if (shared.masked[source] != 0) continue;
    std::uint64_t seen = 0;
    const Wait wait = await_word(low, posts + source * stride + word, awaited, source, seen);
    failed = failed || wait == Wait::kFailed;
    if (wait == Wait::kMissing) shared.lost[source] = 1;
    if (wait != Wait::kCame) continue;
    const std::uint32_t value = low_value(seen);
    // A rank at a later combine of this dispatch has done this one: its rows are there, however it gives the later
    // ones.
    if (word == static_cast<int>(LowWord::kBlocks) && value > 0 && low_lead(seen, sequence) == 0) {
      copies = true;
      shared.ready[source] = 0;
    }
    if (word == static_cast<int>(LowWord::kGaveUp) && value != 0) shared.lost[source] = 1;
    if (word == static_cast<int>(LowWord::kSegment) && value != 0 && low_lead(seen, sequence) == 0) {
      failed = !find_rows(params, memory, posts + source * stride + word + 1, sequence, source, value) || failed;
    }
    if (word >= kNumLowCompared || low_lead(seen, sequence) != 0) continue;
    const std::uint32_t here = reinterpret_cast<const std::uint32_t*>(&mine)[word];
    if (value == here) continue;
    const std::int64_t values[kReportValues] = {source, word, value, here};
    record_failure(group, Outcome::kMismatch, kOperation, sequence, values);
    failed = true;
  }
  if (__syncthreads_or(failed || copies) == 0) return true;
  if (__syncthreads_or(failed) != 0) return false;
  bool came = true;
  await_arrivals(
      low, shared.heaps[group.rank], kKind, params.index, sequence, shared.ready, [](int) { return 0; },
      [&](int source, Wait wait, std::uint32_t) {
        came = came && wait != Wait::kFailed;
        if (wait == Wait::kMissing) shared.lost[source] = 1;
      });
  return __syncthreads_and(came) != 0;
}

// The end of a combine of which some rows are in registered memory: their owners are told that this rank has read them,
// and this rank, if it owns some, waits until all others have. All threads of all blocks.
__device__ __noinline__ void finish_reading(const LowCombineParams& params, std::uint8_t* memory,
                                            std::uint32_t sequence, bool waits) {
  const LowCombineShared shared(memory, params);
  const LowGroup& low = params.low;
  const auto index = static_cast<std::size_t>(params.index);
  const int rank = low.group.rank;
  // No fence: what is told is that loads have returned, and none of what this kernel stored.
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(&low.state->readers, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  const auto is_other = [&](int other) { return other != rank && shared.masked[other] == 0; };
#pragma unroll 1
  for (int other = threadIdx.x; other < low.group.num_ranks; other += kThreads) {
    if (!is_other(other) || shared.segment[other] == 0) continue;
    store_relaxed_system(
        reinterpret_cast<std::uint64_t*>(shared.heaps[other] + low.layout.reads(index, static_cast<std::size_t>(rank))),
        low_word(sequence, 1));
  }
  if (!waits) return;
  const LowAwaited awaited{kKind, params.index, sequence, Step::kRead};
#pragma unroll 1
  for (int other = threadIdx.x; other < low.group.num_ranks; other += kThreads) {
    if (!is_other(other)) continue;
    std::uint64_t seen = 0;
    await_late_word(low,
                    reinterpret_cast<const std::uint64_t*>(shared.heaps[rank] +
                                                           low.layout.reads(index, static_cast<std::size_t>(other))),
                    awaited, other, seen);
  }
}

// The routes of a warp's first token, which it will want as soon as it has waited.
__device__ void prefetch_routes(const LowCombineParams& params) {
  const int row_bytes = params.hidden * static_cast<int>(element_bytes(params.element));
  const int chunks = (row_bytes + kReduceChunk - 1) / kReduceChunk;
  const int item = static_cast<int>(blockIdx.x) * params.pipeline.warps + static_cast<int>(threadIdx.x / 32);
  const int token = item / chunks;
  const int lane = threadIdx.x & 31;
  if (token >= params.num_tokens || lane >= 4) return;
  const int at = token * params.topk;
  const void* places[4] = {params.routing.entries + at, params.routing.ids + at, params.topk_idx + at,
                           params.has_weights ? params.weights + at : nullptr};
  if (places[lane] != nullptr) prefetch_to_l2(places[lane]);
}

// Where rows are, one kernel each: code that is not needed costs instruction fetches at every launch.
enum class Rows : int {
  kInPlace,    // in every rank's heap
  kCopied,     // this rank's are copied there first
  kQuantized,  // likewise, as e4m3
};

template <class R, Rows kRows>
__global__ void __launch_bounds__(kThreads, 1) low_combine_kernel(const __grid_constant__ LowCombineParams params) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  const LowGroup& low = params.low;
  const Group& group = low.group;
  wait_for_stream();
  const LowCombineStart start(params);
  const LowCombineShared shared(memory, params);
  const bool sends = (params.halves & kLowSend) != 0;
  constexpr bool kCopies = kRows != Rows::kInPlace;
  constexpr bool kQuantizes = kRows == Rows::kQuantized;
  const std::uint32_t sequence = sends ? start.begun + 1 : start.header.combine_sequence;
  const bool gave_up = start.dropped == start.header.sequence;
  const auto keep_rank = [&](int rank, std::uint32_t since, bool dropped, std::uint8_t* base) {
    shared.heaps[rank] = base;
    // Ranks that were left out since the rows were sent are not waited for either.
    const bool masked = is_masked(since, sends ? sequence : start.begun);
    shared.masked[rank] = masked ? 1 : 0;
    shared.lost[rank] = masked || dropped || (rank == group.rank && gave_up) ? 1 : 0;
    const bool elsewhere = rank == group.rank && kCopies && !kQuantizes;
    shared.rows[rank] = elsewhere ? params.rows : base + params.rows_offset;
  };
  if (static_cast<int>(threadIdx.x) < group.num_ranks) {
    keep_rank(static_cast<int>(threadIdx.x), start.since, start.gave_up != 0, start.base);
  }
#pragma unroll 1
  for (int rank = static_cast<int>(threadIdx.x) + kThreads; rank < group.num_ranks; rank += kThreads) {
    keep_rank(rank, load_relaxed_device(low.masked_since + rank), params.routing.gave_up[rank] != 0, group.bases[rank]);
  }
  if (kCopies && sends && params.pipeline.use_bulk) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kWarps * kCopyStages; i += kThreads) barrier_init(shared.copy_barriers + i, 1);
    fence_barrier_init();
    fence_shared_to_bulk();
    fence_bulk_to_global();
  }
  // Another kernel may fail at any time: one thread has looked, for all of the block.
  __shared__ std::uint32_t failed;
  const bool registered = kCopies && !kQuantizes && params.segment >= 0 && start.registered == params.segment_id;
  if (threadIdx.x == 0) {
    failed = start.failed;
    *shared.some_segments = registered ? 1 : 0;
  }
  __syncthreads();
  if (failed != 0) return;
  const LowPost post{static_cast<std::uint32_t>(kOperation),
                     static_cast<std::uint32_t>(kQuantizes ? Element::kFloat8 : params.element),
                     static_cast<std::uint32_t>(params.topk),
                     params.has_weights ? 1u : 0u,
                     static_cast<std::uint32_t>(params.index),
                     start.header.sequence,
                     kCopies && !registered ? static_cast<std::uint32_t>(params.send_blocks) : 0u,
                     gave_up ? 1u : 0u,
                     registered ? static_cast<std::uint32_t>(params.segment) + 1 : 0u,
                     params.segment_offset};
  if (sends) {
    // Rows that are in place were written by earlier kernels; the threads that post release them.
    constexpr int kPosting = 32;
    if (threadIdx.x < kPosting && static_cast<int>(blockIdx.x) < group.num_ranks) {
      fence_for_peers(group);
      publish_low_post(low, kKind, params.index, sequence, post, shared.heaps, shared.masked, nullptr, 0, kPosting);
    }
    // By then every block has read the last one.
    if (threadIdx.x == kThreads - 1 && begin_operation(low, sequence)) {
      params.routing.header->combine_sequence = sequence;
    }
    if constexpr (kCopies) {
      // Of a dispatch that has been combined before, peers may still read what is about to be written.
      if (!registered && start.header.combine_sequence != 0 && !await_posts(params, shared, sequence)) return;
      if (!registered && static_cast<int>(blockIdx.x) < params.send_blocks) {
        copy_rows<typename R::Element, kQuantizes>(params, shared.heaps[group.rank] + params.rows_offset,
                                                   CopyRing{shared.stages, shared.copy_barriers, shared.scales},
                                                   shared.ends);
        __syncthreads();
        signal_arrival(low, kKind, params.index, sequence, shared.heaps, shared.masked,
                       static_cast<std::uint32_t>(params.send_blocks));
      }
    }
  }
  if ((params.halves & kLowReceive) == 0) return;
  prefetch_routes(params);
  if (!await_rows(params, shared, memory, sequence, post)) return;
  const LowJob job{params,      shared.lost,   params.num_tokens, params.topk,
                   params.topk, params.hidden, shared.rows,       params.out};
  if constexpr (kQuantizes) {
    reduce_quantized<typename R::Element>(job);
  } else {
    reduce_rows<R>(job, params.pipeline, ReduceRing{shared.stages, shared.barriers});
  }
  // By warps that have no part in that, if there are any.
  const int warp = threadIdx.x / 32;
  const bool all = !params.pipeline.use_bulk || kQuantizes || params.pipeline.warps == kWarps;
  const int first = all ? 0 : params.pipeline.warps;
  if (warp >= first) {
    tell_lost(job, sequence, static_cast<int>(blockIdx.x) * (kWarps - first) + warp - first,
              static_cast<int>(gridDim.x) * (kWarps - first));
  }
  if constexpr (!kQuantizes) {
    if (*shared.some_segments != 0) finish_reading(params, memory, sequence, registered);
  }
}

template <class Visit>
cudaError_t visit_low_rows(Rows rows, Visit&& visit) {
  switch (rows) {
    case Rows::kInPlace: return visit(std::integral_constant<Rows, Rows::kInPlace>{});
    case Rows::kCopied: return visit(std::integral_constant<Rows, Rows::kCopied>{});
    case Rows::kQuantized: return visit(std::integral_constant<Rows, Rows::kQuantized>{});
  }
  return cudaErrorInvalidValue;
}

// Calls `visit` with the kernel for such rows.
template <class Visit>
cudaError_t visit_low_combine(Element element, bool plain, Rows rows, Visit&& visit) {
  return visit_element_on_host(element, [&](auto tag) -> cudaError_t {
    using T = decltype(tag);
    return visit_low_rows(rows, [&](auto of) {
      if (plain) return visit(low_combine_kernel<Reduction<T, kReduceChunk / 512, true>, decltype(of)::value>);
      return visit(low_combine_kernel<Reduction<T, kReduceChunk / 512, false>, decltype(of)::value>);
    });
  });
}

}  // namespace

cudaError_t prepare_low_combine(std::size_t most_shared_bytes) {
  for (const Element element : {Element::kFloat32, Element::kBFloat16, Element::kFloat16}) {
    for (const bool plain : {false, true}) {
      for (const Rows rows : {Rows::kInPlace, Rows::kCopied, Rows::kQuantized}) {
        const cudaError_t error = visit_low_combine(element, plain, rows, [&](auto* kernel) {
          return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(most_shared_bytes));
        });
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

std::size_t low_combine_shared_bytes(const LowCombineParams& params) { return LowCombineShared::bytes(params); }

cudaError_t launch_low_combine(const LowCombineParams& params, int blocks, cudaStream_t stream) {
  const std::size_t shared = LowCombineShared::bytes(params);
  const bool plain = params.low.row_layout == RowLayout::kRank;
  const Rows rows = params.quantize ? Rows::kQuantized : params.rows != nullptr ? Rows::kCopied : Rows::kInPlace;
  return visit_low_combine(params.element, plain, rows, [&](auto* kernel) {
    return launch_early(kernel, blocks, kThreads, shared, stream, params.low.starts_early, params);
  });
}

}  // namespace gpu
}  // namespace moe_ep
