// What host and kernels share in low-latency mode. Plain data; device helpers are in low_words.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/low_latency_layout.h"
#include "cuda/state.h"

namespace moe_ep {
namespace gpu {

// Allocations of one rank, with rows of combines in them, that can be registered at a time; see row_memory.h.
constexpr int kMostRowSegments = 64;

// Device memory of this rank alone, kept between operations. Behind it, for every rank, the sequence number of the
// first operation that leaves the rank out (0: none does): so all blocks of an operation leave out the same ranks,
// whatever another block finds meanwhile.
struct LowState {
  std::uint32_t sequence;  // of the last operation whose send half has begun in all blocks
  std::uint32_t blocks;    // counter of blocks that wraps to 0 by itself
  std::uint32_t readers;   // likewise, of blocks that have read all rows of a combine
  // By index: sequence number of the last dispatch of which some block dropped its part.
  std::uint32_t gave_up[kLowBuffers];
};

// Routing of one handle, in device memory that the handle owns; tensors of results lie in it too.
struct LowHeader {
  std::uint32_t sequence;          // of the dispatch
  std::uint32_t combine_sequence;  // of its last combine
  std::uint32_t unused;
  std::uint32_t received;  // rows in all
};

struct LowRoutingShape {
  std::size_t num_ranks;
  std::size_t num_local_experts;
  std::size_t num_tokens;
  std::size_t topk;
};

struct LowRoutingView {
  LowHeader* header;
  std::int32_t* tokens_per_expert;  // [num_local_experts]
  std::int32_t* group_rows;         // [num_local_experts, or 1 in layout rank] rows received
  std::int32_t* own_first;          // likewise: the run among them that came from this rank
  std::int32_t* own_rows;           // likewise
  std::uint32_t* gave_up;           // [num_ranks] whether a rank dropped its part of the dispatch
  Entry* entries;                   // [num_tokens, topk], as in RoutingView
  std::int32_t* ids;                // [num_tokens, topk] as dispatched

