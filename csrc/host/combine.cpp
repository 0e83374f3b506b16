// Combine: make rows readable by peers, read every token's rows where they lie, sum them in one order.
#include <cstring>
#include <string>

#include "common/errors.h"
#include "common/index.h"
#include "host/communicator.h"

namespace moe_ep {
namespace {

constexpr const char* kName = "combine";

}  // namespace

CombineResult Communicator::combine(const CombineArguments& arguments) {
  const Routing& routing = *arguments.routing;
  ++sequence_;
  const std::size_t row_bytes = at(arguments.hidden) * element_bytes(arguments.element);
  const bool reduces_first = routing.two_stage;
  const bool in_place = !reduces_first && pool_->contains(arguments.rows);
  const std::size_t shared_rows = at(reduces_first ? routing.block_rows(peers_->rank()) : routing.num_rows);
  const bool shares_weights = arguments.has_weights && !reduces_first;
  const std::size_t values_per_row = routing.rows_are_deduplicated() ? at(routing.topk) : 1;

  // Rows, weights and values that peers read, each where it is not in place already.
  const ReceiveBlock arrays =
      ReceiveBlock::make(shared_rows, in_place ? 0 : row_bytes, 0, shares_weights ? sizeof(float) : 0,
                         arguments.has_values ? sizeof(float) * values_per_row : 0);
  const Room room = find_room(arrays.total);
  std::uint8_t* block = peers_->base(peers_->rank()) + room.offset;
  if (room.offset >= 0) {
    auto* values = reinterpret_cast<float*>(block + arrays.indices);
    if (reduces_first) {
      reduce_locally(arguments, block + arrays.rows, values);
    } else {
      if (!in_place) {
        workers_.split(shared_rows, [&](std::size_t begin, std::size_t end) {
          kernels_.copy_row(block + arrays.rows + begin * row_bytes,
                            static_cast<const std::uint8_t*>(arguments.rows) + begin * row_bytes,
                            (end - begin) * row_bytes, streams(shared_rows * row_bytes, row_bytes));
          kernels_.fence();
        });
      }
      if (arguments.has_values) {
        std::memcpy(values, arguments.values, shared_rows * values_per_row * sizeof(float));
      }
    }
    if (shares_weights) std::memcpy(block + arrays.weights, arguments.weights, shared_rows * sizeof(float));
  }

  OperationPost post{};
  post.operation = static_cast<std::int64_t>(Operation::kCombine);
  post.layout = static_cast<std::int64_t>(routing.layout);
  post.element = static_cast<std::int64_t>(arguments.element);
  post.row_bytes = static_cast<std::int64_t>(row_bytes);
  post.topk = static_cast<std::int64_t>(routing.topk);
  post.has_weights = arguments.has_weights;
  post.has_values = arguments.has_values;
  post.routing_id = routing.id;
  post.block_bytes = room.offset < 0 ? -1 : static_cast<std::int64_t>(arrays.total);
  post.block_offset =
      in_place ? static_cast<const std::uint8_t*>(arguments.rows) - peers_->base(peers_->rank()) : room.offset;
  post.side_offset = room.offset + static_cast<std::int64_t>(arrays.weights);
  post.values_offset = room.offset + static_cast<std::int64_t>(arrays.indices);
  publish(post, nullptr);
  peers_->wait_all(Step::kPost, sequence_, kName);
  compare_posts(post);
  for (int rank = 0; rank < peers_->num_ranks(); ++rank) {
    if (peers_->post(peers_->rank(), sequence_, rank)->block_bytes < 0) no_room(rank, kName, arrays.total);
  }

  gather_and_reduce(arguments);
  // The caller may write its rows again, and this rank its staging, once every peer has read them.
  peers_->signal_all(Step::kRead, sequence_);
  peers_->wait_all(Step::kRead, sequence_, kName);

  CombineResult result;
  result.staged = !in_place && !reduces_first;
  const std::size_t value_bytes = arguments.has_values ? sizeof(float) * values_per_row : 0;
  result.bytes_to_peers = routing.entries_to_peers *
                          static_cast<std::int64_t>(row_bytes + (shares_weights ? sizeof(float) : 0) + value_bytes);
  return result;
}

// Two stages: this rank's experts' rows of a token become one row, with their weights applied.
void Communicator::reduce_locally(const CombineArguments& arguments, std::uint8_t* rows, float* values) {
  const Routing& routing = *arguments.routing;
  const std::size_t row_bytes = at(arguments.hidden) * element_bytes(arguments.element);
  workers_.split(routing.fan_begin.size() - 1, [&](std::size_t begin, std::size_t end) {
    std::vector<ReduceTerm> terms(at(routing.topk));
    for (std::size_t row = begin; row < end; ++row) {
      if (arguments.has_values) std::memset(values + row * at(routing.topk), 0, at(routing.topk) * sizeof(float));
      std::size_t count = 0;
      for (std::int64_t i = routing.fan_begin[row]; i < routing.fan_begin[row + 1]; ++i) {
        const std::size_t slot = at(routing.fan_rows[at(i)]);
        terms[count] = ReduceTerm{static_cast<const std::uint8_t*>(arguments.rows) + slot * row_bytes,
                                  arguments.has_weights ? arguments.weights[slot] : 1.0f, count == 0};
        ++count;
        if (arguments.has_values) {
          values[row * at(routing.topk) + at(routing.fan_positions[at(i)])] = arguments.values[slot];
        }
      }
      kernels_.reduce(arguments.element, terms.data(), count, rows + row * row_bytes, at(arguments.hidden));
    }
  });
}

void Communicator::gather_and_reduce(const CombineArguments& arguments) {
  const Routing& routing = *arguments.routing;
  const std::size_t row_bytes = at(arguments.hidden) * element_bytes(arguments.element);
  std::vector<const std::uint8_t*> rows;
  std::vector<const float*> weights;
  std::vector<const float*> values;
  for (int rank = 0; rank < peers_->num_ranks(); ++rank) {
    const OperationPost* post = peers_->post(peers_->rank(), sequence_, rank);
    rows.push_back(peers_->base(rank) + post->block_offset);
    weights.push_back(reinterpret_cast<const float*>(peers_->base(rank) + post->side_offset));
    values.push_back(reinterpret_cast<const float*>(peers_->base(rank) + post->values_offset));
  }
  const bool weighted = arguments.has_weights && !routing.two_stage;
  workers_.split(at(routing.num_tokens), [&](std::size_t begin, std::size_t end) {
    std::vector<ReduceTerm> terms(at(routing.topk));
    for (std::size_t token = begin; token < end; ++token) {
      float* values_out = arguments.has_values ? arguments.values_out + token * at(routing.topk) : nullptr;
      if (values_out != nullptr) std::memset(values_out, 0, at(routing.topk) * sizeof(float));
      std::size_t count = 0;
      std::int32_t last_rank = -1;
      for (std::int64_t i = routing.entry_begin[token]; i < routing.entry_begin[token + 1]; ++i) {
        const Entry& entry = routing.entries[at(i)];
        const std::size_t slot = at(entry.slot);
        terms[count] = ReduceTerm{rows[at(entry.rank)] + slot * row_bytes,
                                  weighted ? weights[at(entry.rank)][slot] : 1.0f, entry.rank != last_rank};
        last_rank = entry.rank;
        ++count;
        if (values_out == nullptr) continue;
        if (entry.position >= 0) {
          values_out[entry.position] = values[at(entry.rank)][slot];
          continue;
        }
        for (std::size_t position = 0; position < at(routing.topk); ++position) {
          const std::int32_t expert = routing.expert_ids[token * at(routing.topk) + position];
          if (expert < 0 || placement_.rank_of_expert[at(expert)] != entry.rank) continue;
          values_out[position] = values[at(entry.rank)][slot * at(routing.topk) + position];
        }
      }
      kernels_.reduce(arguments.element, terms.data(), count,
                      static_cast<std::uint8_t*>(arguments.out) + token * row_bytes, at(arguments.hidden));
    }
  });
}

}  // namespace moe_ep
