// Rows that experts left anywhere, to where peers read them, quantised on the way if asked: the first part of a
// low-latency combine. Only rows that carry a token are copied, and none that this rank itself will read.
#pragma once

#include "cuda/low_state.h"
#include "cuda/memory.cuh"
#include "cuda/quantize.cuh"

namespace moe_ep {
namespace gpu {

constexpr int kCopyStages = 3;
constexpr int kCopyChunk = 4096;  // bytes

// Rows of e4m3 begin at whole vectors; their scales follow all rows.
__host__ __device__ constexpr std::size_t quantized_row_bytes(std::size_t hidden) { return align_up(hidden, 16); }
__host__ __device__ constexpr std::size_t quantized_scales_offset(std::size_t slots, std::size_t hidden) {
  return align_up(slots * quantized_row_bytes(hidden), kCacheLine);
}

struct CopyRing {
  std::uint8_t* stages;     // [warps][kCopyStages][kCopyChunk]
  std::uint64_t* barriers;  // [warps][kCopyStages]
  float* scales;            // [warps][kMostScalesAChunk]

  static constexpr std::size_t kBytes = kWarps * kCopyStages * kCopyChunk;
};

// Walks over the chunks of the rows to copy, in the order of slots, with a fixed stride.
class CopyItems {
 public:
  // `ends`: for each group, rows to copy in it and before it.
  __device__ CopyItems(const LowCombineParams& params, const std::int32_t* ends, int groups, int chunks, bool skips_own)
      : params_(params), ends_(ends), groups_(groups), chunks_(chunks), skips_own_(skips_own) {
    item_ = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32;
    end_ = groups > 0 ? ends[groups - 1] * chunks : 0;
    find();
  }
  __device__ bool valid() const { return item_ < end_; }
  __device__ int chunk() const { return item_ % chunks_; }
  __device__ std::size_t slot() const { return slot_; }
  __device__ void advance() {
    item_ += params_.send_blocks * kWarps;
    find();
  }

 private:
  __device__ void find() {
    if (!valid()) return;
    const int row = item_ / chunks_;
    while (ends_[group_] <= row) ++group_;
    int in_group = row - (group_ > 0 ? ends_[group_ - 1] : 0);
    if (skips_own_ && in_group >= params_.routing.own_first[group_]) in_group += params_.routing.own_rows[group_];
    slot_ = static_cast<std::size_t>(group_) * params_.low.slots.capacity + static_cast<std::size_t>(in_group);
  }

