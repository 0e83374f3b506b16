// Dispatch, its second stage, and combine as the host sees them: room, arguments, launches.
#include <algorithm>
#include <utility>

#include "common/index.h"
#include "cuda/check.h"
#include "cuda/communicator.h"
#include "cuda/launch.h"

namespace moe_ep {
namespace gpu {
namespace {

std::uint32_t bytes32(std::size_t value) { return static_cast<std::uint32_t>(value); }

}  // namespace

DispatchResult Communicator::dispatch(const DispatchArguments& arguments) {
  const DeviceGuard guard(pool_->device());
  throw_if_failed(true);
  const bool reuses = arguments.routing != nullptr;
  const RowLayout layout = reuses ? arguments.routing->layout : arguments.layout;
  const std::int64_t topk = reuses ? arguments.routing->topk : arguments.topk;
  const std::int64_t limit = reuses ? arguments.routing->max_recv_rows : arguments.max_recv_rows;
  const bool staged = options_.two_stage && layout == RowLayout::kExpert;
  const bool deduplicated = layout == RowLayout::kRank || staged;
  const bool quantized = arguments.source.quantize || arguments.has_scales;
  const bool waits = !reuses && limit < 0;

  DispatchParams params{};
  params.group = group_;
  params.source = arguments.source;
  params.sizes.row =
      bytes32(at(arguments.source.hidden) * element_bytes(quantized ? Element::kFloat8 : arguments.source.element));
  params.sizes.scale =
      quantized ? bytes32((at(arguments.source.hidden) + kFp8Block - 1) / kFp8Block * sizeof(float)) : 0;
  params.sizes.weight = arguments.has_weights ? bytes32(sizeof(float) * (deduplicated ? at(topk) : 1)) : 0;
  // A reused two-stage handle knows its fan-out; rank-major output wants the ids every time.
  params.sizes.index = layout == RowLayout::kRank || (staged && !reuses) ? bytes32(sizeof(std::int64_t) * at(topk)) : 0;
  params.pipeline = send_pipeline(params.source, params.sizes, true, arguments.num_sms);
  params.fresh = !reuses;
  params.topk_idx = arguments.topk_idx;
  params.num_tokens = arguments.num_tokens;
  params.topk = static_cast<std::int32_t>(topk);
  params.layout = layout;
  params.deduplicated = deduplicated;
  params.tells_parts = staged && overlaps_stages();
  params.max_recv_rows = limit;
  params.block_rows = limit < 0 ? -1 : staged ? most_received_rows() : limit;

  DispatchResult result;
  result.sizes = params.sizes;
  if (reuses) {
    result.routing = arguments.routing;
  } else {
    result.routing = std::make_shared<Routing>();
    Routing& routing = *result.routing;
    routing.layout = layout;
    routing.two_stage = staged;
    routing.num_tokens = arguments.num_tokens;
    routing.topk = topk;
    routing.max_recv_rows = limit;
    routing.view = RoutingView::at(arguments.routing_memory, routing_shape(arguments.num_tokens, topk));
    routing.num_rows = limit;
    routing.block_rows = staged ? most_received_rows() : limit;
  }
  Routing& routing = *result.routing;
  params.routing = routing.view;

  queue_behind(arguments.streams.run);
  if (!reuses && limit >= 0) {
    // Sizes that work on the device reads must be sizes, also where the operation fails.
    MOE_EP_CUDA_CHECK(cudaMemsetAsync(arguments.routing_memory, 0,
                                      sizeof(RoutingHeader) + 2 * at(num_local_experts_) * sizeof(std::int64_t),
                                      arguments.streams.run));
  }
  // The first of two stages is read by the second, which this stream waits for.
  const Streams streams{arguments.streams.run, staged ? arguments.streams.run : arguments.streams.home};
  Room room;
  if (waits) {
    // As much as there can be; what is not needed goes back as soon as the counts are known.
    const std::int64_t experts = num_local_experts_;
    const std::int64_t most =
        deduplicated ? most_received_rows() : most_received_rows() * topk + experts * (options_.alignment - 1);
    const std::size_t bytes = params.sizes.block(most).total;
    room = room_of(pool_->allocate_largest(bytes, streams.run, streams.home), 0);
  } else {
    room = find_room(params.sizes.block(routing.block_rows).total, streams);
  }
  const std::int64_t row_bytes =
      arguments.source.hidden * static_cast<std::int64_t>(element_bytes(params.source.element));
  const std::int64_t items = arguments.num_tokens * divided_up(row_bytes, params.pipeline.chunk_bytes);
  const int blocks = blocks_for(arguments.num_sms, items, params.pipeline.warps);
  if (params.tells_parts) {
    // What is left of a dispatch whose second stage never came is not to be taken for this one.
    captured_parts_ = captured_parts_ || capture_of(arguments.streams.run) != 0;
    if (expand_owed_ || captured_parts_) {
      MOE_EP_CUDA_CHECK(
          cudaMemsetAsync(&group_.state->sending, 0, sizeof(group_.state->sending), arguments.streams.run));
    }
    MOE_EP_CUDA_CHECK(cudaEventRecord(stage_start_, arguments.streams.run));
    expand_owed_ = true;
  }
  for (bool first_try = true;; first_try = false) {
    params.block_offset = room.offset;
    params.block_bytes = room.bytes;
    params.ticket = waits ? ++ticket_ : 0;
    MOE_EP_CUDA_CHECK(launch_dispatch(params, blocks, arguments.streams.run));
    queued(arguments.streams.run);
    if (!waits) break;
    const bool fits = await(params.ticket, arguments.streams.run);
    routing.block_rows = told(Word::kBlockRows);
    if (fits) break;
    // Ranks with a fixed number of rows have gone on: there is nobody to try again with.
    if (!first_try || report_->call.values[3] != 0) throw_outcome(report_->call);
    // Some rank's block is too small, which all ranks know: every one of them counts again, that one with room of the
    // right size, if there is any.
    const std::size_t need = params.sizes.block(routing.block_rows).total;
    if (room.bytes >= static_cast<std::int64_t>(need)) continue;
    room = Room{};
    room = find_room(need, streams);
  }
  if (waits) {
    routing.num_rows = told(Word::kNumRows);
    routing.sent_rows = told(Word::kSentRows);
    std::int64_t received = 0;
    for (int i = 0; i < num_local_experts_; ++i) {
      routing.tokens_per_local_expert.push_back(told(Word::kFirstExpert, i));
      received += routing.tokens_per_local_expert.back();
    }
    routing.num_received = layout == RowLayout::kExpert ? received : routing.num_rows;
    if (layout == RowLayout::kRank) {
      routing.own_first = told(Word::kOwnFirst);
      routing.own_rows = told(Word::kOwnRows);
    }
  }
  // With a fixed number of rows the block is laid out for that number, whatever has come.
  result.offsets = params.sizes.block(routing.block_rows);
  if (room.bytes < 0) return result;
  result.data = pool_->base() + room.offset;
  if (room.lease != nullptr) room.lease->trim(result.offsets.total);
  result.lease = std::move(room.lease);
  return result;
}

RowSizes Communicator::expanded_sizes(const DispatchResult& staged) const {
  RowSizes sizes = staged.sizes;
  sizes.weight = sizes.weight > 0 ? bytes32(sizeof(float)) : 0;
  sizes.index = 0;
  return sizes;
}

ReceiveBlock Communicator::expanded(const DispatchResult& staged) const {
  return expanded_sizes(staged).block(staged.routing->num_rows);
}

void Communicator::expand(const ExpandArguments& arguments) {
  const DeviceGuard guard(pool_->device());
  const DispatchResult& staged = *arguments.staged;
  const Routing& routing = *staged.routing;
  ExpandParams params{};
  params.group = group_;
  params.source.rows = staged.data + staged.offsets.rows;
  params.source.scales =
      staged.sizes.scale > 0 ? reinterpret_cast<const float*>(staged.data + staged.offsets.scales) : nullptr;
  params.source.weights = reinterpret_cast<const float*>(staged.data + staged.offsets.weights);
  params.source.hidden = arguments.hidden;
  params.source.element = arguments.element;
  params.sizes = expanded_sizes(staged);
  const int local_sms = arguments.beside
                            ? expand_sms_beside(arguments.num_sms, arguments.local_sms, staged.offsets.total)
                            : arguments.local_sms;
  params.pipeline = send_pipeline(params.source, params.sizes, false, local_sms);
  params.routing = routing.view;
  params.fan = routing.fan;
  params.fresh = arguments.fresh;
  params.awaits_parts = arguments.beside;
  params.slots = reinterpret_cast<const std::int64_t*>(staged.data + staged.offsets.indices);
  params.topk = static_cast<std::int32_t>(routing.topk);
  params.num_local_experts = num_local_experts_;
  params.block = arguments.block;
  params.num_rows = routing.num_rows;
  const std::int64_t items =
      routing.block_rows * divided_up(static_cast<std::int64_t>(staged.sizes.row), params.pipeline.chunk_bytes);
  const int blocks = blocks_for(local_sms, items, params.pipeline.warps);
  if (arguments.beside) MOE_EP_CUDA_CHECK(cudaStreamWaitEvent(stage_, stage_start_, 0));
  MOE_EP_CUDA_CHECK(launch_expand(params, blocks, arguments.beside ? stage_ : arguments.streams.run));
  expand_owed_ = false;
  if (arguments.beside) {
    MOE_EP_CUDA_CHECK(cudaEventRecord(stage_end_, stage_));
    MOE_EP_CUDA_CHECK(cudaStreamWaitEvent(arguments.streams.run, stage_end_, 0));
  }
  queued(arguments.streams.run);
}

CombineResult Communicator::combine(const CombineArguments& arguments) {
  const DeviceGuard guard(pool_->device());
  throw_if_failed(true);
  const Routing& routing = *arguments.routing;
  const bool reduces_first = routing.two_stage;
  const bool in_place = !reduces_first && pool_->contains(arguments.rows);
  const bool shares_weights = arguments.has_weights && !reduces_first;
  const std::size_t row_bytes = at(arguments.hidden) * element_bytes(arguments.element);
  const std::size_t shared_rows = at(reduces_first ? routing.block_rows : routing.num_rows);
  const std::size_t values_per_row = routing.deduplicated() ? at(routing.topk) : 1;
  const bool weights_in_place = shares_weights && pool_->contains(arguments.weights);
  const bool values_in_place = !reduces_first && arguments.has_values && pool_->contains(arguments.values);

  queue_behind(arguments.streams.run);
  // Rows, weights and values that peers read, each where it is not in place already.
  const ReceiveBlock arrays = ReceiveBlock::make(
      shared_rows, in_place ? 0 : row_bytes, 0, shares_weights && !weights_in_place ? sizeof(float) : 0,
      arguments.has_values && !values_in_place ? sizeof(float) * values_per_row : 0);
  Room room;
  room.bytes = 0;
  // It is in use until peers have read it, which the end of the combine waits for: its stream's order is enough.
  if (arrays.total > 0) room = find_room(arrays.total, Streams{arguments.streams.run, arguments.streams.run});
  std::uint8_t* block = pool_->base() + room.offset;
  float* values = reinterpret_cast<float*>(block + arrays.indices);
  const bool tells_parts = reduces_first && overlaps_stages();
  // Sums wait for nothing. In a graph the order of branches is not ours to say.
  const int local_sms =
      tells_parts ? sms_beside(arguments.num_sms, arguments.local_sms, shared_rows * row_bytes, 1.0) : 0;
  const bool beside = local_sms > 0 && capture_of(arguments.streams.run) == 0;
  const std::int32_t part_log2 = reduces_first ? rows_in_part_log2() : 0;
  if (room.bytes >= 0 && reduces_first) {
    ReduceParams params{};
    params.group = group_;
    params.stage_rows = rows_at_once(static_cast<int>(routing.topk));
    params.pipeline = first_reduce_pipeline(params.stage_rows, static_cast<std::int64_t>(row_bytes));
    params.routing = routing.view;
    params.fan = routing.fan;
    params.tells_parts = tells_parts;
    params.part_log2 = part_log2;
    params.topk = static_cast<std::int32_t>(routing.topk);
    params.hidden = arguments.hidden;
    params.element = arguments.element;
    params.rows = arguments.rows;
    params.weights = arguments.has_weights ? arguments.weights : nullptr;
    params.values = arguments.has_values ? arguments.values : nullptr;
    params.out = block + arrays.rows;
    params.values_out = values;
    const std::int64_t items = static_cast<std::int64_t>(shared_rows) *
                               divided_up(static_cast<std::int64_t>(row_bytes), params.pipeline.chunk_bytes);
    const int blocks = blocks_for(beside ? local_sms : arguments.local_sms, items, params.pipeline.warps);
    cudaStream_t stream = arguments.streams.run;
    if (beside) {
      MOE_EP_CUDA_CHECK(cudaEventRecord(stage_start_, stream));
      stream = stage_;
      MOE_EP_CUDA_CHECK(cudaStreamWaitEvent(stream, stage_start_, 0));
    }
    MOE_EP_CUDA_CHECK(launch_reduce(params, blocks, stream));
    if (beside) MOE_EP_CUDA_CHECK(cudaEventRecord(stage_end_, stream));
  } else if (room.bytes >= 0 && shared_rows > 0) {
    if (!in_place) {
      // All but what this rank will read itself: it can where they are.
      const std::size_t first = at(routing.own_first) * row_bytes;
      const std::size_t end = at(routing.own_first + routing.own_rows) * row_bytes;
      const std::size_t all = shared_rows * row_bytes;
      std::uint8_t* to = block + arrays.rows;
      if (first > 0) copy(to, arguments.rows, first, arguments.streams.run);
      if (end < all) copy(to + end, arguments.rows + end, all - end, arguments.streams.run);
    }
    if (shares_weights && !weights_in_place) {
      copy(block + arrays.weights, arguments.weights, shared_rows * sizeof(float), arguments.streams.run);
    }
    if (arguments.has_values && !values_in_place) {
      copy(values, arguments.values, shared_rows * values_per_row * sizeof(float), arguments.streams.run);
    }
  }

  const auto offset_of = [&](const void* address) { return static_cast<const std::uint8_t*>(address) - pool_->base(); };
  CombineParams params{};
  params.group = group_;
  params.most_entries = static_cast<std::int32_t>(
      routing.deduplicated() ? std::min<std::int64_t>(routing.topk, num_ranks()) : routing.topk);
  params.pipeline = reduce_pipeline(num_ranks(), params.most_entries, routing.deduplicated() && !shares_weights);
  params.routing = routing.view;
  params.num_tokens = routing.num_tokens;
  params.topk = static_cast<std::int32_t>(routing.topk);
  params.hidden = arguments.hidden;
  params.element = arguments.element;
  params.layout = routing.layout;
  params.deduplicated = routing.deduplicated();
  params.has_weights = arguments.has_weights;
  params.weights_at_rows = shares_weights;
  params.has_values = arguments.has_values;
  params.awaits_parts = tells_parts;
  params.reduces = tells_parts && room.bytes >= 0;
  params.part_log2 = part_log2;
  params.block_bytes = room.bytes;
  params.own_rows = !in_place && !reduces_first && routing.own_rows > 0 ? arguments.rows : nullptr;
  params.rows_offset = in_place ? offset_of(arguments.rows) : offset_of(block + arrays.rows);
  params.weights_offset = weights_in_place ? offset_of(arguments.weights) : offset_of(block + arrays.weights);
  params.values_offset = values_in_place ? offset_of(arguments.values) : offset_of(values);
  params.out = arguments.out;
  params.values_out = arguments.values_out;
  const std::int64_t items =
      routing.num_tokens * divided_up(static_cast<std::int64_t>(row_bytes), params.pipeline.chunk_bytes);
  const int blocks = blocks_for(arguments.num_sms, items, params.pipeline.warps);
  MOE_EP_CUDA_CHECK(launch_combine(params, blocks, arguments.streams.run));
  if (beside && params.reduces) MOE_EP_CUDA_CHECK(cudaStreamWaitEvent(arguments.streams.run, stage_end_, 0));
  queued(arguments.streams.run);

  CombineResult result;
  result.staged = !in_place && !reduces_first;
  const std::size_t value_bytes = arguments.has_values ? sizeof(float) * values_per_row : 0;
  const std::size_t crossing = row_bytes + (shares_weights ? sizeof(float) : 0) + value_bytes;
  result.bytes_to_peers = std::max<std::int64_t>(routing.sent_rows, 0) * static_cast<std::int64_t>(crossing);
  return result;
}

}  // namespace gpu
}  // namespace moe_ep
