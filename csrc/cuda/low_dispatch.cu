// Low-latency dispatch in one launch: every block looks at all of the rank's routes, so that no block waits for
// another one, and posts to one rank how many rows go to each expert; with all ranks' counts every row has its slot,
// and is written there once. Rows are loaded, and quantised, while posts are on their way.
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
// Routes are counted by the first warps of a block; the others see to the rows meanwhile.
constexpr int kRouters = kLowCountWarps * 32;
constexpr int kQuickSpins = 256;  // for a word, before looking what keeps it

// Arrays in shared memory, in their order. Offsets come from the host: finding them takes a kernel a microsecond.
enum LowArray : int {
  kBarriers,      // std::uint64_t [warps][stages]
  kHeaps,         // std::uint8_t* [num_ranks]
  kDestinations,  // Destination [num_ranks]
  kScales,        // float [warps][kMostScalesAChunk]
  kIds,           // std::int32_t [routes] expert, -1: none
  kKeys,          // std::int32_t [routes] layout rank: the rank where a row goes, once a rank; -1: nowhere
  kRankOf,        // std::int32_t [num_experts]
  kLocalOf,       // std::int32_t [num_experts]
  kPlaces,        // std::uint16_t [routes] among a run's rows that go to the same place
  kCounters,      // std::uint16_t [count_warps][places] rows of a run, then of those before it
  kCounts,        // std::int32_t [bins] rows of this rank, then those of ranks before it
  kTotals,        // std::int32_t [bins]
  kHeader,        // std::uint32_t [num_ranks][words before the counts]
  kMasked,        // std::uint8_t [num_ranks]
  kMissing,       // std::uint8_t [num_ranks]
  kRowsOf,        // std::int32_t [num_experts] rows of this rank; for GatheredScales, as the next
  kListed,        // std::uint16_t [num_experts][kMostListed] tokens
  kStages,        // [warps][stages][chunk]
  kNumArrays
};
static_assert(static_cast<int>(kNumArrays) + 1 == kLowDispatchOffsets, "an offset an array, and their end");

std::size_t chunk_bytes(const LowDispatchParams& params) {
  return align_up(static_cast<std::size_t>(params.chunk_elements) * element_bytes(params.source.element), 128);
}

void lay_out(LowDispatchParams& params) {
  const std::size_t routes = align_up(static_cast<std::size_t>(params.num_tokens) * params.topk, 4);
  const std::size_t experts = params.low.group.num_experts;
  const std::size_t ranks = params.low.group.num_ranks;
  const bool by_rank = params.low.row_layout == RowLayout::kRank;
  std::size_t bytes[kNumArrays] = {};
  bytes[kBarriers] = kWarps * params.stages * sizeof(std::uint64_t);
  bytes[kHeaps] = ranks * sizeof(std::uint8_t*);
  bytes[kDestinations] = ranks * sizeof(Destination);
  bytes[kScales] = params.source.quantize ? kWarps * kMostScalesAChunk * sizeof(float) : 0;
  bytes[kIds] = routes * sizeof(std::int32_t);
  bytes[kPlaces] = routes * sizeof(std::uint16_t);
  bytes[kCounters] = static_cast<std::size_t>(params.count_warps) * (by_rank ? ranks : experts) * sizeof(std::uint16_t);
  bytes[kKeys] = by_rank ? routes * sizeof(std::int32_t) : 0;
  bytes[kRankOf] = bytes[kLocalOf] = experts * sizeof(std::int32_t);
  bytes[kCounts] = bytes[kTotals] = (experts + (by_rank ? ranks : 0)) * sizeof(std::int32_t);
  bytes[kHeader] = ranks * params.low.layout.header_words() * sizeof(std::uint32_t);
  bytes[kMasked] = bytes[kMissing] = ranks;
  if (params.scale_parts > 0) {
    bytes[kRowsOf] = experts * sizeof(std::int32_t);
    bytes[kListed] = experts * kMostListed * sizeof(std::uint16_t);
  }
  bytes[kStages] = static_cast<std::size_t>(kWarps) * params.stages * chunk_bytes(params);
  params.offsets[0] = 0;
  for (int i = 0; i < kNumArrays; ++i) {
    params.offsets[i + 1] = static_cast<std::uint32_t>(align_up(params.offsets[i] + bytes[i], 128));
  }
}

__device__ inline void sync_routers() { sync_some(1, kRouters); }

struct LowShared {
  std::uint8_t* base;
  const std::uint32_t* offsets;

  template <class T>
  __device__ T* at(LowArray array) const {
    return reinterpret_cast<T*>(base + offsets[array]);
  }
  __device__ std::uint8_t** heaps() const { return at<std::uint8_t*>(kHeaps); }
  __device__ Destination* destinations() const { return at<Destination>(kDestinations); }
  __device__ std::int32_t* ids() const { return at<std::int32_t>(kIds); }
  __device__ std::int32_t* rank_of() const { return at<std::int32_t>(kRankOf); }
  __device__ std::int32_t* local_of() const { return at<std::int32_t>(kLocalOf); }
  __device__ std::uint16_t* places() const { return at<std::uint16_t>(kPlaces); }
  __device__ std::uint16_t* counters() const { return at<std::uint16_t>(kCounters); }
  __device__ std::int32_t* counts() const { return at<std::int32_t>(kCounts); }
  __device__ std::int32_t* totals() const { return at<std::int32_t>(kTotals); }
  __device__ std::uint32_t* header() const { return at<std::uint32_t>(kHeader); }
  __device__ std::uint8_t* masked() const { return at<std::uint8_t>(kMasked); }
  __device__ std::uint8_t* missing() const { return at<std::uint8_t>(kMissing); }
  __device__ std::int32_t* rows_of() const { return at<std::int32_t>(kRowsOf); }
  __device__ std::uint16_t* listed() const { return at<std::uint16_t>(kListed); }
};

