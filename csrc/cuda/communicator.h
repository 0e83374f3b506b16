// Dispatch and combine of one rank on a GPU: room in the heap, launches, and what kernels report back. One operation
// is queued at a time; the host waits for counts only where sizes are asked for.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/errors.h"
#include "common/heap_layout.h"
#include "common/process.h"
#include "cuda/low_state.h"
#include "cuda/pool.h"
#include "cuda/row_memory.h"
#include "cuda/state.h"

namespace moe_ep {
namespace gpu {

// Where a peer's heap is, and whose it is.
struct PeerAddress {
  std::int64_t pid;
  IpcHandle heap;
};

// What the host knows of a handle's routing; the tables are in device memory that the caller owns.
struct Routing {
  RowLayout layout = RowLayout::kExpert;
  bool two_stage = false;
  std::int64_t num_tokens = 0;
  std::int64_t topk = 0;
  std::int64_t max_recv_rows = -1;
  std::int64_t num_rows = 0;
  std::int64_t num_received = -1;  // -1: only the device knows
  std::int64_t block_rows = 0;     // room for rows in this rank's receive block: exact, or the most there can be
  std::int64_t sent_rows = -1;     // rows for other ranks; -1: only the device knows
  // Layout rank, of exact sizes: the run of rows in this rank's block that came from itself.
  std::int64_t own_first = 0;
  std::int64_t own_rows = 0;
  std::vector<std::int64_t> tokens_per_local_expert;  // empty: only the device knows
  RoutingView view{};
  Entry* fan = nullptr;  // [block_rows, topk], two stages

