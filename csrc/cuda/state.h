// What host and kernels share: the rank's view of its group, routing tables, arguments of kernels, and the report
// that kernels leave in host-mapped memory. Plain data; device helpers are in the .cuh files.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/heap_layout.h"

namespace moe_ep {
namespace gpu {

// Of one kernel, for all ranks of one GPU together: see Communicator's check of num_sms.
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMostScalesAChunk = 32;  // so a chunk has at most 4096 elements where rows are quantised
constexpr int kReduceChunk = 1024;     // bytes of a row that a warp sums at a time: two vectors a lane
constexpr int kWideReduceChunk = 2048;

// How an operation ended, where it did not end well. The first one is kept until the host has seen it.
enum class Outcome : std::uint32_t {
  kOk = 0,
  kNoRoom,      // a rank's block is too small for its rows: [rank, need bytes, block bytes]
  kOverflow,    // more rows than max_recv_tokens: [rank, need, limit]
  kTooMany,     // more rows than 32-bit slots: [rank, need]
  kBadRoute,    // an id out of range: [rank, 1 + index in topk_idx, id, topk]
  kFullSlots,   // more rows for an expert than low-latency slots: [rank, need, capacity]
  kOtherRoute,  // another id than was dispatched: [rank, 1 + index in topk_idx, id, topk]
  kMismatch,    // ranks disagree: [rank, compared field, theirs, mine]
  kTimeout,     // [rank, step, seen]
  kLost,        // [rank, step, seen, departure state]
  kAborted,     // the host gave up: [rank, step, seen]
  kMasked,      // a peer has masked this rank: [peer]
};

// Outcomes after which the buffer can go on: every rank gave the same operation up together.
MOE_EP_HOST_DEVICE constexpr bool is_fatal(Outcome outcome) { return outcome >= Outcome::kMismatch; }

constexpr int kReportValues = 4;

struct ReportedOutcome {
  std::uint32_t outcome;
  std::uint32_t operation;
  std::uint64_t sequence;
  std::int64_t values[kReportValues];
};

// Host-mapped memory, one a rank. `call` belongs to the call that waits for it; `failure` is the first outcome of
// any kind since the host last took one.
struct Report {
  std::uint64_t started;  // ticket of the last kernel that began
  ReportedOutcome call;
  std::uint32_t failure_state;  // 0: none, 1: being written, 2: there
  ReportedOutcome failure;
  std::uint32_t abort;  // written by the host: waits end
};

// Behind the report, one word each: what a call that waits is told. A word names its call, so each stands for itself
// and no fence, which would cost microseconds, has to order them. Where the outcome is not kOk, `call` is there before
// it; the other words come with kOk and kNoRoom only.
enum class Word : int {
  kOutcome = 0,
  kNumRows,      // to return
  kBlockRows,    // of the receive block
  kSentRows,     // that go to other ranks
  kOwnFirst,     // layout rank: where this rank's own rows begin in its block
  kOwnRows,      // and how many they are
  kFirstExpert,  // then received rows, no padding, of each local expert
};

MOE_EP_HOST_DEVICE inline std::uint64_t* words_of(Report* report) {
  return reinterpret_cast<std::uint64_t*>(report + 1);
}
MOE_EP_HOST_DEVICE constexpr std::uint64_t tagged_word(std::uint64_t ticket, std::int64_t value) {
  return ticket << 32 | static_cast<std::uint32_t>(value);
}
MOE_EP_HOST_DEVICE constexpr bool has_tag(std::uint64_t word, std::uint64_t ticket) {
  return static_cast<std::uint32_t>(word >> 32) == static_cast<std::uint32_t>(ticket);
}

// A row that crosses: into which slot of which rank's block. rank -1: none; entries of a token are packed to the
// front, ranks ascending, then top-k positions ascending.
struct Entry {
  std::int32_t slot;
  std::int16_t rank;
  std::int16_t position;  // -1 where the row stands for all of the token's experts there
};

// In two stages rows are sent in parts, and go to their experts' places as they arrive; they are summed in parts as
// well, and cross back as sums are made. So one stage goes on while the other has begun.
constexpr int kMostParts = 32;
constexpr int kMostSentParts = 8;  // each is waited for by the warps that have sent it
static_assert(kMostSentParts <= kMostParts, "their counters have room");

// Device memory of this rank alone, kept between operations.
struct DeviceState {
  std::uint64_t sequence;                // operations done
  std::uint32_t failed;                  // an operation ended fatally: later ones do nothing
  std::uint32_t blocks[3];               // counters of blocks that wrap to 0 by themselves
  std::uint32_t passed;                  // mark of the last barrier that all blocks have come to
  std::uint64_t bad_route;               // smallest flat index in topk_idx of an id out of range; kNoBadRoute
  std::uint32_t next_item;               // of the rows to send, taken by warps in turn
  std::uint32_t next_place;              // of the rows that go to their experts' places, likewise
  std::uint64_t sending;                 // sequence number of the dispatch whose second stage has not ended; 0: none
  std::uint64_t given_up;                // sequence number of the last dispatch that all ranks gave up
  std::uint32_t warps_past[kMostParts];  // that have done all they have of a part; 0 again in the end
  std::uint32_t parts_told;              // to all ranks; likewise
};

constexpr std::uint64_t kNoBadRoute = ~0ull;

// The routing of one handle, in device memory that the handle owns.
struct RoutingHeader {
  std::uint64_t id;            // sequence number of the dispatch that made it
  std::int64_t received_rows;  // rows of this rank's block that carry a token
  std::int64_t num_parts;      // in which rows are sent, in two stages
};

struct RoutingShape {
  std::size_t num_ranks;
  std::size_t num_local_experts;
  std::size_t num_tokens;
  std::size_t topk;
};

struct RoutingView {
  RoutingHeader* header;
  std::int64_t* local_rows;     // [num_local_experts] rows received, no padding
  std::int64_t* returned_rows;  // [num_local_experts] rows returned: with padding in layout expert
  std::int64_t* local_first;    // [num_local_experts] first row in layout expert
  std::int64_t* rows_at_rank;   // [num_ranks] rows of every rank's block
  std::int64_t* sent_first;     // [num_ranks] one row a (token, rank): where this rank's rows begin in that block,
  std::int64_t* sent_rows;      // [num_ranks] how many they are,
  std::int64_t* rows_from;      // [num_ranks] and how many rows of this rank's block came from each rank
  Entry* entries;               // [num_tokens, topk]
  std::int32_t* ids;            // [num_tokens, topk]
  std::int32_t* expert_slots;   // [num_tokens, topk] two stages: places of rows where their expert's are; -1: none
  std::int32_t* part_tokens;    // [kMostSentParts] two stages: the token after the last one of a part
  std::int32_t* part_rows;      // [kMostSentParts, num_ranks] rows for each rank up to there

