// Low-latency dispatch in one launch: every block looks at all of the rank's routes, so that no block waits for
// another one, and posts to one rank how many rows go to each expert; with all ranks' counts every row has its slot,
// and is written there once. Where much is to be quantised, half of a block's warps, the sorters, see to that, while
// the others, the movers, quantise rows; then the movers send rows, and the sorters what goes beside them. Otherwise
// all warps are both.
//
// Nothing here is run often. What a call with few tokens takes is the time in which instructions come from L2, 30 to 40
// ns for every eight of them (measured, ranks sharing a GPU). So what every call runs is short and in a row, loops are
// not unrolled, what the host can compute it does, and what is rare is a function that is not inlined.
#include <algorithm>
#include <climits>

#include "cuda/launch.h"
#include "cuda/low_words.cuh"
#include "cuda/quantize.cuh"

namespace moe_ep {
namespace gpu {
namespace {

constexpr Operation kOperation = Operation::kLowDispatch;
constexpr LowKind kKind = LowKind::kDispatch;
constexpr int kScaleSpins = 128;  // for a scale of another block, before finding it without that

// Arrays in shared memory, in their order. Offsets come from the host: finding them takes a kernel a microsecond.
enum LowArray : int {
  kBarriers,  // std::uint64_t [warps][stages]
  kHeaps,     // std::uint8_t* [num_ranks]
  kScales,    // float [warps][kMostScalesAChunk]
  kIds,       // std::int32_t [routes] expert; -1: none, -2: out of range
  kRoutes,    // SortedRoute [warps][topk]
  kRankOf,    // std::int32_t [num_experts]; nothing where experts are spread evenly, as the next
  kLocalOf,   // std::int32_t [num_experts]
  // Zero at first, up to kHeader.
  kMarks,       // std::uint32_t [places][mark_stride] a bit a token: whether it has a row that goes there
  kPost,        // std::uint32_t [header words + bins + 1] of this rank; count_of() tells the counts of its rows
  kBefore,      // std::int32_t [bins] rows of ranks before this one
  kTotals,      // std::int32_t [bins]
  kMissing,     // std::uint8_t [num_ranks]
  kHeader,      // std::uint32_t [num_ranks][words before the counts]
  kMasked,      // std::uint8_t [num_ranks]
  kScaleWords,  // std::uint64_t [sorters][kMostListed][part_words] for GatheredScales
  kStages,      // [warps][stages][chunk]
  kNumArrays
};
static_assert(static_cast<int>(kNumArrays) + 1 == kLowDispatchOffsets, "an offset an array, and their end");

// A token's route, in the order of its entries, but for the rows of other ranks that come before it.
struct SortedRoute {
  std::int16_t rank;  // where its row goes; -1: nowhere
  std::int16_t position;
  std::int32_t bin;    // where it is counted
  std::int32_t index;  // among this rank's rows there
  std::int32_t group;  // of slots
};

std::size_t chunk_bytes(const LowDispatchParams& params) {
  return align_up(static_cast<std::size_t>(params.chunk_elements) * element_bytes(params.source.element), 128);
}

void lay_out(LowDispatchParams& params) {
  const std::size_t routes = align_up(static_cast<std::size_t>(params.num_tokens) * params.topk, 4);
  const std::size_t experts = params.low.group.num_experts;
  const std::size_t ranks = params.low.group.num_ranks;
  std::size_t bytes[kNumArrays] = {};
  bytes[kBarriers] = kWarps * params.stages * sizeof(std::uint64_t);
  bytes[kHeaps] = ranks * sizeof(std::uint8_t*);
  bytes[kScales] = params.source.quantize ? kWarps * kMostScalesAChunk * sizeof(float) : 0;
  bytes[kIds] = routes * sizeof(std::int32_t);
  bytes[kMarks] =
      params.has_marks ? static_cast<std::size_t>(params.places * params.mark_stride) * sizeof(std::uint32_t) : 0;
  bytes[kRoutes] = static_cast<std::size_t>(kWarps * params.topk) * sizeof(SortedRoute);
  bytes[kRankOf] = bytes[kLocalOf] = params.low.experts_each > 0 ? 0 : experts * sizeof(std::int32_t);
  bytes[kBefore] = bytes[kTotals] = static_cast<std::size_t>(params.bins) * sizeof(std::int32_t);
  bytes[kPost] = static_cast<std::size_t>(params.header_words + params.bins + 1) * sizeof(std::uint32_t);
  bytes[kHeader] = ranks * params.low.layout.header_words() * sizeof(std::uint32_t);
  bytes[kMasked] = bytes[kMissing] = ranks;
  if (params.gathers_scales) {
    bytes[kScaleWords] =
        static_cast<std::size_t>(params.sorters * kMostListed * params.part_words) * sizeof(std::uint64_t);
  }
  bytes[kStages] = static_cast<std::size_t>(kWarps) * params.stages * chunk_bytes(params);
  params.offsets[0] = 0;
  for (int i = 0; i < kNumArrays; ++i) {
    params.offsets[i + 1] = static_cast<std::uint32_t>(align_up(params.offsets[i] + bytes[i], 128));
  }
}

// Its own beside LowCombineShared: what derives from another class goes to functions through memory, which made this
// kernel 190 instructions longer.
struct LowShared {
  std::uint8_t* base;
  const std::uint32_t* offsets;

  template <class T>
  __device__ T* at(LowArray array) const {
    return reinterpret_cast<T*>(base + offsets[array]);
  }
  __device__ std::uint8_t** heaps() const { return at<std::uint8_t*>(kHeaps); }
  __device__ std::int32_t* ids() const { return at<std::int32_t>(kIds); }
  __device__ std::uint32_t* marks() const { return at<std::uint32_t>(kMarks); }
  __device__ std::uint32_t* post() const { return at<std::uint32_t>(kPost); }
  __device__ std::int32_t* before() const { return at<std::int32_t>(kBefore); }
  __device__ std::int32_t* totals() const { return at<std::int32_t>(kTotals); }
  __device__ std::uint32_t* header() const { return at<std::uint32_t>(kHeader); }
  __device__ std::uint8_t* masked() const { return at<std::uint8_t>(kMasked); }
  __device__ std::uint8_t* missing() const { return at<std::uint8_t>(kMissing); }
};

__device__ inline void sync_sorters(const LowDispatchParams& params) { sync_some(1, params.sorters * 32); }

__device__ inline int rank_of(const LowDispatchParams& params, const LowShared& shared, int expert) {
  if (params.low.experts_each > 0) return quotient(expert, params.low.experts_inverse);
  return shared.at<std::int32_t>(kRankOf)[expert];
}
__device__ inline int local_of(const LowDispatchParams& params, const LowShared& shared, int expert, int rank) {
  if (params.low.experts_each > 0) return expert - rank * params.low.experts_each;
  return shared.at<std::int32_t>(kLocalOf)[expert];
}
// What a rank receives.
__device__ inline std::uint8_t* block_of(const LowDispatchParams& params, const LowShared& shared, int rank) {
  return shared.heaps()[rank] + params.receive_offset;
}

// An item is one chunk of one token's row. A block has a run of items, which its warps take in turn: what is written at
// the same time lies together.
struct LowItem {
  int token;
  int chunk;
  __device__ LowItem(const LowDispatchParams& params, int item) {
    token = quotient(item, params.chunks_inverse);
    chunk = item - token * params.chunks;
  }
  __device__ int elements(const LowDispatchParams& params) const {
    return min(params.chunk_elements, params.source.hidden - chunk * params.chunk_elements);
  }
  __device__ int first_block(const LowDispatchParams& params) const { return chunk * params.chunk_blocks; }
  __device__ int blocks(const LowDispatchParams& params) const {
    return min(params.chunk_blocks, params.row_blocks - chunk * params.chunk_blocks);
  }
};

// Copies of chunks into rings, one for each warp.
struct LowLoader {
  const LowDispatchParams& params;
  std::uint8_t* stages;
  std::uint64_t* barriers;
  int first;  // item of the block; ring w has every kWarps-th from the w-th on
  int end;

