// Low-latency dispatch in one launch: every block looks at all of the rank's routes, so that no block waits for
// another one; the first one posts how many rows go to each expert; with all ranks' counts every row has its slot, and
// is written there once. Rows are loaded, and quantised, while posts are on their way.
#include <climits>

#include "cuda/launch.h"
#include "cuda/low_words.cuh"
#include "cuda/quantize.cuh"

namespace moe_ep {
namespace gpu {
namespace {

constexpr Operation kOperation = Operation::kLowDispatch;
constexpr LowKind kKind = LowKind::kDispatch;

// Arrays of one rank's receive buffer.
struct LowDestination {
  std::uint8_t* rows;
  float* scales;
  float* weights;
  std::int64_t* indices;
};

// Arrays in shared memory, in their order. Offsets come from the host: finding them takes a kernel a microsecond.
enum LowArray : int {
  kBarriers,      // std::uint64_t [warps][stages]
  kDestinations,  // LowDestination [num_ranks]
  kScales,        // float [warps][kMostScalesAChunk]
  kIds,           // std::int32_t [routes] expert, -1: none
  kKeys,          // std::int32_t [routes] layout rank: the rank where a row goes, once a rank; -1: nowhere
  kRankOf,        // std::int32_t [num_experts]
  kLocalOf,       // std::int32_t [num_experts]
  kCounts,        // std::int32_t [bins] rows of this rank, then those of ranks before it
  kTotals,        // std::int32_t [bins]
  kHeader,        // std::uint32_t [num_ranks][words before the counts]
  kMasked,        // std::uint8_t [num_ranks]
  kMissing,       // std::uint8_t [num_ranks]
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
  bytes[kDestinations] = ranks * sizeof(LowDestination);
  bytes[kScales] = params.source.quantize ? kWarps * kMostScalesAChunk * sizeof(float) : 0;
  bytes[kIds] = routes * sizeof(std::int32_t);
  bytes[kKeys] = by_rank ? routes * sizeof(std::int32_t) : 0;
  bytes[kRankOf] = bytes[kLocalOf] = experts * sizeof(std::int32_t);
  bytes[kCounts] = bytes[kTotals] = (experts + (by_rank ? ranks : 0)) * sizeof(std::int32_t);
  bytes[kHeader] = ranks * params.low.layout.header_words() * sizeof(std::uint32_t);
  bytes[kMasked] = bytes[kMissing] = ranks;
  bytes[kStages] = static_cast<std::size_t>(kWarps) * params.stages * chunk_bytes(params);
  params.offsets[0] = 0;
  for (int i = 0; i < kNumArrays; ++i) {
    params.offsets[i + 1] = static_cast<std::uint32_t>(align_up(params.offsets[i] + bytes[i], 128));
  }
}

struct LowShared {
  std::uint8_t* base;
  const std::uint32_t* offsets;

  template <class T>
  __device__ T* at(LowArray array) const {
    return reinterpret_cast<T*>(base + offsets[array]);
  }
  __device__ LowDestination* destinations() const { return at<LowDestination>(kDestinations); }
  __device__ std::int32_t* ids() const { return at<std::int32_t>(kIds); }
  __device__ std::int32_t* rank_of() const { return at<std::int32_t>(kRankOf); }
  __device__ std::int32_t* local_of() const { return at<std::int32_t>(kLocalOf); }
  __device__ std::int32_t* counts() const { return at<std::int32_t>(kCounts); }
  __device__ std::int32_t* totals() const { return at<std::int32_t>(kTotals); }
  __device__ std::uint32_t* header() const { return at<std::uint32_t>(kHeader); }
  __device__ std::uint8_t* masked() const { return at<std::uint8_t>(kMasked); }
  __device__ std::uint8_t* missing() const { return at<std::uint8_t>(kMissing); }
};

// An item is one chunk of one token's row. A warp has a run of items, so of few tokens.
struct LowItems {
  int begin;
  int end;