// An item is one chunk of one token's row. A block has a run of items, which its warps take in turn: what is written at
// the same time lies together.
struct LowItems {
  int first;  // of this warp; then every kWarps-th
  int end;

  __device__ explicit LowItems(const LowDispatchParams& params) {
    const int all = params.num_tokens * params.chunks;
    const int blocks = static_cast<int>(gridDim.x);
    const int block = static_cast<int>(blockIdx.x);
    const int each = all / blocks;
    const int extra = all % blocks;
    const int begin = each * block + min(block, extra);
    // The routers are the last to be free.
    first = begin + kWarps - 1 - static_cast<int>(threadIdx.x / 32);
    end = begin + each + (block < extra ? 1 : 0);
  }
};

// A warp's copies of chunks into its ring.
struct LowLoader {
  const LowDispatchParams& params;
  LowItems items;
  std::uint8_t* stages;
  std::uint64_t* barriers;

  __device__ int elements(int chunk) const {
    return min(params.chunk_elements, params.source.hidden - chunk * params.chunk_elements);
  }
  __device__ std::uint8_t* stage(int which) const { return stages + which * params.stage_bytes; }

  __device__ void load(int item, int which) const {
    if (item >= items.end) return;
    const int lane = threadIdx.x & 31;
    const int element = params.element_bytes;
    const int token = static_cast<int>(static_cast<std::uint32_t>(item) / static_cast<std::uint32_t>(params.chunks));
    const int chunk = item - token * params.chunks;
    const std::uint8_t* from = params.source.rows + (static_cast<std::size_t>(token) * params.source.hidden +
                                                     static_cast<std::size_t>(chunk) * params.chunk_elements) *
                                                        element;
    const int bytes = elements(chunk) * element;
    if (params.bulk_loads) {
      if (lane != 0) return;
      barrier_arrive_expect(barriers + which, static_cast<std::uint32_t>(bytes));
      bulk_load(stage(which), from, static_cast<std::uint32_t>(bytes), barriers + which);
      return;
    }
    // Rows of e4m3 are words of 4 bytes.
#pragma unroll 1
    for (int i = lane; i < bytes / 4; i += 32) {
      reinterpret_cast<std::uint32_t*>(stage(which))[i] = reinterpret_cast<const std::uint32_t*>(from)[i];
    }
    __syncwarp();
  }
  // The first item's, before it may be read.
  __device__ void prefetch() const {
    if (!params.bulk_loads || items.first >= items.end || (threadIdx.x & 31) != 0) return;
    const int token = items.first / params.chunks;
    const int chunk = items.first - token * params.chunks;
    const std::size_t first = static_cast<std::size_t>(token) * params.source.hidden +
                              static_cast<std::size_t>(chunk) * params.chunk_elements;
    bulk_prefetch(params.source.rows + first * params.element_bytes,
                  static_cast<std::uint32_t>(elements(chunk) * params.element_bytes));
  }
  __device__ void wait(int which, std::uint32_t parity) const {
    if (params.bulk_loads) barrier_wait(barriers + which, parity);
  }
  // The first loads but for `waited` of them: shared memory is not to be left before what is on the way to it.
  __device__ void drain(int waited) const {
#pragma unroll 1
    for (int i = waited; i < params.stages; ++i) {
      if (items.first + i * kWarps < items.end) wait(i, 0);
    }
  }
};

// What no operation changes, and what is empty at first, in shared memory. All threads, before what the stream has
// queued ahead is over.
__device__ void keep_constants(const LowDispatchParams& params, const LowShared& shared) {
  const LowGroup& low = params.low;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int rank = thread; rank < low.group.num_ranks; rank += kThreads) {
    std::uint8_t* base = low.group.bases[rank];
    std::uint8_t* block = base + params.receive_offset;
    shared.missing()[rank] = 0;
    shared.heaps()[rank] = base;
    shared.destinations()[rank] = Destination{block, reinterpret_cast<float*>(block + params.arrays.scales),
                                              reinterpret_cast<float*>(block + params.arrays.weights),
                                              reinterpret_cast<std::int64_t*>(block + params.arrays.indices)};
  }
#pragma unroll 1
  for (int i = thread; i < low.group.num_experts; i += kThreads) {
    shared.rank_of()[i] = low.group.rank_of_expert[i];
    shared.local_of()[i] = low.group.local_of_expert[i];
  }
#pragma unroll 1
  for (int bin = thread; bin < params.bins; bin += kThreads) shared.counts()[bin] = 0;
  const int words = (params.count_warps * params.places + 1) / 2;
#pragma unroll 1
  for (int word = thread; word < words; word += kThreads) shared.at<std::uint32_t>(kCounters)[word] = 0;
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

// Whether an id is out of range.
__device__ inline bool keep_id(const LowDispatchParams& params, const LowShared& shared, int at, std::int64_t id) {
  const bool good = id >= -1 && id < params.low.group.num_experts;
  shared.ids()[at] = good ? static_cast<std::int32_t>(id) : -2;
  return !good;
}

