// Rows to their slots: each is read once and written to every place that wants it, quantised on the way if asked.
//
// Bulk path: every warp drives a ring of its own in shared memory. An item is one chunk of one token's row: the copy
// engine loads it, and stores it once for each entry of the token. Warps wait for each other only to tell what has been
// sent, in two stages.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/layout.cuh"
#include "cuda/memory.cuh"
#include "cuda/parts.cuh"
#include "cuda/quantize.cuh"
#include "cuda/state.h"

namespace moe_ep {
namespace gpu {

__device__ inline Destination destination_of(std::uint8_t* block, const RowSizes& sizes, std::int64_t rows) {
  const ReceiveBlock arrays = sizes.block(rows);
  return Destination{block + arrays.rows, reinterpret_cast<float*>(block + arrays.scales),
                     reinterpret_cast<float*>(block + arrays.weights),
                     reinterpret_cast<std::int64_t*>(block + arrays.indices)};
}

// Parts of the rows that are told as they have been sent; see RoutingView.
struct SentParts {
  const Group* group;  // null: none are told
  const RoutingHeader* header;
  const std::int32_t* tokens;
  const std::int32_t* rows;
};

// What a warp has told of them.
class PartsTold {
 public:
  // Once tokens have their slots.
  __device__ explicit PartsTold(const SentParts& parts) : parts_(parts) {
    if (parts_.group == nullptr) return;
    num_ = static_cast<int>(load_cached_in_l2(&parts_.header->num_parts));
    end_ = load_cached_in_l2(parts_.tokens);
  }
  // Whether a part is over before `token`.
  __device__ bool due(std::int64_t token) const { return told_ < num_ && token >= end_; }
  // All lanes, whose stores of all tokens before `token` have been written.
  __device__ void tell(std::int64_t token, int warps) {
    while (due(token)) {
      const std::int32_t* rows = parts_.rows + told_ * parts_.group->num_ranks;
      pass_part(*parts_.group, Step::kSent, told_, num_, warps,
                [&](int rank) { return static_cast<std::uint32_t>(load_cached_in_l2(rows + rank)); });
      if (++told_ < num_) end_ = load_cached_in_l2(parts_.tokens + told_);
    }
  }

 private:
  SentParts parts_;
  int num_ = 0;
  int told_ = 0;
  std::int32_t end_ = 0;
};

struct SendJob {
  RowSource source;
  RowSizes sizes;
  std::int64_t num_tokens;
  const Entry* entries;
  const std::int32_t* ids;              // with deduplication: what goes beside a row
  const std::int32_t* rank_of_expert;   // likewise
  const std::int32_t* local_of_expert;  // likewise
  std::int32_t topk;
  bool deduplicated;
  const Destination* destinations;             // in shared memory
  std::uint32_t* next_item;                    // shared by all blocks; 0 at the start
  const std::int32_t* expert_slots = nullptr;  // with deduplication: what goes beside a row, not local ids
  SentParts parts = {};

