#include "host/routing.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "common/index.h"

namespace moe_ep {
namespace {

std::int64_t aligned(std::int64_t rows, std::int64_t alignment) {
  return (rows + alignment - 1) / alignment * alignment;
}

std::int64_t rows_of_expert(const std::vector<Counts>& counts, std::int32_t expert) {
  std::int64_t rows = 0;
  for (const Counts& source : counts) rows += source.per_expert[at(expert)];
  return rows;
}

std::int64_t rows_of_rank(const std::vector<Counts>& counts, int rank) {
  std::int64_t rows = 0;
  for (const Counts& source : counts) rows += source.per_rank[at(rank)];
  return rows;
}

// The next free slot of this source for every expert (of its rank's expert-major block).
std::vector<std::int64_t> first_slots_by_expert(const Placement& placement, const RoutingRequest& request) {
  std::vector<std::int64_t> first(placement.rank_of_expert.size(), 0);
  for (const auto& experts : placement.experts_of_rank) {
    std::int64_t row = 0;
    for (std::int32_t expert : experts) {
      first[at(expert)] = row;
      for (int source = 0; source < request.rank; ++source) {
        first[at(expert)] += request.counts[at(source)].per_expert[at(expert)];
      }
      row += aligned(rows_of_expert(request.counts, expert), request.alignment);
    }
  }
  return first;
}

std::vector<std::int64_t> first_slots_by_rank(const RoutingRequest& request) {
  std::vector<std::int64_t> first(request.counts.size(), 0);
  for (std::size_t rank = 0; rank < first.size(); ++rank) {
    for (int source = 0; source < request.rank; ++source) first[rank] += request.counts[at(source)].per_rank[rank];
  }
  return first;
}

void add_local_rows(const Placement& placement, const RoutingRequest& request, Routing& routing) {
  std::int64_t row = 0;
  for (std::int32_t expert : placement.experts_of_rank[at(request.rank)]) {
    const std::int64_t rows = rows_of_expert(request.counts, expert);
    routing.tokens_per_local_expert.push_back(rows);
    routing.first_row_of_local_expert.push_back(row);
    if (request.layout == RowLayout::kExpert) {
      const std::int64_t end = row + aligned(rows, request.alignment);
      if (row + rows < end) routing.padding.emplace_back(row + rows, end);
      row = end;
      routing.num_received += rows;
    }
  }
  if (request.layout == RowLayout::kRank) row = routing.num_received = rows_of_rank(request.counts, request.rank);
  const std::int64_t fixed = request.max_recv_rows[at(request.rank)];
  routing.num_rows = fixed < 0 ? row : fixed;
  if (row < routing.num_rows) routing.padding.emplace_back(row, routing.num_rows);
}

}  // namespace

Placement::Placement(const std::vector<std::int32_t>& expert_to_rank, int num_ranks)
    : rank_of_expert(expert_to_rank), experts_of_rank(at(num_ranks)) {
  for (std::size_t expert = 0; expert < expert_to_rank.size(); ++expert) {
    auto& experts = experts_of_rank[at(expert_to_rank[expert])];
    local_of_expert.push_back(static_cast<std::int32_t>(experts.size()));
    experts.push_back(static_cast<std::int32_t>(expert));
  }
}

LocalRoutes read_routes(const Placement& placement, int num_ranks, const std::int64_t* topk_idx,
                        std::int64_t num_tokens, std::int64_t topk) {
  constexpr std::int64_t kFirst = std::numeric_limits<std::int32_t>::min();
  constexpr std::int64_t kLast = std::numeric_limits<std::int32_t>::max();
  const auto num_experts = static_cast<std::int64_t>(placement.rank_of_expert.size());
  LocalRoutes routes;
  routes.expert_ids.reserve(at(num_tokens * topk));
  routes.counts = Counts{std::vector<std::int32_t>(at(num_experts), 0), std::vector<std::int32_t>(at(num_ranks), 0)};
  std::vector<std::int64_t> last_token(at(num_ranks), -1);
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    for (std::int64_t position = 0; position < topk; ++position) {
      const std::int64_t expert = topk_idx[token * topk + position];
      routes.expert_ids.push_back(static_cast<std::int32_t>(std::clamp<std::int64_t>(expert, kFirst, kLast)));
      if (expert < -1 || expert >= num_experts) {
        if (routes.bad_route != 0) continue;
        routes.bad_route = token * topk + position + 1;
        routes.bad_expert = expert;
        continue;
      }
      if (expert == -1) continue;
      ++routes.counts.per_expert[at(expert)];
      const std::int32_t rank = placement.rank_of_expert[at(expert)];
      if (last_token[at(rank)] != token) ++routes.counts.per_rank[at(rank)];
      last_token[at(rank)] = token;
    }
  }
  return routes;
}