// Into shared memory, with what did not fit the first go. All threads; a barrier comes next. Whether this thread has
// seen something rare: a rank that is left out, an id out of range.
__device__ bool keep_start(const LowDispatchParams& params, const LowShared& shared, const LowStart& start) {
  const LowGroup& low = params.low;
  const int routes = params.num_tokens * params.topk;
  bool rare = false;
  const auto keep_rank = [&](int rank, std::uint32_t since) {
    const bool masked = is_masked(since, start.sequence);
    rare = rare || masked;
    shared.masked()[rank] = masked ? 1 : 0;
  };
  const int at = static_cast<int>(threadIdx.x);
  if (at < low.group.num_ranks) keep_rank(at, start.since);
#pragma unroll 1
  for (int rank = at + kThreads; rank < low.group.num_ranks; rank += kThreads) {
    keep_rank(rank, load_relaxed_device(low.masked_since + rank));
  }
#pragma unroll
  for (int i = 0; i < LowStart::kAtOnce; ++i) {
    if (at + i * kThreads < routes) rare = keep_id(params, shared, at + i * kThreads, start.ids[i]) || rare;
  }
#pragma unroll 1
  for (int i = at + LowStart::kAtOnce * kThreads; i < routes; i += kThreads) {
    rare = keep_id(params, shared, i, params.topk_idx[i]) || rare;
  }
  return rare;
}

// Layout rank: where rows go, once a rank. The routers; ends with a barrier.
__device__ __noinline__ void find_keys(const LowDispatchParams& params, const LowShared& shared) {
  const int routes = params.num_tokens * params.topk;
#pragma unroll 1
  for (int at = threadIdx.x; at < routes; at += kRouters) {
    const std::int32_t id = shared.ids()[at];
    const int rank = id >= 0 ? shared.rank_of()[id] : -1;
    bool first = rank >= 0;
#pragma unroll 1
    for (int earlier = at / params.topk * params.topk; earlier < at && first; ++earlier) {
      const std::int32_t other = shared.ids()[earlier];
      first = other < 0 || shared.rank_of()[other] != rank;
    }
    shared.at<std::int32_t>(kKeys)[at] = first ? rank : -1;
  }
  sync_routers();
}

// For every route, how many of this rank's rows go to the same place before it: within its run of routes (`places`),
// and in the runs before that (`counters`); and of each place, how many there are (`counts`). Runs are of one warp
// each. The routers; ends with a barrier.
__device__ void find_places(const LowDispatchParams& params, const LowShared& shared, const std::int32_t* keys,
                            std::int32_t* counts) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const int routes = params.num_tokens * params.topk;
  if (warp < params.count_warps) {
    std::uint16_t* counter = shared.counters() + warp * params.places;
    const int end = min(routes, (warp + 1) * params.run);
#pragma unroll 1
    for (int first = warp * params.run; first < end; first += 32) {
      const int at = first + lane;
      const std::int32_t key = at < end ? keys[at] : -1;
      const unsigned same = __match_any_sync(0xffffffffu, key);
      const unsigned earlier = same & ((1u << lane) - 1);
      const int before = key >= 0 ? counter[key] : 0;
      if (at < end) shared.places()[at] = static_cast<std::uint16_t>(before + __popc(earlier));
      __syncwarp();
      if (key >= 0 && earlier == 0) counter[key] = static_cast<std::uint16_t>(before + __popc(same));
      __syncwarp();
    }
  }
  sync_routers();
#pragma unroll 1
  for (int place = threadIdx.x; place < params.places; place += kRouters) {
    int sum = 0;
#pragma unroll 4
    for (int run = 0; run < params.count_warps; ++run) {
      std::uint16_t& counter = shared.counters()[run * params.places + place];
      const int rows = counter;
      counter = static_cast<std::uint16_t>(sum);
      sum += rows;
    }
    counts[place] = sum;
  }
  sync_routers();
}

// Layout rank: rows for each expert. The routers; ends with a barrier.
__device__ __noinline__ void count_experts(const LowDispatchParams& params, const LowShared& shared) {
#pragma unroll 1
  for (int at = threadIdx.x; at < params.num_tokens * params.topk; at += kRouters) {
    const std::int32_t id = shared.ids()[at];
    if (id >= 0) atomicAdd(shared.counts() + id, 1);
  }
  sync_routers();
}

// The first id out of range, if there is any, into the post; its other half goes where nobody will want a count. The
// routers; end with a barrier.
__device__ __noinline__ void find_bad_route(const LowDispatchParams& params, const LowShared& shared, LowPost& post) {
  __shared__ std::uint32_t first;
  if (threadIdx.x == 0) first = 0xffffffffu;
  sync_routers();
#pragma unroll 1
  for (int at = threadIdx.x; at < params.num_tokens * params.topk; at += kRouters) {
    if (shared.ids()[at] == -2) atomicMin(&first, static_cast<std::uint32_t>(at));
  }
  sync_routers();
  if (first == 0xffffffffu) return;
  post.bad_route = first + 1;
  post.bad_expert = static_cast<std::uint32_t>(params.topk_idx[first]);
  if (threadIdx.x == 0) shared.counts()[0] = static_cast<std::int32_t>(params.topk_idx[first] >> 32);
  sync_routers();
}

// Routes of a token in a warp, which are to become its entries, sorted by rank and position.
struct LowRoutes {
  std::int32_t rank;   // of lane j's route; INT_MAX: it goes nowhere
  std::int32_t bin;    // where it is counted
  std::int32_t index;  // among this rank's rows that go to the same place
  std::int32_t slot;   // but for what comes before this rank's rows
  std::int32_t from;   // the lane whose route becomes lane j's entry
};

