// Low-latency combine: tell peers that this rank's rows are there, read every token's rows where they lie, and sum them
// with the token's own weights. Of rows in the heap nothing is told after the reads: they are written again only after
// the rank's next dispatch into the same buffer, for which every peer has to have come past this combine. Rows in
// registered memory are the caller's, who may write them as soon as the combine is over: so it ends when all have read.
#include <algorithm>
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
constexpr int kPostWords = static_cast<int>(LowWord::kBadRoute);  // what a combine has to say

// Arrays in shared memory, in their order, as in low_dispatch.cu.
enum LowArray : int {
  kRowsOf,        // const std::uint8_t* [num_ranks]
  kHeaps,         // std::uint8_t* [num_ranks]
  kBarriers,      // std::uint64_t [pipeline.warps][pipeline.stages]
  kCopyBarriers,  // std::uint64_t [kWarps][kCopyStages]
  kScales,        // float [kWarps][kMostScalesAChunk]
  kEnds,          // std::int32_t [num_local_experts + 1]
  kPost,          // std::uint32_t [kPostWords] of this rank
  kKept,          // KeptEntry [pipeline.warps][pipeline.stages][topk]
  kMasked,        // std::uint8_t [num_ranks]
  kLost,          // std::uint8_t [num_ranks]
  kReady,         // std::uint8_t [num_ranks] whose rows are there when they have posted, or that are lost
  kSegment,       // std::uint8_t [num_ranks] whether rows are in registered memory
  kSomeSegments,  // std::uint8_t whether any are
  kStages,        // rings of both parts: one is done with when the other begins
  kNumArrays
};
static_assert(static_cast<int>(kNumArrays) + 1 == kLowCombineOffsets, "an offset an array, and their end");

// An entry of a token whose rows are on their way.
struct KeptEntry {
  std::int32_t rank;  // -1: it is past the last one
  float factor;
};

struct LowCombineShared {
  std::uint8_t* base;
  const std::uint32_t* offsets;

  template <class T>
  __device__ T* at(LowArray array) const {
    return reinterpret_cast<T*>(base + offsets[array]);
  }
  __device__ const std::uint8_t** rows() const { return at<const std::uint8_t*>(kRowsOf); }
  __device__ std::uint8_t** heaps() const { return at<std::uint8_t*>(kHeaps); }
  __device__ std::uint64_t* copy_barriers() const { return at<std::uint64_t>(kCopyBarriers); }
  __device__ std::uint32_t* post() const { return at<std::uint32_t>(kPost); }
  __device__ std::uint8_t* masked() const { return at<std::uint8_t>(kMasked); }
  __device__ std::uint8_t* lost() const { return at<std::uint8_t>(kLost); }
  __device__ std::uint8_t* ready() const { return at<std::uint8_t>(kReady); }
  __device__ std::uint8_t* segment() const { return at<std::uint8_t>(kSegment); }
  __device__ std::uint8_t* some_segments() const { return at<std::uint8_t>(kSomeSegments); }
};

// A chunk of a token, of which a warp takes every so many-th.
struct LowItem {
  int token;
  int chunk;
  __device__ LowItem(const LowCombineParams& params, int item) {
    token = quotient(item, params.chunks_inverse);
    chunk = item - token * params.chunks;
  }
};

// A row of a token that is summed, and its weight.
struct LowEntry {
  std::int32_t slot;
  std::int16_t rank;  // -1: none
  float factor;
};

// What a lane knows of a token's route.
struct LowRoute {
  Entry entry;
  float factor;
  std::int32_t id;  // as dispatched
  std::int64_t asked;
};

// Where some routes in between are lost: the others move up.
__device__ __noinline__ LowEntry move_up(LowEntry found) {
  const int lane = threadIdx.x & 31;
  const unsigned there = __ballot_sync(0xffffffffu, found.rank >= 0);
  const int from = static_cast<int>(__fns(there, 0, lane + 1));
  const bool some = lane < __popc(there);
  found.slot = __shfl_sync(0xffffffffu, found.slot, some ? from : lane);
  found.factor = __shfl_sync(0xffffffffu, found.factor, some ? from : lane);
  const int rank = __shfl_sync(0xffffffffu, static_cast<int>(found.rank), some ? from : lane);
  found.rank = static_cast<std::int16_t>(some ? rank : -1);
  return found;
}

