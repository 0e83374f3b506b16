// Combine out of fixed slots: make rows readable by peers; the receive half reads every token's rows where they lie
// and sums them in one order.
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "common/peer_text.h"
#include "host/low_latency.h"

namespace moe_ep {
namespace {

// The ids of the routes to sum; the others are -1.
std::vector<std::int32_t> routes_to_sum(const LowRouting& routing, const std::int64_t* topk_idx) {
  std::vector<std::int32_t> ids = routing.expert_ids;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::int64_t id = topk_idx[i];
    if (id == -1) ids[i] = -1;
    if (id == ids[i]) continue;
    throw Error(ErrorKind::kConfig, describe_other_route(static_cast<std::int64_t>(i) + 1, routing.topk, id));
  }
  return ids;
}

}  // namespace

std::shared_ptr<LowCombine> LowLatency::send_combine(const LowCombineArguments& arguments) {
  const LowRouting& routing = *arguments.routing;
  auto combine = std::make_shared<LowCombine>();
  combine->arguments = arguments;
  // A row of layout rank is for all of the token's experts at its rank.
  combine->expert_ids = by_expert() ? routes_to_sum(routing, arguments.topk_idx) : routing.expert_ids;
  combine->staged = arguments.quantize || arguments.rows != rows_address(routing.operation.index);
  if (combine->staged && !routing.given_up) stage(arguments);
  const Element element = arguments.quantize ? Element::kFloat8 : arguments.element;
  combine->operation = exchange_.publish(Operation::kLowCombine,
                                         LowPost{element, routing.topk, arguments.has_weights, routing.operation.index,
                                                 routing.operation.sequence, routing.given_up, 0, 0},
                                         nullptr);
  return combine;
}

void LowLatency::receive_combine(LowCombine& combine) {
  exchange_.await_posts(combine.operation);
  std::vector<bool> left_out;
  for (int rank = 0; rank < peers_.num_ranks(); ++rank) {
    const bool gave_up = exchange_.posted(combine.operation, rank, LowWord::kGaveUp) != 0;
    left_out.push_back(exchange_.masked(rank) || gave_up);
  }
  gather(combine, left_out);
  // The caller may write its rows again, and this rank its copies, once every peer has read them.
  exchange_.signal_read(combine.operation);
  exchange_.await_reads(combine.operation);
}

void LowLatency::stage(const LowCombineArguments& arguments) {
  const LowRouting& routing = *arguments.routing;
  const std::size_t source_bytes = at(arguments.hidden) * element_bytes(arguments.element);
  const std::size_t blocks = arguments.quantize ? scales_per_row(arguments.hidden) : 0;
  const std::size_t row_bytes = arguments.quantize ? at(arguments.hidden) : source_bytes;
  const ReceiveBlock arrays = slots_.arrays(row_bytes, blocks * sizeof(float), 0, 0);
  if (arrays.total > layout_.rows_bytes) throw std::logic_error("the buffers of rows are too small");

  std::vector<std::size_t> slots;
  const std::size_t groups = by_expert() ? routing.tokens_per_local_expert.size() : 1;
  for (std::size_t group = 0; group < groups; ++group) {
    const auto rows = at(by_expert() ? routing.tokens_per_local_expert[group] : routing.num_received);
    for (std::size_t row = 0; row < rows; ++row) slots.push_back(group * slots_.capacity + row);
  }

  std::uint8_t* buffer = rows_buffer(peers_.rank(), routing.operation.index);
  const auto* rows = static_cast<const std::uint8_t*>(arguments.rows);
  const std::size_t num_rows = groups * slots_.capacity;
  // Rows that lie where the copies go are moved away first.
  std::vector<std::uint8_t> moved;
  if (rows + num_rows * source_bytes > buffer && rows < buffer + layout_.rows_bytes) {
    moved.resize(slots.size() * source_bytes);
    for (std::size_t i = 0; i < slots.size(); ++i) {
      std::memcpy(moved.data() + i * source_bytes, rows + slots[i] * source_bytes, source_bytes);
    }
  }
  const bool stream = streams(slots.size() * row_bytes, row_bytes);
  workers_.split(slots.size(), [&](std::size_t begin, std::size_t end) {
    std::vector<float> scales(blocks);
    auto* there = reinterpret_cast<float*>(buffer + arrays.scales);
    for (std::size_t i = begin; i < end; ++i) {
      const std::uint8_t* row = moved.empty() ? rows + slots[i] * source_bytes : moved.data() + i * source_bytes;
      std::uint8_t* copy = buffer + slots[i] * row_bytes;
      if (!arguments.quantize) {
        kernels_.copy_row(copy, row, row_bytes, stream);
        continue;
      }
      kernels_.quantize(arguments.element, row, at(arguments.hidden), arguments.power_of_two, copy, scales.data());
      for (std::size_t b = 0; b < blocks; ++b) there[slots_.scale(slots[i], b, blocks)] = scales[b];
    }
    kernels_.fence();
  });
}