__device__ LowRoutes sort_routes(const LowDispatchParams& params, const LowShared& shared, const std::int32_t* keys,
                                 int token, bool by_rank) {
  const int lane = threadIdx.x & 31;
  const int at = token * params.topk + lane;
  LowRoutes routes{INT_MAX, 0, 0, 0, 0};
  const std::int32_t key = lane < params.topk ? keys[at] : -1;
  if (key >= 0) {
    routes.rank = by_rank ? key : shared.rank_of()[key];
    routes.bin = by_rank ? params.low.group.num_experts + key : key;
    routes.index = shared.places()[at] + shared.counters()[at / params.run * params.places + key];
    routes.slot = (by_rank ? 0 : shared.local_of()[key] * params.capacity) + routes.index;
    if (shared.masked()[routes.rank] != 0) routes.rank = INT_MAX;
  }
  int to = 0;
#pragma unroll 4
  for (int j = 0; j < params.topk; ++j) {
    const int other = __shfl_sync(0xffffffffu, routes.rank, j);
    to += other < routes.rank || (other == routes.rank && j < lane) ? 1 : 0;
  }
#pragma unroll 4
  for (int j = 0; j < params.topk; ++j) routes.from = __shfl_sync(0xffffffffu, to, j) == lane ? j : routes.from;
  return routes;
}

// Lane j's entry, with the counts of all ranks.
__device__ Entry place_entries(const LowDispatchParams& params, const LowShared& shared, const LowRoutes& routes,
                               bool by_rank, bool dropped) {
  const int lane = threadIdx.x & 31;
  const std::int32_t slot = routes.slot + shared.counts()[routes.bin];
  const int rank = __shfl_sync(0xffffffffu, routes.rank, routes.from);
  Entry entry{-1, -1, -1};
  const std::int32_t its_slot = __shfl_sync(0xffffffffu, slot, routes.from);
  if (lane >= params.topk || rank == INT_MAX || dropped) return entry;
  entry.slot = its_slot;
  entry.rank = static_cast<std::int16_t>(rank);
  entry.position = static_cast<std::int16_t>(by_rank ? -1 : routes.from);
  return entry;
}

// Why an operation does not go on as meant; the same on all ranks but for a rank that is missing.
struct LowVerdict {
  bool failed;   // and so has this rank
  bool dropped;  // no rows cross
};

// A word of a post that had not come at first; 0 where it does not come at all, which `missing` tells then.
__device__ __noinline__ std::uint32_t late_word(const LowGroup& low, const std::uint64_t* at, const LowAwaited& awaited,
                                                int source, std::uint8_t* missing, bool& unusual) {
  std::uint64_t seen = 0;
  if (await_late_word(low, at, awaited, source, seen) == Wait::kCame) return low_value(seen);
  unusual = true;
  missing[source] = 1;
  return 0;
}

// Waits for the posts of all ranks: their header words, and for each bin how many rows come before this rank's
// (`counts`) and in all (`totals`). Whether anything is not as it usually is: all threads agree, and judge_posts()
// finds out what. Ends with a barrier. No fence: rows are written only where a peer's kernel has begun, after all that
// used its buffer before, and no store comes before the loads here that decide on it.
__device__ bool gather_posts(const LowDispatchParams& params, const LowShared& shared, std::uint32_t sequence,
                             const LowPost& mine, bool some_masked) {
  const LowGroup& low = params.low;
  const int ranks = low.group.num_ranks;
  const int header = params.header_words;
  const auto* posts = reinterpret_cast<const std::uint64_t*>(shared.heaps()[low.group.rank] + params.posts_offset);
  const int stride = params.post_stride;
  std::uint8_t* const masked = shared.masked();
  std::uint8_t* const missing = shared.missing();
  const LowAwaited awaited{kKind, params.index, sequence, Step::kPost};
  bool unusual = false;
  // The last threads, as the first ones have more of the bins.
#pragma unroll 1
  for (int i = kThreads - 1 - static_cast<int>(threadIdx.x); i < ranks * header; i += kThreads) {
    const int source = i / header;
    const int word = i - source * header;
    if (masked[source] != 0) continue;
    const std::uint64_t* at = posts + source * stride + word;
    std::uint64_t seen = load_relaxed_system(at);
#pragma unroll 1
    for (int spin = 0; spin < kQuickSpins && low_lead(seen, sequence) != 0; ++spin) seen = load_relaxed_system(at);
    const std::uint32_t value =
        low_lead(seen, sequence) == 0 ? low_value(seen) : late_word(low, at, awaited, source, missing, unusual);
    shared.header()[i] = value;
    const int mask = static_cast<int>(LowWord::kMask);
    std::uint32_t usual = word == static_cast<int>(LowWord::kBlocks) ? value : 0;
    if (word < kNumLowCompared) usual = reinterpret_cast<const std::uint32_t*>(&mine)[word];
#pragma unroll 1
    for (int bit = 0; word >= mask && bit < 32 && (word - mask) * 32 + bit < ranks; ++bit) {
      usual |= masked[(word - mask) * 32 + bit] != 0 ? 1u << bit : 0u;
    }
    unusual = unusual || value != usual;
  }
  constexpr int kAtOnce = 8;  // loads in flight
  // Words of a rank that is left out never come.
  const int spins = some_masked ? 0 : kQuickSpins;
#pragma unroll 1
  for (int bin = threadIdx.x; bin < params.bins; bin += kThreads) {
    std::int32_t before = 0;
    std::int32_t total = 0;
#pragma unroll 1
    for (int first = 0; first < ranks; first += kAtOnce) {
      std::uint64_t words[kAtOnce];
      bool here = false;
#pragma unroll 1
      for (int spin = 0; spin < spins && !here; ++spin) {
        here = true;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          words[i] = load_relaxed_system(posts + min(first + i, ranks - 1) * stride + header + bin);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) here = here && low_lead(words[i], sequence) == 0;
      }
      if (here) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const std::int32_t rows = first + i < ranks ? static_cast<std::int32_t>(low_value(words[i])) : 0;
          total += rows;
          before += first + i < low.group.rank ? rows : 0;
        }
        continue;
      }