// See ReduceJob. Routes of ranks that are lost, and those that the caller leaves out, are passed over.
struct LowJob : InTokenOrder {
  const LowCombineParams& params;
  const std::uint8_t* lost;  // [num_ranks], in shared memory
  std::int64_t num_tokens;
  std::int32_t topk;
  std::int32_t hidden;
  const std::uint8_t* const* rows;  // [num_ranks], in shared memory
  std::uint8_t* out;

  using LaneEntry = LowEntry;

  __device__ LowEntry entry(const ItemCursor& item) const {
    return item.valid() ? resolve(fetch(item.token)) : LowEntry{-1, -1, 0.0f};
  }
  __device__ float weight(const LowEntry& entry) const { return entry.factor; }

  // Asks for what lane j is to know of a token's route number j.
  __device__ LowRoute fetch(int token) const {
    const int lane = threadIdx.x & 31;
    LowRoute route{Entry{-1, -1, -1}, 1.0f, 0, 0};
    if (lane >= topk || token >= params.num_tokens) return route;
    const int at = token * topk + lane;
    route.entry = params.routing.entries[at];
    if (params.has_weights) route.factor = params.weights[at];
    route.id = params.routing.ids[at];
    route.asked = params.topk_idx[at];
    return route;
  }
  // All lanes: lane j's entry of a token.
  __device__ LowEntry resolve(const LowRoute& route) const {
    LowEntry found{route.entry.slot, route.entry.rank, route.factor};
    if (params.low.row_layout == RowLayout::kExpert) {
      const int position = max(static_cast<int>(route.entry.position), 0);
      const unsigned wanted = __ballot_sync(0xffffffffu, route.asked == route.id);
      found.factor = __shfl_sync(0xffffffffu, route.factor, position);
      if ((wanted >> position & 1) == 0) found.rank = -1;
    }
    if (found.rank >= 0 && lost[found.rank] != 0) found.rank = -1;
    const unsigned there = __ballot_sync(0xffffffffu, found.rank >= 0);
    // Usually the first ones.
    return (there & (there + 1)) == 0 ? found : move_up(found);
  }
};

// As reduce_rows_bulk(), in less code: what a call with few tokens takes is the time in which code is fetched, see
// low_dispatch.cu. An entry is found once, and kept until its rows are there. `item` is the warp's first, and `route`
// what job.fetch() gave for it.
template <class R>
__device__ inline void sum_rows(const LowJob& job, const LowCombineShared& shared, LowItem item, LowRoute route) {
  const LowCombineParams& params = job.params;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (warp >= params.pipeline.warps) return;
  const int depth = params.pipeline.stages;
  const int stage_bytes = job.topk * R::kChunk;
  std::uint8_t* stages = shared.at<std::uint8_t>(kStages) + warp * depth * stage_bytes;
  std::uint64_t* barriers = shared.at<std::uint64_t>(kBarriers) + warp * depth;
  KeptEntry* kept = shared.at<KeptEntry>(kKept) + warp * depth * job.topk;
  fence_bulk_to_global();
  const auto advance = [&](LowItem& to) {
    to.token += params.token_step;
    to.chunk += params.chunk_step;
    if (to.chunk < params.chunks) return;
    to.chunk -= params.chunks;
    ++to.token;
  };
  LowItem loading = item;
  int on_their_way = 0;
  int load_stage = 0;
  int stage = 0;
  std::uint32_t parity = 0;
#pragma unroll 1
  for (;;) {
    if (loading.token < params.num_tokens) {
      const LowEntry entry = job.resolve(route);
      const int bytes = chunk_bytes<R>(params.row_bytes, loading.chunk);
      const int count = __popc(__ballot_sync(0xffffffffu, entry.rank >= 0));
      if (lane < job.topk) kept[load_stage * job.topk + lane] = KeptEntry{entry.rank, job.weight(entry)};
      if (lane == 0) barrier_arrive_expect(barriers + load_stage, static_cast<std::uint32_t>(count * bytes));
      __syncwarp();
      if (entry.rank >= 0) {
        bulk_load_once(
            stages + load_stage * stage_bytes + lane * R::kChunk,
            job.rows[entry.rank] + static_cast<std::size_t>(entry.slot) * params.row_bytes + loading.chunk * R::kChunk,
            static_cast<std::uint32_t>(bytes), barriers + load_stage);
      }
      if (++load_stage == depth) load_stage = 0;
      advance(loading);
      route = job.fetch(loading.token);
      if (++on_their_way < depth) continue;
    }
    if (on_their_way == 0) break;
    const std::uint8_t* data = stages + stage * stage_bytes + lane * 16;
    const KeptEntry* entries = kept + stage * job.topk;
    Sums<R> sums;
    barrier_wait(barriers + stage, parity);
    int last_rank = -1;
#pragma unroll 1
    for (int j = 0; j < job.topk; ++j) {
      const int rank = entries[j].rank;
      if (rank < 0) break;
      const float factor = entries[j].factor;
      sums.add_row(data + j * R::kChunk, rank != last_rank, factor);
      last_rank = rank;
    }
    store_sums<R>(job, params.row_bytes, item, sums);
    // All lanes have read the stage: it may be loaded again.
    __syncwarp();
    advance(item);
    --on_their_way;
    if (++stage == depth) {
      stage = 0;
      parity ^= 1;
    }
  }
}

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
    base = heap_of(params, static_cast<int>(threadIdx.x));
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
    if (shared.masked()[source] != 0) continue;
    std::uint64_t seen = 0;
    const std::uint64_t* post = low_post_of(low, shared.heaps()[low.group.rank], kKind, params.index, source);
    failed = await_word(low, post, awaited, source, seen) == Wait::kFailed || failed;
  }
  return __syncthreads_or(failed) == 0;
}