  bool deduplicated() const { return layout == RowLayout::kRank || two_stage; }
};

struct Streams {
  cudaStream_t run;   // where the operation is queued
  cudaStream_t home;  // where its results will be used
};

struct DispatchArguments {
  RowSource source;
  std::int64_t num_tokens;
  // An empty tensor's address may be null, so what is there is said apart from where it is.
  bool has_scales;  // the rows are quantised already
  bool has_weights;
  const std::int64_t* topk_idx;  // unused with `routing`
  std::int64_t topk;
  RowLayout layout;
  std::int64_t max_recv_rows;        // -1: exact sizes, the host waits for counts
  std::shared_ptr<Routing> routing;  // reuse; null: route `topk_idx`
  void* routing_memory;              // RoutingView::bytes, 16-byte aligned
  int num_sms;                       // 0: the default
  Streams streams;
};

// Where received rows are: a lease, or without one a place from which the caller must copy them before the next
// operation.
struct DispatchResult {
  std::shared_ptr<Pool::Lease> lease;
  std::uint8_t* data = nullptr;
  ReceiveBlock offsets{};
  RowSizes sizes{};
  std::shared_ptr<Routing> routing;
};

struct ExpandArguments {
  const DispatchResult* staged;
  Element element;  // of the rows as they arrived
  std::int32_t hidden;
  bool fresh;   // the fan-out comes with the rows
  bool beside;  // on stage_stream(), where `block` may be written, while the dispatch goes on
  std::uint8_t* block;
  int num_sms;    // of the dispatch
  int local_sms;  // of this stage
  Streams streams;
};

struct CombineArguments {
  const std::uint8_t* rows;
  Element element;
  std::int32_t hidden;
  std::shared_ptr<Routing> routing;
  bool has_weights;
  bool has_values;
  const float* weights;
  const float* values;
  std::uint8_t* out;
  float* values_out;
  int num_sms;
  int local_sms;  // of what stays on this GPU
  Streams streams;
};

struct CombineResult {
  bool staged = false;
  std::int64_t bytes_to_peers = 0;
};

struct LowDispatchArguments {
  RowSource source;
  std::int64_t num_tokens;
  bool has_scales;
  bool has_weights;
  const std::int64_t* topk_idx;
  std::int64_t topk;
  void* routing_memory;  // LowRoutingView::bytes, 16-byte aligned
  int index;
  int num_sms;  // 0: the default
  bool receives;
  cudaStream_t stream;
};

struct LowCombineArguments {
  const std::uint8_t* rows;  // null where only the receive half is asked for
  Element element;
  std::int32_t hidden;
  std::int64_t num_tokens;
  const std::int64_t* topk_idx;
  std::int64_t topk;
  bool has_weights;
  const float* weights;
  void* routing_memory;
  int index;
  bool quantize;
  bool power_of_two;
  std::uint8_t* out;
  float* lost;
  int num_sms;
  LowHalves halves;
  cudaStream_t stream;
};

// What tensors over a buffer of low-latency mode keep: as long as one lives, so does this.
struct LowHold {
  std::shared_ptr<Pool> pool;
};

// Where low-latency results of one index are.
struct LowBlock {
  std::shared_ptr<LowHold> hold;
  std::uint8_t* receive;
  ReceiveBlock offsets;  // in `receive`
  std::uint8_t* rows;
};

struct CommunicatorOptions {
  std::vector<std::int32_t> expert_to_rank;
  std::int64_t alignment;
  bool two_stage;
  std::int64_t max_tokens;
  double timeout_s;
  int default_sms;
  int ranks_on_device;
  bool gpu_each;  // has every rank, not this one alone
  // Low-latency mode: tokens a rank, 0 without it.
  std::int64_t low_tokens = 0;
  RowLayout low_layout = RowLayout::kExpert;
  bool mask_on_timeout = false;
};

class Communicator {
 public:
  // `on_idle` is called about ten times a second while the host waits; it may throw to break the wait.
  Communicator(std::shared_ptr<Pool> pool, int rank, const std::vector<PeerAddress>& peers, CommunicatorOptions options,
               std::function<void()> on_idle);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  DispatchResult dispatch(const DispatchArguments& arguments);
  // Where the second stage of a dispatch of `bytes` of rows runs beside the first one; null: it does not.
  cudaStream_t stage_stream(int num_sms, int local_sms, std::size_t bytes) const {
    return expand_sms_beside(num_sms, local_sms, bytes) > 0 ? stage_ : nullptr;
  }
  // Stage two: the rows of `staged` at the places of their experts. `block` has expanded(...).total bytes.
  void expand(const ExpandArguments& arguments);
  ReceiveBlock expanded(const DispatchResult& staged) const;
  RowSizes expanded_sizes(const DispatchResult& staged) const;
  CombineResult combine(const CombineArguments& arguments);
  std::shared_ptr<Pool::Lease> lease(std::size_t bytes, const Streams& streams);
  void copy(void* to, const void* from, std::size_t bytes, cudaStream_t stream);

  // Low-latency mode; see low_latency.cpp.
  void low_dispatch(const LowDispatchArguments& arguments);
  void low_receive(void* routing_memory, std::int64_t num_tokens, std::int64_t topk, int index, cudaStream_t stream);
  // Whether rows had to be copied into the heap.
  bool low_combine(const LowCombineArguments& arguments);
  // Memory of buffer `index`, in sizes of rows as they crossed. Its next use follows what `home` has done by then.
  LowBlock low_block(int index, const RowSizes& sizes, cudaStream_t home);
  std::uint8_t* low_rows(int index) const { return pool_->base() + pool_->low().rows(static_cast<std::size_t>(index)); }
  bool low_held(int index) const { return !low_holds_[static_cast<std::size_t>(index)].expired(); }
  void low_mask(const std::vector<int>& ranks, cudaStream_t stream);
  // Waits for what is queued.
  std::vector<int> low_masked();
  // Registering memory that rows of combines are in; see RowMemory. Nothing may be under way.
  bool note_rows(const void* rows);
  void forget_rows(bool all) { row_memory_.forget(all); }
  std::vector<RowSegment> offer_rows(std::string& refused);
  std::vector<int> map_rows(int rank, const std::vector<RowSegment>& offers, std::string& refused);
  // Bytes that are registered then.
  std::size_t commit_rows(const std::vector<int>& indices);
  std::size_t low_routing_bytes(std::int64_t num_tokens, std::int64_t topk) const {
    return LowRoutingView::bytes(low_routing_shape(num_tokens, topk));
  }