  __device__ LowLoader(const LowDispatchParams& launch, const LowShared& shared) : params(launch) {
    const int block = static_cast<int>(blockIdx.x);
    stages = shared.at<std::uint8_t>(kStages);
    barriers = shared.at<std::uint64_t>(kBarriers);
    first = params.items_each * block + min(block, params.items_left);
    end = first + params.items_each + (block < params.items_left ? 1 : 0);
  }
  __device__ std::uint8_t* stage(int ring, int which) const {
    return stages + (ring * params.stages + which) * params.stage_bytes;
  }
  __device__ std::uint64_t* barrier(int ring, int which) const { return barriers + ring * params.stages + which; }
  __device__ const std::uint8_t* source(const LowItem& item) const {
    return params.source.rows +
           static_cast<std::size_t>(static_cast<unsigned>(item.token)) * static_cast<unsigned>(params.source_bytes) +
           item.chunk * params.chunk_bytes;
  }
  __device__ std::uint32_t bytes(const LowItem& item) const {
    return static_cast<std::uint32_t>(min(params.chunk_bytes, params.source_bytes - item.chunk * params.chunk_bytes));
  }
  __device__ void load(int number, int ring, int which) const {
    if (number >= end) return;
    const LowItem item(params, number);
    if (!params.bulk_loads) {
      load_plainly(source(item), stage(ring, which), bytes(item));
    } else if ((threadIdx.x & 31) == 0) {
      barrier_arrive_expect(barrier(ring, which), bytes(item));
      bulk_load(stage(ring, which), source(item), bytes(item), barrier(ring, which));
    }
  }
  // Rows of e4m3 are words of 4 bytes.
  __device__ __noinline__ static void load_plainly(const std::uint8_t* from, std::uint8_t* to, std::uint32_t bytes) {
#pragma unroll 1
    for (std::uint32_t i = threadIdx.x & 31; i < bytes / 4; i += 32) {
      reinterpret_cast<std::uint32_t*>(to)[i] = reinterpret_cast<const std::uint32_t*>(from)[i];
    }
    __syncwarp();
  }
  // The first item's of a ring, before it may be read.
  __device__ void prefetch(int ring) const {
    if (!params.bulk_loads || first + ring >= end || (threadIdx.x & 31) != 0) return;
    const LowItem item(params, first + ring);
    bulk_prefetch(source(item), bytes(item));
  }
  __device__ void wait(int ring, int which, std::uint32_t parity) const {
    if (params.bulk_loads) barrier_wait(barrier(ring, which), parity);
  }
};

// The first loads of a ring: shared memory is not to be left before what is on the way to it.
__device__ __noinline__ void drain(const LowDispatchParams& params, std::uint64_t* barriers, int items) {
  const int warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll 1
  for (int i = 0; i < params.stages && params.bulk_loads; ++i) {
    if (warp + i * kWarps < items) barrier_wait(barriers + warp * params.stages + i, 0);
  }
}

// What no operation changes, and what is empty at first, in shared memory. All threads, before what the stream has
// queued ahead is over; ends with a barrier.
__device__ void keep_constants(const LowDispatchParams& params, const LowShared& shared) {
  const LowGroup& low = params.low;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int rank = thread; rank < low.group.num_ranks; rank += kThreads) {
    shared.heaps()[rank] = heap_of(params, rank);
  }
  if (low.experts_each == 0) {
#pragma unroll 1
    for (int i = thread; i < low.group.num_experts; i += kThreads) {
      shared.at<std::int32_t>(kRankOf)[i] = low.group.rank_of_expert[i];
      shared.at<std::int32_t>(kLocalOf)[i] = low.group.local_of_expert[i];
    }
  }
  auto* zeros = shared.at<uint4>(kMarks);
#pragma unroll 1
  for (std::uint32_t i = threadIdx.x; i < params.zero_bytes / 16; i += kThreads) zeros[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
}

// What the operation needs from global memory before it can do anything, asked for in one go.
struct LowStart {
  static constexpr int kAtOnce = 2;
  std::uint32_t failed;
  std::uint32_t sequence;
  std::uint32_t since;
  std::int64_t ids[kAtOnce];