  __device__ explicit LowItems(const LowDispatchParams& params) {
    const int all = params.num_tokens * params.chunks;
    const int warps = static_cast<int>(gridDim.x) * kWarps;
    // Neighbours are in different blocks, so that few items are spread over all.
    const int warp = static_cast<int>(threadIdx.x / 32 * gridDim.x + blockIdx.x);
    const int each = all / warps;
    const int extra = all % warps;
    begin = each * warp + min(warp, extra);
    end = begin + each + (warp < extra ? 1 : 0);
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
    for (int i = lane; i < bytes / 4; i += 32) {
      reinterpret_cast<std::uint32_t*>(stage(which))[i] = reinterpret_cast<const std::uint32_t*>(from)[i];
    }
    __syncwarp();
  }
  __device__ void wait(int which, std::uint32_t parity) const {
    if (params.bulk_loads) barrier_wait(barriers + which, parity);
  }
};

// What a kernel begins with: everything that it needs from global memory before it can do anything, in one go.
struct LowStart {
  static constexpr int kAtOnce = 2;
  std::uint32_t failed;
  std::uint32_t sequence;
  std::uint32_t since;
  std::uint8_t* base;
  std::int64_t ids[kAtOnce];
  std::int32_t rank_of;
  std::int32_t local_of;