  // An item's row; -1: it has none. A job of another kind may have to wait for rows, and for what is to become of them.
  __device__ std::int64_t row(std::int32_t token) const { return token; }
  __device__ void await(std::int32_t /* token */) const {}
  // Lane j's entry of a row; rank -1 in the lanes past the last one.
  __device__ Entry entry(std::int64_t row) const {
    const int lane = threadIdx.x & 31;
    return lane < topk ? entries[row * topk + lane] : Entry{-1, -1, -1};
  }
  __device__ void keep(std::int64_t /* row */, const Entry& /* entry */) const {}
};

__device__ inline int scales_per_row(const SendJob& job) {
  return (job.source.hidden + static_cast<int>(kFp8Block) - 1) / static_cast<int>(kFp8Block);
}

__device__ inline int count_entries(const Entry& entry) { return __popc(__ballot_sync(0xffffffffu, entry.rank >= 0)); }

// Calls `write(destination, slot)` for every entry of the warp's token.
template <class Write>
__device__ inline void for_each_entry(const SendJob& job, const Entry& entry, int count, Write&& write) {
  for (int i = 0; i < count; ++i) {
    const int rank = __shfl_sync(0xffffffffu, static_cast<int>(entry.rank), i);
    const int slot = __shfl_sync(0xffffffffu, entry.slot, i);
    write(job.destinations[rank], static_cast<std::size_t>(slot), rank);
  }
}

// Weights, local expert ids and scales that came with the row: a warp, for one token. Loads are past the L1 cache: what
// lies beside a row may arrive later.
__device__ inline void send_metadata(const SendJob& job, std::int64_t token, const Entry& entry, int count) {
  const int lane = threadIdx.x & 31;
  if (job.sizes.weight + job.sizes.index > 0) {
    if (!job.deduplicated) {
      if (entry.rank >= 0) {
        store_gathered(job.destinations[entry.rank].weights + entry.slot,
                       load_cached_in_l2(job.source.weights + token * job.topk + entry.position));
      }
    } else {
      const bool there = lane < job.topk;
      const std::int32_t expert = there ? job.ids[token * job.topk + lane] : -1;
      const int expert_rank = expert >= 0 ? job.rank_of_expert[expert] : -1;
      std::int64_t local = -1;
      if (expert >= 0) {
        local = job.expert_slots != nullptr ? job.expert_slots[token * job.topk + lane] : job.local_of_expert[expert];
      }
      const float weight = there && job.sizes.weight > 0 ? job.source.weights[token * job.topk + lane] : 0.0f;
      for_each_entry(job, entry, count, [&](const Destination& to, std::size_t slot, int rank) {
        if (!there) return;
        const std::size_t at = slot * job.topk + lane;
        if (job.sizes.weight > 0) store_gathered(to.weights + at, expert_rank == rank ? weight : 0.0f);
        if (job.sizes.index > 0) store_gathered(to.indices + at, expert_rank == rank ? local : std::int64_t{-1});
      });
    }
  }
  if (job.source.scales != nullptr) {
    const int scales = scales_per_row(job);
    const float* from = job.source.scales + token * scales;
    for_each_entry(job, entry, count, [&](const Destination& to, std::size_t slot, int) {
      for (int i = lane; i < scales; i += 32)
        store_gathered(to.scales + slot * scales + i, load_cached_in_l2(from + i));
    });
  }
}

// Shared memory of the bulk path; `stages` is send_stages().
struct SendRing {
  std::uint8_t* stages;     // [warps][stages][chunk_bytes]
  std::uint64_t* barriers;  // [warps][stages], initialised with one arrival
  float* scales;            // [warps][kMostScalesAChunk], where rows are quantised
};

__host__ __device__ inline std::size_t ring_bytes(const Pipeline& pipeline, bool quantize) {
  if (!pipeline.use_bulk) return 0;
  return static_cast<std::size_t>(pipeline.warps) * send_stages(quantize) * pipeline.chunk_bytes;
}

// Of the barriers and the scales.
__host__ __device__ inline std::size_t ring_side_bytes(const Pipeline& pipeline, bool quantize) {
  const std::size_t warps = static_cast<std::size_t>(pipeline.warps);
  return warps * (send_stages(quantize) * sizeof(std::uint64_t) + (quantize ? kMostScalesAChunk * sizeof(float) : 0));
}

// How rows are sent, one kernel each: code that is not needed costs instruction fetches at every launch.
struct BulkCopy {
  static constexpr bool kBulk = true;
  static constexpr bool kQuantizes = false;
};
template <class ElementType>
struct BulkQuantize {
  using Element = ElementType;
  static constexpr bool kBulk = true;
  static constexpr bool kQuantizes = true;
};
// Vectors, for any rows and any GPU.
struct AnyRows {
  static constexpr bool kBulk = false;
};

// Calls `visit` with every path until one fails.
template <class Visit>
cudaError_t for_each_path(Visit&& visit) {
  cudaError_t error = visit(AnyRows{});
  if (error == cudaSuccess) error = visit(BulkCopy{});
  if (error == cudaSuccess) error = visit(BulkQuantize<Float32>{});
  if (error == cudaSuccess) error = visit(BulkQuantize<BFloat16>{});
  if (error == cudaSuccess) error = visit(BulkQuantize<Float16>{});
  return error;
}

// Calls `visit` with the path for such rows.
template <class Visit>
cudaError_t visit_path(const RowSource& source, const Pipeline& pipeline, Visit&& visit) {
  if (!pipeline.use_bulk) return visit(AnyRows{});
  if (!source.quantize) return visit(BulkCopy{});
  return visit_element_on_host(source.element, [&](auto tag) { return visit(BulkQuantize<decltype(tag)>{}); });
}

struct SendItem {
  std::int32_t token;
  std::int32_t chunk;
  bool valid;
  std::int64_t row;  // -1: none
};

// Items in the order of tokens, handed to whichever warp of whichever block is free: no warp waits at the end for one
// whose tokens go to more ranks. A warp takes several small ones at a time, and asks for more before it needs them.
class SendQueue {
 public:
  // A warp that is not at work finds it empty.
  __device__ SendQueue(std::uint32_t* next_item, std::int64_t num_tokens, int chunks, int chunk_bytes, bool at_work)
      : next_item_(next_item), end_(at_work ? static_cast<std::uint32_t>(num_tokens) * chunks : 0), chunks_(chunks) {
    const int several = kBytesAClaim / chunk_bytes;
    a_claim_ = several > 1 ? several : 1;
    claimed_ = claim();
  }
  // All lanes: the same item for all of them.
  __device__ SendItem take() {
    if (left_ == 0) {
      item_ = __shfl_sync(0xffffffffu, claimed_, 0);
      left_ = a_claim_;
      if (item_ < end_) claimed_ = claim();
    }
    const std::uint32_t item = item_;
    ++item_;
    --left_;
    return SendItem{static_cast<std::int32_t>(item / chunks_), static_cast<std::int32_t>(item % chunks_), item < end_,
                    -1};
  }

