// Sums of a token's rows, read where they lie, in fp32 and in one order: ranks ascending, each rank's rows in top-k
// order into a partial sum of its own, every product rounded before it is added.
//
// Bulk path: every warp drives a ring of its own. An item is one chunk of one token; a stage holds that chunk of each
// of the token's rows, or, where most tokens have few rows here and some many, of some of them. Entries are fetched
// ahead of the loads, weights ahead of the sums.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/items.cuh"
#include "cuda/memory.cuh"
#include "cuda/state.h"

namespace moe_ep {
namespace gpu {

// What most jobs have in common: an item is a row of what comes out, nothing is waited for, and nobody waits for it.
struct InTokenOrder {
  // All lanes, before the rows of their entries are read.
  template <class LaneEntry>
  __device__ void await(const LaneEntry& /* entry */) const {}
  // Row of `out`; -1: the item is none.
  __device__ std::int64_t row(const ItemCursor& item) const { return item.token; }
  // All lanes: of what `warps` warps share, this one has nothing left to do before `next`.
  __device__ void reached(const ItemCursor& /* next */, int /* warps */) const {}
};

// What is summed. A job of another kind has its own way to the entry and the weight of a lane (see below), and the same
// names for what else is used here.
struct ReduceJob : InTokenOrder {
  const Entry* entries;  // [num_tokens, topk]
  std::int64_t num_tokens;
  std::int32_t topk;
  std::int32_t stage_rows;  // that a stage holds: as many as a token has entries, unless it is split
  std::int32_t hidden;
  const std::uint8_t* const* rows;  // [num_ranks], in shared memory
  const float* const* weights;      // [num_ranks], in shared memory; unused where sums are plain
  std::uint8_t* out;                // [num_tokens, hidden]

  using LaneEntry = Entry;
  // Lane j's entry of an item's token; rank -1 in the lanes past the last one.
  __device__ LaneEntry entry(const ItemCursor& item) const {
    const int lane = threadIdx.x & 31;
    if (!item.valid() || lane >= topk) return Entry{-1, -1, -1};
    return entries[static_cast<std::int64_t>(item.token) * topk + lane];
  }
  __device__ float weight(const LaneEntry& entry) const {
    if (entry.rank < 0 || weights == nullptr) return 1.0f;
    return load_cached_in_l2(weights[entry.rank] + entry.slot);
  }
};

struct ReduceRing {
  std::uint8_t* stages;     // [warps][stages][stage_rows][chunk]
  std::uint64_t* barriers;  // [warps][stages]
};

// How rows are summed: what the compiler is to know.
template <class ElementType, int kVectorsALane, bool kIsPlain>
struct Reduction {
  using Element = ElementType;
  static constexpr int kVectors = kVectorsALane;     // of 16 bytes that a lane sums at a time
  static constexpr int kChunk = kVectors * 32 * 16;  // bytes of a row
  // No weights, and rows of one rank or one row a rank: adding up is all there is, with the same bits.
  static constexpr bool kPlain = kIsPlain;
};

// The running sums of a lane.
template <class R>
struct Sums {
  using T = typename R::Element;
  float total[R::kVectors][T::kPerVector] = {};
  float partial[R::kPlain ? 1 : R::kVectors][T::kPerVector] = {};

  __device__ void add_plain(int v, const uint4& vector) {
    float values[T::kPerVector];
    T::unpack(vector, values);
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) total[v][i] = __fadd_rn(total[v][i], values[i]);
  }
  __device__ void start_rank(int v, const uint4& vector, float weight) {
    float values[T::kPerVector];
    T::unpack(vector, values);
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) {
      total[v][i] = __fadd_rn(total[v][i], partial[v][i]);
      partial[v][i] = __fmul_rn(values[i], weight);
    }
  }
  __device__ void add(int v, const uint4& vector, float weight) {
    float values[T::kPerVector];
    T::unpack(vector, values);
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) {
      partial[v][i] = __fadd_rn(partial[v][i], __fmul_rn(values[i], weight));
    }
  }
  // A row's chunk in shared memory; `data` is the lane's part. `starts`: no other row of this rank came before.
  __device__ void add_row(const std::uint8_t* data, bool starts, float weight) {
    uint4 vectors[R::kVectors];
#pragma unroll
    for (int v = 0; v < R::kVectors; ++v) vectors[v] = *reinterpret_cast<const uint4*>(data + v * 512);
    if constexpr (R::kPlain) {
#pragma unroll
      for (int v = 0; v < R::kVectors; ++v) add_plain(v, vectors[v]);
    } else if (starts) {
#pragma unroll
      for (int v = 0; v < R::kVectors; ++v) start_rank(v, vectors[v], weight);
    } else {
#pragma unroll
      for (int v = 0; v < R::kVectors; ++v) add(v, vectors[v], weight);
    }
  }
  __device__ uint4 result(int v) const {
    if constexpr (R::kPlain) {
      return T::pack(total[v]);
    } else {
      float values[T::kPerVector];
#pragma unroll
      for (int i = 0; i < T::kPerVector; ++i) values[i] = __fadd_rn(total[v][i], partial[v][i]);
      return T::pack(values);
    }
  }
};