#pragma unroll 1
      for (int source = first; source < ranks && source < first + kAtOnce; ++source) {
        if (masked[source] != 0) continue;
        const std::uint64_t* at = posts + source * stride + header + bin;
        const auto rows = static_cast<std::int32_t>(late_word(low, at, awaited, source, missing, unusual));
        total += rows;
        before += source < low.group.rank ? rows : 0;
      }
    }
    shared.counts()[bin] = before;
    shared.totals()[bin] = total;
    unusual = unusual || total > params.capacity;
  }
  const bool any = __syncthreads_or(unusual) != 0;
  // The reduction is a barrier, but compute-sanitizer's racecheck does not take it for one.
  __syncthreads();
  return any;
}

// What the posts say of the operation: the first difference, a mask that is not everyone's, a bad id, slots that do not
// suffice. All threads; ends with a barrier. One block reports.
__device__ __noinline__ LowVerdict judge_posts(const LowDispatchParams& params, const LowShared& shared,
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
      values[0] = bin < group.num_experts ? shared.rank_of()[bin] : bin - group.num_experts;
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
__device__ __noinline__ void tell_counts(const LowDispatchParams& params, const LowShared& shared,
                                         std::uint32_t sequence, bool dropped) {
  const LowGroup& low = params.low;
  const Group& group = low.group;
  const int header = static_cast<int>(low.layout.header_words());
  __shared__ std::int32_t received;
  if (threadIdx.x == 0) received = 0;
  __syncthreads();
  const int first = group.first_of_rank[group.rank];
  const auto own_count = [&](int bin) {
    const std::uint64_t* words = low_post_of(low, shared.heaps()[group.rank], kKind, params.index, group.rank);
    return static_cast<std::int32_t>(low_value(load_relaxed_system(words + header + bin)));
  };
  const bool by_expert = low.row_layout == RowLayout::kExpert;
#pragma unroll 1
  for (int local = threadIdx.x; local < low.num_local_experts; local += blockDim.x) {
    const int expert = group.experts_by_rank[first + local];
    const std::int32_t rows = dropped ? 0 : shared.totals()[expert];
    params.routing.tokens_per_expert[local] = rows;
    if (!by_expert) continue;
    params.routing.group_rows[local] = rows;
    params.routing.own_first[local] = dropped ? 0 : shared.counts()[expert];
    params.routing.own_rows[local] = dropped ? 0 : own_count(expert);
    atomicAdd(&received, rows);
  }
  if (!by_expert && threadIdx.x == 0) {
    const int bin = group.num_experts + group.rank;
    received = dropped ? 0 : shared.totals()[bin];
    params.routing.group_rows[0] = received;
    params.routing.own_first[0] = dropped ? 0 : shared.counts()[bin];
    params.routing.own_rows[0] = dropped ? 0 : own_count(bin);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  params.routing.header->sequence = sequence;
  params.routing.header->received = static_cast<std::uint32_t>(received);
}

// What goes beside a row in layout rank: a warp, for one token.
__device__ __noinline__ void send_metadata(const LowDispatchParams& params, const LowShared& shared, int token,
                                           const Entry& entry, int count) {
  const int lane = threadIdx.x & 31;
  const int at = token * params.topk + lane;
  const std::int32_t id = lane < params.topk ? shared.ids()[at] : -1;
  const int rank_of = id >= 0 ? shared.rank_of()[id] : -1;
  const float weight = lane < params.topk && params.sizes.weight > 0 ? params.source.weights[at] : 0.0f;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), i);
    const std::size_t slot = static_cast<std::size_t>(__shfl_sync(0xffffffffu, entry.slot, i));
    if (lane >= params.topk) continue;
    const Destination& to = shared.destinations()[rank];
    to.indices[slot * params.topk + lane] = rank_of == rank ? shared.local_of()[id] : -1;
    if (params.sizes.weight > 0) to.weights[slot * params.topk + lane] = rank_of == rank ? weight : 0.0f;
  }
}

// A chunk in shared memory to all its places: a warp.
__device__ void store_chunk(const LowDispatchParams& params, const LowShared& shared, const Entry& entry, int count,
                            const std::uint8_t* data, int first_byte, int bytes) {
  const int lane = threadIdx.x & 31;
  if (params.bulk_stores) {
    if (entry.rank >= 0) {
      bulk_store(
          shared.destinations()[entry.rank].rows + static_cast<std::size_t>(entry.slot) * params.sizes.row + first_byte,
          data, static_cast<std::uint32_t>(bytes));
    }
    bulk_commit();
    return;
  }
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), i);
    const std::size_t slot = static_cast<std::size_t>(__shfl_sync(0xffffffffu, entry.slot, i));
    std::uint8_t* to = shared.destinations()[rank].rows + slot * params.sizes.row + first_byte;
#pragma unroll 1
    for (int word = lane; word < bytes / 4; word += 32) {
      reinterpret_cast<std::uint32_t*>(to)[word] = reinterpret_cast<const std::uint32_t*>(data)[word];
    }
  }
}