 private:
  static constexpr int kBytesAClaim = 8192;

  __device__ std::uint32_t claim() {
    const bool asks = (threadIdx.x & 31) == 0 && end_ > 0;
    return asks ? atomicAdd(next_item_, static_cast<std::uint32_t>(a_claim_)) : 0;
  }

  std::uint32_t* next_item_;
  std::uint32_t end_;
  std::uint32_t chunks_;
  int a_claim_;
  std::uint32_t item_ = 0;
  int left_ = 0;
  std::uint32_t claimed_;
};

// See send_rows.
template <class Path, class Job, class Ready>
__device__ inline bool send_rows_bulk(Job& job, const Pipeline& pipeline, const SendRing& ring, Ready&& ready) {
  constexpr int kStages = send_stages(Path::kQuantizes);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  std::uint8_t* stages = ring.stages + static_cast<std::size_t>(warp) * kStages * pipeline.chunk_bytes;
  std::uint64_t* barriers = ring.barriers + warp * kStages;
  [[maybe_unused]] float* scales = ring.scales + warp * kMostScalesAChunk;
  const int element = static_cast<int>(element_bytes(job.source.element));
  const int chunk_elements = pipeline.chunk_bytes / element;
  const int chunks = (job.source.hidden + chunk_elements - 1) / chunk_elements;
  const std::size_t source_row = static_cast<std::size_t>(job.source.hidden) * element;
  const int out_element = Path::kQuantizes ? 1 : element;

  const auto elements_of = [&](int chunk) {
    const int left = job.source.hidden - chunk * chunk_elements;
    return left < chunk_elements ? left : chunk_elements;
  };
  // One lane.
  const auto load = [&](const SendItem& item, int stage) {
    const std::uint32_t bytes = item.row >= 0 ? static_cast<std::uint32_t>(elements_of(item.chunk) * element) : 0;
    barrier_arrive_expect(barriers + stage, bytes);
    if (bytes == 0) return;
    bulk_load(stages + stage * pipeline.chunk_bytes,
              job.source.rows + static_cast<std::size_t>(item.row) * source_row +
                  static_cast<std::size_t>(item.chunk) * chunk_elements * element,
              bytes, barriers + stage);
  };
  const auto fetch = [&](const SendItem& item) {
    return item.valid && item.row >= 0 ? job.entry(item.row) : Entry{-1, -1, -1};
  };

  // This item is in flight; the next one is loaded while it is sent; the one after that is being taken.
  SendQueue queue(job.next_item, job.num_tokens, chunks, pipeline.chunk_bytes, warp < pipeline.warps);
  const auto take = [&] {
    SendItem item = queue.take();
    if (item.valid) item.row = job.row(item.token);
    return item;
  };
  SendItem item = take();
  SendItem following = take();
  if (item.valid) {
    job.await(item.token);
    if (lane == 0) load(item, 0);
  }
  if (!ready()) {
    // Shared memory is not to be left before what is on the way to it.
    if (item.valid) barrier_wait(barriers, 0);
    return false;
  }
  PartsTold told(job.parts);
  const int all_warps = static_cast<int>(gridDim.x) * pipeline.warps;
  Entry next = fetch(item);
  int stage = 0;
  std::uint32_t parity = 0;
  while (item.valid) {
    const SendItem now = item;
    const Entry entry = next;
    const int next_stage = stage + 1 < kStages ? stage + 1 : 0;
    if (following.valid) job.await(following.token);
    next = fetch(following);
    if (following.valid) {
      // What was sent from that stage has left it; with more than two stages, what was sent last need not have.
      bulk_wait_read<kStages - 2>();
      __syncwarp();
      if (lane == 0) load(following, next_stage);
    }
    item = following;
    following = take();
    const int elements = elements_of(now.chunk);
    const int count = count_entries(entry);
    std::uint8_t* data = stages + stage * pipeline.chunk_bytes;
    barrier_wait(barriers + stage, parity);
    if constexpr (Path::kQuantizes) {
      quantize_chunk<typename Path::Element>(data, elements, job.source.power_of_two, scales);
      fence_shared_to_bulk();
      __syncwarp();
    }
    if (entry.rank >= 0) {
      bulk_store(job.destinations[entry.rank].rows + static_cast<std::size_t>(entry.slot) * job.sizes.row +
                     static_cast<std::size_t>(now.chunk) * chunk_elements * out_element,
                 data, static_cast<std::uint32_t>(elements * out_element));
    }
    bulk_commit();
    if constexpr (Path::kQuantizes) {
      const int row_scales = scales_per_row(job);
      const int first = now.chunk * (chunk_elements / static_cast<int>(kFp8Block));
      const int blocks = (elements + static_cast<int>(kFp8Block) - 1) / static_cast<int>(kFp8Block);
      for_each_entry(job, entry, count, [&](const Destination& to, std::size_t slot, int) {
        if (lane < blocks) store_gathered(to.scales + slot * row_scales + first + lane, scales[lane]);
      });
      __syncwarp();
    }
    if (now.chunk == 0 && now.row >= 0) {
      job.keep(now.row, entry);
      send_metadata(job, now.row, entry, count);
    }
    if (told.due(now.token)) {
      // All but what this item has just stored.
      bulk_wait_written<1>();
      fence_bulk_to_global();
      told.tell(now.token, all_warps);
    }
    parity ^= next_stage == 0 ? 1 : 0;
    stage = next_stage;
  }
  bulk_wait_written<0>();
  fence_bulk_to_global();
  if (warp < pipeline.warps) told.tell(job.num_tokens, all_warps);
  return true;
}

// The vector path: rows of any size in words of `Word`, straight from registers. A warp, for one token.
template <class Word>
__device__ inline void copy_row(const SendJob& job, std::int64_t token, const Entry& entry, int count) {
  constexpr int kUnroll = 4;
  const int lane = threadIdx.x & 31;
  const int words = static_cast<int>(job.sizes.row / sizeof(Word));
  const auto* from = reinterpret_cast<const Word*>(job.source.rows + token * job.sizes.row);
  for (int base = 0; base < words; base += 32 * kUnroll) {
    Word held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int word = base + 32 * u + lane;
      if (word < words) held[u] = load_cached_in_l2(from + word);
    }
    for_each_entry(job, entry, count, [&](const Destination& to, std::size_t slot, int) {
      auto* at = reinterpret_cast<Word*>(to.rows + slot * job.sizes.row);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int word = base + 32 * u + lane;
        if (word < words) at[word] = held[u];
      }
    });
  }
}

