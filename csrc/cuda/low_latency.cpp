// Low-latency operations as the host sees them: arguments, shapes of launches, and the two sets of fixed slots.
#include <algorithm>

#include "common/index.h"
#include "cuda/check.h"
#include "cuda/communicator.h"
#include "cuda/launch.h"

namespace moe_ep {
namespace gpu {
namespace {

constexpr std::int64_t kLargestLowChunk = 4096;  // bytes of a source row
constexpr std::int64_t kSmallestLowChunk = 1024;
// How many rows of this rank an expert gets on average, from which on gathering their scales pays; and of how many
// scales of each row a warp sees to at least.
constexpr std::int64_t kFewestGatheredRows = 2;
constexpr std::int64_t kFewestGatheredScales = 8;
// Blocks of a chunk from which on quantising them takes longer than sorting routes.
constexpr std::int64_t kFewestSplitBlocks = 8;

}  // namespace

LowRoutingShape Communicator::low_routing_shape(std::int64_t num_tokens, std::int64_t topk) const {
  return LowRoutingShape{bases_.size(), at(num_local_experts_), at(num_tokens), at(topk)};
}

LowSlots Communicator::low_slots(std::int32_t most_local_experts) const {
  return LowSlots{at(options_.low_tokens) * bases_.size(),
                  options_.low_layout == RowLayout::kExpert ? at(most_local_experts) : 1};
}

// As many as a rank's tokens have scales: source rows are of 2 bytes an element or more, and no longer than a slot.
std::size_t Communicator::low_scale_words(const LowSlots& slots) const {
  if (slots.slots() == 0) return 0;
  return at(options_.low_tokens) * align_up(divided_up(pool_->low().rows_bytes / slots.slots(), 2 * kFp8Block), 2);
}

void Communicator::fill_low_group(LowState* state, std::uint64_t* scale_words, const LowSlots& slots) {
  low_.group = group_;
  low_.layout = pool_->low();
  low_.slots = slots;
  low_.scale_words = scale_words;
  low_.row_layout = options_.low_layout;
  low_.state = state;
  low_.masked_since = reinterpret_cast<std::uint32_t*>(state + 1);
  low_.mask_on_timeout = options_.mask_on_timeout;
  low_.starts_early = has_bulk_;
  low_.lets_next_begin = has_bulk_ && next_leaves_room();
  low_.num_local_experts = num_local_experts_;
  const auto& rank_of = options_.expert_to_rank;
  const std::int32_t each = std::max(group_.num_experts / group_.num_ranks, 1);
  bool even = each * group_.num_ranks == group_.num_experts;
  for (std::size_t expert = 0; even && expert < rank_of.size(); ++expert) {
    even = rank_of[expert] == static_cast<std::int32_t>(expert) / each;
  }
  low_.experts_each = even ? each : 0;
  low_.experts_inverse = inverse_of(each);
}

// Whether a kernel that begins before an operation has ended leaves room for the other ranks on this GPU: each of those
// that it waits for needs as many blocks at a time as post to the others, which are its first ones. At worst all other
// ranks hold, beside a next kernel of the most blocks, the SM of the one that waits for rows.
bool Communicator::next_leaves_room() const {
  const int ranks = options_.ranks_on_device;
  if (ranks == 1) return true;
  const int most = num_device_sms_ / ranks;
  const int lacking = std::max((ranks - 1) * (most + 1) + most - num_device_sms_, 0);
  return most - lacking >= num_ranks();
}

// Results that are used on another stream than the one that writes the buffer next.
void Communicator::follow_low_home(int index, cudaStream_t stream) {
  const cudaStream_t home = low_homes_[at(index)];
  low_homes_[at(index)] = stream;
  if (home == nullptr || home == stream || capture_of(home) != capture_of(stream)) return;
  MOE_EP_CUDA_CHECK(cudaEventRecord(low_home_event_, home));
  MOE_EP_CUDA_CHECK(cudaStreamWaitEvent(stream, low_home_event_, 0));
}

LowBlock Communicator::low_block(int index, const RowSizes& sizes, cudaStream_t home) {
  low_homes_[at(index)] = home;
  auto& kept = low_holds_[at(index)];
  LowBlock block{};
  block.hold = kept.lock();
  if (block.hold == nullptr) {
    block.hold = std::make_shared<LowHold>(LowHold{pool_});
    kept = block.hold;
  }
  block.receive = pool_->base() + pool_->low().receive(at(index));
  block.offsets = low_.slots.arrays(sizes.row, sizes.scale, sizes.weight, sizes.index);
  block.rows = low_rows(index);
  return block;
}

// Whether, and how, scales are gathered: not where rows are too few or too many for it, or too long.
void Communicator::plan_gathering(LowDispatchParams& params, int blocks) const {
  const std::int64_t experts = group_.num_experts;
  const std::int64_t routes = std::int64_t{params.num_tokens} * params.topk;
  const std::int64_t stride = align_up(divided_up(params.source.hidden, kFp8Block), 2);
  const std::int64_t warps_each = blocks * kWarps / experts;
  const bool pays = routes >= kFewestGatheredRows * experts && routes <= kMostListed * experts;
  params.gathers_scales = false;
  if (!params.source.quantize || !params.has_marks || tuned_gather_ < 0 || (tuned_gather_ == 0 && !pays) ||
      options_.low_layout != RowLayout::kExpert || warps_each == 0 ||
      at(params.num_tokens * stride) > low_scale_words(low_.slots)) {
    return;
  }
  int parts_log2 = 0;
  while (2 << parts_log2 <= warps_each && (kFewestGatheredScales << (parts_log2 + 1)) <= stride) ++parts_log2;
  const std::int64_t part_words = 2 * divided_up(stride / 2, std::int64_t{1} << parts_log2);
  if (part_words > kMostPartWords) return;
  params.gathers_scales = true;
  params.scale_parts_log2 = parts_log2;
  params.scale_stride = static_cast<std::int32_t>(stride);
  params.part_words = static_cast<std::int32_t>(part_words);
  params.first_gathered = static_cast<std::int32_t>(group_.rank * experts / num_ranks());
}

void Communicator::low_dispatch(const LowDispatchArguments& arguments) {
  const DeviceGuard guard(pool_->device());
  throw_if_failed(true);
  const RowSource& source = arguments.source;
  const bool quantized = source.quantize || arguments.has_scales;
  LowDispatchParams params{};
  params.low = low_;
  params.source = source;
  std::copy_n(bases_.begin(), std::min<std::size_t>(bases_.size(), kHeapsAtHand), params.heaps);
  const std::int64_t element = static_cast<std::int64_t>(element_bytes(source.element));
  const bool by_rank = options_.low_layout == RowLayout::kRank;
  params.sizes.row = static_cast<std::uint32_t>(source.hidden * (quantized ? 1 : element));
  params.sizes.scale = quantized ? static_cast<std::uint32_t>(divided_up(source.hidden, kFp8Block) * sizeof(float)) : 0;
  params.sizes.weight = by_rank && arguments.has_weights ? static_cast<std::uint32_t>(arguments.topk * 4) : 0;
  params.sizes.index = by_rank ? static_cast<std::uint32_t>(arguments.topk * 8) : 0;
  params.routing =
      LowRoutingView::at(arguments.routing_memory, low_routing_shape(arguments.num_tokens, arguments.topk));
  params.topk_idx = arguments.topk_idx;
  params.num_tokens = static_cast<std::int32_t>(arguments.num_tokens);
  params.topk = static_cast<std::int32_t>(arguments.topk);
  params.index = arguments.index;
  params.halves = arguments.receives ? kLowBoth : kLowSend;
  params.bulk_loads = has_bulk_ && source.hidden * element % 16 == 0;
  params.bulk_stores = has_bulk_ && params.sizes.row % 16 == 0;

  // So many chunks that every warp has one, within what is worth a copy of its own.
  const int most = most_low_blocks(arguments.num_sms);
  const std::int64_t unit = quantized ? static_cast<std::int64_t>(kFp8Block) : 16 / element;
  const std::int64_t row = source.hidden * element;
  const std::int64_t wanted = divided_up(std::int64_t{most} * kWarps, std::max<std::int64_t>(arguments.num_tokens, 1));
  // Where every warp has one, it needs no second stage, and chunks may be twice as long.
  const bool one_each =
      wanted >= divided_up(row, 2 * kLargestLowChunk) && arguments.num_tokens * wanted <= std::int64_t{most} * kWarps;
  const std::int64_t largest_bytes = one_each ? 2 * kLargestLowChunk : kLargestLowChunk;
  const std::int64_t fewest = divided_up(row, largest_bytes);
  const std::int64_t chunks = std::clamp(wanted, fewest, std::max(fewest, divided_up(row, kSmallestLowChunk)));
  const std::int64_t largest = largest_bytes / element / unit * unit;
  params.chunk_elements =
      static_cast<std::int32_t>(std::min(largest, divided_up(divided_up(source.hidden, chunks), unit) * unit));
  if (tuned_send_.chunk_bytes > 0) params.chunk_elements = static_cast<std::int32_t>(tuned_send_.chunk_bytes / element);
  const std::int64_t items = arguments.num_tokens * divided_up(source.hidden, params.chunk_elements);
  const int blocks = static_cast<int>(std::clamp<std::int64_t>(items, 1, most));
  params.sorters =
      source.quantize && params.chunk_elements >= kFewestSplitBlocks * std::int64_t{kFp8Block} ? kWarps / 2 : kWarps;
  // Less is slower, but all of it works.
  bool fits = false;
  struct Way {
    bool marks;
    bool may_gather;
  };
  for (const Way way : {Way{true, true}, Way{true, false}, Way{false, false}}) {
    params.has_marks = way.marks;
    params.gathers_scales = false;
    if (way.may_gather) plan_gathering(params, blocks);
    for (int stages = one_each ? 1 : 2; stages > 0 && !fits; --stages) {
      params.stages = stages;
      fits = complete_low_dispatch(params, blocks) <= most_shared_bytes_;
    }
    // In layout rank nothing is gathered, and marks say where a row goes once.
    if (fits || by_rank) break;
  }
  if (!fits) {
    throw Error(ErrorKind::kConfig, std::to_string(group_.num_experts) + " experts and " +
                                        std::to_string(arguments.num_tokens) +
                                        " tokens are more than this GPU's shared memory has room for in one "
                                        "low-latency dispatch; send fewer tokens, or use dispatch");
  }
  queue_behind(arguments.stream);
  follow_low_home(arguments.index, arguments.stream);
  MOE_EP_CUDA_CHECK(launch_low_dispatch(params, blocks, arguments.stream));
  queued(arguments.stream);
}

void Communicator::low_receive(void* routing_memory, std::int64_t num_tokens, std::int64_t topk, int index,
                               cudaStream_t stream) {
  const DeviceGuard guard(pool_->device());
  throw_if_failed(true);
  LowDispatchParams params{};
  params.low = low_;
  params.routing = LowRoutingView::at(routing_memory, low_routing_shape(num_tokens, topk));
  params.index = index;
  params.halves = kLowReceive;
  queue_behind(stream);
  MOE_EP_CUDA_CHECK(launch_low_dispatch(params, 1, stream));
  queued(stream);
}

bool Communicator::low_combine(const LowCombineArguments& arguments) {
  const DeviceGuard guard(pool_->device());
  throw_if_failed(true);
  const bool sends = (arguments.halves & kLowSend) != 0;
  const bool receives = (arguments.halves & kLowReceive) != 0;
  const std::uint8_t* in_place = low_rows(arguments.index);
  // Without experts there is nothing to copy.
  const bool is_in_place = !arguments.quantize && (arguments.rows == in_place || arguments.rows == nullptr);
  const bool copies = sends && !is_in_place;
  LowCombineParams params{};
  params.low = low_;
  std::copy_n(bases_.begin(), std::min<std::size_t>(bases_.size(), kHeapsAtHand), params.heaps);
  params.topk_idx = arguments.topk_idx;
  params.weights = arguments.weights;
  params.has_weights = arguments.has_weights;
  params.routing =
      LowRoutingView::at(arguments.routing_memory, low_routing_shape(arguments.num_tokens, arguments.topk));
  params.num_tokens = static_cast<std::int32_t>(arguments.num_tokens);
  params.topk = static_cast<std::int32_t>(arguments.topk);
  params.index = arguments.index;
  params.rows_offset = pool_->low().rows(at(arguments.index));
  params.hidden = arguments.hidden;
  params.element = arguments.element;
  params.quantize = arguments.quantize;
  params.power_of_two = arguments.power_of_two;
  params.out = arguments.out;
  params.lost = arguments.lost;
  params.halves = arguments.halves;
  // A receive half reads this rank's own rows where the caller left them, too.
  params.rows = is_in_place || (arguments.quantize && !sends) ? nullptr : arguments.rows;
  // Rows are read in place only within one launch: between two, peers that read them late would hold this rank up.
  params.segment = -1;
  bool registered = false;
  if (copies && receives && !arguments.quantize && !options_.mask_on_timeout) {
    const RowPlace place = row_memory_.note(arguments.rows);
    params.segment = place.segment;
    params.segment_offset = place.offset;
    params.segment_id = place.id;
    registered = place.registered;
  }

  params.pipeline = reduce_pipeline(num_ranks(), params.topk, false);
  params.pipeline.chunk_bytes = kReduceChunk;
  const int most = most_low_blocks(arguments.num_sms);
  params.send_blocks = most;
  while (complete_low_combine(params) > most_shared_bytes_ && params.pipeline.warps > 1) --params.pipeline.warps;
  int blocks = 1;
  if (copies) blocks = most;
  if (receives) {
    const int warps = params.quantize ? kWarps : params.pipeline.warps;
    const std::int64_t chunks =
        params.quantize
            ? divided_up(arguments.hidden * static_cast<std::int64_t>(element_bytes(arguments.element)), 512)
            : params.chunks;
    blocks = std::max(
        blocks, static_cast<int>(std::clamp<std::int64_t>(divided_up(arguments.num_tokens * chunks, warps), 1, most)));
  }
  params.token_step = blocks * params.pipeline.warps / params.chunks;
  params.chunk_step = blocks * params.pipeline.warps % params.chunks;
  // Rows that the L2 cache holds need not be brought there.
  const double rows_read = static_cast<double>(arguments.num_tokens) * params.topk * params.row_bytes;
  params.prefetches_own = sends && receives && !arguments.quantize && params.pipeline.use_bulk &&
                          rows_read * options_.ranks_on_device > static_cast<double>(l2_bytes_);
  queue_behind(arguments.stream);
  MOE_EP_CUDA_CHECK(launch_low_combine(params, blocks, arguments.stream));
  queued(arguments.stream);
  return copies && !registered;
}

bool Communicator::note_rows(const void* rows) {
  const DeviceGuard guard(pool_->device());
  return row_memory_.note(rows).registered;
}

std::vector<RowSegment> Communicator::offer_rows(std::string& refused) {
  const DeviceGuard guard(pool_->device());
  return row_memory_.offer(refused);
}

std::vector<int> Communicator::map_rows(int rank, const std::vector<RowSegment>& offers, std::string& refused) {
  const DeviceGuard guard(pool_->device());
  const std::vector<int> indices = row_memory_.map(rank, offers, refused);
  const auto& mapped = row_memory_.mapped();
  upload_rows(low_.segments, mapped.data(), mapped.size() * sizeof(mapped[0]));
  return indices;
}

std::size_t Communicator::commit_rows(const std::vector<int>& indices) {
  const DeviceGuard guard(pool_->device());
  row_memory_.commit(indices);
  const std::vector<std::uint64_t> registered = row_memory_.registered();
  upload_rows(low_.registered, registered.data(), registered.size() * sizeof(registered[0]));
  return row_memory_.registered_bytes();
}

void Communicator::upload_rows(void* table, const void* from, std::size_t bytes) {
  MOE_EP_CUDA_CHECK(cudaMemcpyAsync(table, from, bytes, cudaMemcpyHostToDevice, control_));
  MOE_EP_CUDA_CHECK(cudaStreamSynchronize(control_));
}

void Communicator::low_mask(const std::vector<int>& ranks, cudaStream_t stream) {
  const DeviceGuard guard(pool_->device());
  throw_if_failed(true);
  queue_behind(stream);
  for (int first = 0; first < num_ranks(); first += 64) {
    std::uint64_t bits = 0;
    for (const int rank : ranks) {
      if (rank >= first && rank < first + 64) bits |= std::uint64_t{1} << (rank - first);
    }
    if (bits != 0) MOE_EP_CUDA_CHECK(launch_low_mask(low_, bits, first, stream));
  }
  queued(stream);
}

std::vector<int> Communicator::low_masked() {
  check();
  const DeviceGuard guard(pool_->device());
  std::vector<std::uint32_t> since(bases_.size());
  MOE_EP_CUDA_CHECK(cudaMemcpyAsync(since.data(), low_.masked_since, since.size() * sizeof(since[0]),
                                    cudaMemcpyDeviceToHost, control_));
  MOE_EP_CUDA_CHECK(cudaStreamSynchronize(control_));
  std::vector<int> ranks;
  for (int rank = 0; rank < num_ranks(); ++rank) {
    if (since[at(rank)] != 0) ranks.push_back(rank);
  }
  return ranks;
}

}  // namespace gpu
}  // namespace moe_ep