  // Waits for what is queued and throws what it ran into.
  void check();
  // Tells all peers that this rank takes part in nothing more: state 1 closed, 2 failed. Ends waits of this rank.
  void depart(std::uint32_t state, const std::string& text);

  RoutingShape routing_shape(std::int64_t num_tokens, std::int64_t topk) const;
  // Most rows that one rank can receive, one a (token, source rank).
  std::int64_t most_received_rows() const { return options_.max_tokens * num_ranks(); }
  // For measurements and tests: other pipelines than the ones that were found best; scales gathered, and two stages
  // at the same time, (1) wherever that is possible, or nowhere (-1). 0 leaves a number as it is chosen.
  void tune(Pipeline send, Pipeline reduce, int rows_at_once, int gather_scales, int overlap_stages) {
    tuned_send_ = send;
    tuned_reduce_ = reduce;
    tuned_rows_ = rows_at_once;
    tuned_gather_ = gather_scales;
    tuned_overlap_ = overlap_stages;
  }

 private:
  void connect(const std::vector<PeerAddress>& peers);
  std::uint8_t* open_heap(int rank, const IpcHandle& heap);
  void fill_tables();
  void release();

  int num_ranks() const { return static_cast<int>(bases_.size()); }
  // Of a launch on at most `num_sms` SMs, 0: the default; and as many of them as have work.
  int most_blocks(int num_sms) const;
  int blocks_for(int num_sms, std::int64_t items, int warps) const;
  // Whether ranks tell how far they are in one stage, so that another can run beside it: alike on all ranks. Where some
  // share a GPU they keep each other from its SMs.
  bool overlaps_stages() const;
  // SMs for a stage that stays on this GPU beside one of `num_sms` that does not, on another stream; 0: one after the
  // other. Only for so many `bytes` of rows that this is worth the host's time, and within `share` of this rank's SMs:
  // where one stage waits for the other, both must find room. And only if that leaves half of `local_sms` or more.
  int sms_beside(int num_sms, int local_sms, std::size_t bytes, double share) const;
  // Of a combine: about sixteen parts where all tokens come that can; of fewer, as many rows as are worth telling.
  std::int32_t rows_in_part_log2() const;
  // A dispatch's second stage waits for its first one, which may not have begun: two buffers may do so at a time.
  int expand_sms_beside(int num_sms, int local_sms, std::size_t bytes) const {
    return overlaps_stages() ? sms_beside(num_sms, local_sms, bytes, 0.5) : 0;
  }
  LowRoutingShape low_routing_shape(std::int64_t num_tokens, std::int64_t topk) const;
  int most_low_blocks(int num_sms) const { return std::min(most_blocks(num_sms), kMostLowBlocks); }
  LowSlots low_slots(std::int32_t most_local_experts) const;
  std::size_t low_scale_words(const LowSlots& slots) const;
  void plan_gathering(LowDispatchParams& params, int blocks) const;
  bool next_leaves_room() const;
  void fill_low_group(LowState* state, std::uint64_t* scale_words, const LowSlots& slots);
  void follow_low_home(int index, cudaStream_t stream);
  void upload_rows(void* table, const void* from, std::size_t bytes);
  // `crosses`: to other ranks, by at most `num_sms` SMs.
  Pipeline send_pipeline(const RowSource& source, const RowSizes& sizes, bool crosses, int num_sms) const;
  Pipeline reduce_pipeline(int num_sources, int most_entries, bool plain) const;
  // Of the first of two stages, which reads so many rows of a token at a time.
  Pipeline first_reduce_pipeline(int stage_rows, std::int64_t row_bytes) const;
  int rows_at_once(int topk) const;
  Pipeline fit_reduce(int num_sources, int stage_rows, int chunk_bytes, int most_warps) const;
  int count_warps(int bins) const;
  // Whether this GPU's ranks use most of its SMs, so that memory is the limit and not what an SM can do.
  bool is_crowded() const { return options_.ranks_on_device * options_.default_sms * 5 >= num_device_sms_ * 3; }
  void queue_behind(cudaStream_t stream);
  void queued(cudaStream_t stream);
  cudaError_t wait_for_queued();