// Likewise, quantised: a block of 128 a step, four elements a lane. hidden is a multiple of 4.
template <class T>
__device__ inline void quantize_row(const SendJob& job, std::int64_t token, const Entry& entry, int count) {
  const int lane = threadIdx.x & 31;
  const int row_scales = scales_per_row(job);
  const std::uint8_t* row = job.source.rows + token * (static_cast<std::size_t>(job.source.hidden) * T::kBytes);
  for (int block = 0; block < row_scales; ++block) {
    const int column = block * static_cast<int>(kFp8Block) + lane * 4;
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (column < job.source.hidden) load_four<T>(row + static_cast<std::size_t>(column) * T::kBytes, values);
    const QuantizedFour quantized = quantize_four(values, job.source.power_of_two);
    for_each_entry(job, entry, count, [&](const Destination& to, std::size_t slot, int) {
      if (column < job.source.hidden) {
        *reinterpret_cast<std::uint32_t*>(to.rows + slot * job.sizes.row + column) = quantized.bytes;
      }
      if (lane == 0) store_gathered(to.scales + slot * row_scales + block, quantized.scale);
    });
  }
}

template <class Job>
__device__ inline void send_rows_vector(Job& job) {
  PartsTold told(job.parts);
  const int all_warps = static_cast<int>(gridDim.x) * kWarps;
  const auto first = static_cast<std::int32_t>(blockIdx.x * kWarps + threadIdx.x / 32);
  for (std::int32_t token = first; token < job.num_tokens; token += all_warps) {
    told.tell(token, all_warps);
    const std::int64_t row = job.row(token);
    if (row < 0) continue;
    job.await(token);
    const Entry entry = job.entry(row);
    job.keep(row, entry);
    const int count = count_entries(entry);
    if (count == 0) continue;
    if (job.source.quantize) {
      visit_element(job.source.element, [&](auto tag) { quantize_row<decltype(tag)>(job, row, entry, count); });
    } else if (job.sizes.row % 16 == 0) {
      copy_row<uint4>(job, row, entry, count);
    } else {
      copy_row<std::uint32_t>(job, row, entry, count);
    }
    send_metadata(job, row, entry, count);
  }
  told.tell(job.num_tokens, all_warps);
}

