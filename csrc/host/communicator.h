// Dispatch and combine of one rank over the heaps of its group. One operation at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/heap_layout.h"
#include "host/block.h"
#include "host/kernels.h"
#include "host/low_latency.h"
#include "host/peers.h"
#include "host/pool.h"
#include "host/routing.h"
#include "host/workers.h"

namespace moe_ep {

struct DispatchArguments : TokenArguments {
  RowLayout layout;
  std::int64_t max_recv_rows;              // -1: exact sizes
  std::shared_ptr<const Routing> routing;  // reuse; null: route `topk_idx`
};

struct DispatchResult {
  Block block;
  ReceiveBlock offsets;  // of the arrays in `block`
  std::shared_ptr<const Routing> routing;
  bool copied_out = false;
  std::int64_t bytes_to_peers = 0;
};

struct CombineArguments {
  const void* rows;  // [routing.num_rows, hidden]
  Element element;
  std::int64_t hidden;
  std::shared_ptr<const Routing> routing;
  bool has_weights;
  bool has_values;
  const float* weights;  // [num_rows]
  const float* values;   // [num_rows] (layout expert) or [num_rows, topk] (layout rank)
  void* out;             // [num_tokens, hidden]
  float* values_out;     // [num_tokens, topk], if there are values
};

struct CombineResult {
  bool staged = false;
  std::int64_t bytes_to_peers = 0;
};

struct CommunicatorOptions {
  std::vector<std::int32_t> expert_to_rank;
  std::int64_t alignment;
  bool two_stage;
  std::size_t num_threads;
  LowLatencyOptions low_latency{};
};

class Communicator {
 public:
  Communicator(std::shared_ptr<Pool> pool, std::unique_ptr<Peers> peers, CommunicatorOptions options);

  DispatchResult dispatch(const DispatchArguments& arguments);
  CombineResult combine(const CombineArguments& arguments);
  // A block for rows that a later combine reads in place; data is null if the pool has no room.
  Block lease(std::size_t bytes);
  LowLatency& low_latency() { return low_latency_; }
  void depart(std::uint32_t state, const std::string& text) { peers_->depart(state, text); }

 private:
  struct Sizes {
    std::size_t row;
    std::size_t scale;
    std::size_t weight;
    std::size_t index;
    ReceiveBlock block(std::int64_t rows) const {
      return ReceiveBlock::make(static_cast<std::size_t>(rows), row, scale, weight, index);
    }
  };
  // Room in this rank's heap: a lease or the overflow region; offset -1 if there is neither.
  struct Room {
    std::shared_ptr<Pool::Lease> lease;
    std::int64_t offset = -1;
  };

  Room find_room(std::size_t bytes);
  void publish(const OperationPost& post, const Counts* counts);
  void compare_posts(const OperationPost& mine) const;
  std::vector<Counts> gather_counts() const;
  void check_max_recv(const RoutingRequest& request) const;
  std::vector<std::uint8_t*> agree_on_blocks(const Routing& routing, const Sizes& sizes, Room& room);
  [[noreturn]] void no_room(int rank, const char* operation, std::size_t own_bytes) const;
  void send(const DispatchArguments& arguments, const Routing& routing, const Sizes& sizes,
            const std::vector<std::uint8_t*>& blocks);
  void send_metadata(const DispatchArguments& arguments, const Routing& routing, const Sizes& sizes, const Entry& entry,
                     std::int64_t token, std::uint8_t* block, const ReceiveBlock& offsets) const;
  void clear_padding(const Routing& routing, const Sizes& sizes, std::uint8_t* block) const;
  Block expand(const Routing& routing, const Sizes& staged, const Sizes& sizes, const std::uint8_t* block);
  Block own_memory(std::size_t bytes) const;

  void reduce_locally(const CombineArguments& arguments, std::uint8_t* rows, float* values);
  void gather_and_reduce(const CombineArguments& arguments);

  std::shared_ptr<Pool> pool_;
  std::unique_ptr<Peers> peers_;
  Placement placement_;
  std::int64_t alignment_;
  bool two_stage_;
  Workers workers_;
  const Kernels& kernels_;
  std::uint64_t sequence_ = 0;
  std::size_t expected_bytes_ = 0;  // of the next receive block, from those before
  LowLatency low_latency_;
};

}  // namespace moe_ep