// Scales of a chunk beside its rows, but for entries without a rank: half a warp an entry.
__device__ void store_scales(const LowDispatchParams& params, const LowShared& shared, const Entry& entry, int count,
                             const float* scales, int first_block, int blocks, int row_blocks) {
  const int lane = threadIdx.x & 15;
  const int half = threadIdx.x / 16 & 1;
  // As in LowSlots::scale, with one division, of 32 bits.
  const auto capacity = static_cast<std::uint32_t>(params.capacity);
  const std::uint32_t group = static_cast<std::uint32_t>(entry.slot) / capacity;
  const std::uint32_t row = static_cast<std::uint32_t>(entry.slot) - group * capacity;
  unsigned long long mine = 0;
  if (entry.rank >= 0) {
    mine = reinterpret_cast<unsigned long long>(
        shared.destinations()[entry.rank].scales +
        (static_cast<std::size_t>(group) * row_blocks + static_cast<std::size_t>(first_block)) * capacity + row);
  }
#pragma unroll 1
  for (int i = 0; i < count; i += 2) {
    auto* to = reinterpret_cast<float*>(__shfl_sync(0xffffffffu, mine, i + half));
    if (i + half >= count || to == nullptr) continue;
#pragma unroll 2
    for (int block = lane; block < blocks; block += 16) {
      store_gathered(to + static_cast<std::size_t>(block) * capacity, scales[block]);
    }
  }
}

// Scales of a chunk to where the rank's other warps find them: a warp. Each word names its dispatch, so that no fence
// or flag has to say that it has come.
__device__ void lay_out_scales(const LowDispatchParams& params, std::uint32_t sequence, int token, int first_block,
                               int blocks, const float* scales) {
  const int row_blocks = static_cast<int>(params.sizes.scale / sizeof(float));
  std::uint64_t* to = params.low.scale_words + static_cast<std::size_t>(token) * row_blocks + first_block;
#pragma unroll 1
  for (int block = threadIdx.x & 31; block < blocks; block += 32) {
    store_relaxed_device(to + block, low_word(sequence, __float_as_uint(scales[block])));
  }
}

// The first tokens of each expert, and how many it gets of this rank. The routers, once the counts are there.
__device__ __noinline__ void list_rows(const LowDispatchParams& params, const LowShared& shared) {
#pragma unroll 1
  for (int expert = threadIdx.x; expert < params.places; expert += kRouters) {
    shared.rows_of()[expert] = shared.counts()[expert];
  }
#pragma unroll 1
  for (int at = threadIdx.x; at < params.num_tokens * params.topk; at += kRouters) {
    const std::int32_t expert = shared.ids()[at];
    if (expert < 0) continue;
    const int row = shared.places()[at] + shared.counters()[at / params.run * params.places + expert];
    if (row < kMostListed) shared.listed()[expert * kMostListed + row] = static_cast<std::uint16_t>(at / params.topk);
  }
}

// A scale that had not come at first; of a rank that has failed, anything: a block that found that says to nobody that
// its rows have come.
__device__ __noinline__ std::uint64_t late_scale(const LowDispatchParams& params, const std::uint64_t* at,
                                                 std::uint32_t sequence) {
  std::uint64_t word = load_relaxed_device(at);
#pragma unroll 1
  for (unsigned spin = 1; low_lead(word, sequence) != 0; ++spin) {
    if ((spin & 127) == 0 && load_relaxed_device(&params.low.group.state->failed) != 0) break;
    word = load_relaxed_device(at);
  }
  return word;
}

// Scales of the first of this rank's rows for an expert, or a part of each; layout expert. They lie together there, a
// few rows of each block of scales. So lanes that follow each other take rows that do, and memory sees a fraction of
// the transactions that scales stored token by token would be. Other rows' scales are sent with them. A warp.
struct GatheredScales {
  const std::uint64_t* from;  // of the lane's row
  float* to;                  // likewise
  int block;                  // the lane's first
  int end;                    // past its last
  int step;
  std::uint64_t words[kGatheredWords];