  __device__ explicit LowStart(const LowDispatchParams& params) {
    const LowGroup& low = params.low;
    const int thread = static_cast<int>(threadIdx.x);
    const int routes = params.num_tokens * params.topk;
    failed = load_relaxed_device(&low.group.state->failed);
    sequence = load_relaxed_device(&low.state->sequence) + 1;
    since = 0;
    base = nullptr;
    if (thread < low.group.num_ranks) {
      since = load_relaxed_device(low.masked_since + thread);
      base = low.group.bases[thread];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = thread + i * kThreads;
      ids[i] = at < routes ? params.topk_idx[at] : -1;
    }
    rank_of = thread < low.group.num_experts ? low.group.rank_of_expert[thread] : 0;
    local_of = thread < low.group.num_experts ? low.group.local_of_expert[thread] : 0;
  }
};

__device__ inline void keep_id(const LowDispatchParams& params, const LowShared& shared, int at, std::int64_t id) {
  const bool good = id >= -1 && id < params.low.group.num_experts;
  shared.ids()[at] = good ? static_cast<std::int32_t>(id) : -2;
}

// Into shared memory, with what did not fit the first go. All threads; a barrier comes next.
__device__ void keep_start(const LowDispatchParams& params, const LowShared& shared, const LowStart& start) {
  const LowGroup& low = params.low;
  const int routes = params.num_tokens * params.topk;
  const auto keep_rank = [&](int rank, std::uint32_t since, std::uint8_t* base) {
    shared.masked()[rank] = is_masked(since, start.sequence) ? 1 : 0;
    shared.missing()[rank] = 0;
    std::uint8_t* block = base + params.receive_offset;
    shared.destinations()[rank] = LowDestination{block, reinterpret_cast<float*>(block + params.arrays.scales),
                                                 reinterpret_cast<float*>(block + params.arrays.weights),
                                                 reinterpret_cast<std::int64_t*>(block + params.arrays.indices)};
  };
  int at = static_cast<int>(threadIdx.x);
  if (at < low.group.num_ranks) keep_rank(at, start.since, start.base);
  for (int rank = at + kThreads; rank < low.group.num_ranks; rank += kThreads) {
    keep_rank(rank, load_relaxed_device(low.masked_since + rank), low.group.bases[rank]);
  }
#pragma unroll
  for (int i = 0; i < LowStart::kAtOnce; ++i) {
    if (at + i * kThreads < routes) keep_id(params, shared, at + i * kThreads, start.ids[i]);
  }
  for (int i = at + LowStart::kAtOnce * kThreads; i < routes; i += kThreads) {
    keep_id(params, shared, i, params.topk_idx[i]);
  }
  if (at < low.group.num_experts) {
    shared.rank_of()[at] = start.rank_of;
    shared.local_of()[at] = start.local_of;
  }
  for (int i = at + kThreads; i < low.group.num_experts; i += kThreads) {
    shared.rank_of()[i] = low.group.rank_of_expert[i];
    shared.local_of()[i] = low.group.local_of_expert[i];
  }
  for (int bin = at; bin < params.bins; bin += kThreads) shared.counts()[bin] = 0;
}

// Layout rank: where rows go, once a rank. All threads; ends with a barrier.
__device__ void find_keys(const LowDispatchParams& params, const LowShared& shared) {
  const int routes = params.num_tokens * params.topk;
  for (int at = threadIdx.x; at < routes; at += kThreads) {
    const std::int32_t id = shared.ids()[at];
    const int rank = id >= 0 ? shared.rank_of()[id] : -1;
    bool first = rank >= 0;
    for (int earlier = at / params.topk * params.topk; earlier < at && first; ++earlier) {
      const std::int32_t other = shared.ids()[earlier];
      first = other < 0 || shared.rank_of()[other] != rank;
    }
    shared.at<std::int32_t>(kKeys)[at] = first ? rank : -1;
  }
  __syncthreads();
}

// Rows of this rank for each bin (an expert, then a rank in layout rank), and the smallest flat index of an id out of
// range. All threads of the block that posts; ends with a barrier.
__device__ void count_routes(const LowDispatchParams& params, const LowShared& shared, bool by_rank,
                             std::uint32_t& bad_route) {
  const int routes = params.num_tokens * params.topk;
  for (int at = threadIdx.x; at < routes; at += kThreads) {
    const std::int32_t id = shared.ids()[at];
    if (id >= 0) atomicAdd(shared.counts() + id, 1);
    if (id < -1) atomicMin(&bad_route, static_cast<std::uint32_t>(at));
    if (!by_rank) continue;
    const std::int32_t rank = shared.at<std::int32_t>(kKeys)[at];
    if (rank >= 0) atomicAdd(shared.counts() + params.low.group.num_experts + rank, 1);
  }
  __syncthreads();
}

// A token's routes in a warp: lane j has the j-th one until they are sorted.
struct LowRoutes {
  std::int32_t key;    // -1: goes nowhere
  std::int32_t place;  // among this rank's rows that go to the same place
};

// How many rows go to the same places before a token's. A warp.
__device__ LowRoutes find_places(const LowDispatchParams& params, const std::int32_t* keys, int token) {
  const int lane = threadIdx.x & 31;
  const int first = token * params.topk;
  LowRoutes routes{-1, 0};
  if (lane < params.topk) routes.key = keys[first + lane];
  constexpr int kTogether = 8;  // routes that a lane looks for at a time
  const auto* vectors = reinterpret_cast<const int4*>(keys);
  for (int j = 0; j < params.topk; j += kTogether) {
    std::int32_t wanted[kTogether];
    int earlier[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      wanted[i] = __shfl_sync(0xffffffffu, routes.key, (j + i) & 31);
      // Where there are fewer, one that is not there.
      if (j + i >= params.topk || wanted[i] < 0) wanted[i] = -3;
    }
#pragma unroll 2
    for (int i = lane; i < first / 4; i += 32) {
      const int4 four = vectors[i];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        earlier[k] += (four.x == wanted[k]) + (four.y == wanted[k]) + (four.z == wanted[k]) + (four.w == wanted[k]);
      }
    }
    // The rest of whole vectors, and the token's own routes before the wanted one.
    const int rest = first / 4 * 4 + lane;
    const std::int32_t key = rest < first + params.topk ? keys[rest] : -1;
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (rest < first + j + k && key == wanted[k]) ++earlier[k];
      const int before = __reduce_add_sync(0xffffffffu, earlier[k]);
      if (lane == j + k) routes.place = before;
    }
    // Routes of the token that the vectors and the 32 lanes above did not reach: there are fewer than 3 + topk.
    if (first % 4 + params.topk > 32) {
      const int beyond = rest + 32;
      const std::int32_t other = beyond < first + params.topk ? keys[beyond] : -1;
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int before = __popc(__ballot_sync(0xffffffffu, beyond < first + j + k && other == wanted[k]));
        if (lane == j + k) routes.place += before;
      }
    }
  }
  return routes;
}