  MOE_EP_HOST_DEVICE static std::size_t entries_offset(const RoutingShape& shape) {
    return align_up(sizeof(RoutingHeader) + (3 * shape.num_local_experts + 4 * shape.num_ranks) * sizeof(std::int64_t),
                    16);
  }
  MOE_EP_HOST_DEVICE static std::size_t bytes(const RoutingShape& shape) {
    return entries_offset(shape) + shape.num_tokens * shape.topk * (sizeof(Entry) + 2 * sizeof(std::int32_t)) +
           kMostSentParts * (1 + shape.num_ranks) * sizeof(std::int32_t);
  }
  MOE_EP_HOST_DEVICE static RoutingView at(void* memory, const RoutingShape& shape) {
    auto* base = static_cast<std::uint8_t*>(memory);
    RoutingView view{};
    view.header = reinterpret_cast<RoutingHeader*>(base);
    view.local_rows = reinterpret_cast<std::int64_t*>(base + sizeof(RoutingHeader));
    view.returned_rows = view.local_rows + shape.num_local_experts;
    view.local_first = view.returned_rows + shape.num_local_experts;
    view.rows_at_rank = view.local_first + shape.num_local_experts;
    view.sent_first = view.rows_at_rank + shape.num_ranks;
    view.sent_rows = view.sent_first + shape.num_ranks;
    view.rows_from = view.sent_rows + shape.num_ranks;
    view.entries = reinterpret_cast<Entry*>(base + entries_offset(shape));
    view.ids = reinterpret_cast<std::int32_t*>(view.entries + shape.num_tokens * shape.topk);
    view.expert_slots = view.ids + shape.num_tokens * shape.topk;
    view.part_tokens = view.expert_slots + shape.num_tokens * shape.topk;
    view.part_rows = view.part_tokens + kMostSentParts;
    return view;
  }
};

// What every kernel of a rank knows of its group. Passed by value; tables are in device memory.
struct Group {
  HeapLayout layout;
  std::int32_t rank;
  std::int32_t num_ranks;
  std::int32_t num_experts;
  std::int32_t alignment;
  std::uint8_t* const* bases;           // [num_ranks] heaps as this process maps them
  const std::int32_t* rank_of_expert;   // [num_experts]
  const std::int32_t* local_of_expert;  // [num_experts]
  const std::int32_t* experts_by_rank;  // [num_experts] sorted by (rank, local index)
  const std::int32_t* first_of_rank;    // [num_ranks + 1] into experts_by_rank
  std::int32_t* block_counts;           // [blocks][bins] workspace
  DeviceState* state;
  Report* report;  // as the device maps it
  std::uint64_t timeout_ns;
  bool on_one_device;  // all ranks
};

// Bytes per row of the arrays of a receive block.
struct RowSizes {
  std::uint32_t row;
  std::uint32_t scale;
  std::uint32_t weight;
  std::uint32_t index;