// The rows of `source`, which are in registered memory number `segment` - 1; `offset` is the word that says where in
// it. One thread. False: this rank has failed.
__device__ inline bool find_rows(const LowCombineParams& params, const LowCombineShared& shared,
                                 const std::uint64_t* offset, std::uint32_t sequence, int source,
                                 std::uint32_t segment) {
  const LowGroup& low = params.low;
  if (source == low.group.rank) return true;
  const LowAwaited awaited{kKind, params.index, sequence, Step::kPost};
  std::uint64_t seen = 0;
  const Wait wait = await_late_word(low, offset, awaited, source, seen);
  if (wait == Wait::kMissing) shared.lost()[source] = 1;
  if (wait != Wait::kCame) return wait == Wait::kMissing;
  shared.segment()[source] = 1;
  *shared.some_segments() = 1;
  shared.rows()[source] = low.segments[source * kMostRowSegments + static_cast<int>(segment) - 1] +
                          static_cast<std::size_t>(low_value(seen)) * 16;
  return true;
}

// How a look at a word of a post ended.
enum LowLook : int { kLookFine = 0, kLookCopies = 1, kLookFailed = 2 };

// A word of a post that is late, or says something that is not usual. One thread. `memory` is all of shared memory, as
// in finish_reading(): a reference to the view of it would keep that in local memory, in all of the kernel.
__device__ __noinline__ LowLook look_closer(const LowCombineParams& params, std::uint8_t* memory,
                                            std::uint32_t sequence, const std::uint64_t* at, int source, int word) {
  const LowCombineShared shared{memory, params.offsets};
  const LowAwaited awaited{kKind, params.index, sequence, Step::kPost};
  std::uint64_t seen = 0;
  const Wait wait = await_word(params.low, at, awaited, source, seen);
  if (wait == Wait::kMissing) shared.lost()[source] = 1;
  if (wait != Wait::kCame) return wait == Wait::kFailed ? kLookFailed : kLookFine;
  const std::uint32_t value = low_value(seen);
  if (word == static_cast<int>(LowWord::kGaveUp) && value != 0) shared.lost()[source] = 1;
  // A rank at a later combine of this dispatch has done this one: its rows are there, however it gives the later ones.
  if (low_lead(seen, sequence) != 0) return kLookFine;
  if (word == static_cast<int>(LowWord::kBlocks) && value > 0) {
    shared.ready()[source] = 0;
    return kLookCopies;
  }
  if (word == static_cast<int>(LowWord::kSegment) && value != 0) {
    return find_rows(params, shared, at + 1, sequence, source, value) ? kLookFine : kLookFailed;
  }
  if (word >= kNumLowCompared || value == shared.post()[word]) return kLookFine;
  const std::int64_t values[kReportValues] = {source, word, value, shared.post()[word]};
  record_failure(params.low.group, Outcome::kMismatch, kOperation, sequence, values);
  return kLookFailed;
}