// The entries of a token, sorted by rank and position, from its routes and what comes before this rank's rows. A warp.
__device__ Entry place_entries(const LowDispatchParams& params, const LowShared& shared, const LowRoutes& routes,
                               bool by_rank, bool dropped) {
  const int lane = threadIdx.x & 31;
  int rank = INT_MAX;
  if (routes.key >= 0 && !dropped) {
    rank = by_rank ? routes.key : shared.rank_of()[routes.key];
    if (shared.masked()[rank] != 0) rank = INT_MAX;
  }
  int before = 0;
  for (int j = 0; j < params.topk; ++j) {
    const int other = __shfl_sync(0xffffffffu, rank, j);
    before += other < rank || (other == rank && j < lane) ? 1 : 0;
  }
  std::int32_t slot = -1;
  if (rank != INT_MAX) {
    const int bin = by_rank ? params.low.group.num_experts + routes.key : routes.key;
    const std::int32_t group_first =
        by_rank ? 0 : shared.local_of()[routes.key] * static_cast<std::int32_t>(params.low.slots.capacity);
    slot = group_first + shared.counts()[bin] + routes.place;
  }
  // Lane `before` takes what this lane has.
  Entry entry{-1, -1, -1};
  for (int j = 0; j < params.topk; ++j) {
    const int to = __shfl_sync(0xffffffffu, before, j);
    const int its_rank = __shfl_sync(0xffffffffu, rank, j);
    const std::int32_t its_slot = __shfl_sync(0xffffffffu, slot, j);
    if (to != lane || its_rank == INT_MAX) continue;
    entry.slot = its_slot;
    entry.rank = static_cast<std::int16_t>(its_rank);
    entry.position = static_cast<std::int16_t>(by_rank ? -1 : j);
  }
  return entry;
}

// Why an operation does not go on as meant; the same on all ranks but for a rank that is missing.
struct LowVerdict {
  bool failed;   // and so has this rank
  bool dropped;  // no rows cross
};