void LowLatency::gather(LowCombine& combine, const std::vector<bool>& left_out) {
  const LowCombineArguments& arguments = combine.arguments;
  const LowRouting& routing = *arguments.routing;
  const std::size_t hidden = at(arguments.hidden);
  const std::size_t topk = at(routing.topk);
  const std::size_t out_bytes = hidden * element_bytes(arguments.element);
  const std::size_t blocks = arguments.quantize ? scales_per_row(arguments.hidden) : 0;
  const std::size_t row_bytes = arguments.quantize ? hidden : out_bytes;
  const ReceiveBlock arrays = slots_.arrays(row_bytes, blocks * sizeof(float), 0, 0);
  std::atomic<std::int64_t> rows_of_peers{0};
  workers_.split(at(routing.num_tokens), [&](std::size_t begin, std::size_t end) {
    std::vector<ReduceTerm> terms(topk);
    std::vector<float> scales(blocks);
    std::vector<float> dequantized(arguments.quantize ? topk * hidden : 0);
    std::int64_t from_peers = 0;
    for (std::size_t token = begin; token < end; ++token) {
      const std::int32_t* ids = combine.expert_ids.data() + token * topk;
      const float* weights = arguments.has_weights ? arguments.weights + token * topk : nullptr;
      float lost = 0.0f;
      for (std::size_t k = 0; k < topk; ++k) {
        if (ids[k] < 0 || !(routing.given_up || left_out[at(placement_.rank_of_expert[at(ids[k])])])) continue;
        lost += weights != nullptr ? weights[k] : 1.0f;
      }
      arguments.lost_weights[token] = lost;

      std::size_t count = 0;
      std::int32_t last_rank = -1;
      for (std::int64_t i = routing.entry_begin[token]; i < routing.entry_begin[token + 1]; ++i) {
        const Entry& entry = routing.entries[at(i)];
        if (left_out[at(entry.rank)] || (entry.position >= 0 && ids[entry.position] < 0)) continue;
        const std::uint8_t* buffer = rows_buffer(entry.rank, routing.operation.index);
        const void* row = buffer + at(entry.slot) * row_bytes;
        if (arguments.quantize) {
          const auto* there = reinterpret_cast<const float*>(buffer + arrays.scales);
          for (std::size_t b = 0; b < blocks; ++b) scales[b] = there[slots_.scale(at(entry.slot), b, blocks)];
          float* floats = dequantized.data() + count * hidden;
          kernels_.dequantize(static_cast<const std::uint8_t*>(row), scales.data(), hidden, floats);
          row = floats;
        }
        terms[count++] = ReduceTerm{row, weights != nullptr ? weights[entry.position] : 1.0f, entry.rank != last_rank};
        last_rank = entry.rank;
        from_peers += entry.rank != peers_.rank();
      }
      const auto reduce = arguments.quantize ? kernels_.reduce_floats : kernels_.reduce;
      reduce(arguments.element, terms.data(), count, static_cast<std::uint8_t*>(arguments.out) + token * out_bytes,
             hidden);
    }
    rows_of_peers += from_peers;
  });
  combine.bytes_to_peers = rows_of_peers * static_cast<std::int64_t>(row_bytes + blocks * sizeof(float));
}

}  // namespace moe_ep