  // Brings it closer, before it may be read. By few threads: a cache line each.
  __device__ static void prefetch(const LowDispatchParams& params) {
    const LowGroup& low = params.low;
    const int thread = static_cast<int>(threadIdx.x);
    const int lines = (params.num_tokens * params.topk + 15) / 16;
    if (thread < lines) prefetch_to_l2(params.topk_idx + thread * 16);
    if (thread == kThreads - 1) prefetch_to_l2(&low.group.state->failed);
    if (thread == kThreads - 2) prefetch_to_l2(&low.state->sequence);
    if (thread == kThreads - 3) prefetch_to_l2(low.masked_since);
  }
  __device__ explicit LowStart(const LowDispatchParams& params) {
    const LowGroup& low = params.low;
    const int thread = static_cast<int>(threadIdx.x);
    const int routes = params.num_tokens * params.topk;
    failed = load_relaxed_device(&low.group.state->failed);
    sequence = load_relaxed_device(&low.state->sequence) + 1;
    since = thread < low.group.num_ranks ? load_relaxed_device(low.masked_since + thread) : 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = thread + i * kThreads;
      ids[i] = at < routes ? params.topk_idx[at] : -1;
    }
  }
};

// A route, and a mark where its row goes. Whether its id is out of range.
__device__ inline bool keep_route(const LowDispatchParams& params, const LowShared& shared, int at, std::int64_t id,
                                  std::uint32_t& repeated) {
  const bool good = id >= -1 && id < params.low.group.num_experts;
  const auto expert = static_cast<std::int32_t>(id);
  shared.ids()[at] = good ? expert : -2;
  if (!good) return true;
  if (expert < 0) return false;
  const bool by_rank = params.low.row_layout == RowLayout::kRank;
  int place = expert;
  if (by_rank) {
    place = rank_of(params, shared, expert);
    atomicAdd(shared.post() + params.header_words + expert, 1u);
  }
  if (!params.has_marks) return false;
  const auto token = static_cast<unsigned>(quotient(at, params.topk_inverse));
  const std::uint32_t bit = 1u << (token & 31);
  const std::uint32_t before = atomicOr(shared.marks() + place * params.mark_stride + token / 32, bit);
  // Marks do not tell two rows of a token for one expert apart.
  if ((before & bit) != 0 && !by_rank) atomicOr(&repeated, 1u);
  return false;
}

__device__ inline bool keep_rank(const LowShared& shared, int rank, std::uint32_t since, std::uint32_t sequence) {
  const bool masked = is_masked(since, sequence);
  shared.masked()[rank] = masked ? 1 : 0;
  return masked;
}

// What did not fit the first go.
__device__ __noinline__ bool keep_more(const LowDispatchParams& params, LowShared shared, std::uint32_t sequence,
                                       std::uint32_t& repeated) {
  bool rare = false;
#pragma unroll 1
  for (int rank = static_cast<int>(threadIdx.x) + kThreads; rank < params.low.group.num_ranks; rank += kThreads) {
    rare = keep_rank(shared, rank, load_relaxed_device(params.low.masked_since + rank), sequence) || rare;
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) + LowStart::kAtOnce * kThreads; i < params.num_tokens * params.topk;
       i += kThreads) {
    rare = keep_route(params, shared, i, params.topk_idx[i], repeated) || rare;
  }
  return rare;
}

// Into shared memory. All threads; a barrier comes next. Whether this thread has seen something rare: a rank that is
// left out, an id out of range.
__device__ bool keep_start(const LowDispatchParams& params, const LowShared& shared, const LowStart& start,
                           std::uint32_t& repeated) {
  const int routes = params.num_tokens * params.topk;
  const int ranks = params.low.group.num_ranks;
  const int thread = static_cast<int>(threadIdx.x);
  bool rare = thread < ranks && keep_rank(shared, thread, start.since, start.sequence);
  static_assert(LowStart::kAtOnce == 2, "as the loop takes them");
#pragma unroll 1
  for (int i = 0; i < LowStart::kAtOnce; ++i) {
    const int at = thread + i * kThreads;
    if (at < routes) rare = keep_route(params, shared, at, i == 0 ? start.ids[0] : start.ids[1], repeated) || rare;
  }
  if (routes > LowStart::kAtOnce * kThreads || ranks > kThreads) {
    rare = keep_more(params, shared, start.sequence, repeated) || rare;
  }
  return rare;
}

// How many of the first `end` routes go to an expert: where a token has two for one, or there is no room for marks.
__device__ __noinline__ int count_slowly(LowShared shared, int end, std::int32_t expert) {
  int rows = 0;
#pragma unroll 4
  for (int at = 0; at < end; ++at) rows += shared.ids()[at] == expert ? 1 : 0;
  return rows;
}

// How many rows of this rank go to a place. `marked`: marks tell.
__device__ inline int count_of(const LowDispatchParams& params, const LowShared& shared, int place, bool marked) {
  if (!marked) return count_slowly(shared, params.num_tokens * params.topk, place);
  const std::uint32_t* marks = shared.marks() + place * params.mark_stride;
  int rows = 0;
#pragma unroll 1
  for (int i = 0; i < params.mark_words; ++i) rows += __popc(marks[i]);
  return rows;
}

// How many of them come before that of a token's route.
__device__ inline int index_of(const LowDispatchParams& params, const LowShared& shared, int token, int at, int place,
                               bool marked) {
  if (!marked) return count_slowly(shared, at, place);
  const std::uint32_t* marks = shared.marks() + place * params.mark_stride;
  int rows = __popc(marks[token / 32] & ((1u << (token & 31)) - 1));
#pragma unroll 1
  for (int i = 0; i < token / 32; ++i) rows += __popc(marks[i]);
  return rows;
}

// The token whose row is number `index` of those that go to a place, where marks tell.
__device__ inline int token_of(const LowDispatchParams& params, const LowShared& shared, int index, int place) {
  const std::uint32_t* marks = shared.marks() + place * params.mark_stride;
  int at = 0;
#pragma unroll 1
  for (; index >= __popc(marks[at]); ++at) index -= __popc(marks[at]);
  std::uint32_t word = marks[at];
#pragma unroll 1
  for (; index > 0; --index) word &= word - 1;
  return at * 32 + __ffs(static_cast<int>(word)) - 1;
}

// What a post says of something rare: which ranks are left out, and the first id out of range, whose other half goes
// where nobody will want a count. All threads; ends with a barrier.
__device__ __noinline__ void post_rare(const LowDispatchParams& params, LowShared shared) {
  __shared__ std::uint32_t first;
  if (threadIdx.x == 0) first = 0xffffffffu;
  if (threadIdx.x < static_cast<int>(LowWord::kMask)) shared.post()[threadIdx.x] = params.post[threadIdx.x];
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < params.num_tokens * params.topk; at += kThreads) {
    if (shared.ids()[at] == -2) atomicMin(&first, static_cast<std::uint32_t>(at));
  }
  if (threadIdx.x < 32) post_masks(shared.post(), shared.masked(), params.low.group.num_ranks);
  __syncthreads();
  if (first != 0xffffffffu && threadIdx.x == 0) {
    shared.post()[static_cast<int>(LowWord::kBadRoute)] = first + 1;
    shared.post()[static_cast<int>(LowWord::kBadExpert)] = static_cast<std::uint32_t>(params.topk_idx[first]);
    shared.post()[params.header_words] = static_cast<std::uint32_t>(params.topk_idx[first] >> 32);
  }
  __syncthreads();
}

// What this rank posts, but for the counts of its rows.
__device__ inline std::uint32_t post_word(const LowDispatchParams& params, const LowShared& shared, int word,
                                          bool rare) {
  return word < static_cast<int>(LowWord::kMask) && !rare ? params.post[word] : shared.post()[word];
}

// The sorters: this rank's post to the others.
__device__ void publish_counts(const LowDispatchParams& params, const LowShared& shared, std::uint32_t sequence,
                               bool marked, bool rare) {
  const int places_at = params.header_words + params.bins - params.places;
  const bool is_bad = rare && shared.post()[static_cast<int>(LowWord::kBadRoute)] != 0;
  // An odd count is read with the word after it.
  const int words = params.header_words + params.bins + (params.bins & 1);
  publish_post(params.low.group, shared.heaps(), shared.masked(), params.posts_offset, params.post_stride, sequence,
               words, params.sorters * 32, [&](int word) {
                 const int place = word - places_at;
                 if (place >= 0 && place < params.places && !(is_bad && word == params.header_words)) {
                   return static_cast<std::uint32_t>(count_of(params, shared, place, marked));
                 }
                 return post_word(params, shared, word, rare);
               });
}

// Layout rank: a row goes to a rank once.
__device__ __noinline__ int first_of_rank(const LowDispatchParams& params, int rank) {
  const int lane = threadIdx.x & 31;
  bool first = true;
#pragma unroll 1
  for (int j = 0; j < params.topk; ++j) {
    const int other = __shfl_sync(0xffffffffu, rank, j);
    first = first && (j >= lane || other != rank);
  }
  return first ? rank : INT_MAX;
}

// A warp: a token's routes by rank, each rank's in the order of top-k.
__device__ void sort_routes(const LowDispatchParams& params, const LowShared& shared, int token, bool marked,
                            SortedRoute* sorted) {
  const bool by_rank = params.low.row_layout == RowLayout::kRank;
  const int lane = threadIdx.x & 31;
  const int at = token * params.topk + lane;
  const std::int32_t expert = lane < params.topk ? shared.ids()[at] : -1;
  int rank = INT_MAX;
  SortedRoute route{-1, static_cast<std::int16_t>(by_rank ? -1 : lane), 0, 0, 0};
  if (expert >= 0) {
    rank = rank_of(params, shared, expert);
    const int place = by_rank ? rank : expert;
    route.bin = params.bins - params.places + place;
    route.group = by_rank ? 0 : local_of(params, shared, expert, rank);
    route.index = index_of(params, shared, token, at, place, marked);
    if (shared.masked()[rank] != 0) rank = INT_MAX;
  }
  if (by_rank) rank = first_of_rank(params, rank);
  if (rank != INT_MAX) route.rank = static_cast<std::int16_t>(rank);
  int to = 0;
#pragma unroll 1
  for (int j = 0; j < params.topk; ++j) {
    const int other = __shfl_sync(0xffffffffu, rank, j);
    to += other < rank || (other == rank && j < lane) ? 1 : 0;
  }
  if (lane < params.topk) sorted[to] = route;
}

// Lane j's entry, with the counts of all ranks.
__device__ inline Entry place_entry(const LowDispatchParams& params, const LowShared& shared, const SortedRoute* sorted,
                                    bool dropped) {
  const int lane = threadIdx.x & 31;
  Entry entry{-1, -1, -1};
  if (lane >= params.topk || dropped) return entry;
  const SortedRoute route = sorted[lane];
  if (route.rank < 0) return entry;
  entry.slot = route.group * params.capacity + shared.before()[route.bin] + route.index;
  entry.rank = route.rank;
  entry.position = route.position;
  return entry;
}

// Why an operation does not go on as meant; the same on all ranks but for a rank that is missing.
struct LowVerdict {
  bool failed;   // and so has this rank
  bool dropped;  // no rows cross
};