void add_entries(const Placement& placement, int rank, NextSlots next, SentRows& sent) {
  sent.entry_begin.reserve(at(sent.num_tokens + 1));
  sent.entries.reserve(at(sent.num_tokens * sent.topk));
  sent.entry_begin.push_back(0);
  for (std::int64_t token = 0; token < sent.num_tokens; ++token) {
    const std::size_t first = sent.entries.size();
    for (std::int64_t position = 0; position < sent.topk; ++position) {
      const std::int32_t expert = sent.expert_ids[at(token * sent.topk + position)];
      if (expert < 0) continue;
      const std::int32_t to = placement.rank_of_expert[at(expert)];
      std::int64_t& slot = next.slots[at(next.deduplicated ? to : expert)];
      const bool known =
          next.deduplicated && std::any_of(sent.entries.begin() + static_cast<std::ptrdiff_t>(first),
                                           sent.entries.end(), [to](const Entry& e) { return e.rank == to; });
      if (known || slot < 0) continue;
      sent.entries.push_back(
          Entry{to, static_cast<std::int32_t>(slot++), next.deduplicated ? -1 : static_cast<std::int32_t>(position)});
    }
    // Few entries and mostly in order: an insertion sort keeps equal ranks in top-k order.
    for (std::size_t i = first + 1; i < sent.entries.size(); ++i) {
      for (std::size_t j = i; j > first && sent.entries[j].rank < sent.entries[j - 1].rank; --j) {
        std::swap(sent.entries[j], sent.entries[j - 1]);
      }
    }
    for (std::size_t i = first; i < sent.entries.size(); ++i) sent.entries_to_peers += sent.entries[i].rank != rank;
    sent.entry_begin.push_back(static_cast<std::int64_t>(sent.entries.size()));
  }
}

std::int64_t exact_rows(const Placement& placement, const RoutingRequest& request, int rank) {
  if (request.layout == RowLayout::kRank) return rows_of_rank(request.counts, rank);
  std::int64_t rows = 0;
  for (std::int32_t expert : placement.experts_of_rank[at(rank)]) {
    rows += aligned(rows_of_expert(request.counts, expert), request.alignment);
  }
  return rows;
}

Routing make_routing(const Placement& placement, const RoutingRequest& request, std::vector<std::int32_t> expert_ids) {
  Routing routing;
  routing.id = request.id;
  routing.layout = request.layout;
  routing.two_stage = request.two_stage && request.layout == RowLayout::kExpert;
  routing.num_tokens = request.num_tokens;
  routing.topk = request.topk;
  routing.max_recv_rows = request.max_recv_rows[at(request.rank)];
  routing.expert_ids = std::move(expert_ids);
  for (int rank = 0; rank < static_cast<int>(request.counts.size()); ++rank) {
    const std::int64_t fixed = request.max_recv_rows[at(rank)];
    if (routing.two_stage) {
      routing.rows_at_rank.push_back(rows_of_rank(request.counts, rank));
    } else {
      routing.rows_at_rank.push_back(fixed < 0 ? exact_rows(placement, request, rank) : fixed);
    }
  }
  add_local_rows(placement, request, routing);
  const bool deduplicated = routing.rows_are_deduplicated();
  NextSlots next{deduplicated, deduplicated ? first_slots_by_rank(request) : first_slots_by_expert(placement, request)};
  add_entries(placement, request.rank, std::move(next), routing);
  return routing;
}

void add_fan_out(Routing& routing, const std::int64_t* received_ids) {
  std::int64_t received = 0;
  for (std::int64_t rows : routing.tokens_per_local_expert) received += rows;
  std::vector<std::int64_t> next = routing.first_row_of_local_expert;
  std::int64_t staged = 0;
  routing.fan_begin.push_back(0);
  for (; static_cast<std::int64_t>(routing.fan_rows.size()) < received; ++staged) {
    for (std::int64_t position = 0; position < routing.topk; ++position) {
      const std::int64_t local = received_ids[staged * routing.topk + position];
      if (local < 0) continue;
      routing.fan_rows.push_back(static_cast<std::int32_t>(next[at(local)]++));
      routing.fan_positions.push_back(static_cast<std::int32_t>(position));
    }
    routing.fan_begin.push_back(static_cast<std::int64_t>(routing.fan_rows.size()));
  }
}

}  // namespace moe_ep