// Waits for the posts of all ranks: their header words, and for each bin how many rows come before this rank's
// (`counts`) and in all (`totals`). Whether anything is not as it usually is: all threads agree, and judge_posts()
// finds out what. Ends with a barrier. No fence: rows are written only where a peer's kernel has begun, after all that
// used its buffer before, and no store comes before the loads here that decide on it.
__device__ bool gather_posts(const LowDispatchParams& params, const LowShared& shared, std::uint32_t sequence,
                             const LowPost& mine) {
  const LowGroup& low = params.low;
  const int ranks = low.group.num_ranks;
  const int header = static_cast<int>(low.layout.header_words());
  const std::uint64_t* posts = low_post_of(low, low.group.rank, kKind, params.index, 0);
  const std::size_t stride = low.layout.post_stride() / sizeof(std::uint64_t);
  bool unusual = false;
  const auto await = [&](int source, int word) -> std::uint32_t {
    std::uint64_t seen = 0;
    const Wait wait =
        await_late_word(low, posts + source * stride + word, sequence, source, Step::kPost, kOperation, seen);
    if (wait == Wait::kCame) return low_value(seen);
    unusual = true;
    shared.missing()[source] = 1;
    return 0;
  };
  // The last threads, as the first ones have more of the bins.
  for (int i = kThreads - 1 - static_cast<int>(threadIdx.x); i < ranks * header; i += kThreads) {
    const int source = i / header;
    const int word = i - source * header;
    if (shared.masked()[source] != 0) continue;
    const std::uint64_t seen = load_relaxed_system(posts + source * stride + word);
    const std::uint32_t value = low_lead(seen, sequence) == 0 ? low_value(seen) : await(source, word);
    shared.header()[i] = value;
    const int mask = static_cast<int>(LowWord::kMask);
    std::uint32_t usual = 0;
    if (word < kNumLowCompared) usual = reinterpret_cast<const std::uint32_t*>(&mine)[word];
    if (word == static_cast<int>(LowWord::kBlocks)) usual = value;
    for (int bit = 0; word >= mask && bit < 32 && (word - mask) * 32 + bit < ranks; ++bit) {
      usual |= shared.masked()[(word - mask) * 32 + bit] != 0 ? 1u << bit : 0u;
    }
    unusual = unusual || value != usual;
  }
  constexpr int kAtOnce = 8;  // loads in flight
  for (int bin = threadIdx.x; bin < params.bins; bin += kThreads) {
    std::int32_t before = 0;
    std::int32_t total = 0;
    for (int first = 0; first < ranks; first += kAtOnce) {
      std::uint64_t words[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        words[i] = load_relaxed_system(posts + min(first + i, ranks - 1) * stride + header + bin);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int source = first + i;
        if (source >= ranks || shared.masked()[source] != 0) continue;
        const bool here = low_lead(words[i], sequence) == 0;
        const auto rows = static_cast<std::int32_t>(here ? low_value(words[i]) : await(source, header + bin));
        total += rows;
        before += source < low.group.rank ? rows : 0;
      }
    }
    shared.counts()[bin] = before;
    shared.totals()[bin] = total;
    unusual = unusual || total > static_cast<std::int32_t>(low.slots.capacity);
  }
  return __syncthreads_or(unusual) != 0;
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
  for (int source = threadIdx.x; source < ranks; source += kThreads) missing = missing || shared.missing()[source] != 0;
  LowVerdict verdict{false, __syncthreads_or(missing) != 0};
  bool other_masks = false;
  for (int i = threadIdx.x; i < ranks * header; i += kThreads) {
    const int source = i / header;
    const int word = i % header;
    if (shared.masked()[source] != 0 || shared.missing()[source] != 0) continue;
    const std::uint32_t theirs = shared.header()[i];
    const std::uint32_t mine = shared.header()[group.rank * header + word];
    if (word < kNumLowCompared && theirs != mine) atomicMin(&first, static_cast<std::uint32_t>(i));
    if (word == static_cast<int>(LowWord::kBadRoute) && theirs != 0) {
      atomicMin(&first, static_cast<std::uint32_t>(ranks * header + source));
    }
    if (word < fields || theirs == mine) continue;
    other_masks = true;
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
      values[2] = static_cast<std::int32_t>(theirs[static_cast<int>(LowWord::kBadExpert)]);
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
__device__ void tell_counts(const LowDispatchParams& params, const LowShared& shared, std::uint32_t sequence,
                            bool dropped) {
  const LowGroup& low = params.low;
  const Group& group = low.group;
  const int header = static_cast<int>(low.layout.header_words());
  __shared__ std::int32_t received;
  if (threadIdx.x == 0) received = 0;
  __syncthreads();
  const int first = group.first_of_rank[group.rank];
  const auto own_count = [&](int bin) {
    const std::uint64_t* words = low_post_of(low, group.rank, kKind, params.index, group.rank);
    return static_cast<std::int32_t>(low_value(load_relaxed_system(words + header + bin)));
  };
  const bool by_expert = low.row_layout == RowLayout::kExpert;
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
__device__ void send_metadata(const LowDispatchParams& params, const LowShared& shared, int token, const Entry& entry,
                              int count) {
  const int lane = threadIdx.x & 31;
  const int at = token * params.topk + lane;
  const std::int32_t id = lane < params.topk ? shared.ids()[at] : -1;
  const int rank_of = id >= 0 ? shared.rank_of()[id] : -1;
  const float weight = lane < params.topk && params.sizes.weight > 0 ? params.source.weights[at] : 0.0f;
  for (int i = 0; i < count; ++i) {
    const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), i);
    const std::size_t slot = static_cast<std::size_t>(__shfl_sync(0xffffffffu, entry.slot, i));
    if (lane >= params.topk) continue;
    const LowDestination& to = shared.destinations()[rank];
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
  for (int i = 0; i < count; ++i) {
    const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), i);
    const std::size_t slot = static_cast<std::size_t>(__shfl_sync(0xffffffffu, entry.slot, i));
    std::uint8_t* to = shared.destinations()[rank].rows + slot * params.sizes.row + first_byte;
    for (int word = lane; word < bytes / 4; word += 32) {
      reinterpret_cast<std::uint32_t*>(to)[word] = reinterpret_cast<const std::uint32_t*>(data)[word];
    }
  }
}

