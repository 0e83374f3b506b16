// Dispatch: exchange counts, agree on receive blocks, write every row once into its slot, finish locally.
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "common/errors.h"
#include "common/index.h"
#include "common/peer_text.h"
#include "host/communicator.h"

namespace moe_ep {
namespace {

constexpr const char* kName = "dispatch";

}  // namespace

DispatchResult Communicator::dispatch(const DispatchArguments& arguments) {
  const bool reuses = arguments.routing != nullptr;
  const RowLayout layout = reuses ? arguments.routing->layout : arguments.layout;
  const std::int64_t topk = reuses ? arguments.routing->topk : arguments.topk;
  const bool deduplicated = layout == RowLayout::kRank || two_stage_;
  const bool has_scales = arguments.quantize || arguments.has_scales;
  Sizes sizes{};
  sizes.row = at(arguments.hidden) * element_bytes(has_scales ? Element::kFloat8 : arguments.element);
  sizes.scale = has_scales ? scales_per_row(arguments.hidden) * sizeof(float) : 0;
  sizes.weight = arguments.has_weights ? sizeof(float) * (deduplicated ? at(topk) : 1) : 0;
  // A reused two-stage handle knows its fan-out; rank-major output wants the ids every time.
  sizes.index = layout == RowLayout::kRank || (two_stage_ && !reuses) ? sizeof(std::int64_t) * at(topk) : 0;

  LocalRoutes routes;
  if (!reuses) {
    routes = read_routes(placement_, peers_->num_ranks(), arguments.topk_idx, arguments.num_tokens, topk);
    if (routes.bad_route != 0) {
      throw Error(ErrorKind::kConfig, describe_bad_route(routes.bad_route, topk, routes.bad_expert,
                                                         static_cast<std::int64_t>(placement_.rank_of_expert.size())));
    }
  }
  ++sequence_;
  Room room;
  if (expected_bytes_ > 0) room.lease = pool_->allocate(expected_bytes_);

  OperationPost post{};
  post.operation = static_cast<std::int64_t>(Operation::kDispatch);
  post.layout = static_cast<std::int64_t>(layout);
  post.element = static_cast<std::int64_t>(has_scales ? Element::kFloat8 : arguments.element);
  post.row_bytes = static_cast<std::int64_t>(sizes.row);
  post.scale_bytes = static_cast<std::int64_t>(sizes.scale);
  post.topk = static_cast<std::int64_t>(topk);
  post.has_weights = arguments.has_weights;
  post.routing_id = reuses ? arguments.routing->id : 0;
  post.max_recv_rows = reuses ? arguments.routing->max_recv_rows : arguments.max_recv_rows;
  if (room.lease != nullptr) {
    room.offset = post.block_offset = static_cast<std::int64_t>(room.lease->offset());
    post.block_bytes = static_cast<std::int64_t>(room.lease->bytes());
  }
  publish(post, reuses ? nullptr : &routes.counts);
  peers_->wait_all(Step::kPost, sequence_, kName);
  compare_posts(post);

  std::shared_ptr<const Routing> routing = arguments.routing;
  std::shared_ptr<Routing> fresh;
  if (!reuses) {
    const std::vector<Counts> counts = gather_counts();
    std::vector<std::int64_t> max_recv_rows;
    for (int source = 0; source < peers_->num_ranks(); ++source) {
      max_recv_rows.push_back(peers_->post(peers_->rank(), sequence_, source)->max_recv_rows);
    }
    const RoutingRequest request{static_cast<std::int64_t>(sequence_),
                                 layout,
                                 two_stage_,
                                 arguments.num_tokens,
                                 topk,
                                 alignment_,
                                 peers_->rank(),
                                 counts,
                                 max_recv_rows};
    check_max_recv(request);
    fresh = std::make_shared<Routing>(make_routing(placement_, request, std::move(routes.expert_ids)));
    routing = fresh;
  }

  const std::vector<std::uint8_t*> blocks = agree_on_blocks(*routing, sizes, room);
  std::uint8_t* own_block = blocks[at(peers_->rank())];
  if (!routing->two_stage) clear_padding(*routing, sizes, own_block);
  send(arguments, *routing, sizes, blocks);
  peers_->signal_all(Step::kArrival, sequence_);
  peers_->wait_all(Step::kArrival, sequence_, kName);

  DispatchResult result;
  result.routing = routing;
  const std::int64_t crossing = routing->entries_to_peers;
  result.bytes_to_peers = crossing * static_cast<std::int64_t>(sizes.row + sizes.scale + sizes.weight + sizes.index);
  if (routing->two_stage) {
    if (fresh != nullptr) {
      const std::size_t indices = sizes.block(routing->block_rows(peers_->rank())).indices;
      add_fan_out(*fresh, reinterpret_cast<const std::int64_t*>(own_block + indices));
    }
    Sizes expanded = sizes;
    expanded.weight = arguments.has_weights ? sizeof(float) : 0;
    expanded.index = 0;
    result.offsets = expanded.block(routing->num_rows);
    result.block = expand(*routing, sizes, expanded, own_block);
    result.copied_out = !pool_->contains(result.block.data);
    return result;
  }
  result.offsets = sizes.block(routing->num_rows);
  if (result.offsets.total == 0) return result;
  if (room.lease != nullptr) {
    room.lease->trim(result.offsets.total);
    result.block = Block{own_block, result.offsets.total, std::move(room.lease)};
  } else {
    result.copied_out = true;
    result.block = own_memory(result.offsets.total);
    std::memcpy(result.block.data, own_block, result.offsets.total);
  }
  return result;
}

void Communicator::check_max_recv(const RoutingRequest& request) const {
  for (int rank = 0; rank < peers_->num_ranks(); ++rank) {
    const std::int64_t limit = request.max_recv_rows[at(rank)];
    const std::int64_t need = exact_rows(placement_, request, rank);
    if (need > std::numeric_limits<std::int32_t>::max()) {
      throw Error(ErrorKind::kCapacity, "rank " + std::to_string(rank) + " would receive " + std::to_string(need) +
                                            " rows, but slots are 32-bit; dispatch fewer tokens at a time");
    }
    if (limit < 0 || need <= limit) continue;
    throw Error(ErrorKind::kCapacity, describe_overflow(rank, need, limit));
  }
}

// The address of every rank's receive block. A rank whose published block is too small for the rows that it
// gets, which all ranks can see from the counts, grants another one to all.
std::vector<std::uint8_t*> Communicator::agree_on_blocks(const Routing& routing, const Sizes& sizes, Room& room) {
  std::vector<std::int64_t> offsets;
  std::vector<int> granting;
  for (int rank = 0; rank < peers_->num_ranks(); ++rank) {
    const OperationPost* post = peers_->post(peers_->rank(), sequence_, rank);
    offsets.push_back(post->block_offset);
    const std::size_t need = sizes.block(routing.block_rows(rank)).total;
    if (static_cast<std::size_t>(post->block_bytes) >= need) continue;
    granting.push_back(rank);
    if (rank != peers_->rank()) continue;
    room = Room{};
    room = find_room(need);
    for (int reader = 0; reader < peers_->num_ranks(); ++reader) {
      peers_->grant(reader, sequence_, rank)->block_offset = room.offset;
    }
    peers_->signal_all(Step::kGrant, sequence_);
  }
  const std::size_t own_need = sizes.block(routing.block_rows(peers_->rank())).total;
  expected_bytes_ = own_need + own_need / 8;
  peers_->wait(Step::kGrant, sequence_, granting, kName);
  for (int rank : granting) {
    offsets[at(rank)] = peers_->grant(peers_->rank(), sequence_, rank)->block_offset;
    if (offsets[at(rank)] < 0) no_room(rank, kName, sizes.block(routing.block_rows(rank)).total);
  }
  std::vector<std::uint8_t*> blocks;
  for (int rank = 0; rank < peers_->num_ranks(); ++rank) blocks.push_back(peers_->base(rank) + offsets[at(rank)]);
  return blocks;
}

void Communicator::send(const DispatchArguments& arguments, const Routing& routing, const Sizes& sizes,
                        const std::vector<std::uint8_t*>& blocks) {
  std::vector<ReceiveBlock> offsets;
  for (int rank = 0; rank < peers_->num_ranks(); ++rank) offsets.push_back(sizes.block(routing.block_rows(rank)));
  const std::size_t source_bytes = at(arguments.hidden) * element_bytes(arguments.element);
  const bool stream = streams(routing.entries.size() * sizes.row, sizes.row);
  workers_.split(at(routing.num_tokens), [&](std::size_t begin, std::size_t end) {
    std::vector<std::uint8_t> quantized(arguments.quantize ? sizes.row : 0);
    std::vector<float> scales(arguments.quantize ? sizes.scale / sizeof(float) : 0);
    for (std::size_t token = begin; token < end; ++token) {
      const std::int64_t first = routing.entry_begin[token];
      const std::int64_t last = routing.entry_begin[token + 1];
      if (first == last) continue;
      const void* row = static_cast<const std::uint8_t*>(arguments.x) + token * source_bytes;
      const float* row_scales = arguments.scales;
      if (arguments.has_scales) row_scales += token * scales_per_row(arguments.hidden);
      if (arguments.quantize) {
        kernels_.quantize(arguments.element, row, at(arguments.hidden), arguments.power_of_two, quantized.data(),
                          scales.data());
        row = quantized.data();
        row_scales = scales.data();
      }
      for (std::int64_t i = first; i < last; ++i) {
        const Entry& entry = routing.entries[at(i)];
        std::uint8_t* block = blocks[at(entry.rank)];
        const ReceiveBlock& arrays = offsets[at(entry.rank)];
        kernels_.copy_row(block + arrays.rows + at(entry.slot) * sizes.row, row, sizes.row, stream);
        if (sizes.scale > 0) {
          std::memcpy(block + arrays.scales + at(entry.slot) * sizes.scale, row_scales, sizes.scale);
        }
        if (sizes.weight + sizes.index > 0) {
          send_metadata(arguments, routing, sizes, entry, static_cast<std::int64_t>(token), block, arrays);
        }
      }
    }
    kernels_.fence();
  });
}

void Communicator::send_metadata(const DispatchArguments& arguments, const Routing& routing, const Sizes& sizes,
                                 const Entry& entry, std::int64_t token, std::uint8_t* block,
                                 const ReceiveBlock& offsets) const {
  const std::int64_t first = token * routing.topk;
  auto* weights = reinterpret_cast<float*>(block + offsets.weights + at(entry.slot) * sizes.weight);
  auto* indices = reinterpret_cast<std::int64_t*>(block + offsets.indices + at(entry.slot) * sizes.index);
  if (entry.position >= 0) {
    if (sizes.weight > 0) *weights = arguments.weights[first + entry.position];
    return;
  }
  for (std::int64_t position = 0; position < routing.topk; ++position) {
    const std::int32_t expert = routing.expert_ids[at(first + position)];
    const bool there = expert >= 0 && placement_.rank_of_expert[at(expert)] == entry.rank;
    if (sizes.weight > 0) weights[position] = there ? arguments.weights[first + position] : 0.0f;
    if (sizes.index > 0) indices[position] = there ? placement_.local_of_expert[at(expert)] : -1;
  }
}

void Communicator::clear_padding(const Routing& routing, const Sizes& sizes, std::uint8_t* block) const {
  const ReceiveBlock arrays = sizes.block(routing.num_rows);
  for (const auto& range : routing.padding) {
    const std::size_t first = at(range.first);
    const std::size_t count = at(range.second - range.first);
    std::memset(block + arrays.rows + first * sizes.row, 0, count * sizes.row);
    std::memset(block + arrays.scales + first * sizes.scale, 0, count * sizes.scale);
    std::memset(block + arrays.weights + first * sizes.weight, 0, count * sizes.weight);
    // All bits set is -1: no expert.
    std::memset(block + arrays.indices + first * sizes.index, 0xff, count * sizes.index);
  }
}

// The second stage: expert-major rows from the rank-major rows of the receive block.
Block Communicator::expand(const Routing& routing, const Sizes& staged, const Sizes& sizes, const std::uint8_t* block) {
  const ReceiveBlock from = staged.block(routing.block_rows(peers_->rank()));
  const ReceiveBlock to = sizes.block(routing.num_rows);
  Block out = lease(to.total);
  if (out.data == nullptr) out = own_memory(to.total);
  const bool stream = streams(routing.fan_rows.size() * sizes.row, sizes.row);
  workers_.split(routing.fan_begin.size() - 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t row = begin; row < end; ++row) {
      for (std::int64_t i = routing.fan_begin[row]; i < routing.fan_begin[row + 1]; ++i) {
        const std::size_t slot = at(routing.fan_rows[at(i)]);
        kernels_.copy_row(out.data + to.rows + slot * sizes.row, block + from.rows + row * staged.row, sizes.row,
                          stream);
        std::memcpy(out.data + to.scales + slot * sizes.scale, block + from.scales + row * staged.scale, sizes.scale);
        if (sizes.weight > 0) {
          const auto* weights = reinterpret_cast<const float*>(block + from.weights + row * staged.weight);
          reinterpret_cast<float*>(out.data + to.weights)[slot] = weights[routing.fan_positions[at(i)]];
        }
      }
    }
    kernels_.fence();
  });
  clear_padding(routing, sizes, out.data);
  return out;
}

}  // namespace moe_ep