  struct Room {
    std::shared_ptr<Pool::Lease> lease;
    std::int64_t offset = 0;
    std::int64_t bytes = -1;  // -1: none
  };
  Room find_room(std::size_t bytes, const Streams& streams);
  // `lease`, or without one the overflow region, which has no room for more bytes than it is long.
  Room room_of(std::shared_ptr<Pool::Lease> lease, std::size_t bytes) const;

  // Waits until the call with `ticket` has reported; throws what ended it, kNoRoom excepted, which returns false.
  bool await(std::uint64_t ticket, cudaStream_t stream);
  // Whether all that the call with `ticket` has to say is there: with an outcome that ends it, nothing else is told.
  bool has_told(std::uint64_t ticket) const;
  // Of the words behind the report, the values of the call that has been awaited.
  std::int64_t told(Word word, int further = 0) const;
  int num_words() const { return static_cast<int>(Word::kFirstExpert) + num_local_experts_; }
  void while_waiting(std::uint64_t ticket, cudaStream_t stream, double waited_s);
  void throw_if_failed(bool fatal_only);
  [[noreturn]] void throw_outcome(const ReportedOutcome& reported);
  [[noreturn]] void throw_failed_wait(const ReportedOutcome& reported);
  std::string departure_text(int rank);
  bool has_departed(int rank);
  void tell_departure(int rank);

  std::shared_ptr<Pool> pool_;
  int rank_;
  CommunicatorOptions options_;
  std::function<void()> on_idle_;
  std::vector<std::uint8_t*> bases_;
  std::vector<std::int64_t> pids_;
  std::vector<ProcessWatch> watches_;
  int num_local_experts_ = 0;
  int num_device_sms_ = 0;
  int l2_bytes_ = 0;
  std::size_t most_shared_bytes_ = 0;
  bool has_bulk_ = false;
  void* device_memory_ = nullptr;  // state, tables and workspace
  Report* report_ = nullptr;       // as the host maps it, and its words
  Group group_{};
  LowGroup low_{};
  RowMemory row_memory_;
  std::array<std::weak_ptr<LowHold>, kLowBuffers> low_holds_;
  std::array<cudaStream_t, kLowBuffers> low_homes_{};
  cudaEvent_t low_home_event_ = nullptr;
  cudaStream_t control_ = nullptr;
  cudaEvent_t behind_ = nullptr;
  // Where the stage runs that stays on this GPU, beside the other one.
  cudaStream_t stage_ = nullptr;
  // A dispatch that tells parts has been launched, its second stage has not; or may be at any time, by a graph.
  bool expand_owed_ = false;
  bool captured_parts_ = false;
  cudaEvent_t stage_start_ = nullptr;
  cudaEvent_t stage_end_ = nullptr;
  cudaStream_t last_stream_ = nullptr;
  std::uint64_t last_capture_ = 0;
  bool has_run_ = false;
  bool has_captures_ = false;
  std::atomic<bool> departed_{false};
  std::atomic<bool> awaiting_{false};
  std::uint64_t ticket_ = 0;
  Pipeline tuned_send_{};
  Pipeline tuned_reduce_{};
  int tuned_rows_ = 0;
  int tuned_gather_ = 0;
  int tuned_overlap_ = 0;
};

}  // namespace gpu
}  // namespace moe_ep
