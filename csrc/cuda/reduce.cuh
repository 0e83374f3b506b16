// Sums of a token's rows, read where they lie, in fp32 and in one order: ranks ascending, each rank's rows in top-k
// order into a partial sum of its own, every product rounded before it is added.
//
// Bulk path: every warp drives a ring of its own. An item is one chunk of one token; a stage holds that chunk of each
// of the token's rows. Entries are fetched ahead of the loads, weights ahead of the sums.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/memory.cuh"
#include "cuda/state.h"

namespace moe_ep {
namespace gpu {

struct ReduceJob {
  const Entry* entries;  // [num_tokens, topk]
  std::int64_t num_tokens;
  std::int32_t topk;
  std::int32_t most_entries;
  std::int32_t hidden;
  const std::uint8_t* const* rows;   // [num_ranks], in shared memory
  const float* const* weights;       // [num_ranks], in shared memory; null: all are 1
  std::uint8_t* out;                 // [num_tokens, hidden]
};

struct ReduceRing {
  std::uint8_t* stages;     // [warps][stages][most_entries][kReduceChunk]
  std::uint64_t* barriers;  // [warps][stages]
};

// The running sum of 2 vectors a lane.
template <class T>
struct Sums {
  static constexpr int kVectors = kReduceChunk / 512;
  float total[kVectors][T::kPerVector];
  float partial[kVectors][T::kPerVector];

  __device__ Sums() {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < T::kPerVector; ++i) total[v][i] = partial[v][i] = 0.0f;
    }
  }
  __device__ void add(int v, const uint4& vector, float weight, bool starts_rank) {
    float values[T::kPerVector];
    T::unpack(vector, values);
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) {
      const float product = __fmul_rn(values[i], weight);
      if (starts_rank) total[v][i] = __fadd_rn(total[v][i], partial[v][i]);
      partial[v][i] = starts_rank ? product : __fadd_rn(partial[v][i], product);
    }
  }
  __device__ uint4 result(int v) const {
    float values[T::kPerVector];
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) values[i] = __fadd_rn(total[v][i], partial[v][i]);
    return T::pack(values);
  }
};

// Items of one warp: (token, chunk), spread over all warps of the grid so that the grid walks tokens in order.
struct ReduceItems {
  std::int64_t first;
  std::int64_t step;
  std::int64_t count;  // of this warp
  int chunks;
  int row_bytes;

  __device__ ReduceItems(const ReduceJob& job, int element_size, int warps) {
    row_bytes = job.hidden * element_size;
    chunks = (row_bytes + kReduceChunk - 1) / kReduceChunk;
    first = static_cast<std::int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
    step = static_cast<std::int64_t>(gridDim.x) * warps;
    const std::int64_t all = job.num_tokens * chunks;
    count = first < all ? (all - first + step - 1) / step : 0;
  }
  __device__ std::int64_t token(std::int64_t i) const { return (first + i * step) / chunks; }
  __device__ int chunk(std::int64_t i) const { return static_cast<int>((first + i * step) % chunks); }
  __device__ int bytes(int chunk) const {
    const int left = row_bytes - chunk * kReduceChunk;
    return left < kReduceChunk ? left : kReduceChunk;
  }
};

__device__ inline Entry item_entry(const ReduceJob& job, const ReduceItems& items, std::int64_t i) {
  const int lane = threadIdx.x & 31;
  if (i >= items.count || lane >= job.topk) return Entry{-1, -1, -1};
  return job.entries[items.token(i) * job.topk + lane];
}

__device__ inline float entry_weight(const ReduceJob& job, const Entry& entry) {
  return job.weights != nullptr && entry.rank >= 0 ? load_cached_in_l2(job.weights[entry.rank] + entry.slot) : 1.0f;
}

template <class T>
__device__ inline void store_sums(const ReduceJob& job, const ReduceItems& items, std::int64_t i, const Sums<T>& sums) {
  const int lane = threadIdx.x & 31;
  const int chunk = items.chunk(i);
  std::uint8_t* out = job.out + items.token(i) * items.row_bytes + static_cast<std::size_t>(chunk) * kReduceChunk;
#pragma unroll
  for (int v = 0; v < Sums<T>::kVectors; ++v) {
    const int at = (v * 32 + lane) * 16;
    if (at < items.bytes(chunk)) store_streaming(reinterpret_cast<uint4*>(out + at), sums.result(v));
  }
}