  MOE_EP_HOST_DEVICE ReceiveBlock block(std::int64_t rows) const {
    return ReceiveBlock::make(static_cast<std::size_t>(rows), row, scale, weight, index);
  }
};

// Arrays of one rank's receive block.
struct Destination {
  std::uint8_t* rows;
  float* scales;
  float* weights;
  std::int64_t* indices;
};

// Where rows come from and what becomes of them on the way.
struct RowSource {
  const std::uint8_t* rows;  // [num_tokens, hidden] of `element`
  const float* scales;       // of rows that are quantised already, or null
  const float* weights;      // [num_tokens, topk] or null
  std::int32_t hidden;
  Element element;
  bool quantize;  // to e4m3 in blocks of 128
  bool power_of_two;
};

// Elements that a warp quantises at a time: eight blocks.
constexpr int kQuantizedAtOnce = 8 * static_cast<int>(kFp8Block);

// Of each warp's ring where rows are sent. Quantising a chunk takes as long as loading one: a third stage is sent from
// meanwhile.
MOE_EP_HOST_DEVICE constexpr int send_stages(bool quantize) { return quantize ? 3 : 2; }

// What counting routes keeps in shared memory beside its warps' counters, at most, in arrays as long as these.
constexpr int kArraysBesideCounters = 4;

// How a block's warps move rows: see send.cuh and reduce.cuh.
struct Pipeline {
  std::int32_t warps;        // that move rows
  std::int32_t stages;       // of each warp's ring where rows are summed; send_stages() where they are sent
  std::int32_t chunk_bytes;  // of a source row, per stage
  std::int32_t use_bulk;     // bulk asynchronous copies (sm_90 and later, rows of whole 16 bytes); else vectors
  std::int32_t count_warps;  // that count routes: as many as shared memory has counters for
};

struct DispatchParams {
  Group group;
  RowSource source;
  RowSizes sizes;
  Pipeline pipeline;
  RoutingView routing;
  bool fresh;  // route `topk_idx`; otherwise reuse the routing
  const std::int64_t* topk_idx;
  std::int64_t num_tokens;
  std::int32_t topk;
  RowLayout layout;
  bool deduplicated;           // one row a (token, rank)
  bool tells_parts;            // to the second stage, which runs at the same time
  std::int64_t max_recv_rows;  // of the rows returned; -1: exact
  std::int64_t block_rows;     // that this rank's block is laid out for; -1: as many as come
  std::int64_t block_offset;   // of this rank's receive block in its heap
  std::int64_t block_bytes;    // -1: no room
  std::uint64_t ticket;        // 0: nobody waits for the counts

  // Of two stages: a row a (token, rank), which the second one brings to its experts' places.
  MOE_EP_HOST_DEVICE bool is_staged() const { return deduplicated && layout == RowLayout::kExpert; }
};

// The second stage: expert-major rows from the rank-major rows of this rank's block.
struct ExpandParams {
  Group group;
  RowSource source;  // the rows as they arrive; weights [received rows, topk]
  RowSizes sizes;    // of the rows returned
  Pipeline pipeline;
  RoutingView routing;
  Entry* fan;                 // [received rows, topk]: slots of the rows returned; every rank in it is 0
  bool fresh;                 // the fan-out comes with the rows; otherwise it is reused
  bool awaits_parts;          // the rows are on their way
  const std::int64_t* slots;  // [received rows, topk] as they arrive; -1: none
  std::int32_t topk;
  std::int32_t num_local_experts;
  std::uint8_t* block;
  std::int64_t num_rows;  // of `block`
};

struct CombineParams {
  Group group;
  Pipeline pipeline;
  RoutingView routing;
  std::int64_t num_tokens;
  std::int32_t topk;
  std::int32_t most_entries;  // that a token has
  std::int32_t hidden;
  Element element;
  RowLayout layout;
  bool deduplicated;
  bool has_weights;
  bool weights_at_rows;  // read from the rows' ranks; otherwise they are applied already
  bool has_values;
  bool awaits_parts;             // rows are being summed by reductions at the same time
  bool reduces;                  // this rank's has been launched
  std::int32_t part_log2;        // rows from a rank in a part
  const std::uint8_t* own_rows;  // where this rank reads its own, if not in its heap
  std::int64_t rows_offset;      // in this rank's heap; -1 in `block_bytes`: no room
  std::int64_t weights_offset;
  std::int64_t values_offset;
  std::int64_t block_bytes;
  std::uint8_t* out;
  float* values_out;
};

// Weighted sums of each received row's experts, before they cross back: stage two in reverse.
struct ReduceParams {
  Group group;
  Pipeline pipeline;
  RoutingView routing;
  const Entry* fan;
  bool tells_parts;        // to the combine that runs at the same time
  std::int32_t part_log2;  // rows from a rank in a part
  std::int32_t topk;
  std::int32_t stage_rows;  // of a token, that are read at a time
  std::int32_t hidden;
  Element element;
  const std::uint8_t* rows;
  const float* weights;  // [rows] or null
  const float* values;   // [rows] or null
  std::uint8_t* out;     // [received rows, hidden]
  float* values_out;     // [received rows, topk]
};

}  // namespace gpu
}  // namespace moe_ep