// A word of a post that had not come at first; 0 where it does not come at all, which `missing` tells then.
__device__ inline std::uint32_t late_word(const LowGroup& low, const std::uint64_t* at, const LowAwaited& awaited,
                                          int source, std::uint8_t* missing) {
  std::uint64_t seen = 0;
  if (await_late_word(low, at, awaited, source, seen) == Wait::kCame) return low_value(seen);
  missing[source] = 1;
  return 0;
}

// The same of a header.
__device__ __noinline__ std::uint32_t late_header(const LowDispatchParams& params, LowShared shared,
                                                  std::uint32_t sequence, const std::uint64_t* at, int source) {
  const LowAwaited awaited{kKind, params.index, sequence, Step::kPost};
  return late_word(params.low, at, awaited, source, shared.missing());
}

// Two counts of a rank that had not come at first.
__device__ __noinline__ void late_counts(const LowDispatchParams& params, LowShared shared, std::uint32_t sequence,
                                         const std::uint64_t* at, int source, int bin) {
  const LowAwaited awaited{kKind, params.index, sequence, Step::kPost};
  if (shared.masked()[source] != 0) return;
#pragma unroll 1
  for (int i = 0; i < 2 && bin + i < params.bins; ++i) {
    const std::uint32_t rows = late_word(params.low, at + i, awaited, source, shared.missing());
    atomicAdd(shared.totals() + bin + i, static_cast<std::int32_t>(rows));
    if (source < params.low.group.rank) atomicAdd(shared.before() + bin + i, static_cast<std::int32_t>(rows));
  }
}

// Waits for the posts of all ranks: their header words, and for each bin how many rows come before this rank's
// (`before`) and in all (`totals`). The sorters. Whether anything is not as it usually is; judge_posts() finds out
// what. No fence: rows are written only where a peer's kernel has begun, after all that used its buffer before, and no
// store comes before the loads here that decide on it.
__device__ bool gather_posts(const LowDispatchParams& params, const LowShared& shared, std::uint32_t sequence,
                             bool rare) {
  const LowGroup& low = params.low;
  const int ranks = low.group.num_ranks;
  const int thread = static_cast<int>(threadIdx.x);
  const auto* posts = reinterpret_cast<const std::uint64_t*>(shared.heaps()[low.group.rank] + params.posts_offset);
  bool unusual = false;
  // Two counts of two ranks are on their way at a time, to a quarter of the threads.
  const int quarter = params.sorters * 8;
  const int part = thread / 64 >> (params.sorters == kWarps ? 1 : 0);
#pragma unroll 1
  for (int source = part; source < ranks; source += 8) {
    const bool both = source + 4 < ranks;
#pragma unroll 1
    for (int bin = (thread - part * quarter) * 2; bin < params.bins; bin += quarter * 2) {
      const std::uint64_t* at = posts + source * params.post_stride + params.header_words + bin;
      const std::uint64_t* other = at + (both ? 4 * params.post_stride : 0);
      std::uint64_t words[4];
      bool here = false;
      // Words of a rank that is left out never come.
#pragma unroll 1
      for (int spin = rare ? kQuickSpins : 0; spin < kQuickSpins && !here; ++spin) {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = load_relaxed_system((i < 2 ? at : other) + i % 2);
        here = true;
#pragma unroll
        for (int i = 0; i < 4; ++i) here = here && low_lead(words[i], sequence) == 0;
      }
      if (!here) {
        late_counts(params, shared, sequence, at, source, bin);
        if (both) late_counts(params, shared, sequence, other, source + 4, bin);
        continue;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto rows = static_cast<std::int32_t>(low_value(words[i]));
        const std::int32_t others = both ? static_cast<std::int32_t>(low_value(words[2 + i])) : 0;
        if (bin + i == params.bins) break;
        atomicAdd(shared.totals() + bin + i, rows + others);
        if (source >= low.group.rank) continue;
        atomicAdd(shared.before() + bin + i, rows + (source + 4 < low.group.rank ? others : 0));
      }
    }
  }
  // Half a warp a rank.
#pragma unroll 1
  for (int source = thread / 16; source < ranks; source += params.sorters * 2) {
    if (shared.masked()[source] != 0) continue;
#pragma unroll 1
    for (int word = thread & 15; word < params.header_words; word += 16) {
      const std::uint64_t* at = posts + source * params.post_stride + word;
      std::uint64_t seen = load_relaxed_system(at);
#pragma unroll 1
      for (int spin = 0; spin < kQuickSpins && low_lead(seen, sequence) != 0; ++spin) seen = load_relaxed_system(at);
      std::uint32_t value = low_value(seen);
      if (low_lead(seen, sequence) != 0) value = late_header(params, shared, sequence, at, source);
      shared.header()[source * params.header_words + word] = value;
      std::uint32_t usual = post_word(params, shared, word, rare);
      if (word == static_cast<int>(LowWord::kBlocks)) usual = value;
      if (word == static_cast<int>(LowWord::kBadRoute)) usual = 0;
      unusual = unusual || value != usual;
    }
  }
  sync_sorters(params);
#pragma unroll 1
  for (int bin = thread; bin < params.bins; bin += params.sorters * 32) {
    unusual = unusual || shared.totals()[bin] > params.capacity;
  }
#pragma unroll 1
  for (int source = thread; source < ranks; source += params.sorters * 32) {
    unusual = unusual || shared.missing()[source] != 0;
  }
  return unusual;
}

// What the posts say of the operation: the first difference, a mask that is not everyone's, a bad id, slots that do not
// suffice. All threads; ends with a barrier. One block reports.
__device__ __noinline__ LowVerdict judge_posts(const LowDispatchParams& params, LowShared shared,
                                               std::uint32_t sequence) {
  const LowGroup& low = params.low;
  const Group& group = low.group;
  const int ranks = group.num_ranks;
  const int header = static_cast<int>(low.layout.header_words());
  const int fields = static_cast<int>(LowWord::kMask);
  __shared__ std::uint32_t first;
  __shared__ std::uint32_t first_full;
  if (threadIdx.x == 0) first = first_full = 0xffffffffu;
  bool missing = false;
#pragma unroll 1
  for (int source = threadIdx.x; source < ranks; source += kThreads) missing = missing || shared.missing()[source] != 0;
  LowVerdict verdict{false, __syncthreads_or(missing) != 0};
  bool other_masks = false;
#pragma unroll 1
  for (int i = threadIdx.x; i < ranks * header; i += kThreads) {
    const int source = i / header;
    const int word = i % header;
    if (shared.masked()[source] != 0 || shared.missing()[source] != 0) continue;
    const std::uint32_t theirs = shared.header()[i];
    const std::uint32_t mine = shared.header()[group.rank * header + word];
    if (word == static_cast<int>(LowWord::kOperation) && theirs == kLowWithdrawn) {
      const std::int64_t values[kReportValues] = {source, 0, 0, 0};
      record_failure(group, Outcome::kMasked, kOperation, sequence, values);
      continue;
    }
    if (word < kNumLowCompared && theirs != mine) atomicMin(&first, static_cast<std::uint32_t>(i));
    if (word == static_cast<int>(LowWord::kBadRoute) && theirs != 0) {
      atomicMin(&first, static_cast<std::uint32_t>(ranks * header + source));
    }
    if (word < fields || theirs == mine) continue;
    other_masks = true;
#pragma unroll 1
    for (int bit = 0; bit < 32; ++bit) {
      const int rank = (word - fields) * 32 + bit;
      if ((theirs >> bit & 1) == 0 || rank >= ranks) continue;
      if (rank == group.rank) {
        const std::int64_t values[kReportValues] = {source, 0, 0, 0};
        record_failure(group, Outcome::kMasked, kOperation, sequence, values);
      } else {
        atomicCAS(low.masked_since + rank, 0u, sequence + 1);
      }
    }
  }
#pragma unroll 1
  for (int bin = threadIdx.x; bin < params.bins; bin += kThreads) {
    const bool counts_slots = bin >= group.num_experts || low.row_layout == RowLayout::kExpert;
    if (counts_slots && shared.totals()[bin] > static_cast<std::int32_t>(low.slots.capacity)) {
      atomicMin(&first_full, static_cast<std::uint32_t>(bin));
    }
  }
  verdict.dropped = __syncthreads_or(other_masks) != 0 || verdict.dropped;
  const bool differs = first < static_cast<std::uint32_t>(ranks * header);
  const bool routed = first == 0xffffffffu && first_full == 0xffffffffu;
  if (!differs && !routed) verdict.dropped = true;
  if (differs) verdict.failed = true;
  if (blockIdx.x == 0 && threadIdx.x == 0 && !routed) {
    std::int64_t values[kReportValues] = {};
    Outcome outcome = Outcome::kMismatch;
    if (differs) {
      const int source = static_cast<int>(first) / header;
      const int word = static_cast<int>(first) % header;
      values[0] = source;
      values[1] = word;
      values[2] = shared.header()[first];
      values[3] = shared.header()[group.rank * header + word];
    } else if (first != 0xffffffffu) {
      const std::uint32_t* theirs = shared.header() + (static_cast<int>(first) - ranks * header) * header;
      outcome = Outcome::kBadRoute;
      values[0] = static_cast<int>(first) - ranks * header;
      values[1] = theirs[static_cast<int>(LowWord::kBadRoute)];
      const std::uint64_t* words =
          low_post_of(low, shared.heaps()[group.rank], kKind, params.index, static_cast<int>(values[0]));
      values[2] = static_cast<std::int64_t>(
          low_word(low_value(load_relaxed_system(words + header)), theirs[static_cast<int>(LowWord::kBadExpert)]));
      values[3] = theirs[static_cast<int>(LowWord::kTopk)];
    } else {
      outcome = Outcome::kFullSlots;
      const int bin = static_cast<int>(first_full);
      values[0] = bin < group.num_experts ? rank_of(params, shared, bin) : bin - group.num_experts;
      values[1] = shared.totals()[bin];
      values[2] = static_cast<std::int64_t>(low.slots.capacity);
    }
    record_failure(group, outcome, kOperation, sequence, values);
  }
  // A rank that is masked by a peer has failed.
  verdict.failed = __syncthreads_or(verdict.failed || load_relaxed_device(&group.state->failed) != 0) != 0;
  return verdict;
}

