// Dispatch into fixed slots: exchange counts, write every row once into its slot; its receive half waits for the rows.
#include "host/low_latency.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/peer_text.h"

namespace moe_ep {
namespace {

std::size_t most_experts(const Placement& placement) {
  std::size_t most = 0;
  for (const auto& experts : placement.experts_of_rank) most = std::max(most, experts.size());
  return most;
}

LowSlots slots_of(const LowLatencyOptions& options, const Placement& placement) {
  const std::size_t capacity = placement.experts_of_rank.size() * at(options.tokens_per_rank);
  return LowSlots{capacity, options.layout == RowLayout::kExpert ? most_experts(placement) : 1};
}

}  // namespace

LowLatency::LowLatency(std::shared_ptr<Pool> pool, Peers& peers, const Placement& placement, Workers& workers,
                       const LowLatencyOptions& options)
    : pool_(std::move(pool)),
      peers_(peers),
      placement_(placement),
      workers_(workers),
      kernels_(kernels()),
      options_(options),
      layout_(pool_->low()),
      slots_(slots_of(options, placement)),
      exchange_(peers, layout_, options.mask_on_timeout) {}

// Keeps the heap. Not the pool itself, which others keep too.
std::shared_ptr<void> LowLatency::hold(std::size_t index) {
  std::shared_ptr<void> hold = holds_[index].lock();
  if (hold == nullptr) {
    hold = std::make_shared<std::shared_ptr<Pool>>(pool_);
    holds_[index] = hold;
  }
  return hold;
}

Block LowLatency::buffer(std::size_t offset, std::size_t bytes, std::size_t index) {
  return Block{peers_.base(peers_.rank()) + offset, bytes, hold(index)};
}

Block LowLatency::counts(const LowRouting& routing) {
  struct Counted {
    std::vector<std::int32_t> numbers;
    std::shared_ptr<void> hold;
  };
  auto counted = std::make_shared<Counted>(Counted{routing.tokens_per_local_expert, hold(routing.operation.index)});
  counted->numbers.push_back(static_cast<std::int32_t>(routing.num_received));
  auto* data = reinterpret_cast<std::uint8_t*>(counted->numbers.data());
  return Block{data, counted->numbers.size() * sizeof(std::int32_t), std::move(counted)};
}

void LowLatency::mask(const std::vector<int>& ranks) {
  for (int rank : ranks) exchange_.mask(rank);
}

std::vector<int> LowLatency::masked_ranks() const {
  std::vector<int> ranks;
  for (int rank = 0; rank < peers_.num_ranks(); ++rank) {
    if (exchange_.masked(rank)) ranks.push_back(rank);
  }
  return ranks;
}

std::shared_ptr<LowRouting> LowLatency::send_dispatch(const LowDispatchArguments& arguments) {
  const bool has_scales = arguments.quantize || arguments.has_scales;
  const Element element = has_scales ? Element::kFloat8 : arguments.element;
  Sizes sizes{};
  sizes.row = at(arguments.hidden) * element_bytes(element);
  sizes.scale = has_scales ? scales_per_row(arguments.hidden) * sizeof(float) : 0;
  sizes.weight = arguments.has_weights ? sizeof(float) * at(arguments.topk) : 0;
  sizes.index = by_expert() ? 0 : sizeof(std::int64_t) * at(arguments.topk);
  auto routing = std::make_shared<LowRouting>();
  routing->num_tokens = arguments.num_tokens;
  routing->topk = arguments.topk;
  routing->has_weights = arguments.has_weights;
  routing->offsets = slots_.arrays(sizes.row, sizes.scale, sizes.weight, sizes.index);
  if (routing->offsets.total > layout_.receive_bytes) throw std::logic_error("the receive buffers are too small");
  LocalRoutes routes =
      read_routes(placement_, peers_.num_ranks(), arguments.topk_idx, arguments.num_tokens, arguments.topk);
  routing->expert_ids = std::move(routes.expert_ids);
  // Before the post, after which peers write here.
  clear_metadata(*routing, arguments.index);
  routing->operation = exchange_.publish(Operation::kLowDispatch,
                                         LowPost{element, arguments.topk, arguments.has_weights, arguments.index, 0,
                                                 false, routes.bad_route, routes.bad_expert},
                                         &routes.counts);
  const bool all_came = exchange_.await_posts(routing->operation);
  const bool masked_alike = exchange_.adopt_masks(routing->operation);
  routing->given_up = !all_came || !masked_alike;
  std::optional<Error> refused;
  if (!routing->given_up) {
    const std::vector<Counts> counts = exchange_.counts(routing->operation);
    refused = refusal(routing->operation, arguments.topk, counts);
    if (!refused) {
      count_received(counts, *routing);
      add_entries(placement_, peers_.rank(), next_slots(counts), *routing);
      send(arguments, *routing, sizes);
    }
  }
  exchange_.signal_arrival(routing->operation, routing->given_up || refused);
  if (refused) {
    // No rank goes on before all have read the posts, and so refuse it too.
    exchange_.await_arrivals(routing->operation);
    throw *refused;
  }
  if (routing->given_up) {
    routing->tokens_per_local_expert.assign(num_local_experts(), 0);
    routing->entry_begin.assign(at(routing->num_tokens + 1), 0);
  }
  routing->bytes_to_peers =
      routing->entries_to_peers * static_cast<std::int64_t>(sizes.row + sizes.scale + sizes.weight + sizes.index);
  return routing;
}

void LowLatency::receive_dispatch(LowRouting& routing) {
  // Peers that have not given it up write here even if this rank has.
  exchange_.await_arrivals(routing.operation);
  if (by_expert()) return;
  if (routing.given_up) return clear_metadata(routing, routing.operation.index);
  // By what has arrived, so that it agrees with the ids if a rank gave the dispatch up after its post.
  routing.tokens_per_local_expert.assign(num_local_experts(), 0);
  const auto* ids = reinterpret_cast<const std::int64_t*>(receive_buffer(peers_.rank(), routing.operation.index) +
                                                          routing.offsets.indices);
  for (std::int64_t i = 0; i < routing.num_received * routing.topk; ++i) {
    if (ids[i] >= 0) ++routing.tokens_per_local_expert[at(ids[i])];
  }
}

std::optional<Error> LowLatency::refusal(const LowOperation& operation, std::int64_t topk,
                                         const std::vector<Counts>& counts) const {
  const std::string where =
      std::string(" (") + operation_name(operation.kind) + " " + std::to_string(operation.sequence) + ")";
  for (int source = 0; source < peers_.num_ranks(); ++source) {
    const std::uint32_t route = exchange_.posted(operation, source, LowWord::kBadRoute);
    if (exchange_.masked(source) || route == 0) continue;
    const std::string text = describe_bad_route(route, topk, exchange_.bad_expert(operation, source),
                                                static_cast<std::int64_t>(placement_.rank_of_expert.size()));
    return Error(ErrorKind::kConfig, "rank " + std::to_string(source) + ": " + text + where);
  }
  if (!by_expert()) return std::nullopt;
  for (std::size_t expert = 0; expert < placement_.rank_of_expert.size(); ++expert) {
    std::int64_t need = 0;
    for (const Counts& source : counts) need += source.per_expert[expert];
    const std::int32_t rank = placement_.rank_of_expert[expert];
    if (exchange_.masked(rank) || need <= static_cast<std::int64_t>(slots_.capacity)) continue;
    return Error(ErrorKind::kCapacity,
                 describe_full_slots(rank, need, static_cast<std::int64_t>(slots_.capacity)) + where);
  }
  return std::nullopt;
}

NextSlots LowLatency::next_slots(const std::vector<Counts>& counts) const {
  NextSlots next{!by_expert(), {}};
  const std::size_t places = by_expert() ? placement_.rank_of_expert.size() : counts.size();
  for (std::size_t place = 0; place < places; ++place) {
    const int rank = by_expert() ? placement_.rank_of_expert[place] : static_cast<int>(place);
    std::int64_t slot =
        by_expert() ? placement_.local_of_expert[place] * static_cast<std::int64_t>(slots_.capacity) : 0;
    for (int source = 0; source < peers_.rank(); ++source) {
      slot += (by_expert() ? counts[at(source)].per_expert : counts[at(source)].per_rank)[place];
    }
    next.slots.push_back(exchange_.masked(rank) ? -1 : slot);
  }
  return next;
}

void LowLatency::count_received(const std::vector<Counts>& counts, LowRouting& routing) const {
  for (const Counts& source : counts) {
    if (!by_expert()) routing.num_received += source.per_rank[at(peers_.rank())];
  }
  for (std::int32_t expert : placement_.experts_of_rank[at(peers_.rank())]) {
    std::int32_t rows = 0;
    for (const Counts& source : counts) rows += source.per_expert[at(expert)];
    routing.tokens_per_local_expert.push_back(rows);
    if (by_expert()) routing.num_received += rows;
  }
}

void LowLatency::clear_metadata(const LowRouting& routing, std::size_t index) {
  if (by_expert()) return;
  std::uint8_t* buffer = receive_buffer(peers_.rank(), index);
  const std::size_t count = slots_.slots() * at(routing.topk);
  if (routing.has_weights) std::memset(buffer + routing.offsets.weights, 0, count * sizeof(float));
  // All bits set is -1: no expert.
  std::memset(buffer + routing.offsets.indices, 0xff, count * sizeof(std::int64_t));
}

void LowLatency::send(const LowDispatchArguments& arguments, const LowRouting& routing, const Sizes& sizes) {
  const std::size_t source_bytes = at(arguments.hidden) * element_bytes(arguments.element);
  const std::size_t blocks = sizes.scale / sizeof(float);
  const bool stream = streams(routing.entries.size() * sizes.row, sizes.row);
  workers_.split(at(routing.num_tokens), [&](std::size_t begin, std::size_t end) {
    std::vector<std::uint8_t> quantized(arguments.quantize ? sizes.row : 0);
    std::vector<float> scales(blocks);
    for (std::size_t token = begin; token < end; ++token) {
      const std::int64_t first = routing.entry_begin[token];
      const std::int64_t last = routing.entry_begin[token + 1];
      if (first == last) continue;
      const void* row = static_cast<const std::uint8_t*>(arguments.x) + token * source_bytes;
      const float* row_scales = arguments.has_scales ? arguments.scales + token * blocks : scales.data();
      if (arguments.quantize) {
        kernels_.quantize(arguments.element, row, at(arguments.hidden), arguments.power_of_two, quantized.data(),
                          scales.data());
        row = quantized.data();
      }
      for (std::int64_t i = first; i < last; ++i) {
        const Entry& entry = routing.entries[at(i)];
        std::uint8_t* buffer = receive_buffer(entry.rank, routing.operation.index);
        const std::size_t slot = at(entry.slot);
        kernels_.copy_row(buffer + routing.offsets.rows + slot * sizes.row, row, sizes.row, stream);
        auto* there = reinterpret_cast<float*>(buffer + routing.offsets.scales);
        for (std::size_t b = 0; b < blocks; ++b) there[slots_.scale(slot, b, blocks)] = row_scales[b];
        if (!by_expert()) send_metadata(arguments, routing, static_cast<std::int64_t>(token), entry, buffer);
      }
    }
    kernels_.fence();
  });
}

// Layout rank: what of a token's row is for the experts there. All else is cleared already.
void LowLatency::send_metadata(const LowDispatchArguments& arguments, const LowRouting& routing, std::int64_t token,
                               const Entry& entry, std::uint8_t* buffer) const {
  const std::size_t first = at(token * routing.topk);
  const std::size_t there = at(entry.slot) * at(routing.topk);
  auto* weights = reinterpret_cast<float*>(buffer + routing.offsets.weights);
  auto* indices = reinterpret_cast<std::int64_t*>(buffer + routing.offsets.indices);
  for (std::size_t position = 0; position < at(routing.topk); ++position) {
    const std::int32_t expert = routing.expert_ids[first + position];
    if (expert < 0 || placement_.rank_of_expert[at(expert)] != entry.rank) continue;
    indices[there + position] = placement_.local_of_expert[at(expert)];
    if (arguments.has_weights) weights[there + position] = arguments.weights[first + position];
  }
}

}  // namespace moe_ep