// Rows that ranks copy to where they are read. All threads; ends with a barrier. False: this rank has failed.
__device__ __noinline__ bool await_copies(const LowCombineParams& params, std::uint8_t* memory,
                                          std::uint32_t sequence) {
  const LowCombineShared shared{memory, params.offsets};
  bool came = true;
  await_arrivals(
      params.low, shared.heaps()[params.low.group.rank], kKind, params.index, sequence, shared.ready(),
      [](int) { return 0; },
      [&](int source, Wait wait, std::uint32_t) {
        came = came && wait != Wait::kFailed;
        if (wait == Wait::kMissing) shared.lost()[source] = 1;
      });
  return __syncthreads_and(came) != 0;
}

// Waits for what all ranks post, and for their rows. Which ones bring nothing is in `lost` then, and where rows are in
// `rows`. All threads; ends with a barrier. False: this rank has failed.
__device__ bool await_rows(const LowCombineParams& params, const LowCombineShared& shared, std::uint8_t* memory,
                           std::uint32_t sequence) {
  const Group& group = params.low.group;
  constexpr int kWords = static_cast<int>(LowWord::kSegment) + 1;
  const auto* posts = reinterpret_cast<const std::uint64_t*>(shared.heaps()[group.rank] + params.posts_offset);
  bool failed = false;
  bool copies = false;
  // Half a warp a rank.
  static_assert(kWords <= 16, "a thread a word");
  const int word = static_cast<int>(threadIdx.x & 15);
#pragma unroll 1
  for (int source = static_cast<int>(threadIdx.x / 16); source < group.num_ranks; source += kThreads / 16) {
    if (word >= kWords || shared.masked()[source] != 0) continue;
    const std::uint64_t* at = posts + source * params.post_stride + word;
    std::uint64_t seen = load_acquire_system(at);
#pragma unroll 1
    for (int spin = 0; spin < kQuickSpins && low_lead(seen, sequence) != 0; ++spin) seen = load_acquire_system(at);
    const std::uint32_t usual = word < kNumLowCompared ? shared.post()[word] : 0;
    if (low_lead(seen, sequence) == 0 && low_value(seen) == usual) continue;
    const LowLook look = look_closer(params, memory, sequence, at, source, word);
    failed = failed || look == kLookFailed;
    copies = copies || look == kLookCopies;
  }
  if (__syncthreads_or(failed || copies) == 0) return true;
  if (__syncthreads_or(failed) != 0) return false;
  return await_copies(params, memory, sequence);
}