// How many rows this rank has received, for the caller and for the combine. All threads of one block.
__device__ __noinline__ void tell_counts(const LowDispatchParams& params, LowShared shared, std::uint32_t sequence,
                                         bool dropped, bool marked) {
  const LowGroup& low = params.low;
  const Group& group = low.group;
  __shared__ std::int32_t received;
  if (threadIdx.x == 0) received = 0;
  __syncthreads();
  const int first = group.first_of_rank[group.rank];
  const bool by_expert = low.row_layout == RowLayout::kExpert;
#pragma unroll 1
  for (int local = threadIdx.x; local < low.num_local_experts; local += blockDim.x) {
    const int expert = group.experts_by_rank[first + local];
    const std::int32_t rows = dropped ? 0 : shared.totals()[expert];
    params.routing.tokens_per_expert[local] = rows;
    if (!by_expert) continue;
    params.routing.group_rows[local] = rows;
    params.routing.own_first[local] = dropped ? 0 : shared.before()[expert];
    params.routing.own_rows[local] = dropped ? 0 : count_of(params, shared, expert, marked);
    atomicAdd(&received, rows);
  }
  if (!by_expert && threadIdx.x == 0) {
    const int bin = group.num_experts + group.rank;
    received = dropped ? 0 : shared.totals()[bin];
    params.routing.group_rows[0] = received;
    params.routing.own_first[0] = dropped ? 0 : shared.before()[bin];
    params.routing.own_rows[0] = dropped ? 0 : count_of(params, shared, group.rank, marked);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  params.routing.header->sequence = sequence;
  params.routing.header->received = static_cast<std::uint32_t>(received);
}

// What goes beside a row in layout rank: a warp, for one token.
__device__ __noinline__ void send_metadata(const LowDispatchParams& params, LowShared shared, int token, Entry entry) {
  const int count = __popc(__ballot_sync(0xffffffffu, entry.rank >= 0));
  const int lane = threadIdx.x & 31;
  const int at = token * params.topk + lane;
  const std::int32_t id = lane < params.topk ? shared.ids()[at] : -1;
  const int its_rank = id >= 0 ? rank_of(params, shared, id) : -1;
  const float weight = lane < params.topk && params.sizes.weight > 0 ? params.source.weights[at] : 0.0f;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), i);
    const std::size_t slot = static_cast<std::size_t>(__shfl_sync(0xffffffffu, entry.slot, i));
    if (lane >= params.topk) continue;
    std::uint8_t* block = block_of(params, shared, rank);
    const std::size_t to = slot * params.topk + lane;
    const bool is_its = its_rank == rank;
    reinterpret_cast<std::int64_t*>(block + params.arrays.indices)[to] =
        is_its ? local_of(params, shared, id, rank) : -1;
    if (params.sizes.weight > 0) {
      reinterpret_cast<float*>(block + params.arrays.weights)[to] = is_its ? weight : 0.0f;
    }
  }
}

// A chunk in shared memory to all its places, without bulk copies: a warp.
__device__ __noinline__ void store_plainly(const LowDispatchParams& params, LowShared shared, int rank, int slot,
                                           const std::uint8_t* data, int first_byte, int bytes) {
#pragma unroll 1
  for (unsigned left = __ballot_sync(0xffffffffu, rank >= 0); left != 0; left &= left - 1) {
    const int from = __ffs(static_cast<int>(left)) - 1;
    const auto to_slot = static_cast<std::size_t>(__shfl_sync(0xffffffffu, slot, from));
    std::uint8_t* to =
        block_of(params, shared, __shfl_sync(0xffffffffu, rank, from)) + to_slot * params.sizes.row + first_byte;
#pragma unroll 1
    for (int word = static_cast<int>(threadIdx.x & 31); word < bytes / 4; word += 32) {
      reinterpret_cast<std::uint32_t*>(to)[word] = reinterpret_cast<const std::uint32_t*>(data)[word];
    }
  }
}

// The same, as the GPU allows.
__device__ void store_chunk(const LowDispatchParams& params, const LowShared& shared, const Entry& entry,
                            const std::uint8_t* data, int first_byte, int bytes) {
  if (!params.bulk_stores) {
    store_plainly(params, shared, entry.rank, entry.slot, data, first_byte, bytes);
    return;
  }
  if (entry.rank >= 0) {
    bulk_store(block_of(params, shared, entry.rank) +
                   static_cast<std::size_t>(static_cast<unsigned>(entry.slot)) * params.sizes.row + first_byte,
               data, static_cast<std::uint32_t>(bytes));
  }
  bulk_commit();
}

// Scales of a chunk beside its rows, but for entries without a rank: half a warp an entry.
__device__ void store_scales(const LowDispatchParams& params, const LowShared& shared, const Entry& entry, int group,
                             const float* scales, int first_block, int blocks) {
  const int lane = threadIdx.x & 15;
  const int half = threadIdx.x / 16 & 1;
  // As LowSlots::scale, without a division.
  const std::size_t at =
      static_cast<std::size_t>(static_cast<unsigned>(group * (params.row_blocks - 1) + first_block)) *
          static_cast<unsigned>(params.capacity) +
      static_cast<unsigned>(entry.slot);
  unsigned long long mine = 0;
  if (entry.rank >= 0) {
    mine = reinterpret_cast<unsigned long long>(
        reinterpret_cast<float*>(block_of(params, shared, entry.rank) + params.arrays.scales) + at);
  }
#pragma unroll 1
  for (int i = 0; i < params.topk; i += 2) {
    auto* to = reinterpret_cast<float*>(__shfl_sync(0xffffffffu, mine, i + half));
    if (to == nullptr) continue;
#pragma unroll 1
    for (int block = lane; block < blocks; block += 16) store_gathered(to + block * params.capacity, scales[block]);
  }
}