// Scales of a chunk beside its rows.
__device__ void store_scales(const LowDispatchParams& params, const LowShared& shared, const Entry& entry, int count,
                             const float* scales, int first_block, int blocks, int row_blocks) {
  const int lane = threadIdx.x & 31;
  for (int i = 0; i < count; ++i) {
    const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), i);
    const std::size_t slot = static_cast<std::size_t>(__shfl_sync(0xffffffffu, entry.slot, i));
    float* to = shared.destinations()[rank].scales + params.low.slots.scale(slot, static_cast<std::size_t>(first_block),
                                                                            static_cast<std::size_t>(row_blocks));
    for (int block = lane; block < blocks; block += 32) to[block * params.low.slots.capacity] = scales[block];
  }
}

// How a chunk's elements become what crosses.
struct AsTheyAre {
  static constexpr bool kQuantizes = false;
};
template <class ElementType>
struct Quantized {
  using Element = ElementType;
  static constexpr bool kQuantizes = true;
};

template <class Path>
__device__ void prepare_chunk(const LowDispatchParams& params, const LowLoader& loader, int chunk, int which,
                              std::uint32_t parity, float* scales) {
  loader.wait(which, parity);
  if constexpr (Path::kQuantizes) {
    using T = typename Path::Element;
    const int elements = loader.elements(chunk);
    if (elements % 8 == 0) {
      quantize_chunk<T>(loader.stage(which), elements, params.source.power_of_two, scales);
    } else {
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
__device__ void clear_tail(const LowDispatchParams& params, const LowShared& shared, bool dropped) {
  const LowGroup& low = params.low;
  const std::int32_t rows = dropped ? 0 : shared.totals()[low.group.num_experts + low.group.rank];
  const LowDestination& own = shared.destinations()[low.group.rank];
  const std::int64_t end = static_cast<std::int64_t>(low.slots.capacity) * params.topk;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(rows) * params.topk + blockIdx.x * blockDim.x + threadIdx.x; i < end;
       i += step) {
    own.indices[i] = -1;
    if (params.sizes.weight > 0) own.weights[i] = 0.0f;
  }
}

// All threads of one block: rows of all ranks have come.
template <class BlocksOf>
__device__ void receive(const LowGroup& low, const LowRoutingView& routing, int index, std::uint32_t sequence,
                        const std::uint8_t* masked, BlocksOf&& blocks_of) {
  await_arrivals(low, kKind, index, sequence, masked, kOperation, blocks_of,
                 [&](int source, Wait wait, std::uint32_t value) {
                   routing.gave_up[source] = wait != Wait::kCame || (value & kLowGaveUp) != 0 ? 1 : 0;
                 });
}

// What work on the device reads must be sizes, also where the operation fails. All threads of one block.
__device__ void clear_counts(const LowDispatchParams& params) {
  const int groups = params.low.row_layout == RowLayout::kExpert ? params.low.num_local_experts : 1;
  for (int i = threadIdx.x; i < params.low.num_local_experts; i += blockDim.x) params.routing.tokens_per_expert[i] = 0;
  for (int i = threadIdx.x; i < groups; i += blockDim.x) {
    params.routing.group_rows[i] = params.routing.own_first[i] = params.routing.own_rows[i] = 0;
  }
  if (threadIdx.x == 0) params.routing.header->received = 0;
}

template <class Path>
__global__ void __launch_bounds__(kThreads, 1) low_dispatch_kernel(const __grid_constant__ LowDispatchParams params) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  __shared__ std::uint32_t bad_route;
  const LowGroup& low = params.low;
  const LowStart start(params);
  const std::uint32_t sequence = start.sequence;
  const LowShared shared{memory, params.offsets};
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const int stages = params.stages;
  const LowLoader loader{params, LowItems(params),
                         shared.at<std::uint8_t>(kStages) + warp * stages * params.stage_bytes,
                         shared.at<std::uint64_t>(kBarriers) + warp * stages};
  // A warp's barriers are its own: nobody else has to see them first.
  if (params.bulk_loads && lane == 0) {
    for (int i = 0; i < stages; ++i) barrier_init(loader.barriers + i, 1);
    fence_barrier_init();
    fence_shared_to_bulk();
  }
  __syncwarp();
  if (blockIdx.x == 0) clear_counts(params);
  if (start.failed != 0) return;
  for (int i = 0; i < stages; ++i) loader.load(loader.items.begin + i, i);
  keep_start(params, shared, start);
  if (threadIdx.x == 0) bad_route = 0xffffffffu;
  __syncthreads();
  if (threadIdx.x == kThreads - 1) begin_operation(low, sequence);

  const bool by_rank = low.row_layout == RowLayout::kRank;
  if (by_rank) find_keys(params, shared);
  LowPost post{static_cast<std::uint32_t>(kOperation),
               params.wire_element,
               static_cast<std::uint32_t>(params.topk),
               params.sizes.weight > 0 ? 1u : 0u,
               static_cast<std::uint32_t>(params.index),
               0,
               gridDim.x,
               0,
               0,
               0};
  if (blockIdx.x == 0) {
    count_routes(params, shared, by_rank, bad_route);
    if (bad_route != 0xffffffffu) {
      post.bad_route = bad_route + 1;
      post.bad_expert = static_cast<std::uint32_t>(params.topk_idx[bad_route]);
    }
    publish_low_post(low, kKind, params.index, sequence, post, shared.masked(), shared.counts(), params.bins, kThreads);
    // Counts become what comes before: all have been read.
    __syncthreads();
  }
  const std::int32_t* keys = by_rank ? shared.at<std::int32_t>(kKeys) : shared.ids();
  float* scales = shared.at<float>(kScales) + warp * kMostScalesAChunk;
  const bool works = loader.items.begin < loader.items.end;
  int token = loader.items.begin / params.chunks;
  int chunk = loader.items.begin - token * params.chunks;
  LowRoutes routes{-1, 0};
  if (works) {
    routes = find_places(params, keys, token);
    prepare_chunk<Path>(params, loader, chunk, 0, 0, scales);
  }
  LowVerdict verdict{false, false};
  if (gather_posts(params, shared, sequence, post)) verdict = judge_posts(params, shared, sequence);
  if (verdict.failed) {
    // Shared memory is not to be left before what is on the way to it.
    for (int i = 1; i < stages; ++i) {
      if (loader.items.begin + i < loader.items.end) loader.wait(i, 0);
    }
    return;
  }
  Entry entry{-1, -1, -1};
  int count = 0;
  int which = 0;
  std::uint32_t parity = 0;
  for (int item = loader.items.begin; item < loader.items.end; ++item) {
    const bool is_first = item == loader.items.begin;
    if (is_first || chunk == 0) {
      if (!is_first) routes = find_places(params, keys, token);
      entry = place_entries(params, shared, routes, by_rank, verdict.dropped);
      count = __popc(__ballot_sync(0xffffffffu, entry.rank >= 0));
    }
    if (!is_first) prepare_chunk<Path>(params, loader, chunk, which, parity, scales);
    const int elements = loader.elements(chunk);
    store_chunk(params, shared, entry, count, loader.stage(which), chunk * params.chunk_elements * params.out_bytes,
                elements * params.out_bytes);
    if (params.sizes.scale > 0) {
      const int first_block = chunk * params.chunk_elements / static_cast<int>(kFp8Block);
      const int blocks = (elements + static_cast<int>(kFp8Block) - 1) / static_cast<int>(kFp8Block);
      const int row_blocks = static_cast<int>(params.sizes.scale / sizeof(float));
      const float* from =
          Path::kQuantizes ? scales : params.source.scales + static_cast<std::size_t>(token) * row_blocks + first_block;
      store_scales(params, shared, entry, count, from, first_block, blocks, row_blocks);
    }
    if (chunk == 0) {
      if (lane < params.topk) {
        params.routing.entries[token * params.topk + lane] = entry;
        params.routing.ids[token * params.topk + lane] = shared.ids()[token * params.topk + lane];
      }
      if (by_rank) send_metadata(params, shared, token, entry, count);
    }
    __syncwarp();
    const int next = item + stages;
    if (next < loader.items.end) {
      if (params.bulk_stores) bulk_wait_read<0>();
      __syncwarp();
      loader.load(next, which);
    }
    if (++which == stages) {
      which = 0;
      parity ^= 1;
    }
    if (++chunk == params.chunks) {
      chunk = 0;
      ++token;
    }
  }
  if (by_rank) clear_tail(params, shared, verdict.dropped);
  if (verdict.dropped && threadIdx.x == 0) params.routing.header->gave_up = sequence;
  bulk_wait_written();
  fence_bulk_to_global();
  __syncthreads();
  signal_arrival(low, kKind, params.index, sequence, shared.masked(), gridDim.x | (verdict.dropped ? kLowGaveUp : 0u));
  if (blockIdx.x != 0) return;
  tell_counts(params, shared, sequence, verdict.dropped);
  if ((params.halves & kLowReceive) == 0) return;
  const int header = static_cast<int>(low.layout.header_words());
  receive(low, params.routing, params.index, sequence, shared.masked(), [&](int source) {
    return shared.missing()[source] != 0
               ? 0
               : static_cast<int>(shared.header()[source * header + static_cast<int>(LowWord::kBlocks)]);
  });
}

__global__ void __launch_bounds__(kThreads, 1) low_receive_kernel(const __grid_constant__ LowDispatchParams params) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  const LowGroup& low = params.low;
  const std::uint32_t failed = load_relaxed_device(&low.group.state->failed);
  // Ranks that were left out meanwhile are not waited for either.
  const std::uint32_t begun = load_relaxed_device(&low.state->sequence);
  const std::uint32_t sequence = params.routing.header->sequence;
  for (int rank = threadIdx.x; rank < low.group.num_ranks; rank += blockDim.x) {
    memory[rank] = is_masked(load_relaxed_device(low.masked_since + rank), begun) ? 1 : 0;
  }
  if (failed != 0) return;
  __syncthreads();
  receive(low, params.routing, params.index, sequence, memory, [](int) { return 0; });
}