// The end of a combine of which some rows are in registered memory: their owners are told that this rank has read them,
// and this rank, if it owns some, waits until all others have. All threads of all blocks.
__device__ __noinline__ void finish_reading(const LowCombineParams& params, std::uint8_t* memory,
                                            std::uint32_t sequence, bool waits) {
  const LowCombineShared shared{memory, params.offsets};
  const LowGroup& low = params.low;
  const auto index = static_cast<std::size_t>(params.index);
  const int rank = low.group.rank;
  // No fence: what is told is that loads have returned, and none of what this kernel stored.
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(&low.state->readers, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  const auto is_other = [&](int other) { return other != rank && shared.masked()[other] == 0; };
#pragma unroll 1
  for (int other = threadIdx.x; other < low.group.num_ranks; other += kThreads) {
    if (!is_other(other) || shared.segment()[other] == 0) continue;
    store_relaxed_system(reinterpret_cast<std::uint64_t*>(shared.heaps()[other] +
                                                          low.layout.reads(index, static_cast<std::size_t>(rank))),
                         low_word(sequence, 1));
  }
  if (!waits) return;
  const LowAwaited awaited{kKind, params.index, sequence, Step::kRead};
#pragma unroll 1
  for (int other = threadIdx.x; other < low.group.num_ranks; other += kThreads) {
    if (!is_other(other)) continue;
    std::uint64_t seen = 0;
    await_late_word(low,
                    reinterpret_cast<const std::uint64_t*>(shared.heaps()[rank] +
                                                           low.layout.reads(index, static_cast<std::size_t>(other))),
                    awaited, other, seen);
  }
}

// The routes of a warp's first token, which it will want as soon as it has waited.
__device__ void prefetch_routes(const LowCombineParams& params, const LowItem& item) {
  const int lane = threadIdx.x & 31;
  if (item.token >= params.num_tokens || lane >= 4) return;
  const int at = item.token * params.topk;
  const void* place = params.routing.entries + at;
  if (lane == 1) place = params.routing.ids + at;
  if (lane == 2) place = params.topk_idx + at;
  if (lane == 3 && params.has_weights) place = params.weights + at;
  prefetch_to_l2(place);
}

// This rank's own rows wait for no other rank: they come to L2 while posts are on their way. Of as many tokens as the
// kernel has warps, so that not much more is asked for than comes meanwhile.
__device__ void prefetch_own_rows(const LowCombineParams& params, const std::uint8_t* rows) {
  const int lane = threadIdx.x & 31;
  const int token = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x / 32);
  if (token >= params.num_tokens || lane >= params.topk) return;
  const Entry entry = params.routing.entries[token * params.topk + lane];
  if (entry.rank != params.low.group.rank) return;
  bulk_prefetch(rows + static_cast<std::size_t>(entry.slot) * params.row_bytes,
                static_cast<std::uint32_t>(params.row_bytes));
}

// What a combine knows of a rank at first. `masks`: the operation whose masks count, as ranks that were left out since
// the rows were sent are not waited for either. `own`: this rank's rows, unless they are in the heap.
__device__ inline void keep_rank(const LowCombineParams& params, const LowCombineShared& shared, int rank,
                                 std::uint32_t masks, std::uint32_t since, std::uint32_t their_drop, bool own_drop,
                                 std::uint8_t* base, const std::uint8_t* own) {
  const bool is_own = rank == params.low.group.rank;
  const bool masked = is_masked(since, masks);
  shared.heaps()[rank] = base;
  shared.masked()[rank] = masked ? 1 : 0;
  shared.lost()[rank] = masked || their_drop != 0 || (is_own && own_drop) ? 1 : 0;
  shared.ready()[rank] = 1;
  shared.segment()[rank] = 0;
  shared.rows()[rank] = is_own && own != nullptr ? own : base + params.rows_offset;
}
__device__ __noinline__ void keep_more_ranks(const LowCombineParams& params, std::uint8_t* memory, std::uint32_t masks,
                                             bool own_drop, const std::uint8_t* own) {
  const LowCombineShared shared{memory, params.offsets};
#pragma unroll 1
  for (int rank = static_cast<int>(threadIdx.x) + kThreads; rank < params.low.group.num_ranks; rank += kThreads) {
    keep_rank(params, shared, rank, masks, load_relaxed_device(params.low.masked_since + rank),
              params.routing.gave_up[rank], own_drop, params.low.group.bases[rank], own);
  }
}