// Scales of a chunk to where the rank's other warps find them: a warp. Each word names its dispatch, so that no fence
// or flag has to say that it has come.
__device__ void lay_out_scales(const LowDispatchParams& params, std::uint32_t sequence, int token, int first_block,
                               int blocks, const float* scales) {
  std::uint64_t* to = params.low.scale_words + token * params.scale_stride + first_block;
#pragma unroll 1
  for (int block = threadIdx.x & 31; block < blocks; block += 32) {
    store_relaxed_device(to + block, low_word(sequence, __float_as_uint(scales[block])));
  }
}

// A scale that had not come at first. Where it does not come soon, its block may have found no room on the GPU yet,
// which another rank may hold while it waits for rows of this one: it is found from the row itself.
template <class T>
__device__ __noinline__ float late_scale(const LowDispatchParams& params, const std::uint64_t* at, int token, int block,
                                         std::uint32_t sequence) {
#pragma unroll 1
  for (int spin = 0; spin < kScaleSpins; ++spin) {
    const std::uint64_t word = load_relaxed_device(at);
    if (low_lead(word, sequence) == 0) return __uint_as_float(low_value(word));
  }
  const int first = block * static_cast<int>(kFp8Block);
  const int end = min(first + static_cast<int>(kFp8Block), params.source.hidden);
  const std::uint8_t* row = params.source.rows + static_cast<std::size_t>(token) * params.source.hidden * T::kBytes;
  float amax = 0.0f;
#pragma unroll 1
  for (int column = first; column < end; column += 4) {
    float values[4];
    load_four<T>(row + column * T::kBytes, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) amax = fmaxf(amax, finite_magnitude(values[i]));
  }
  return block_scale(amax, params.source.power_of_two);
}

// Scales of the first of this rank's rows for an expert, or a part of each; layout expert. They lie together there, a
// few rows of each block of scales. So lanes that follow each other take rows that do, and memory sees a fraction of
// the transactions that scales stored token by token would be. Other rows' scales are sent with them. A warp.
template <class T>
struct GatheredScales {
  int token;                  // of the lane's row
  const std::uint64_t* from;  // its scales
  std::uint64_t* kept;        // likewise, in shared memory: from the part's first on
  float* to;                  // likewise, in the receiver's memory
  int first;                  // block of the part
  int end;                    // past its last
  int lane;                   // among those of the row
  int step;                   // how many those are

  // Each of the grid's turns, as many as it has warps, has one expert, or part of one, or none.
  __device__ void find(const LowDispatchParams& params, const LowShared& shared, int turn) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    first = end = lane = 0;
    step = 1;
    const int part = turn & ((1 << params.scale_parts_log2) - 1);
    int expert = params.first_gathered + (turn >> params.scale_parts_log2);
    if (turn >= params.places << params.scale_parts_log2) return;
    if (expert >= params.places) expert -= params.places;
    const int rank = rank_of(params, shared, expert);
    const int rows = min(count_of(params, shared, expert, true), kMostListed);
    if (rows == 0 || shared.masked()[rank] != 0) return;
    const int shift = rows == 1 ? 0 : 32 - __clz(rows - 1);  // 1, 2, 4, 8 rows beside each other
    const int row = static_cast<int>(threadIdx.x & ((1u << shift) - 1));
    if (row >= rows) return;
    lane = static_cast<int>(threadIdx.x & 31) >> shift;
    step = 32 >> shift;
    first = (part * params.scale_stride / 2 >> params.scale_parts_log2) * 2;
    end = ((part + 1) * params.scale_stride / 2 >> params.scale_parts_log2) * 2;
    token = token_of(params, shared, row, expert);
    from = params.low.scale_words + token * params.scale_stride;
    kept = shared.at<std::uint64_t>(kScaleWords) + (warp * kMostListed + row) * params.part_words;
    to = reinterpret_cast<float*>(block_of(params, shared, rank) + params.arrays.scales) +
         static_cast<std::size_t>(static_cast<unsigned>(local_of(params, shared, expert, rank) * params.row_blocks)) *
             static_cast<unsigned>(params.capacity) +
         shared.before()[expert] + row;
  }
  // Asks for words, two at a time; nothing waits for them yet.
  __device__ void load() const {
#pragma unroll 1
    for (int block = first + lane * 2; block < end; block += step * 2) {
      copy_two_words(kept + block - first, from + block);
    }
  }
  __device__ void store(const LowDispatchParams& params, std::uint32_t sequence) const {
    wait_for_copies();
    __syncwarp();
    const int last = min(end, params.row_blocks);
#pragma unroll 1
    for (int block = first + lane; block < last; block += step) {
      const std::uint64_t word = kept[block - first];
      float scale = __uint_as_float(low_value(word));
      if (low_lead(word, sequence) != 0) scale = late_scale<T>(params, from + block, token, block, sequence);
      store_gathered(to + block * params.capacity, scale);
    }
  }
};

// How a chunk's elements become what crosses. One kernel each: code that is not needed costs instruction fetches at
// every launch.
template <bool kWithScales>
struct AsTheyAre {
  static constexpr bool kQuantizes = false;
  static constexpr bool kHasScales = kWithScales;
  static constexpr bool kGathers = false;
};
template <class ElementType, bool kGathersScales>
struct Quantized {
  using Element = ElementType;
  static constexpr bool kQuantizes = true;
  static constexpr bool kHasScales = true;
  static constexpr bool kGathers = kGathersScales;
};

// Rows whose elements are no multiple of 8.
template <class T>
__device__ __noinline__ void quantize_plainly(std::uint8_t* chunk, int elements, bool power_of_two, float* scales) {
#pragma unroll 1
  for (int done = 0; done < elements; done += kQuantizedAtOnce) {
    quantize_any_blocks<T>(chunk, done / static_cast<int>(kFp8Block), elements, power_of_two, scales);
  }
}

// Rows of this rank's buffer that carry no token: no experts. All threads; layout rank only.
__device__ __noinline__ void clear_tail(const LowDispatchParams& params, LowShared shared, bool dropped) {
  const LowGroup& low = params.low;
  const std::int32_t rows = dropped ? 0 : shared.totals()[low.group.num_experts + low.group.rank];
  std::uint8_t* own = block_of(params, shared, low.group.rank);
  const std::int64_t end = static_cast<std::int64_t>(low.slots.capacity) * params.topk;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 1
  for (std::int64_t i = static_cast<std::int64_t>(rows) * params.topk + blockIdx.x * blockDim.x + threadIdx.x; i < end;
       i += step) {
    reinterpret_cast<std::int64_t*>(own + params.arrays.indices)[i] = -1;
    if (params.sizes.weight > 0) reinterpret_cast<float*>(own + params.arrays.weights)[i] = 0.0f;
  }
}

// All threads of one block: rows of all ranks have come.
template <class BlocksOf>
__device__ void receive(const LowGroup& low, std::uint8_t* heap, const LowRoutingView& routing, int index,
                        std::uint32_t sequence, const std::uint8_t* masked, BlocksOf&& blocks_of) {
  await_arrivals(low, heap, kKind, index, sequence, masked, blocks_of, [&](int source, Wait wait, std::uint32_t value) {
    routing.gave_up[source] = wait != Wait::kCame || (value & kLowGaveUp) != 0 ? 1 : 0;
  });
}