  const LowCombineParams& params_;
  const std::int32_t* ends_;
  int groups_;
  int chunks_;
  bool skips_own_;
  int item_;
  int end_;
  int group_ = 0;
  std::size_t slot_ = 0;
};

// All threads: rows to copy of each group and those before it, into shared memory. Ends with a barrier.
__device__ inline void sum_groups(const LowCombineParams& params, int groups, bool skips_own, std::int32_t* ends) {
  const int lane = threadIdx.x & 31;
  if (threadIdx.x < 32) {
    std::int32_t before = 0;
#pragma unroll 1
    for (int first = 0; first < groups; first += 32) {
      const int group = first + lane;
      std::int32_t rows = 0;
      if (group < groups) {
        rows = params.routing.group_rows[group] - (skips_own ? params.routing.own_rows[group] : 0);
      }
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const std::int32_t other = __shfl_up_sync(0xffffffffu, rows, distance);
        if (lane >= distance) rows += other;
      }
      if (group < groups) ends[group] = before + rows;
      before += __shfl_sync(0xffffffffu, rows, 31);
    }
  }
  __syncthreads();
}

// A chunk of a row without the copy engine: a warp.
template <class T, bool kQuantizes>
__device__ inline void copy_chunk(const LowCombineParams& params, const std::uint8_t* from, std::uint8_t* to,
                                  float* scales, int elements) {
  const int lane = threadIdx.x & 31;
  if constexpr (!kQuantizes) {
#pragma unroll 1
    for (int i = lane; i < elements * T::kBytes / 16; i += 32) {
      reinterpret_cast<uint4*>(to)[i] = load_streaming(reinterpret_cast<const uint4*>(from) + i);
    }
    return;
  } else {
#pragma unroll 1
    for (int first = 0; first < elements; first += static_cast<int>(kFp8Block)) {
      const int column = first + lane * 4;
      float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (column < elements) load_four<T>(from + static_cast<std::size_t>(column) * T::kBytes, values);
      const QuantizedFour quantized = quantize_four(values, params.power_of_two);
      if (column < elements) *reinterpret_cast<std::uint32_t*>(to + column) = quantized.bytes;
      if (lane == 0) scales[first / static_cast<int>(kFp8Block)] = quantized.scale;
    }
  }
}

// All threads of the blocks that copy. `to` is this rank's buffer of rows. What the calling thread stored has been
// written when it returns.
template <class T, bool kQuantizes>
__device__ inline void copy_rows(const LowCombineParams& params, std::uint8_t* to, const CopyRing& ring,
                                 std::int32_t* ends) {
  const bool skips_own = !kQuantizes;
  const int groups = params.low.row_layout == RowLayout::kExpert ? params.low.num_local_experts : 1;
  const std::size_t row_bytes = static_cast<std::size_t>(params.hidden) * T::kBytes;
  const std::size_t out_row = kQuantizes ? quantized_row_bytes(static_cast<std::size_t>(params.hidden)) : row_bytes;
  const int blocks = (params.hidden + static_cast<int>(kFp8Block) - 1) / static_cast<int>(kFp8Block);
  auto* all_scales = reinterpret_cast<float*>(
      to + quantized_scales_offset(params.low.slots.slots(), static_cast<std::size_t>(params.hidden)));
  constexpr int kElements = kCopyChunk / T::kBytes;
  const int chunks = (params.hidden + kElements - 1) / kElements;
  sum_groups(params, groups, skips_own, ends);
  const auto elements_of = [&](int chunk) { return min(kElements, params.hidden - chunk * kElements); };
  const auto source_of = [&](const CopyItems& item) {
    return params.rows + item.slot() * row_bytes + static_cast<std::size_t>(item.chunk()) * kCopyChunk;
  };
  const auto target_of = [&](const CopyItems& item) {
    return to + item.slot() * out_row + static_cast<std::size_t>(item.chunk()) * (kQuantizes ? kElements : kCopyChunk);
  };
  const auto scales_of = [&](const CopyItems& item) {
    return all_scales + item.slot() * blocks + item.chunk() * (kElements / static_cast<int>(kFp8Block));
  };
  CopyItems item(params, ends, groups, chunks, skips_own);
#if defined(MOE_EP_BULK_COPIES)
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  std::uint8_t* stages = ring.stages + static_cast<std::size_t>(warp) * kCopyStages * kCopyChunk;
  std::uint64_t* barriers = ring.barriers + warp * kCopyStages;
  float* scales = ring.scales + warp * kMostScalesAChunk;
  // Rows of e4m3 that are no whole vectors go the other way.
  const bool whole = params.hidden % 16 == 0 || !kQuantizes;
  const auto load = [&](const CopyItems& next, int stage) {
    if (!whole || !next.valid() || lane != 0) return;
    const auto bytes = static_cast<std::uint32_t>(elements_of(next.chunk()) * T::kBytes);
    barrier_arrive_expect(barriers + stage, bytes);
    bulk_load_once(stages + stage * kCopyChunk, source_of(next), bytes, barriers + stage);
  };
  CopyItems loading = item;
#pragma unroll 1
  for (int i = 0; i < kCopyStages - 1; ++i) {
    load(loading, i);
    if (loading.valid()) loading.advance();
  }
  int stage = 0;
  int load_stage = kCopyStages - 1;
  std::uint32_t parity = 0;
  while (item.valid() && whole) {
    // What was stored from that stage has left it.
    bulk_wait_read<0>();
    __syncwarp();
    load(loading, load_stage);
    if (loading.valid()) loading.advance();
    if (++load_stage == kCopyStages) load_stage = 0;
    const int elements = elements_of(item.chunk());
    std::uint8_t* data = stages + stage * kCopyChunk;
    barrier_wait(barriers + stage, parity);
    if constexpr (kQuantizes) {
      quantize_chunk<T>(data, elements, params.power_of_two, scales);
      fence_shared_to_bulk();
      __syncwarp();
      float* out = scales_of(item);
#pragma unroll 1
      for (int i = lane; i * static_cast<int>(kFp8Block) < elements; i += 32) out[i] = scales[i];
    }
    if (lane == 0) {
      bulk_store_kept(target_of(item), data, static_cast<std::uint32_t>(elements * (kQuantizes ? 1 : T::kBytes)));
      bulk_commit();
    }
    __syncwarp();
    item.advance();
    if (++stage == kCopyStages) {
      stage = 0;
      parity ^= 1;
    }
  }
#endif
#pragma unroll 1
  for (; item.valid(); item.advance()) {
    copy_chunk<T, kQuantizes>(params, source_of(item), target_of(item), scales_of(item), elements_of(item.chunk()));
  }
  bulk_wait_written<0>();
  fence_bulk_to_global();
}

}  // namespace gpu
}  // namespace moe_ep