template <class R>
__device__ inline int chunk_bytes(int row_bytes, int chunk) {
  const int left = row_bytes - chunk * R::kChunk;
  return left < R::kChunk ? left : R::kChunk;
}

template <class R, class Job>
__device__ inline float weight_of(const Job& job, const typename Job::LaneEntry& entry) {
  if constexpr (R::kPlain) return 1.0f;
  return job.weight(entry);
}

template <class R, class Job, class Item>
__device__ inline void store_sums(const Job& job, int row_bytes, const Item& item, const Sums<R>& sums) {
  const int lane = threadIdx.x & 31;
  const int bytes = chunk_bytes<R>(row_bytes, item.chunk);
  std::uint8_t* out =
      job.out + static_cast<std::size_t>(item.token) * row_bytes + static_cast<std::size_t>(item.chunk) * R::kChunk;
#pragma unroll
  for (int v = 0; v < R::kVectors; ++v) {
    const int at = (v * 32 + lane) * 16;
    if (at < bytes) store_streaming(reinterpret_cast<uint4*>(out + at), sums.result(v));
  }
}

struct PlacedItem {
  std::int64_t token;
  std::int32_t chunk;
};

// To the row of an item, if it has one.
template <class R, class Job>
__device__ inline void store_item(const Job& job, int row_bytes, const ItemCursor& item, const Sums<R>& sums) {
  const std::int64_t row = job.row(item);
  if (row >= 0) store_sums<R>(job, row_bytes, PlacedItem{row, item.chunk}, sums);
}

// The grid walks tokens in order, so that what is read close in time lies close together.
template <class R, class Job>
__device__ inline ItemCursor first_item(const Job& job, int row_bytes, int warps) {
  const int chunks = (row_bytes + R::kChunk - 1) / R::kChunk;
  return ItemCursor(0, job.num_tokens, chunks, static_cast<int>(blockIdx.x) * warps + threadIdx.x / 32,
                    static_cast<int>(gridDim.x) * warps);
}

// `kSplits`: a token may have more entries than a stage holds rows, and then takes several stages, one after the other.
template <class R, bool kSplits, class Job>
__device__ inline void reduce_rows_bulk(Job& job, const Pipeline& pipeline, const ReduceRing& ring) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (warp >= pipeline.warps) return;
  const int row_bytes = job.hidden * R::Element::kBytes;
  const int depth = pipeline.stages;
  const int stage_rows = job.stage_rows;
  const std::size_t stage_bytes = static_cast<std::size_t>(stage_rows) * R::kChunk;
  std::uint8_t* stages = ring.stages + static_cast<std::size_t>(warp) * depth * stage_bytes;
  std::uint64_t* barriers = ring.barriers + warp * depth;
  // A warp's barriers are its own: nobody else has to see them first.
  if (lane == 0) {
    for (int i = 0; i < depth; ++i) barrier_init(barriers + i, 1);
    fence_barrier_init();
  }
  fence_bulk_to_global();
  __syncwarp();

  using LaneEntry = typename Job::LaneEntry;
  const auto count_of = [](const LaneEntry& entry) { return __popc(__ballot_sync(0xffffffffu, entry.rank >= 0)); };
  // Rows of an item from number `first` on, as many as a stage holds.
  const auto load = [&](const ItemCursor& item, const LaneEntry& entry, int first, int count, int stage) {
    const std::uint32_t bytes = static_cast<std::uint32_t>(chunk_bytes<R>(row_bytes, item.chunk));
    const int here = kSplits ? min(count - first, stage_rows) : count;
    if (lane == 0) barrier_arrive_expect(barriers + stage, here * bytes);
    __syncwarp();
    const int place = lane - first;
    if (entry.rank >= 0 && (!kSplits || (place >= 0 && place < here))) {
      bulk_load_once(stages + stage * stage_bytes + static_cast<std::size_t>(place) * R::kChunk,
                     job.rows[entry.rank] + static_cast<std::size_t>(entry.slot) * row_bytes +
                         static_cast<std::size_t>(item.chunk) * R::kChunk,
                     bytes, barriers + stage);
    }
  };

  ItemCursor item = first_item<R>(job, row_bytes, pipeline.warps);
  const int all_warps = static_cast<int>(gridDim.x) * pipeline.warps;
  job.reached(item, all_warps);
  ItemCursor loading = item;
  LaneEntry to_load = job.entry(loading);
  int first_to_load = 0;
  const auto load_next = [&](int stage) {
    const ItemCursor now = loading;
    const LaneEntry entry = to_load;
    const int first = first_to_load;
    const int count = count_of(entry);
    if (!kSplits || first + stage_rows >= count) {
      loading.advance();
      to_load = job.entry(loading);
      first_to_load = 0;
    } else {
      first_to_load += stage_rows;
    }
    if (!now.valid()) return;
    job.await(entry);
    load(now, entry, first, count, stage);
  };
  for (int i = 0; i < depth - 1; ++i) load_next(i);
  ItemCursor following = item;
  LaneEntry entry = job.entry(following);
  following.advance();
  LaneEntry soon = job.entry(following);
  float weight = weight_of<R>(job, entry);
  int stage = 0;
  int load_stage = depth - 1;
  std::uint32_t parity = 0;
  while (item.valid()) {
    Sums<R> sums;
    int last_rank = -1;
    int first = 0;
    const int count = count_of(entry);
    float next_weight = 0.0f;
    LaneEntry later{};
    for (;;) {
      load_next(load_stage);
      if (++load_stage == depth) load_stage = 0;
      if (!kSplits || first == 0) {
        next_weight = weight_of<R>(job, soon);
        following.advance();
        later = job.entry(following);
      }
      const int end = kSplits ? min(first + stage_rows, count) : count;
      const std::uint8_t* data = stages + stage * stage_bytes + lane * 16;
      barrier_wait(barriers + stage, parity);
      if constexpr (R::kPlain) {
#pragma unroll 2
        for (int j = first; j < end; ++j) sums.add_row(data + (j - first) * R::kChunk, false, 1.0f);
      } else {
        for (int j = first; j < end; ++j) {
          const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), j);
          const float factor = __shfl_sync(0xffffffffu, weight, j);
          sums.add_row(data + (j - first) * R::kChunk, rank != last_rank, factor);
          last_rank = rank;
        }
      }
      if (++stage == depth) {
        stage = 0;
        parity ^= 1;
      }
      first = end;
      if (!kSplits || first == count) break;
      // As below.
      __syncwarp();
    }
    store_item<R>(job, row_bytes, item, sums);
    // All lanes have read the stage: it may be loaded again.
    __syncwarp();
    item.advance();
    job.reached(item, all_warps);
    entry = soon;
    soon = later;
    weight = next_weight;
  }
}

