// From expert ids to slots: who gets a token's row, and where it will lie there. All of it is integer
// arithmetic on counts that every rank knows, so no rank asks another where to write.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "common/heap_layout.h"

namespace moe_ep {

struct Placement {
  std::vector<std::int32_t> rank_of_expert;
  std::vector<std::int32_t> local_of_expert;
  std::vector<std::vector<std::int32_t>> experts_of_rank;

  Placement(const std::vector<std::int32_t>& expert_to_rank, int num_ranks);
};

// A row that crosses: to which rank, into which slot of that rank's receive block.
struct Entry {
  std::int32_t rank;
  std::int32_t slot;
  std::int32_t position;  // top-k position; -1 where the row stands for all of the token's experts there
};

// Rows of each expert and, deduplicated, of each rank that one source sends.
struct Counts {
  std::vector<std::int32_t> per_expert;
  std::vector<std::int32_t> per_rank;
};

// What a rank passes to a dispatch of either mode.
struct TokenArguments {
  const void* x;    // [num_tokens, hidden] of `element`
  Element element;  // kFloat8: quantised already, with `scales`
  // An empty tensor's address may be null, so what is there is said apart from where it is.
  bool has_scales;
  bool has_weights;
  const float* scales;  // [num_tokens, ceil(hidden / 128)]
  std::int64_t num_tokens;
  std::int64_t hidden;
  const std::int64_t* topk_idx;  // [num_tokens, topk]; null where a routing is reused
  std::int64_t topk;
  const float* weights;  // [num_tokens, topk]
  bool quantize;
  bool power_of_two;
};

// The tokens that a rank sends, and where each of their rows goes.
struct SentRows {
  std::int64_t num_tokens = 0;
  std::int64_t topk = 0;
  std::vector<std::int32_t> expert_ids;  // [num_tokens, topk]
  // Entries of token t: [entry_begin[t], entry_begin[t + 1]), ranks ascending, then positions ascending.
  std::vector<std::int64_t> entry_begin;
  std::vector<Entry> entries;
  std::int64_t entries_to_peers = 0;  // entries whose rank is another one
};

// The routing state of a dispatch, kept by its handle.
struct Routing : SentRows {
  std::int64_t id = 0;  // sequence number of the dispatch that made it: equal on all ranks
  RowLayout layout = RowLayout::kExpert;
  bool two_stage = false;  // layout expert made from rank-major rows by a local pass
  std::int64_t max_recv_rows = -1;

  std::vector<std::int64_t> rows_at_rank;  // rows of every rank's receive block, padding included

  std::int64_t num_rows = 0;      // rows returned to this rank's caller
  std::int64_t num_received = 0;  // of these, rows that carry a token
  std::vector<std::int64_t> tokens_per_local_expert;
  std::vector<std::int64_t> first_row_of_local_expert;
  // Rows [first, second) of the returned rows that carry nothing.
  std::vector<std::pair<std::int64_t, std::int64_t>> padding;

  // Two stages: the returned rows made from each received row, and their top-k positions.
  std::vector<std::int64_t> fan_begin;
  std::vector<std::int32_t> fan_rows;
  std::vector<std::int32_t> fan_positions;

  bool rows_are_deduplicated() const { return layout == RowLayout::kRank || two_stage; }
  // Rows of this rank's receive block.
  std::int64_t block_rows(int rank) const { return rows_at_rank[static_cast<std::size_t>(rank)]; }
};

// What this rank wants to send: its ids, read once so that nothing can change under the counts.
struct LocalRoutes {
  std::vector<std::int32_t> expert_ids;
  Counts counts;
  // The first id outside [-1, num_experts): 1 + its flat index (0: there is none), and the id. Such ids are not
  // counted, and cut to 32 bits above.
  std::int64_t bad_route = 0;
  std::int64_t bad_expert = 0;
};

LocalRoutes read_routes(const Placement& placement, int num_ranks, const std::int64_t* topk_idx,
                        std::int64_t num_tokens, std::int64_t topk);

// The next free slot for a row of each expert or, deduplicated, for each rank's; -1: nothing is sent there.
struct NextSlots {
  bool deduplicated;
  std::vector<std::int64_t> slots;
};

// Fills in the entries of `sent`, whose tokens and ids are there, from the slots that are free at their ranks.
void add_entries(const Placement& placement, int rank, NextSlots next, SentRows& sent);

struct RoutingRequest {
  std::int64_t id;
  RowLayout layout;
  bool two_stage;
  std::int64_t num_tokens;
  std::int64_t topk;
  std::int64_t alignment;
  int rank;
  // What every source sends, and the fixed row count each rank asked for (-1: exact).
  const std::vector<Counts>& counts;
  const std::vector<std::int64_t>& max_recv_rows;
};

// Rows that `rank` returns to its caller before any fixed row count: padding included.
std::int64_t exact_rows(const Placement& placement, const RoutingRequest& request, int rank);

Routing make_routing(const Placement& placement, const RoutingRequest& request, std::vector<std::int32_t> expert_ids);

// Completes the routing of two stages from the local expert ids that arrived with the rows.
void add_fan_out(Routing& routing, const std::int64_t* received_ids);

}  // namespace moe_ep