// What work on the device reads must be sizes, also where the operation fails. All threads of one block.
__device__ __noinline__ void clear_counts(const LowDispatchParams& params) {
  const int groups = params.low.row_layout == RowLayout::kExpert ? params.low.num_local_experts : 1;
#pragma unroll 1
  for (int i = threadIdx.x; i < params.low.num_local_experts; i += blockDim.x) params.routing.tokens_per_expert[i] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < groups; i += blockDim.x) {
    params.routing.group_rows[i] = params.routing.own_first[i] = params.routing.own_rows[i] = 0;
  }
  if (threadIdx.x == 0) params.routing.header->received = params.routing.header->combine_sequence = 0;
}

// What a warp does with one chunk. `ring` is where it is loaded, and which routes and scales are its.
template <class Path>
struct LowChunk {
  const LowDispatchParams& params;
  const LowShared& shared;
  const LowLoader& loader;
  const LowItem& item;
  int ring;
  int which;

  __device__ SortedRoute* routes() const { return shared.at<SortedRoute>(kRoutes) + ring * params.topk; }
  __device__ float* scales() const { return shared.at<float>(kScales) + ring * kMostScalesAChunk; }

  // Waits for it, and quantises it.
  __device__ void prepare(std::uint32_t sequence, std::uint32_t parity, bool gathers) const {
    loader.wait(ring, which, parity);
    if constexpr (Path::kQuantizes) {
      using T = typename Path::Element;
      const int elements = item.elements(params);
      if (elements % 8 == 0) {
        quantize_briefly<T>(loader.stage(ring, which), elements, params.source.power_of_two, scales());
      } else {
        quantize_plainly<T>(loader.stage(ring, which), elements, params.source.power_of_two, scales());
      }
      fence_shared_to_bulk();
      __syncwarp();
      if constexpr (Path::kGathers) {
        if (gathers) {
          lay_out_scales(params, sequence, item.token, item.first_block(params), item.blocks(params), scales());
        }
      }
    }
  }
  __device__ void send(const Entry& entry) const {
    store_chunk(params, shared, entry, loader.stage(ring, which), item.chunk * params.chunk_elements * params.out_bytes,
                item.elements(params) * params.out_bytes);
  }
  // What goes beside it; but for scales that are gathered.
  __device__ void send_beside(const Entry& entry, bool gathers) const {
    const int lane = threadIdx.x & 31;
    if constexpr (Path::kHasScales) {
      Entry others = entry;
      const SortedRoute route = lane < params.topk ? routes()[lane] : SortedRoute{};
      if (gathers && route.index < kMostListed) others.rank = -1;
      if (!Path::kGathers || __any_sync(0xffffffffu, others.rank >= 0)) {
        const float* from = scales();
        if constexpr (!Path::kQuantizes) {
          from = params.source.scales + static_cast<std::size_t>(item.token) * params.row_blocks +
                 item.first_block(params);
        }
        store_scales(params, shared, others, route.group, from, item.first_block(params), item.blocks(params));
      }
    }
    if (item.chunk != 0) return;
    const int at = item.token * params.topk + lane;
    if (lane < params.topk) {
      params.routing.entries[at] = entry;
      params.routing.ids[at] = shared.ids()[at];
    }
    if (params.low.row_layout == RowLayout::kRank) send_metadata(params, shared, item.token, entry);
  }
};

// Where warps have more than one chunk: the rest, each warp its own. All threads, after the first ones.
template <class Path>
__device__ __noinline__ void send_more(const LowDispatchParams& params, LowShared shared, std::uint32_t sequence,
                                       bool marked, bool gathers, bool dropped) {
  const LowLoader loader(params, shared);
  const int ring = static_cast<int>(threadIdx.x / 32);
  int which = params.stages > 1 ? 1 : 0;
  std::uint32_t parity = params.stages > 1 ? 0 : 1;
#pragma unroll 1
  for (int number = loader.first + ring + kWarps; number < loader.end; number += kWarps) {
    const LowItem item(params, number);
    const LowChunk<Path> chunk{params, shared, loader, item, ring, which};
    sort_routes(params, shared, item.token, marked, chunk.routes());
    chunk.prepare(sequence, parity, gathers);
    __syncwarp();
    const Entry entry = place_entry(params, shared, chunk.routes(), dropped);
    chunk.send(entry);
    chunk.send_beside(entry, gathers);
    __syncwarp();
    const int next = number + params.stages * kWarps;
    if (next < loader.end) {
      if (params.bulk_stores) bulk_wait_read<0>();
      __syncwarp();
      loader.load(next, ring, which);
    }
    if (++which == params.stages) {
      which = 0;
      parity ^= 1;
    }
  }
}

template <class Path>
__global__ void __launch_bounds__(kThreads, 1) low_dispatch_kernel(const __grid_constant__ LowDispatchParams params) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  const LowGroup& low = params.low;
  const Group& group = low.group;
  const LowShared shared{memory, params.offsets};
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const LowLoader loader(params, shared);
  if (params.bulk_loads && lane == 0) {
#pragma unroll 1
    for (int i = 0; i < params.stages; ++i) barrier_init(loader.barrier(warp, i), 1);
    fence_barrier_init();
    fence_shared_to_bulk();
  }
  __syncwarp();
  // What follows up to the wait takes its time while earlier kernels end, where they have let this one begin.
  loader.prefetch(warp);
  LowStart::prefetch(params);
  __shared__ std::uint32_t failed;
  __shared__ std::uint32_t repeated;
  if (threadIdx.x == 0) repeated = 0;
  keep_constants(params, shared);
  wait_for_stream();
  const LowStart start(params);
  const std::uint32_t sequence = start.sequence;
  if (blockIdx.x == gridDim.x - 1) clear_counts(params);
#pragma unroll 1
  for (int i = 0; i < params.stages; ++i) loader.load(loader.first + warp + i * kWarps, warp, i);
  // Another kernel may fail at any time: one thread has looked, for all of the block.
  if (threadIdx.x == 0) failed = start.failed;
  const bool rare = __syncthreads_or(keep_start(params, shared, start, repeated)) != 0;
  if (failed != 0) {
    drain(params, loader.barriers, loader.end - loader.first);
    return;
  }
  if (threadIdx.x == kThreads - 1) begin_operation(low, sequence);

  const bool by_rank = low.row_layout == RowLayout::kRank;
  const bool marked = params.has_marks && repeated == 0;
  const bool gathers = Path::kGathers && marked;
  if (rare) post_rare(params, shared);
  // The first chunk of every ring. Sorters see to two rings beside each other, movers to two that have nothing in
  // common.
  const bool split = params.sorters != kWarps;
  const bool sorts = warp < params.sorters;
  const bool moves = !split || !sorts;
  const int ring_step = split && moves ? kWarps / 2 : 1;
  const int first_ring = !split ? warp : sorts ? 2 * warp : warp - kWarps / 2;
  const int rings = min(loader.end - loader.first, kWarps);
  const int end_ring = min(first_ring + (split ? 2 : 1) * ring_step, rings);
  if (sorts && static_cast<int>(blockIdx.x) < group.num_ranks) {
    publish_counts(params, shared, sequence, marked, rare);
  }
#pragma unroll 1
  for (int ring = first_ring; ring < end_ring; ring += ring_step) {
    const LowItem item(params, loader.first + ring);
    const LowChunk<Path> chunk{params, shared, loader, item, ring, 0};
    if (sorts) sort_routes(params, shared, item.token, marked, chunk.routes());
    if (moves) chunk.prepare(sequence, 0, gathers);
  }
  const bool unusual = sorts && gather_posts(params, shared, sequence, rare);
  LowVerdict verdict{false, false};
  // All that the block has prepared is there. The reduction is a barrier, but compute-sanitizer's racecheck does not
  // take it for one.
  __syncthreads();
  if (__syncthreads_or(unusual) != 0) verdict = judge_posts(params, shared, sequence);
  if (verdict.failed) {
    drain(params, loader.barriers, loader.end - loader.first);
    return;
  }