  // A warp of the grid has one expert, or part of one, or none.
  __device__ void find(const LowDispatchParams& params, const LowShared& shared) {
    const int warp = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x / 32);
    const int lane = threadIdx.x & 31;
    const int row_blocks = static_cast<int>(params.sizes.scale / sizeof(float));
    block = end = 0;
    step = 1;
    if (warp >= params.places * params.scale_parts) return;
    const int part = warp % params.scale_parts;
    // Ranks begin with experts of different ranks.
    int expert = warp / params.scale_parts + params.low.group.rank * params.places / params.low.group.num_ranks;
    if (expert >= params.places) expert -= params.places;
    const int rank = shared.rank_of()[expert];
    const int rows = min(shared.rows_of()[expert], kMostListed);
    if (rows == 0 || shared.masked()[rank] != 0) return;
    const int shift = rows == 1 ? 0 : 32 - __clz(rows - 1);  // 1, 2, 4, 8 rows beside each other
    const int row = lane & ((1 << shift) - 1);
    if (row >= rows) return;
    step = 32 >> shift;
    block = part * row_blocks / params.scale_parts + (lane >> shift);
    end = (part + 1) * row_blocks / params.scale_parts;
    from = params.low.scale_words + static_cast<std::size_t>(shared.listed()[expert * kMostListed + row]) * row_blocks;
    to = shared.destinations()[rank].scales +
         static_cast<std::size_t>(shared.local_of()[expert]) * row_blocks * params.capacity + shared.counts()[expert] +
         row;
  }
  // Asks for words; nothing waits for them yet.
  __device__ void load() {
#pragma unroll
    for (int i = 0; i < kGatheredWords; ++i) {
      if (block + i * step < end) words[i] = load_relaxed_device(from + block + i * step);
    }
  }
  __device__ void store(const LowDispatchParams& params, std::uint32_t sequence) {
#pragma unroll
    for (int i = 0; i < kGatheredWords; ++i) {
      const int at = block + i * step;
      if (at >= end) break;
      if (low_lead(words[i], sequence) != 0) words[i] = late_scale(params, from + at, sequence);
      store_gathered(to + static_cast<std::size_t>(at) * params.capacity, __uint_as_float(low_value(words[i])));
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

template <class Path>
__device__ __noinline__ void prepare_chunk(const LowDispatchParams& params, const LowLoader& loader, int chunk,
                                           int which, std::uint32_t parity, float* scales) {
  loader.wait(which, parity);
  if constexpr (Path::kQuantizes) {
    using T = typename Path::Element;
    const int elements = loader.elements(chunk);
    if (elements % 8 == 0) {
      quantize_chunk<T>(loader.stage(which), elements, params.source.power_of_two, scales);
    } else {
#pragma unroll 1
      for (int done = 0; done < elements; done += kQuantizedAtOnce) {
        quantize_any_blocks<T>(loader.stage(which), done / static_cast<int>(kFp8Block), elements,
                               params.source.power_of_two, scales);
      }
    }
    fence_shared_to_bulk();
    __syncwarp();
  }
}

// Rows of this rank's buffer that carry no token: no experts. All threads; layout rank only.
__device__ __noinline__ void clear_tail(const LowDispatchParams& params, const LowShared& shared, bool dropped) {
  const LowGroup& low = params.low;
  const std::int32_t rows = dropped ? 0 : shared.totals()[low.group.num_experts + low.group.rank];
  const Destination& own = shared.destinations()[low.group.rank];
  const std::int64_t end = static_cast<std::int64_t>(low.slots.capacity) * params.topk;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 1
  for (std::int64_t i = static_cast<std::int64_t>(rows) * params.topk + blockIdx.x * blockDim.x + threadIdx.x; i < end;
       i += step) {
    own.indices[i] = -1;
    if (params.sizes.weight > 0) own.weights[i] = 0.0f;
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

template <class Path>
__global__ void __launch_bounds__(kThreads, 1) low_dispatch_kernel(const __grid_constant__ LowDispatchParams params) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  const LowGroup& low = params.low;
  const Group& group = low.group;
  const LowShared shared{memory, params.offsets};
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const int stages = params.stages;
  const LowLoader loader{params, LowItems(params),
                         shared.at<std::uint8_t>(kStages) + warp * stages * params.stage_bytes,
                         shared.at<std::uint64_t>(kBarriers) + warp * stages};
  // A warp's barriers are its own: nobody else has to see them first.
  if (params.bulk_loads && lane == 0) {
#pragma unroll 1
    for (int i = 0; i < stages; ++i) barrier_init(loader.barriers + i, 1);
    fence_barrier_init();
    fence_shared_to_bulk();
  }
  __syncwarp();
  // What follows up to the wait takes its time while earlier kernels end, where they have let this one begin.
  loader.prefetch();
  LowStart::prefetch(params);
  keep_constants(params, shared);
  wait_for_stream();
  const LowStart start(params);
  const std::uint32_t sequence = start.sequence;
  if (blockIdx.x == gridDim.x - 1) clear_counts(params);
#pragma unroll 1
  for (int i = 0; i < stages; ++i) loader.load(loader.items.first + i * kWarps, i);
  // Another kernel may fail at any time: one thread has looked, for all of the block.
  __shared__ std::uint32_t failed;
  if (threadIdx.x == 0) failed = start.failed;
  const bool rare = __syncthreads_or(keep_start(params, shared, start)) != 0;
  if (failed != 0) {
    loader.drain(0);
    return;
  }
  if (threadIdx.x == kThreads - 1) begin_operation(low, sequence);

  const bool by_rank = low.row_layout == RowLayout::kRank;
  const std::int32_t* keys = by_rank ? shared.at<std::int32_t>(kKeys) : shared.ids();
  LowPost post{static_cast<std::uint32_t>(kOperation),
               params.wire_element,
               static_cast<std::uint32_t>(params.topk),
               params.sizes.weight > 0 ? 1u : 0u,
               static_cast<std::uint32_t>(params.index),
               0,
               gridDim.x};
  if (threadIdx.x < kRouters) {
    if (by_rank) find_keys(params, shared);
    find_places(params, shared, keys, shared.counts() + (by_rank ? group.num_experts : 0));
    if (static_cast<int>(blockIdx.x) < group.num_ranks) {
      if (by_rank) count_experts(params, shared);
      if (rare) find_bad_route(params, shared, post);
      publish_low_post(low, kKind, params.index, sequence, post, shared.heaps(), shared.masked(), shared.counts(),
                       params.bins, kRouters);
    }
    if constexpr (Path::kGathers) list_rows(params, shared);
  }
  float* scales = shared.at<float>(kScales) + warp * kMostScalesAChunk;
  const auto token_of = [&](int item) {
    return static_cast<int>(static_cast<std::uint32_t>(item) / static_cast<std::uint32_t>(params.chunks));
  };
  const auto first_block_of = [&](int chunk) { return chunk * params.chunk_elements / static_cast<int>(kFp8Block); };
  const auto blocks_of = [&](int chunk) {
    return (loader.elements(chunk) + static_cast<int>(kFp8Block) - 1) / static_cast<int>(kFp8Block);
  };
  const int first_item = loader.items.first;
  const int first_token = token_of(first_item);
  const bool works = first_item < loader.items.end;
  // Quantised, and its scales where others look for them.
  const auto prepare = [&](int token, int chunk, int which, std::uint32_t parity) {
    prepare_chunk<Path>(params, loader, chunk, which, parity, scales);
    if constexpr (Path::kGathers) {
      lay_out_scales(params, sequence, token, first_block_of(chunk), blocks_of(chunk), scales);
    }
  };
  if (works) prepare(first_token, first_item - first_token * params.chunks, 0, 0);
  // Counts become what comes before: all have been read. And all places are there.
  __syncthreads();
  LowRoutes routes{INT_MAX, 0, 0, 0, 0};
  if (works) routes = sort_routes(params, shared, keys, first_token, by_rank);
  LowVerdict verdict{false, false};
  if (gather_posts(params, shared, sequence, post, rare)) verdict = judge_posts(params, shared, sequence);
  if (verdict.failed) {
    loader.drain(1);
    return;
  }
  GatheredScales gathered;
  if constexpr (Path::kGathers) {
    // Words are asked for before memory is busy with rows. By now most have come.
    if (!verdict.dropped) {
      gathered.find(params, shared);
      gathered.load();
    }
  }
  int which = 0;
  std::uint32_t parity = 0;
#pragma unroll 1
  for (int item = first_item; item < loader.items.end; item += kWarps) {
    const int token = token_of(item);
    const int chunk = item - token * params.chunks;
    if (item != first_item) {
      routes = sort_routes(params, shared, keys, token, by_rank);
      prepare(token, chunk, which, parity);
    }
    const Entry entry = place_entries(params, shared, routes, by_rank, verdict.dropped);
    const int count = __popc(__ballot_sync(0xffffffffu, entry.rank >= 0));
    const int elements = loader.elements(chunk);
    store_chunk(params, shared, entry, count, loader.stage(which), chunk * params.chunk_elements * params.out_bytes,
                elements * params.out_bytes);
    if constexpr (Path::kHasScales) {
      Entry others = entry;
      if constexpr (Path::kGathers) {
        if (__shfl_sync(0xffffffffu, routes.index, routes.from) < kMostListed) others.rank = -1;
      }
      if (!Path::kGathers || __any_sync(0xffffffffu, others.rank >= 0)) {
        const int first_block = first_block_of(chunk);
        const int row_blocks = static_cast<int>(params.sizes.scale / sizeof(float));
        const float* from = Path::kQuantizes
                                ? scales
                                : params.source.scales + static_cast<std::size_t>(token) * row_blocks + first_block;
        store_scales(params, shared, others, count, from, first_block, blocks_of(chunk), row_blocks);
      }
    }
    if (chunk == 0) {
      if (lane < params.topk) {
        params.routing.entries[token * params.topk + lane] = entry;
        params.routing.ids[token * params.topk + lane] = shared.ids()[token * params.topk + lane];
      }
      if (by_rank) send_metadata(params, shared, token, entry, count);
    }
    __syncwarp();
    const int next = item + stages * kWarps;
    if (next < loader.items.end) {
      if (params.bulk_stores) bulk_wait_read<0>();
      __syncwarp();
      loader.load(next, which);
    }
    if (++which == stages) {
      which = 0;
      parity ^= 1;
    }
  }
  if constexpr (Path::kGathers) {
    if (!verdict.dropped) gathered.store(params, sequence);
  }
  if (by_rank) clear_tail(params, shared, verdict.dropped);
  if (verdict.dropped && threadIdx.x == 0) low.state->gave_up[params.index] = sequence;
  if (low.lets_next_begin) let_next_begin();
  bulk_wait_written();
  fence_bulk_to_global();
  __syncthreads();
  signal_arrival(low, kKind, params.index, sequence, shared.heaps(), shared.masked(),
                 gridDim.x | (verdict.dropped ? kLowGaveUp : 0u));
  // By two blocks, where there are two: the first one waits for what the others send.
  if (blockIdx.x == gridDim.x - 1) tell_counts(params, shared, sequence, verdict.dropped);
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
    return params.scale_parts > 0 ? visit(Quantized<decltype(tag), true>{}) : visit(Quantized<decltype(tag), false>{});
  });
}

}  // namespace