// Of the rings that the launch uses. All threads; a barrier comes before those of the copies are used.
__device__ void init_barriers(const LowCombineParams& params, const LowCombineShared& shared, bool copies, bool sums) {
  if (!params.pipeline.use_bulk) return;
  if (copies) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kWarps * kCopyStages; i += kThreads) barrier_init(shared.copy_barriers() + i, 1);
  }
  if (sums && (threadIdx.x & 31) == 0 && static_cast<int>(threadIdx.x / 32) < params.pipeline.warps) {
    std::uint64_t* own = shared.at<std::uint64_t>(kBarriers) + threadIdx.x / 32 * params.pipeline.stages;
#pragma unroll 1
    for (int i = 0; i < params.pipeline.stages; ++i) barrier_init(own + i, 1);
  }
  fence_barrier_init();
  fence_shared_to_bulk();
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
  const LowCombineShared shared{memory, params.offsets};
  const bool sends = (params.halves & kLowSend) != 0;
  const bool receives = (params.halves & kLowReceive) != 0;
  constexpr bool kCopies = kRows != Rows::kInPlace;
  constexpr bool kQuantizes = kRows == Rows::kQuantized;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const LowItem item(params, static_cast<int>(blockIdx.x) * params.pipeline.warps + warp);
  // What follows up to the wait takes its time while earlier kernels end, where they have let this one begin.
  if (receives && !kQuantizes) prefetch_routes(params, item);
  init_barriers(params, shared, kCopies && sends, receives && !kQuantizes);
  wait_for_stream();
  const LowCombineStart start(params);
  const std::uint32_t sequence = sends ? start.begun + 1 : start.header.combine_sequence;
  const bool gave_up = start.dropped == start.header.sequence;
  const std::uint32_t masks = sends ? sequence : start.begun;
  const std::uint8_t* own = kCopies && !kQuantizes ? params.rows : nullptr;
  if (const int rank = static_cast<int>(threadIdx.x); rank < group.num_ranks) {
    keep_rank(params, shared, rank, masks, start.since, start.gave_up, gave_up, start.base, own);
  }
  if (group.num_ranks > kThreads) keep_more_ranks(params, memory, masks, gave_up, own);
  // Another kernel may fail at any time: one thread has looked, for all of the block.
  __shared__ std::uint32_t failed;
  const bool registered = kCopies && !kQuantizes && params.segment >= 0 && start.registered == params.segment_id;
  if (threadIdx.x == 0) {
    failed = start.failed;
    *shared.some_segments() = registered ? 1 : 0;
  }
  if (const int word = static_cast<int>(threadIdx.x); word < kPostWords) {
    std::uint32_t value = params.post[word];
    if (word == static_cast<int>(LowWord::kHandle)) value = start.header.sequence;
    if (word == static_cast<int>(LowWord::kGaveUp)) value = gave_up ? 1 : 0;
    if constexpr (kCopies) {
      if (word == static_cast<int>(LowWord::kBlocks) && registered) value = 0;
      if (word == static_cast<int>(LowWord::kSegment) && !registered) value = 0;
    }
    shared.post()[word] = value;
  }
  __syncthreads();
  if (failed != 0) return;
  if (sends) {
    // Rows that are in place were written by earlier kernels; the threads that post release them.
    constexpr int kPosting = 32;
    if (threadIdx.x < kPosting && static_cast<int>(blockIdx.x) < group.num_ranks) {
      fence_for_peers(group);
      publish_post(group, shared.heaps(), shared.masked(), params.posts_offset, params.post_stride, sequence,
                   kPostWords, kPosting, [&](int word) { return shared.post()[word]; });
    }
    // By then every block has read the last one.
    if (threadIdx.x == kThreads - 1 && begin_operation(low, sequence)) {
      params.routing.header->combine_sequence = sequence;
    }
    if constexpr (kCopies) {
      // Of a dispatch that has been combined before, peers may still read what is about to be written.
      if (!registered && start.header.combine_sequence != 0 && !await_posts(params, shared, sequence)) return;
      if (!registered && static_cast<int>(blockIdx.x) < params.send_blocks) {
        fence_bulk_to_global();
        copy_rows<typename R::Element, kQuantizes>(
            params, shared.heaps()[group.rank] + params.rows_offset,
            CopyRing{shared.at<std::uint8_t>(kStages), shared.copy_barriers(), shared.at<float>(kScales)},
            shared.at<std::int32_t>(kEnds));
        __syncthreads();
        signal_arrival(group, shared.heaps(), shared.masked(), params.arrivals_offset, sequence,
                       static_cast<std::uint32_t>(params.send_blocks));
      }
    }
  }
  if (!receives) return;
  if constexpr (!kQuantizes) {
    if (params.prefetches_own && !gave_up && (!kCopies || registered)) {
      prefetch_own_rows(params, shared.rows()[group.rank]);
    }
  }
  const LowJob job{{}, params, shared.lost(), params.num_tokens, params.topk, params.hidden, shared.rows(), params.out};
  const LowRoute route = job.fetch(kQuantizes || warp >= params.pipeline.warps ? params.num_tokens : item.token);
  if (!await_rows(params, shared, memory, sequence)) return;
  // All ranks have begun. What comes next finds room where blocks end.
  if (low.lets_next_begin) let_next_begin();
  if constexpr (kQuantizes) {
    reduce_quantized<typename R::Element>(job);
  } else {
#if defined(MOE_EP_BULK_COPIES)
    sum_rows<R>(job, shared, item, route);
#else
    reduce_rows_vector<R>(job);
#endif
  }
  // By warps that have no part in that, if there are any.
  const bool all = !params.pipeline.use_bulk || kQuantizes || params.pipeline.warps == kWarps;
  const int first = all ? 0 : params.pipeline.warps;
  if (warp >= first) {
    tell_lost(job, sequence, static_cast<int>(blockIdx.x) * (kWarps - first) + warp - first,
              static_cast<int>(gridDim.x) * (kWarps - first));
  }
  if constexpr (!kQuantizes) {
    if (*shared.some_segments() != 0) finish_reading(params, memory, sequence, registered);
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

std::size_t complete_low_combine(LowCombineParams& params) {
  complete_words(params, kKind, kOperation, params.quantize ? Element::kFloat8 : params.element, params.has_weights);
  if (params.rows != nullptr || params.quantize) {
    params.post[static_cast<int>(LowWord::kBlocks)] = static_cast<std::uint32_t>(params.send_blocks);
    params.post[static_cast<int>(LowWord::kSegment)] = static_cast<std::uint32_t>(params.segment + 1);
    params.post[static_cast<int>(LowWord::kOffset)] = params.segment_offset;
  }
  params.row_bytes = params.hidden * static_cast<std::int32_t>(element_bytes(params.element));
  params.chunks = (params.row_bytes + kReduceChunk - 1) / kReduceChunk;
  params.chunks_inverse = inverse_of(params.chunks);

  const auto ranks = static_cast<std::size_t>(params.low.group.num_ranks);
  const auto slots = static_cast<std::size_t>(params.pipeline.warps * params.pipeline.stages);
  std::size_t bytes[kNumArrays] = {};
  bytes[kRowsOf] = bytes[kHeaps] = ranks * sizeof(void*);
  bytes[kBarriers] = slots * sizeof(std::uint64_t);
  bytes[kCopyBarriers] = kWarps * kCopyStages * sizeof(std::uint64_t);
  bytes[kScales] = kWarps * kMostScalesAChunk * sizeof(float);
  bytes[kEnds] = (static_cast<std::size_t>(params.low.num_local_experts) + 1) * sizeof(std::int32_t);
  bytes[kPost] = kPostWords * sizeof(std::uint32_t);
  bytes[kKept] = slots * static_cast<std::size_t>(params.topk) * sizeof(KeptEntry);
  bytes[kMasked] = bytes[kLost] = bytes[kReady] = bytes[kSegment] = ranks;
  bytes[kSomeSegments] = 1;
  const bool reduces = params.pipeline.use_bulk && (params.halves & kLowReceive) != 0;
  const std::size_t ring = reduces ? slots * static_cast<std::size_t>(params.topk * kReduceChunk) : 0;
  const std::size_t copy = params.pipeline.use_bulk && params.rows != nullptr ? CopyRing::kBytes : 0;
  bytes[kStages] = std::max(ring, copy);
  params.offsets[0] = 0;
  for (int i = 0; i < kNumArrays; ++i) {
    params.offsets[i + 1] =
        static_cast<std::uint32_t>(align_up(params.offsets[i] + bytes[i], i + 1 == kStages ? 128 : 16));
  }
  return params.offsets[kNumArrays];
}

cudaError_t launch_low_combine(const LowCombineParams& params, int blocks, cudaStream_t stream) {
  const std::size_t shared = params.offsets[kNumArrays];
  const bool plain = params.low.row_layout == RowLayout::kRank;
  const Rows rows = params.quantize ? Rows::kQuantized : params.rows != nullptr ? Rows::kCopied : Rows::kInPlace;
  return visit_low_combine(params.element, plain, rows, [&](auto* kernel) {
    return launch_early(kernel, blocks, kThreads, shared, stream, params.low.starts_early, params);
  });
}

}  // namespace gpu
}  // namespace moe_ep
