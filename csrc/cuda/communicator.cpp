// What dispatch and combine share: the group's memory, room in the heap, shapes of launches.
#include "cuda/communicator.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/index.h"
#include "cuda/check.h"
#include "cuda/launch.h"

namespace moe_ep {
namespace gpu {
namespace {

// What kernels declare as static shared memory, rounded up.
constexpr std::size_t kStaticSharedBytes = 512;
constexpr int kMostStages = 8;
constexpr std::int64_t kSmallChunk = 3584;
constexpr std::int64_t kQuantizedChunk = 2048;  // elements
static_assert(kQuantizedChunk <= kMostScalesAChunk * static_cast<std::int64_t>(kFp8Block), "their scales have room");

}  // namespace

Communicator::Communicator(std::shared_ptr<Pool> pool, int rank, const std::vector<PeerAddress>& peers,
                           CommunicatorOptions options, std::function<void()> on_idle)
    : pool_(std::move(pool)),
      rank_(rank),
      options_(std::move(options)),
      on_idle_(std::move(on_idle)),
      row_memory_(static_cast<int>(peers.size())) {
  try {
    connect(peers);
  } catch (...) {
    release();
    throw;
  }
}

Communicator::~Communicator() { release(); }

void Communicator::connect(const std::vector<PeerAddress>& peers) {
  const int device = pool_->device();
  const DeviceGuard guard(device);
  int major = 0;
  int shared = 0;
  MOE_EP_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  MOE_EP_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  MOE_EP_CUDA_CHECK(cudaDeviceGetAttribute(&num_device_sms_, cudaDevAttrMultiProcessorCount, device));
  MOE_EP_CUDA_CHECK(cudaDeviceGetAttribute(&l2_bytes_, cudaDevAttrL2CacheSize, device));
  has_bulk_ = major >= 9;
  most_shared_bytes_ = static_cast<std::size_t>(shared) - kStaticSharedBytes;
  if (const cudaError_t error = prepare_dispatch(most_shared_bytes_); error != cudaSuccess) {
    cudaGetLastError();
    throw Error(ErrorKind::kUnavailable, "this build has no kernels for compute capability " + std::to_string(major) +
                                             ".x (" + cudaGetErrorString(error) +
                                             "); install it again on this machine, or set "
                                             "MOE_EP_CUDA_ARCHITECTURES when building");
  }
  MOE_EP_CUDA_CHECK(prepare_expand(most_shared_bytes_));
  MOE_EP_CUDA_CHECK(prepare_combine(most_shared_bytes_));
  MOE_EP_CUDA_CHECK(prepare_low_dispatch(most_shared_bytes_));
  MOE_EP_CUDA_CHECK(prepare_low_combine(most_shared_bytes_));

  for (std::size_t i = 0; i < peers.size(); ++i) {
    pids_.push_back(peers[i].pid);
    watches_.emplace_back(static_cast<int>(i) == rank_ ? 0 : peers[i].pid);
    bases_.push_back(static_cast<int>(i) == rank_ ? pool_->base() : open_heap(static_cast<int>(i), peers[i].heap));
  }
  fill_tables();
  MOE_EP_CUDA_CHECK(cudaStreamCreateWithFlags(&control_, cudaStreamNonBlocking));
  MOE_EP_CUDA_CHECK(cudaEventCreateWithFlags(&behind_, cudaEventDisableTiming));
  MOE_EP_CUDA_CHECK(cudaEventCreateWithFlags(&low_home_event_, cudaEventDisableTiming));
  MOE_EP_CUDA_CHECK(cudaStreamCreateWithFlags(&stage_, cudaStreamNonBlocking));
  MOE_EP_CUDA_CHECK(cudaEventCreateWithFlags(&stage_start_, cudaEventDisableTiming));
  MOE_EP_CUDA_CHECK(cudaEventCreateWithFlags(&stage_end_, cudaEventDisableTiming));
}

std::uint8_t* Communicator::open_heap(int rank, const IpcHandle& heap) {
  cudaIpcMemHandle_t handle;
  std::memcpy(&handle, heap.data(), sizeof(handle));
  void* base = nullptr;
  const cudaError_t error = cudaIpcOpenMemHandle(&base, handle, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw Error(ErrorKind::kUnavailable,
                "the memory of rank " + std::to_string(rank) + " can't be mapped: " + cudaGetErrorString(error) +
                    "; the GPUs need peer access (NVLink or PCIe), and every rank must see all of them: don't hide "
                    "them with CUDA_VISIBLE_DEVICES, call torch.cuda.set_device instead");
  }
  std::uint64_t magic = 0;
  MOE_EP_CUDA_CHECK(cudaMemcpy(&magic, base, sizeof(magic), cudaMemcpyDeviceToHost));
  if (magic != kHeapMagic) {
    throw Error(ErrorKind::kUnavailable, "the memory of rank " + std::to_string(rank) +
                                             " has another format; install one version of the package everywhere");
  }
  return static_cast<std::uint8_t*>(base);
}

void Communicator::fill_tables() {
  const auto& rank_of = options_.expert_to_rank;
  const int num_experts = static_cast<int>(rank_of.size());
  std::vector<std::int32_t> local_of, by_rank, first_of_rank;
  std::vector<std::int32_t> held(bases_.size(), 0);
  for (std::int32_t rank : rank_of) local_of.push_back(held[at(rank)]++);
  for (int rank = 0; rank < num_ranks(); ++rank) {
    first_of_rank.push_back(static_cast<std::int32_t>(by_rank.size()));
    for (int expert = 0; expert < num_experts; ++expert) {
      if (rank_of[at(expert)] == rank) by_rank.push_back(expert);
    }
  }
  first_of_rank.push_back(num_experts);
  num_local_experts_ = held[at(rank_)];
  if (count_warps(num_experts + num_ranks()) < 1) {
    throw Error(ErrorKind::kUnavailable, std::to_string(num_experts) +
                                             " experts are more than this GPU's shared memory has counters for; use "
                                             "backend='collective'");
  }

  const std::size_t blocks = at(num_device_sms_) * (at(num_experts) + bases_.size());
  const std::size_t words = 3 * at(num_experts) + first_of_rank.size() + blocks;
  const std::size_t tables = align_up(sizeof(DeviceState), kCacheLine);
  const std::size_t low_at = tables;
  const std::size_t bases_at = align_up(low_at + sizeof(LowState) + bases_.size() * sizeof(std::uint32_t), kCacheLine);
  const LowSlots slots = low_slots(*std::max_element(held.begin(), held.end()));
  const std::size_t segments_at = align_up(bases_at + bases_.size() * sizeof(std::uint8_t*), kCacheLine);
  const std::size_t registered_at = segments_at + row_memory_.mapped().size() * sizeof(std::uint8_t*);
  const std::size_t scales_at = registered_at + kMostRowSegments * sizeof(std::uint64_t);
  const std::size_t words_at = scales_at + low_scale_words(slots) * sizeof(std::uint64_t);
  MOE_EP_CUDA_CHECK(cudaMalloc(&device_memory_, words_at + words * sizeof(std::int32_t)));
  auto* memory = static_cast<std::uint8_t*>(device_memory_);
  MOE_EP_CUDA_CHECK(cudaMemset(memory, 0, words_at));
  DeviceState state{};
  state.bad_route = kNoBadRoute;
  const auto upload = [](void* to, const void* from, std::size_t bytes) {
    MOE_EP_CUDA_CHECK(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
  };
  upload(memory, &state, sizeof(state));
  upload(memory + bases_at, bases_.data(), bases_.size() * sizeof(std::uint8_t*));
  auto* next = reinterpret_cast<std::int32_t*>(memory + words_at);
  const auto table = [&](const std::vector<std::int32_t>& values) {
    std::int32_t* start = next;
    upload(start, values.data(), values.size() * sizeof(std::int32_t));
    next += values.size();
    return start;
  };

  const std::size_t report_bytes = sizeof(Report) + at(num_words()) * sizeof(std::uint64_t);
  void* report = nullptr;
  MOE_EP_CUDA_CHECK(cudaHostAlloc(&report, report_bytes, cudaHostAllocMapped));
  report_ = static_cast<Report*>(report);
  std::memset(report, 0, report_bytes);
  void* report_on_device = nullptr;
  MOE_EP_CUDA_CHECK(cudaHostGetDevicePointer(&report_on_device, report, 0));

  group_.layout = pool_->layout();
  group_.rank = rank_;
  group_.num_ranks = num_ranks();
  group_.num_experts = num_experts;
  group_.alignment = static_cast<std::int32_t>(options_.alignment);
  group_.bases = reinterpret_cast<std::uint8_t* const*>(memory + bases_at);
  group_.rank_of_expert = table(rank_of);
  group_.local_of_expert = table(local_of);
  group_.experts_by_rank = table(by_rank);
  group_.first_of_rank = table(first_of_rank);
  group_.block_counts = next;
  group_.state = reinterpret_cast<DeviceState*>(memory);
  group_.report = static_cast<Report*>(report_on_device);
  group_.on_one_device = options_.ranks_on_device == num_ranks();
  group_.timeout_ns = static_cast<std::uint64_t>(options_.timeout_s * 1e9);
  low_.segments = reinterpret_cast<std::uint8_t**>(memory + segments_at);
  low_.registered = reinterpret_cast<std::uint64_t*>(memory + registered_at);
  fill_low_group(reinterpret_cast<LowState*>(memory + low_at), reinterpret_cast<std::uint64_t*>(memory + scales_at),
                 slots);
}

// At the end of a process the driver may be gone already: nothing is checked.
void Communicator::release() {
  if (has_run_) wait_for_queued();
  for (std::size_t i = 0; i < bases_.size(); ++i) {
    if (static_cast<int>(i) != rank_) cudaIpcCloseMemHandle(bases_[i]);
  }
  bases_.clear();
  if (control_ != nullptr) cudaStreamDestroy(control_);
  if (stage_ != nullptr) cudaStreamDestroy(stage_);
  for (cudaEvent_t event : {behind_, low_home_event_, stage_start_, stage_end_}) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  if (device_memory_ != nullptr) cudaFree(device_memory_);
  if (report_ != nullptr) cudaFreeHost(report_);
  cudaGetLastError();
}

RoutingShape Communicator::routing_shape(std::int64_t num_tokens, std::int64_t topk) const {
  return RoutingShape{bases_.size(), at(num_local_experts_), at(num_tokens), at(topk)};
}

int Communicator::count_warps(int bins) const {
  const std::size_t room = most_shared_bytes_ - at(num_ranks()) * 48 - 4096;
  const auto counters = static_cast<int>(room / sizeof(std::int32_t) / at(bins));
  return std::min(kWarps, counters - kArraysBesideCounters);
}

// What did best on an H200 and on H100s (docs/performance.md): where memory or a link is the limit, few small chunks in
// flight disturb it least; with few SMs each of them has to keep more in flight. Quantising takes all warps.
Pipeline Communicator::send_pipeline(const RowSource& source, const RowSizes& sizes, bool crosses, int num_sms) const {
  Pipeline pipeline{};
  pipeline.count_warps = count_warps(group_.num_experts + group_.num_ranks);
  const auto element = static_cast<std::int64_t>(element_bytes(source.element));
  const std::int64_t row = source.hidden * element;
  pipeline.use_bulk = has_bulk_ && row % 16 == 0 && sizes.row % 16 == 0;
  pipeline.warps = kWarps;
  pipeline.chunk_bytes = static_cast<std::int32_t>(row);
  if (!pipeline.use_bulk) return pipeline;
  const int num_destinations = crosses ? num_ranks() : 1;
  const int blocks = most_blocks(num_sms);
  // So many warps in all fill a link; with more, rows queue up in it, and what waits for them waits longer.
  constexpr int kWarpsForLinks = 96;
  const bool linked = options_.gpu_each && num_ranks() > 1 && blocks * kWarps / 2 >= kWarpsForLinks;
  const bool few = (is_crowded() || linked) && !source.quantize;
  if (few) pipeline.warps = linked && crosses ? std::max((kWarpsForLinks + blocks - 1) / blocks, 4) : kWarps / 2;
  const std::int64_t stages = send_stages(source.quantize);
  const std::int64_t side = sizeof(std::uint64_t) * stages + (source.quantize ? kMostScalesAChunk * sizeof(float) : 0);
  const auto room = static_cast<std::int64_t>(most_shared_bytes_ -
                                              align_up(at(num_destinations) * 48 + at(num_ranks()) * 16, 128) - 128);
  std::int64_t most = (room / kWarps - side) / stages;
  // Quantising by whole units, and a short last one, costs least.
  const std::int64_t block = static_cast<std::int64_t>(kFp8Block) * element;
  const std::int64_t unit = !source.quantize                     ? 16
                            : most >= kQuantizedAtOnce * element ? kQuantizedAtOnce * element
                                                                 : block;
  if (few) most = std::min<std::int64_t>(most, kSmallChunk);
  if (source.quantize) most = std::min(most, kQuantizedChunk * element);
  const std::int64_t chunks = (row + most / unit * unit - 1) / (most / unit * unit);
  const std::int64_t even = source.quantize ? most / unit * unit : (row + chunks - 1) / chunks;
  pipeline.chunk_bytes = static_cast<std::int32_t>(std::min(row, (even + unit - 1) / unit * unit));
  if (tuned_send_.warps > 0) pipeline.warps = tuned_send_.warps;
  if (tuned_send_.chunk_bytes > 0) pipeline.chunk_bytes = tuned_send_.chunk_bytes;
  return pipeline;
}

// The warps and chunks that did best on an H200: few where memory is the limit. Otherwise the arithmetic is, which
// likes many warps, and wide chunks of few rows.
Pipeline Communicator::reduce_pipeline(int num_sources, int most_entries, bool plain) const {
  const bool crowded = is_crowded();
  const bool wide = plain && most_entries <= (crowded ? 2 : 4);
  int most_warps = kWarps;
  if (most_entries == 4 || (crowded && most_entries > 2)) most_warps = most_entries <= 4 ? 12 : 10;
  return fit_reduce(num_sources, most_entries, wide ? kWideReduceChunk : kReduceChunk, most_warps);
}

// A token's experts are spread over ranks: most have few rows here, some all. With room for all of them in every stage
// most of the ring would be empty.
Pipeline Communicator::first_reduce_pipeline(int stage_rows, std::int64_t row_bytes) const {
  const bool wide = has_bulk_ && row_bytes > kReduceChunk;
  return fit_reduce(num_ranks(), stage_rows, wide ? kWideReduceChunk : kReduceChunk, kWarps);
}

int Communicator::rows_at_once(int topk) const { return std::min(tuned_rows_ > 0 ? tuned_rows_ : 3, topk); }

// Two stages a warp or more.
Pipeline Communicator::fit_reduce(int num_sources, int stage_rows, int chunk_bytes, int most_warps) const {
  Pipeline pipeline{};
  pipeline.use_bulk = has_bulk_;
  pipeline.chunk_bytes = tuned_reduce_.chunk_bytes > 0 ? tuned_reduce_.chunk_bytes : chunk_bytes;
  const std::size_t room = most_shared_bytes_ - align_up(at(num_sources) * 40, 128) - 256;
  const std::size_t stage = at(stage_rows) * at(pipeline.chunk_bytes) + sizeof(std::uint64_t);
  if (tuned_reduce_.warps > 0) most_warps = tuned_reduce_.warps;
  for (int warps = most_warps; warps >= 1; --warps) {
    pipeline.warps = warps;
    pipeline.stages = static_cast<std::int32_t>(std::min<std::size_t>(kMostStages, room / (stage * at(warps))));
    const int wanted = tuned_reduce_.stages > 0 ? tuned_reduce_.stages : 2;
    if (tuned_reduce_.stages > 0) pipeline.stages = std::min(pipeline.stages, wanted);
    if (pipeline.stages >= wanted) break;
  }
  return pipeline;
}

int Communicator::most_blocks(int num_sms) const {
  return std::min(num_sms > 0 ? num_sms : options_.default_sms, num_device_sms_);
}

bool Communicator::overlaps_stages() const {
  // A lane for each rank.
  if (num_ranks() > 32 || tuned_overlap_ < 0) return false;
  return options_.gpu_each || tuned_overlap_ > 0;
}

int Communicator::sms_beside(int num_sms, int local_sms, std::size_t bytes, double share) const {
  // Less is there before the host has launched it all.
  constexpr std::size_t kLeastBytes = std::size_t{24} << 20;
  if (bytes < kLeastBytes && tuned_overlap_ <= 0) return 0;
  const int left = static_cast<int>(share * num_device_sms_ / options_.ranks_on_device) - most_blocks(num_sms);
  const int wanted = most_blocks(local_sms);
  // With a few it would take longer than after the other stage with all of them.
  return 2 * left < wanted ? 0 : std::min(left, wanted);
}

std::int32_t Communicator::rows_in_part_log2() const {
  std::int32_t log2 = 5;
  while ((std::int64_t{16} << log2) < options_.max_tokens) ++log2;
  return log2;
}

int Communicator::blocks_for(int num_sms, std::int64_t items, int warps) const {
  return static_cast<int>(std::clamp<std::int64_t>(divided_up(items, warps), 1, most_blocks(num_sms)));
}

// Operations follow each other on the GPU whatever streams they are queued on.
void Communicator::queue_behind(cudaStream_t stream) {
  // A capture is not ordered after what came before it: it begins on an idle device, and so do its replays.
  if (has_run_ && stream != last_stream_ && capture_of(stream) == last_capture_) {
    MOE_EP_CUDA_CHECK(cudaStreamWaitEvent(stream, behind_, 0));
  }
}

// Recorded now, so that the next operation waits for this one and for nothing that is queued after it.
void Communicator::queued(cudaStream_t stream) {
  MOE_EP_CUDA_CHECK(cudaEventRecord(behind_, stream));
  last_stream_ = stream;
  last_capture_ = capture_of(stream);
  has_captures_ = has_captures_ || last_capture_ != 0;
  has_run_ = true;
}

// Replays of a graph may run on any stream.
cudaError_t Communicator::wait_for_queued() {
  return has_captures_ ? cudaDeviceSynchronize() : cudaStreamSynchronize(last_stream_);
}

Communicator::Room Communicator::find_room(std::size_t bytes, const Streams& streams) {
  return room_of(pool_->allocate(bytes, streams.run, streams.home), bytes);
}

Communicator::Room Communicator::room_of(std::shared_ptr<Pool::Lease> lease, std::size_t bytes) const {
  Room room;
  if (lease != nullptr) {
    room.offset = static_cast<std::int64_t>(lease->offset());
    room.bytes = static_cast<std::int64_t>(lease->bytes());
    room.lease = std::move(lease);
    return room;
  }
  room.offset = static_cast<std::int64_t>(pool_->layout().overflow());
  if (bytes <= pool_->layout().overflow_bytes) room.bytes = static_cast<std::int64_t>(pool_->layout().overflow_bytes);
  return room;
}

std::shared_ptr<Pool::Lease> Communicator::lease(std::size_t bytes, const Streams& streams) {
  const DeviceGuard guard(pool_->device());
  return pool_->allocate(bytes, streams.run, streams.home);
}

void Communicator::copy(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  const DeviceGuard guard(pool_->device());
  MOE_EP_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
  queued(stream);
}

}  // namespace gpu
}  // namespace moe_ep