template <class R, class Job>
__device__ inline void reduce_rows_vector(Job& job) {
  constexpr int kUnroll = 4;
  const int lane = threadIdx.x & 31;
  const int row_bytes = job.hidden * R::Element::kBytes;
  const int all_warps = static_cast<int>(gridDim.x) * kWarps;
  ItemCursor item = first_item<R>(job, row_bytes, kWarps);
  for (job.reached(item, all_warps); item.valid(); job.reached(item, all_warps)) {
    const typename Job::LaneEntry entry = job.entry(item);
    const float weight = weight_of<R>(job, entry);
    const int count = __popc(__ballot_sync(0xffffffffu, entry.rank >= 0));
    const int bytes = chunk_bytes<R>(row_bytes, item.chunk);
    job.await(entry);
    Sums<R> sums;
    int last_rank = -1;
    for (int first = 0; first < count; first += kUnroll) {
      uint4 held[kUnroll][R::kVectors];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), (first + u) & 31);
        const int slot = __shfl_sync(0xffffffffu, entry.slot, (first + u) & 31);
#pragma unroll
        for (int v = 0; v < R::kVectors; ++v) {
          const int at = (v * 32 + lane) * 16;
          held[u][v] = make_uint4(0, 0, 0, 0);
          if (first + u < count && at < bytes) {
            // Past the L1 cache: the next row may be on its way.
            held[u][v] = load_cached_in_l2(
                reinterpret_cast<const uint4*>(job.rows[rank] + static_cast<std::size_t>(slot) * row_bytes +
                                               static_cast<std::size_t>(item.chunk) * R::kChunk + at));
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), (first + u) & 31);
        const float factor = __shfl_sync(0xffffffffu, weight, (first + u) & 31);
        if (first + u >= count) continue;
#pragma unroll
        for (int v = 0; v < R::kVectors; ++v) {
          if constexpr (R::kPlain) {
            sums.add_plain(v, held[u][v]);
          } else if (rank != last_rank) {
            sums.start_rank(v, held[u][v], factor);
          } else {
            sums.add(v, held[u][v], factor);
          }
        }
        last_rank = rank;
      }
    }
    store_item<R>(job, row_bytes, item, sums);
    __syncwarp();
    item.advance();
  }
}

// All threads of a block.
template <class R, bool kSplits = false, class Job>
__device__ inline void reduce_rows(Job& job, const Pipeline& pipeline, const ReduceRing& ring) {
  // Rows are whole vectors on any GPU, so where there are bulk copies they serve all of them.
#if defined(MOE_EP_BULK_COPIES)
  reduce_rows_bulk<R, kSplits>(job, pipeline, ring);
#else
  reduce_rows_vector<R>(job);
#endif
}

}  // namespace gpu
}  // namespace moe_ep