  MOE_EP_HOST_DEVICE static std::size_t counts_offset() { return sizeof(LowHeader); }
  MOE_EP_HOST_DEVICE static std::size_t entries_offset(const LowRoutingShape& shape) {
    const std::size_t groups = shape.num_local_experts + 1;
    return align_up(counts_offset() + (4 * groups + shape.num_ranks) * sizeof(std::int32_t), 16);
  }
  MOE_EP_HOST_DEVICE static std::size_t bytes(const LowRoutingShape& shape) {
    return entries_offset(shape) + shape.num_tokens * shape.topk * (sizeof(Entry) + sizeof(std::int32_t));
  }
  MOE_EP_HOST_DEVICE static LowRoutingView at(void* memory, const LowRoutingShape& shape) {
    auto* base = static_cast<std::uint8_t*>(memory);
    const std::size_t groups = shape.num_local_experts + 1;
    LowRoutingView view{};
    view.header = reinterpret_cast<LowHeader*>(base);
    view.tokens_per_expert = reinterpret_cast<std::int32_t*>(base + counts_offset());
    view.group_rows = view.tokens_per_expert + groups;
    view.own_first = view.group_rows + groups;
    view.own_rows = view.own_first + groups;
    view.gave_up = reinterpret_cast<std::uint32_t*>(view.own_rows + groups);
    view.entries = reinterpret_cast<Entry*>(base + entries_offset(shape));
    view.ids = reinterpret_cast<std::int32_t*>(view.entries + shape.num_tokens * shape.topk);
    return view;
  }
};

// Heaps whose addresses come with a launch; of more ranks, from a table.
constexpr int kHeapsAtHand = 16;

// For __umulhi(): 2^32 / divisor, rounded up; exact for numbers of less than that. 0 for a divisor of 1.
inline std::uint32_t inverse_of(std::int32_t divisor) {
  return divisor > 1 ? 0xffffffffu / static_cast<std::uint32_t>(divisor) + 1 : 0u;
}

// What every low-latency kernel of a rank knows.
struct LowGroup {
  Group group;
  LowLayout layout;
  LowSlots slots;
  RowLayout row_layout;
  LowState* state;
  std::uint32_t* masked_since;  // [num_ranks], see LowState
  // Registered memory, see row_memory.h: where each rank's is mapped here, and whether this rank's is everywhere.
  std::uint8_t** segments;    // [num_ranks][kMostRowSegments]
  std::uint64_t* registered;  // [kMostRowSegments] CUDA's number of the allocation; 0: none is registered
  // Scales of a dispatch's source rows on their way between this rank's warps: [tokens][blocks of a row, rounded up to
  // 2], each a low_word().
  std::uint64_t* scale_words;
  bool mask_on_timeout;
  bool starts_early;     // see launch_early()
  bool lets_next_begin;  // before an operation ends
  std::int32_t num_local_experts;
  // Where rank r has experts [r * each, (r + 1) * each), else 0; and inverse_of() it.
  std::int32_t experts_each;
  std::uint32_t experts_inverse;
};

// Which halves of an operation a launch does.
enum LowHalves : std::int32_t { kLowSend = 1, kLowReceive = 2, kLowBoth = 3 };

constexpr int kLowDispatchOffsets = 17;
constexpr int kLowCombineOffsets = 15;
// Of this rank's rows for an expert, those whose scales a warp gathers; and how many of each at most.
constexpr int kMostListed = 8;
constexpr int kMostPartWords = 64;

struct LowDispatchParams {
  LowGroup low;
  std::uint8_t* heaps[kHeapsAtHand];  // [num_ranks], see heap_of()
  RowSource source;
  RowSizes sizes;  // of a row as it crosses
  LowRoutingView routing;
  const std::int64_t* topk_idx;
  std::int32_t num_tokens;
  std::int32_t topk;
  std::int32_t index;
  std::int32_t chunk_elements;  // of a row that a warp moves at a time: whole FP8 blocks where rows are quantised
  std::int32_t stages;          // of each warp's ring
  bool has_marks;               // shared memory has room for them, see mark_words
  bool bulk_loads;
  bool bulk_stores;
  LowHalves halves;
  std::int32_t sorters;           // warps that sort routes: half of them, or all
  bool gathers_scales;            // by expert, or they are sent with their rows
  std::int32_t scale_parts_log2;  // log2 of the parts in which warps gather those of an expert
  std::int32_t scale_stride;      // words that a row has for them
  std::int32_t part_words;        // at most
  std::int32_t first_gathered;    // expert, so that ranks begin with experts of different ranks
  // What follows from the above; see complete_low_dispatch().
  std::int32_t chunks;           // of a row
  std::uint32_t chunks_inverse;  // see inverse_of()
  std::uint32_t topk_inverse;    // likewise
  std::int32_t items_each;       // of a block
  std::int32_t items_left;       // blocks with one more
  std::int32_t source_bytes;     // of a row
  std::int32_t chunk_bytes;      // of that
  std::int32_t stage_bytes;      // of the ring
  std::int32_t out_bytes;        // of an element as it crosses
  std::int32_t bins;             // experts, and ranks in layout rank
  std::int32_t places;           // experts, or ranks in layout rank: where rows go
  std::int32_t mark_words;       // of a place: a bit a token
  std::int32_t mark_stride;
  std::int32_t header_words;                             // of a post
  std::uint32_t post[static_cast<int>(LowWord::kMask)];  // its words but for bad routes
  std::int32_t post_stride;                              // in words
  std::int32_t capacity;
  std::int32_t row_blocks;                     // scales of a row
  std::int32_t chunk_blocks;                   // and of a chunk
  std::uint32_t zero_bytes;                    // of shared memory, from the marks on, at first
  std::size_t posts_offset;                    // of this dispatch, in every rank's heap
  std::size_t arrivals_offset;                 // likewise, of this rank
  std::size_t receive_offset;                  // in every rank's heap
  ReceiveBlock arrays;                         // from there
  std::uint32_t offsets[kLowDispatchOffsets];  // of arrays in shared memory, and their end
};

struct LowCombineParams {
  LowGroup low;
  std::uint8_t* heaps[kHeapsAtHand];  // likewise
  Pipeline pipeline;
  LowRoutingView routing;
  const std::int64_t* topk_idx;
  const float* weights;  // [num_tokens, topk], if there are any
  bool has_weights;
  std::int32_t num_tokens;
  std::int32_t topk;
  std::int32_t index;
  std::int32_t hidden;
  Element element;
  // To be copied into the heap first, unless they are in memory that is registered when the kernel runs; null: they are
  // in the heap.
  const std::uint8_t* rows;
  std::int32_t segment;  // that may be registered; -1: they are copied
  std::uint32_t segment_offset;
  std::uint64_t segment_id;  // CUDA's number: another allocation may have taken the place since this was captured
  bool quantize;             // while copying
  bool power_of_two;
  std::int32_t send_blocks;  // that copy
  bool prefetches_own;       // rows, to L2
  std::size_t rows_offset;   // in every rank's heap
  std::uint8_t* out;
  float* lost;  // [num_tokens]
  LowHalves halves;
  // What follows from the above; see complete_low_combine().
  std::int32_t row_bytes;
  std::int32_t chunks;           // of a row, as they are summed
  std::uint32_t chunks_inverse;  // see inverse_of()
  std::int32_t token_step;       // from a warp's chunk to its next
  std::int32_t chunk_step;
  std::int32_t post_stride;                              // in words
  std::size_t posts_offset;                              // in every rank's heap
  std::size_t arrivals_offset;                           // likewise, of this rank
  std::uint32_t post[static_cast<int>(LowWord::kMask)];  // its words but for what the kernel finds out
  std::uint32_t offsets[kLowCombineOffsets];             // of arrays in shared memory, and their end
};

}  // namespace gpu
}  // namespace moe_ep
