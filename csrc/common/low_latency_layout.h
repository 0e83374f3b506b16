// Offsets inside the low-latency region of one rank's symmetric heap, and the words that ranks tell each other there.
//
//   posts[2 kinds][2][num_ranks] | arrivals[2 kinds][2][num_ranks][kLowArrivals] | receive[2] | rows[2]
//
// A word carries its operation's sequence number beside its value, so that each stands for itself: nothing is cleared
// and no fence or flag has to order words. Dispatches use the two sets of everything in turn (`index`), so that two
// results can be held; a combine uses the set of its dispatch.
//
// A dispatch waits for a post of every rank before it writes any row. So a rank's rows are written only once its own
// stream has come to that dispatch, and nothing before it still reads them; and the words of a dispatch are read before
// those of the second one after it can come. Of a combine, a later combine of the same dispatch may have overwritten
// the post: that says the same but for how rows are given, and those of the earlier one are there by then. Not so where
// rows are in registered memory: their owner has not ended its combine before all ranks have read them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/heap_layout.h"

namespace moe_ep {

enum class LowKind : int { kDispatch = 0, kCombine = 1 };
constexpr std::size_t kLowBuffers = 2;
constexpr std::size_t kLowSets = 2 * kLowBuffers;
// Blocks of a grid that signal on their own.
constexpr int kMostLowBlocks = 192;
// Words beside them: the last one is for a reader, see LowLayout::reads. Whole cache lines.
constexpr int kLowArrivals = kMostLowBlocks + 8;
// In an arrival: the sender has dropped the dispatch, wholly or in part.
constexpr std::uint32_t kLowGaveUp = 1u << 16;

// Words of a post, before the mask (a bit a rank) and the counts of rows per expert and per rank. A combine between
// GPUs has nothing to say after kOffset.
enum class LowWord : int {
  // These are compared.
  kOperation = 0,
  kElement,
  kTopk,
  kHasWeights,
  kIndex,
  kHandle,  // sequence number of the dispatch that is combined; 0: this is a dispatch
  // These are not.
  kBlocks,     // that signal the arrival of their part
  kGaveUp,     // the sender has dropped the dispatch that it combines: its rows are none
  kSegment,    // 1 + index of the registered memory that the rows are in, 0: they are in the heap
  kOffset,     // of the rows, there, in units of 16 bytes
  kBadRoute,   // 1 + flat index in topk_idx of an id out of range; 0: none
  kBadExpert,  // that id
  kMask,       // first word of the mask
};
constexpr int kNumLowCompared = 6;
// In place of kOperation: the sender has given up waiting for the reader, and takes its post back.
constexpr std::uint32_t kLowWithdrawn = 0xffffffffu;

MOE_EP_HOST_DEVICE constexpr std::uint64_t low_word(std::uint32_t sequence, std::uint32_t value) {
  return static_cast<std::uint64_t>(sequence) << 32 | value;
}
MOE_EP_HOST_DEVICE constexpr std::uint32_t low_value(std::uint64_t word) { return static_cast<std::uint32_t>(word); }
// How far a word's sequence number is past `sequence`; negative: it has not come yet. Numbers wrap around.
MOE_EP_HOST_DEVICE constexpr std::int32_t low_lead(std::uint64_t word, std::uint32_t sequence) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(word >> 32) - sequence);
}

struct LowLayout {
  std::size_t base;  // of the region, in the heap
  std::size_t num_ranks;
  std::size_t num_experts;
  std::size_t receive_bytes;  // of one buffer; 0 where there is no low-latency mode
  std::size_t rows_bytes;     // of one buffer

  // Of a region that begins at `base`: HeapLayout::low(), or 0 to find how many bytes it takes.
  static LowLayout make(std::size_t base, std::size_t num_ranks, std::size_t num_experts, std::size_t receive_bytes,
                        std::size_t rows_bytes) {
    return LowLayout{base, num_ranks, num_experts, align_up(receive_bytes, kRegionAlignment),
                     align_up(rows_bytes, kRegionAlignment)};
  }

  MOE_EP_HOST_DEVICE std::size_t mask_words() const { return (num_ranks + 31) / 32; }
  MOE_EP_HOST_DEVICE std::size_t header_words() const { return static_cast<int>(LowWord::kMask) + mask_words(); }
  MOE_EP_HOST_DEVICE std::size_t post_words() const { return header_words() + num_experts + num_ranks; }
  MOE_EP_HOST_DEVICE std::size_t post_stride() const {
    // GPUs read an odd count together with the word after it.
    return align_up((post_words() + 1) * sizeof(std::uint64_t), kCacheLine);
  }

  // What `source` posts for a dispatch or a combine of set `index`.
  MOE_EP_HOST_DEVICE std::size_t post(LowKind kind, std::size_t index, std::size_t source) const {
    return base + (set(kind, index) * num_ranks + source) * post_stride();
  }
  // The words by which blocks of `source` say that their rows have been written (dispatch), or copied to where peers
  // read them (combine). Their value: how many blocks there are, and kLowGaveUp.
  MOE_EP_HOST_DEVICE std::size_t arrivals(LowKind kind, std::size_t index, std::size_t source) const {
    return base + kLowSets * num_ranks * post_stride() +
           (set(kind, index) * num_ranks + source) * kLowArrivals * sizeof(std::uint64_t);
  }
  // The word by which `reader` says, in the heap of a rank, that it has read that rank's rows of a combine. On GPUs
  // this is told of rows in registered memory alone.
  MOE_EP_HOST_DEVICE std::size_t reads(std::size_t index, std::size_t reader) const {
    return arrivals(LowKind::kCombine, index, reader) + (kLowArrivals - 1) * sizeof(std::uint64_t);
  }
  MOE_EP_HOST_DEVICE std::size_t receive(std::size_t index) const {
    const std::size_t words = kLowSets * num_ranks * (post_stride() + kLowArrivals * sizeof(std::uint64_t));
    return align_up(base + words, kRegionAlignment) + index * receive_bytes;
  }
  MOE_EP_HOST_DEVICE std::size_t rows(std::size_t index) const { return receive(kLowBuffers) + index * rows_bytes; }
  MOE_EP_HOST_DEVICE std::size_t end() const { return receive_bytes == 0 ? base : rows(kLowBuffers); }

 private:
  MOE_EP_HOST_DEVICE static std::size_t set(LowKind kind, std::size_t index) {
    return static_cast<std::size_t>(kind) * kLowBuffers + index;
  }
};

// Arrays of one receive buffer. Layout expert: rows [groups, capacity, row], scales [groups, blocks, capacity]; layout
// rank: one group, and weights [capacity, topk], indices [capacity, topk] beside it.
struct LowSlots {
  std::size_t capacity;  // rows of a group
  std::size_t groups;    // the most local experts that a rank has; 1 in layout rank

  MOE_EP_HOST_DEVICE std::size_t slots() const { return capacity * groups; }
  MOE_EP_HOST_DEVICE ReceiveBlock arrays(std::size_t row_bytes, std::size_t scale_bytes, std::size_t weight_bytes,
                                         std::size_t index_bytes) const {
    return ReceiveBlock::make(slots(), row_bytes, scale_bytes, weight_bytes, index_bytes);
  }
  // Where block `block` of a slot's scales is, in floats: those of one block lie next to each other.
  MOE_EP_HOST_DEVICE std::size_t scale(std::size_t slot, std::size_t block, std::size_t blocks) const {
    return (slot / capacity * blocks + block) * capacity + slot % capacity;
  }
};

}  // namespace moe_ep