#pragma unroll 1
  for (int ring = first_ring; ring < end_ring; ring += ring_step) {
    const LowItem item(params, loader.first + ring);
    const LowChunk<Path> chunk{params, shared, loader, item, ring, 0};
    const Entry entry = place_entry(params, shared, chunk.routes(), verdict.dropped);
    if (moves) chunk.send(entry);
    if (sorts) chunk.send_beside(entry, gathers);
  }
  if (loader.end - loader.first > kWarps) {
    // Routes and scales of the first chunks have been read, and their stages may be loaded again.
    if (params.bulk_stores) bulk_wait_read<0>();
    __syncthreads();
    loader.load(loader.first + warp + params.stages * kWarps, warp, 0);
    send_more<Path>(params, shared, sequence, marked, gathers, verdict.dropped);
  }
  if constexpr (Path::kGathers) {
    if (gathers && sorts && !verdict.dropped) {
#pragma unroll 1
      for (int turn = warp; turn < kWarps; turn += params.sorters) {
        GatheredScales<typename Path::Element> scales;
        scales.find(params, shared, static_cast<int>(blockIdx.x) * kWarps + turn);
        scales.load();
        scales.store(params, sequence);
        __syncwarp();
      }
    }
  }
  if (by_rank) clear_tail(params, shared, verdict.dropped);
  if (verdict.dropped && threadIdx.x == 0) low.state->gave_up[params.index] = sequence;
  if (low.lets_next_begin) let_next_begin();
  bulk_wait_written<0>();
  fence_bulk_to_global();
  __syncthreads();
  signal_arrival(group, shared.heaps(), shared.masked(), params.arrivals_offset, sequence,
                 gridDim.x | (verdict.dropped ? kLowGaveUp : 0u));
  // By two blocks, where there are two: the first one waits for what the others send.
  if (blockIdx.x == gridDim.x - 1) tell_counts(params, shared, sequence, verdict.dropped, marked);
  if (blockIdx.x != 0 || (params.halves & kLowReceive) == 0) return;
  const int header = static_cast<int>(low.layout.header_words());
  receive(low, shared.heaps()[group.rank], params.routing, params.index, sequence, shared.masked(), [&](int source) {
    return shared.missing()[source] != 0
               ? 0
               : static_cast<int>(shared.header()[source * header + static_cast<int>(LowWord::kBlocks)]);
  });
}

__global__ void __launch_bounds__(kThreads, 1) low_receive_kernel(const __grid_constant__ LowDispatchParams params) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  const LowGroup& low = params.low;
  wait_for_stream();
  __shared__ std::uint32_t failed;
  if (threadIdx.x == 0) failed = load_relaxed_device(&low.group.state->failed);
  // Ranks that were left out meanwhile are not waited for either.
  const std::uint32_t begun = load_relaxed_device(&low.state->sequence);
  const std::uint32_t sequence = params.routing.header->sequence;
#pragma unroll 1
  for (int rank = threadIdx.x; rank < low.group.num_ranks; rank += blockDim.x) {
    memory[rank] = is_masked(load_relaxed_device(low.masked_since + rank), begun) ? 1 : 0;
  }
  __syncthreads();
  if (failed != 0) return;
  receive(low, low.group.bases[low.group.rank], params.routing, params.index, sequence, memory, [](int) { return 0; });
}

__global__ void low_mask_kernel(LowGroup low, std::uint64_t ranks, int first) {
  const int rank = first + static_cast<int>(threadIdx.x);
  if (rank >= low.group.num_ranks || (ranks >> threadIdx.x & 1) == 0) return;
  atomicCAS(low.masked_since + rank, 0u, load_relaxed_device(&low.state->sequence) + 1);
}

template <class Visit>
cudaError_t visit_low_path(const LowDispatchParams& params, Visit&& visit) {
  if (params.sizes.scale == 0) return visit(AsTheyAre<false>{});
  if (!params.source.quantize) return visit(AsTheyAre<true>{});
  return visit_element_on_host(params.source.element, [&](auto tag) {
    return params.gathers_scales ? visit(Quantized<decltype(tag), true>{}) : visit(Quantized<decltype(tag), false>{});
  });
}

}  // namespace

std::size_t complete_low_dispatch(LowDispatchParams& params, int blocks) {
  params.chunks = (params.source.hidden + params.chunk_elements - 1) / params.chunk_elements;
  params.chunks_inverse = inverse_of(params.chunks);
  params.topk_inverse = inverse_of(params.topk);
  params.items_each = params.num_tokens * params.chunks / blocks;
  params.items_left = params.num_tokens * params.chunks % blocks;
  params.stage_bytes = static_cast<std::int32_t>(chunk_bytes(params));
  const auto element = static_cast<std::int32_t>(element_bytes(params.source.element));
  params.source_bytes = params.source.hidden * element;
  params.chunk_bytes = params.chunk_elements * element;
  params.out_bytes = params.source.quantize ? 1 : element;
  params.bins =
      params.low.group.num_experts + (params.low.row_layout == RowLayout::kRank ? params.low.group.num_ranks : 0);
  params.receive_offset = params.low.layout.receive(static_cast<std::size_t>(params.index));
  const Element crosses = params.sizes.scale > 0 ? Element::kFloat8 : params.source.element;
  complete_words(params, kKind, kOperation, crosses, params.sizes.weight > 0);
  params.header_words = static_cast<std::int32_t>(params.low.layout.header_words());
  params.post[static_cast<int>(LowWord::kBlocks)] = static_cast<std::uint32_t>(blocks);
  params.capacity = static_cast<std::int32_t>(params.low.slots.capacity);
  params.row_blocks = static_cast<std::int32_t>(params.sizes.scale / sizeof(float));
  params.chunk_blocks = params.chunk_elements / static_cast<std::int32_t>(kFp8Block);
  params.arrays =
      params.low.slots.arrays(params.sizes.row, params.sizes.scale, params.sizes.weight, params.sizes.index);
  params.places = params.low.row_layout == RowLayout::kRank ? params.low.group.num_ranks : params.low.group.num_experts;
  params.mark_words = (params.num_tokens + 31) / 32;
  params.mark_stride = params.mark_words | 1;  // Odd: neighbours in different banks of shared memory.
  lay_out(params);
  params.zero_bytes = params.offsets[kHeader] - params.offsets[kMarks];
  return params.offsets[kNumArrays];
}

cudaError_t prepare_low_dispatch(std::size_t most_shared_bytes) {
  const auto prepare = [&](auto path) {
    return cudaFuncSetAttribute(low_dispatch_kernel<decltype(path)>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(most_shared_bytes));
  };
  cudaError_t error = prepare(AsTheyAre<false>{});
  if (error == cudaSuccess) error = prepare(AsTheyAre<true>{});
  const auto prepare_quantized = [&](auto tag) {
    if (error == cudaSuccess) error = prepare(Quantized<decltype(tag), false>{});
    if (error == cudaSuccess) error = prepare(Quantized<decltype(tag), true>{});
  };
  prepare_quantized(Float32{});
  prepare_quantized(BFloat16{});
  prepare_quantized(Float16{});
  return error;
}

cudaError_t launch_low_dispatch(const LowDispatchParams& params, int blocks, cudaStream_t stream) {
  if ((params.halves & kLowSend) == 0) {
    return launch_early(low_receive_kernel, 1, kThreads, static_cast<std::size_t>(params.low.group.num_ranks), stream,
                        params.low.starts_early, params);
  }
  return visit_low_path(params, [&](auto path) {
    return launch_early(low_dispatch_kernel<decltype(path)>, blocks, kThreads, params.offsets[kNumArrays], stream,
                        params.low.starts_early, params);
  });
}

cudaError_t launch_low_mask(const LowGroup& low, std::uint64_t ranks, int first, cudaStream_t stream) {
  low_mask_kernel<<<1, 64, 0, stream>>>(low, ranks, first);
  return cudaGetLastError();
}

}  // namespace gpu
}  // namespace moe_ep
