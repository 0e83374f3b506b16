// Offsets inside one rank's symmetric heap. The only place that knows them: host code, kernels and tests
// all ask here, so every rank and every device computes the same addresses.
//
//   header | posts[2][num_ranks] | flags[kNumSteps][num_ranks] | grants[2][num_ranks]
//          | departures[num_ranks] | pool | overflow | low latency (see low_latency_layout.h)
//
// Everything before the pool is written by peers into the reader's heap, so a rank waits on its own
// memory only. Posts and grants are double-buffered by the parity of the sequence number: a peer can be at
// most one operation ahead, because every operation waits for a post of every rank.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define MOE_EP_HOST_DEVICE __host__ __device__
#else
#define MOE_EP_HOST_DEVICE
#endif

namespace moe_ep {

constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kRegionAlignment = 4096;
constexpr std::uint64_t kHeapMagic = 0x6d6f655f65703034ULL;
constexpr std::size_t kDepartureText = 448;

MOE_EP_HOST_DEVICE constexpr std::size_t align_up(std::size_t value, std::size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

// What a flag of one source rank says it has done for the operation whose sequence number it holds. That of kReduced
// and that of kSent say how much of it is done, too: see progress_flag().
enum class Step : int { kPost = 0, kGrant = 1, kArrival = 2, kRead = 3, kReduced = 4, kSent = 5 };
constexpr int kNumSteps = 6;

// `done`: parts whose rows have been summed, or rows that have been sent.
constexpr int kProgressBits = 32;
MOE_EP_HOST_DEVICE constexpr int progress_bits(Step step) {
  return step == Step::kReduced || step == Step::kSent ? kProgressBits : 0;
}
MOE_EP_HOST_DEVICE constexpr std::uint64_t progress_flag(std::uint64_t sequence, std::uint32_t done) {
  return sequence << kProgressBits | done;
}

enum class Operation : std::int32_t { kDispatch = 0, kCombine = 1, kLowDispatch = 2, kLowCombine = 3 };
enum class RowLayout : std::int32_t { kExpert = 0, kRank = 1 };
enum class Element : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat8 = 3 };

MOE_EP_HOST_DEVICE constexpr std::size_t element_bytes(Element element) {
  return element == Element::kFloat32 ? 4 : element == Element::kFloat8 ? 1 : 2;
}

// Elements along hidden that share one FP8 scale.
constexpr std::size_t kFp8Block = 128;

// What a rank tells every peer at the start of an operation. The first group must be equal on all ranks.
struct OperationPost {
  std::int64_t operation;
  std::int64_t layout;
  std::int64_t element;
  std::int64_t row_bytes;
  std::int64_t scale_bytes;
  std::int64_t topk;
  std::int64_t has_weights;
  std::int64_t has_values;
  std::int64_t routing_id;  // sequence number of the dispatch that made the handle; 0: this one makes it

  std::int64_t max_recv_rows;  // -1: exact sizes
  std::int64_t block_rows;     // rows that the block is laid out for; -1: as many as come
  std::int64_t bad_route;      // 1 + flat index in topk_idx of an id out of range; 0: none
  std::int64_t bad_expert;     // that id
  std::int64_t block_offset;   // dispatch: where peers may write; combine: where they may read
  std::int64_t block_bytes;    // -1: this rank could not find room, the operation is off
  std::int64_t side_offset;    // combine: weights (layout expert), then values
  std::int64_t values_offset;
};

// Leading fields of a post that are compared.
constexpr int kNumComparedFields = 9;

// A receive block that was not large enough is replaced by a granted one once all counts are known.
struct Grant {
  std::int64_t block_offset;  // -1: no room
};

// One flag a cache line: sources write theirs at the same time.
struct alignas(kCacheLine) Flag {
  std::uint64_t value;
};

struct alignas(kCacheLine) Departure {
  std::uint32_t state;  // 0: present, 1: closed, 2: failed
  char text[kDepartureText];
};

struct alignas(kCacheLine) HeapHeader {
  std::uint64_t magic;
  alignas(kCacheLine) std::uint32_t doorbell;  // counts events, so that a sleeper can't miss one
  alignas(kCacheLine) std::uint32_t sleepers;
};

struct HeapLayout {
  std::size_t num_ranks;
  std::size_t num_experts;
  std::size_t pool_bytes;
  std::size_t overflow_bytes;
  std::size_t low_bytes;

  // Regions of at least so many bytes.
  static HeapLayout make(std::size_t num_ranks, std::size_t num_experts, std::size_t pool_bytes,
                         std::size_t overflow_bytes, std::size_t low_bytes = 0) {
    return HeapLayout{num_ranks, num_experts, align_up(pool_bytes, kRegionAlignment),
                      align_up(overflow_bytes, kRegionAlignment), align_up(low_bytes, kRegionAlignment)};
  }

  // A post is followed by this rank's outgoing rows per expert and per rank, int32 each.
  MOE_EP_HOST_DEVICE std::size_t post_stride() const {
    return align_up(sizeof(OperationPost) + (num_experts + num_ranks) * sizeof(std::int32_t), kCacheLine);
  }
  MOE_EP_HOST_DEVICE std::size_t post(std::size_t parity, std::size_t source) const {
    return align_up(sizeof(HeapHeader), kCacheLine) + (parity * num_ranks + source) * post_stride();
  }
  MOE_EP_HOST_DEVICE std::size_t flag(Step step, std::size_t source) const {
    return post(2, 0) + (static_cast<std::size_t>(step) * num_ranks + source) * sizeof(Flag);
  }
  MOE_EP_HOST_DEVICE std::size_t grant(std::size_t parity, std::size_t source) const {
    return flag(static_cast<Step>(kNumSteps), 0) + (parity * num_ranks + source) * sizeof(Grant);
  }
  MOE_EP_HOST_DEVICE std::size_t departure(std::size_t source) const {
    return align_up(grant(2, 0), kCacheLine) + source * sizeof(Departure);
  }
  MOE_EP_HOST_DEVICE std::size_t control_bytes() const { return align_up(departure(num_ranks), kRegionAlignment); }
  MOE_EP_HOST_DEVICE std::size_t pool() const { return control_bytes(); }
  MOE_EP_HOST_DEVICE std::size_t overflow() const { return align_up(pool() + pool_bytes, kRegionAlignment); }
  MOE_EP_HOST_DEVICE std::size_t low() const { return align_up(overflow() + overflow_bytes, kRegionAlignment); }
  MOE_EP_HOST_DEVICE std::size_t total_bytes() const { return align_up(low() + low_bytes, kRegionAlignment); }
};

// Arrays of one receive block. Senders and the receiver derive the same offsets from the row count.
struct ReceiveBlock {
  std::size_t rows;
  std::size_t scales;
  std::size_t weights;
  std::size_t indices;
  std::size_t total;

  // Bytes per row of: the row, its scales, its weights, its int64 local expert ids. 0 where there are none.
  MOE_EP_HOST_DEVICE static ReceiveBlock make(std::size_t num_rows, std::size_t row_bytes, std::size_t scale_bytes,
                                              std::size_t weight_bytes, std::size_t index_bytes) {
    ReceiveBlock block{};
    block.rows = 0;
    block.scales = align_up(num_rows * row_bytes, kCacheLine);
    block.weights = block.scales + align_up(num_rows * scale_bytes, kCacheLine);
    block.indices = block.weights + align_up(num_rows * weight_bytes, kCacheLine);
    block.total = block.indices + align_up(num_rows * index_bytes, kCacheLine);
    return block;
  }
};

}  // namespace moe_ep