// All threads of a block. Calls `ready`, all of them, before entries are read; false where it does not come true. What
// the calling thread stored has been written when it returns.
template <class Path, class Job, class Ready>
__device__ inline bool send_rows(Job& job, const Pipeline& pipeline, const SendRing& ring, Ready&& ready) {
  if constexpr (Path::kBulk) {
#if defined(MOE_EP_BULK_COPIES)
    const int barriers = pipeline.warps * send_stages(Path::kQuantizes);
    for (int i = threadIdx.x; i < barriers; i += blockDim.x) barrier_init(ring.barriers + i, 1);
    fence_barrier_init();
    fence_shared_to_bulk();
    __syncthreads();
    return send_rows_bulk<Path>(job, pipeline, ring, ready);
#else
    __trap();
    return false;
#endif
  } else {
    if (!ready()) return false;
    send_rows_vector(job);
    return true;
  }
}

// Zeros, and -1 as an id: a warp, for one row. Rare: it is not to make kernels larger.
static __device__ __noinline__ void clear_row(const Destination& block, const RowSizes& sizes, std::int64_t row) {
  const int lane = threadIdx.x & 31;
  std::uint8_t* bytes = block.rows + row * sizes.row;
  if (sizes.row % 16 == 0) {
    for (int i = lane; i < static_cast<int>(sizes.row / 16); i += 32) {
      reinterpret_cast<uint4*>(bytes)[i] = make_uint4(0, 0, 0, 0);
    }
  } else {
    for (int i = lane; i < static_cast<int>(sizes.row / 4); i += 32) reinterpret_cast<std::uint32_t*>(bytes)[i] = 0;
  }
  for (int i = lane; i < static_cast<int>(sizes.scale / 4); i += 32) block.scales[row * (sizes.scale / 4) + i] = 0.0f;
  for (int i = lane; i < static_cast<int>(sizes.weight / 4); i += 32) {
    block.weights[row * (sizes.weight / 4) + i] = 0.0f;
  }
  for (int i = lane; i < static_cast<int>(sizes.index / 8); i += 32) block.indices[row * (sizes.index / 8) + i] = -1;
}

// The rows of this rank's returned block that carry no token. `routing` tells where they are.
__device__ inline void clear_padding(const Destination& block, const RowSizes& sizes, const RoutingView& routing,
                                     RowLayout layout, int num_local_experts, int alignment, std::int64_t num_rows) {
  std::int64_t end = load_cached_in_l2(&routing.header->received_rows);
  if (layout == RowLayout::kExpert && num_local_experts > 0) {
    const int last = num_local_experts - 1;
    const std::int64_t rows = load_cached_in_l2(routing.local_rows + last);
    end = align_up(load_cached_in_l2(routing.local_first + last) + rows, alignment);
    // A few warps an expert, so that experts are cleared side by side.
    constexpr int kParts = 8;
    const int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int warps = gridDim.x * (blockDim.x / 32);
    for (int i = warp; i < num_local_experts * kParts && alignment > 1; i += warps) {
      const std::int64_t first = load_cached_in_l2(routing.local_first + i / kParts);
      const std::int64_t used = first + load_cached_in_l2(routing.local_rows + i / kParts);
      const std::int64_t next = align_up(used, alignment);
      for (std::int64_t row = used + i % kParts; row < next; row += kParts) clear_row(block, sizes, row);
    }
  }
  const std::int64_t warp = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * (blockDim.x / 32);
  for (std::int64_t row = end + warp; row < num_rows; row += warps) clear_row(block, sizes, row);
}

}  // namespace gpu
}  // namespace moe_ep