std::size_t complete_low_dispatch(LowDispatchParams& params) {
  params.chunks = (params.source.hidden + params.chunk_elements - 1) / params.chunk_elements;
  params.stage_bytes = static_cast<std::int32_t>(chunk_bytes(params));
  params.element_bytes = static_cast<std::int32_t>(element_bytes(params.source.element));
  params.out_bytes = params.source.quantize ? 1 : params.element_bytes;
  params.wire_element = static_cast<std::uint32_t>(params.sizes.scale > 0 ? Element::kFloat8 : params.source.element);
  params.bins =
      params.low.group.num_experts + (params.low.row_layout == RowLayout::kRank ? params.low.group.num_ranks : 0);
  params.receive_offset = params.low.layout.receive(static_cast<std::size_t>(params.index));
  params.posts_offset = params.low.layout.post(kKind, static_cast<std::size_t>(params.index), 0);
  params.post_stride = static_cast<std::int32_t>(params.low.layout.post_stride() / sizeof(std::uint64_t));
  params.header_words = static_cast<std::int32_t>(params.low.layout.header_words());
  params.capacity = static_cast<std::int32_t>(params.low.slots.capacity);
  params.arrays =
      params.low.slots.arrays(params.sizes.row, params.sizes.scale, params.sizes.weight, params.sizes.index);
  params.places = params.low.row_layout == RowLayout::kRank ? params.low.group.num_ranks : params.low.group.num_experts;
  const int routes = params.num_tokens * params.topk;
  params.run = std::max(32, (routes + 32 * params.count_warps - 1) / (32 * params.count_warps) * 32);
  lay_out(params);
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
