// Low-latency mode of one rank: dispatches into fixed slots and combines out of them, each in a half that sends and
// a half that receives. The words that ranks tell each other are those of common/low_latency_layout.h.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "common/errors.h"
#include "common/heap_layout.h"
#include "common/index.h"
#include "common/low_latency_layout.h"
#include "host/block.h"
#include "host/kernels.h"
#include "host/low_latency_exchange.h"
#include "host/peers.h"
#include "host/pool.h"
#include "host/routing.h"
#include "host/workers.h"

namespace moe_ep {

struct LowLatencyOptions {
  std::int64_t tokens_per_rank = 0;  // 0: the heap has no region for the mode
  RowLayout layout = RowLayout::kExpert;
  bool mask_on_timeout = false;
};

// Weights in layout rank only.
struct LowDispatchArguments : TokenArguments {
  std::size_t index;  // of the buffers to use
};

// The routing state of a dispatch, kept by its handle.
struct LowRouting : SentRows {
  LowOperation operation{};  // the dispatch
  bool has_weights = false;
  // Nothing was sent and nothing is received: masks differed, or a rank did not come.
  bool given_up = false;
  ReceiveBlock offsets{};  // of the arrays in the receive buffer
  std::vector<std::int32_t> tokens_per_local_expert;
  std::int64_t num_received = 0;
  std::int64_t bytes_to_peers = 0;
};

struct LowCombineArguments {
  const void* rows;  // of the shape of the receive buffer's rows
  Element element;
  std::int64_t hidden;
  std::shared_ptr<const LowRouting> routing;
  const std::int64_t* topk_idx;  // [num_tokens, topk], as dispatched or -1
  bool has_weights;
  const float* weights;  // [num_tokens, topk]
  bool quantize;
  bool power_of_two;
  void* out;            // [num_tokens, hidden] of `element`
  float* lost_weights;  // [num_tokens]
};

// A combine between its two halves.
struct LowCombine {
  LowCombineArguments arguments;
  LowOperation operation{};
  std::vector<std::int32_t> expert_ids;  // [num_tokens, topk] of the routes to sum
  bool staged = false;
  std::int64_t bytes_to_peers = 0;
};

class LowLatency {
 public:
  // All but the pool outlive it.
  LowLatency(std::shared_ptr<Pool> pool, Peers& peers, const Placement& placement, Workers& workers,
             const LowLatencyOptions& options);

  std::shared_ptr<LowRouting> send_dispatch(const LowDispatchArguments& arguments);
  // Waits for the rows, and completes what `routing` says of them.
  void receive_dispatch(LowRouting& routing);
  std::shared_ptr<LowCombine> send_combine(const LowCombineArguments& arguments);
  void receive_combine(LowCombine& combine);

  // All of a receive buffer, and of a buffer of rows.
  Block received(std::size_t index) { return buffer(layout_.receive(index), layout_.receive_bytes, index); }
  Block rows(std::size_t index) { return buffer(layout_.rows(index), layout_.rows_bytes, index); }
  // Where a combine reads without a copy.
  const void* rows_address(std::size_t index) const { return rows_buffer(peers_.rank(), index); }
  // int32: rows received by each local expert, and in all.
  Block counts(const LowRouting& routing);
  // Whether some block of these is alive.
  bool held(std::size_t index) const { return !holds_[index].expired(); }

  void mask(const std::vector<int>& ranks);
  std::vector<int> masked_ranks() const;

 private:
  // Bytes per row of: the row, its scales, its weights, its local expert ids.
  struct Sizes {
    std::size_t row;
    std::size_t scale;
    std::size_t weight;
    std::size_t index;
  };

  bool by_expert() const { return options_.layout == RowLayout::kExpert; }
  std::size_t num_local_experts() const { return placement_.experts_of_rank[at(peers_.rank())].size(); }
  std::shared_ptr<void> hold(std::size_t index);
  Block buffer(std::size_t offset, std::size_t bytes, std::size_t index);
  std::uint8_t* receive_buffer(int rank, std::size_t index) const { return peers_.base(rank) + layout_.receive(index); }
  std::uint8_t* rows_buffer(int rank, std::size_t index) const { return peers_.base(rank) + layout_.rows(index); }

  // What makes all ranks refuse a dispatch, if anything does.
  std::optional<Error> refusal(const LowOperation& operation, std::int64_t topk,
                               const std::vector<Counts>& counts) const;
  NextSlots next_slots(const std::vector<Counts>& counts) const;
  void count_received(const std::vector<Counts>& counts, LowRouting& routing) const;
  // Marks all rows of layout rank as rows for no expert.
  void clear_metadata(const LowRouting& routing, std::size_t index);
  void send(const LowDispatchArguments& arguments, const LowRouting& routing, const Sizes& sizes);
  void send_metadata(const LowDispatchArguments& arguments, const LowRouting& routing, std::int64_t token,
                     const Entry& entry, std::uint8_t* buffer) const;

  // Copies the rows that carry a token to where peers read them.
  void stage(const LowCombineArguments& arguments);
  void gather(LowCombine& combine, const std::vector<bool>& left_out);

  std::shared_ptr<Pool> pool_;
  Peers& peers_;
  const Placement& placement_;
  Workers& workers_;
  const Kernels& kernels_;
  LowLatencyOptions options_;
  LowLayout layout_;
  LowSlots slots_;
  LowExchange exchange_;
  std::weak_ptr<void> holds_[kLowBuffers];
};

}  // namespace moe_ep