__global__ void low_mask_kernel(LowGroup low, std::uint64_t ranks, int first) {
  const int rank = first + static_cast<int>(threadIdx.x);
  if (rank >= low.group.num_ranks || (ranks >> threadIdx.x & 1) == 0) return;
  atomicCAS(low.masked_since + rank, 0u, load_relaxed_device(&low.state->sequence) + 1);
}

template <class Visit>
cudaError_t visit_low_path(const RowSource& source, Visit&& visit) {
  if (!source.quantize) return visit(AsTheyAre{});
  switch (source.element) {
    case Element::kFloat32: return visit(Quantized<Float32>{});
    case Element::kBFloat16: return visit(Quantized<BFloat16>{});
    case Element::kFloat16: return visit(Quantized<Float16>{});
    case Element::kFloat8: break;
  }
  return cudaErrorInvalidValue;
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
  params.arrays =
      params.low.slots.arrays(params.sizes.row, params.sizes.scale, params.sizes.weight, params.sizes.index);
  lay_out(params);
  return params.offsets[kNumArrays];
}

cudaError_t prepare_low_dispatch(std::size_t most_shared_bytes) {
  const auto prepare = [&](auto path) {
    return cudaFuncSetAttribute(low_dispatch_kernel<decltype(path)>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(most_shared_bytes));
  };
  cudaError_t error = prepare(AsTheyAre{});
  if (error == cudaSuccess) error = prepare(Quantized<Float32>{});
  if (error == cudaSuccess) error = prepare(Quantized<BFloat16>{});
  if (error == cudaSuccess) error = prepare(Quantized<Float16>{});
  return error;
}

cudaError_t launch_low_dispatch(const LowDispatchParams& params, int blocks, cudaStream_t stream) {
  if ((params.halves & kLowSend) == 0) {
    low_receive_kernel<<<1, kThreads, static_cast<std::size_t>(params.low.group.num_ranks), stream>>>(params);
    return cudaGetLastError();
  }
  return visit_low_path(params.source, [&](auto path) {
    low_dispatch_kernel<decltype(path)><<<blocks, kThreads, params.offsets[kNumArrays], stream>>>(params);
    return cudaGetLastError();
  });
}

cudaError_t launch_low_mask(const LowGroup& low, std::uint64_t ranks, int first, cudaStream_t stream) {
  low_mask_kernel<<<1, 64, 0, stream>>>(low, ranks, first);
  return cudaGetLastError();
}

}  // namespace gpu
}  // namespace moe_ep