template <class T>
__device__ inline void reduce_rows_bulk(const ReduceJob& job, const Pipeline& pipeline, const ReduceRing& ring) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (warp >= pipeline.warps) return;
  const ReduceItems items(job, T::kBytes, pipeline.warps);
  const int depth = pipeline.stages;
  const std::size_t stage_bytes = static_cast<std::size_t>(job.most_entries) * kReduceChunk;
  std::uint8_t* stages = ring.stages + static_cast<std::size_t>(warp) * depth * stage_bytes;
  std::uint64_t* barriers = ring.barriers + warp * depth;

  const auto load = [&](std::int64_t i, const Entry& entry, int stage) {
    if (i >= items.count) return;
    const int count = __popc(__ballot_sync(0xffffffffu, entry.rank >= 0));
    const int chunk = items.chunk(i);
    const std::uint32_t bytes = static_cast<std::uint32_t>(items.bytes(chunk));
    if (lane == 0) barrier_arrive_expect(barriers + stage, count * bytes);
    __syncwarp();
    if (entry.rank >= 0) {
      bulk_load(stages + stage * stage_bytes + static_cast<std::size_t>(lane) * kReduceChunk,
                job.rows[entry.rank] + static_cast<std::size_t>(entry.slot) * items.row_bytes +
                    static_cast<std::size_t>(chunk) * kReduceChunk,
                bytes, barriers + stage);
    }
  };

  Entry to_load = item_entry(job, items, 0);
  for (int i = 0; i < depth - 1; ++i) {
    const Entry entry = to_load;
    to_load = item_entry(job, items, i + 1);
    load(i, entry, i);
  }
  Entry now = item_entry(job, items, 0);
  Entry soon = item_entry(job, items, 1);
  float weight = entry_weight(job, now);
  int stage = 0;
  int load_stage = depth - 1;
  std::uint32_t parity = 0;
  for (std::int64_t i = 0; i < items.count; ++i) {
    const Entry entry = to_load;
    to_load = item_entry(job, items, i + depth);
    load(i + depth - 1, entry, load_stage);
    if (++load_stage == depth) load_stage = 0;
    const float next_weight = entry_weight(job, soon);
    const Entry later = item_entry(job, items, i + 2);

    const int count = __popc(__ballot_sync(0xffffffffu, now.rank >= 0));
    const std::uint8_t* data = stages + stage * stage_bytes;
    Sums<T> sums;
    int last_rank = -1;
    barrier_wait(barriers + stage, parity);
    for (int j = 0; j < count; ++j) {
      const int rank = __shfl_sync(0xffffffffu, static_cast<int>(now.rank), j);
      const float factor = __shfl_sync(0xffffffffu, weight, j);
#pragma unroll
      for (int v = 0; v < Sums<T>::kVectors; ++v) {
        const uint4 vector =
            *reinterpret_cast<const uint4*>(data + static_cast<std::size_t>(j) * kReduceChunk + (v * 32 + lane) * 16);
        sums.add(v, vector, factor, rank != last_rank);
      }
      last_rank = rank;
    }
    store_sums(job, items, i, sums);
    // All lanes have read the stage: it may be loaded again.
    __syncwarp();
    now = soon;
    soon = later;
    weight = next_weight;
    if (++stage == depth) {
      stage = 0;
      parity ^= 1;
    }
  }
}

template <class T>
__device__ inline void reduce_rows_vector(const ReduceJob& job) {
  constexpr int kUnroll = 4;
  const int lane = threadIdx.x & 31;
  const ReduceItems items(job, T::kBytes, kWarps);
  for (std::int64_t i = 0; i < items.count; ++i) {
    const Entry entry = item_entry(job, items, i);
    const float weight = entry_weight(job, entry);
    const int count = __popc(__ballot_sync(0xffffffffu, entry.rank >= 0));
    const int chunk = items.chunk(i);
    const int bytes = items.bytes(chunk);
    Sums<T> sums;
    int last_rank = -1;
    for (int first = 0; first < count; first += kUnroll) {
      uint4 held[kUnroll][Sums<T>::kVectors];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), (first + u) & 31);
        const int slot = __shfl_sync(0xffffffffu, entry.slot, (first + u) & 31);
#pragma unroll
        for (int v = 0; v < Sums<T>::kVectors; ++v) {
          const int at = (v * 32 + lane) * 16;
          if (first + u < count && at < bytes) {
            held[u][v] = load_streaming(reinterpret_cast<const uint4*>(
                job.rows[rank] + static_cast<std::size_t>(slot) * items.row_bytes +
                static_cast<std::size_t>(chunk) * kReduceChunk + at));
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), (first + u) & 31);
        const float factor = __shfl_sync(0xffffffffu, weight, (first + u) & 31);
        if (first + u >= count) continue;
#pragma unroll
        for (int v = 0; v < Sums<T>::kVectors; ++v) {
          if ((v * 32 + lane) * 16 < bytes) sums.add(v, held[u][v], factor, rank != last_rank);
        }
        last_rank = rank;
      }
    }
    store_sums(job, items, i, sums);
  }
}

// All threads of a block.
template <class T>
__device__ inline void reduce_rows(const ReduceJob& job, const Pipeline& pipeline, const ReduceRing& ring) {
#if defined(MOE_EP_BULK_COPIES)
  if (pipeline.use_bulk) {
    for (int i = threadIdx.x; i < pipeline.warps * pipeline.stages; i += blockDim.x) barrier_init(ring.barriers + i, 1);
    fence_barrier_init();
    fence_bulk_to_global();
    __syncthreads();
    reduce_rows_bulk<T>(job, pipeline, ring);
    return;
  }
#endif
  reduce_rows_vector<T>(job);
}

}  // namespace gpu
}  // namespace moe_ep
