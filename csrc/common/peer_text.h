// What backends say about peers, so that a user reads the same sentence on a CPU and on a GPU.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "common/heap_layout.h"
#include "common/low_latency_layout.h"

namespace moe_ep {

inline const char* step_name(Step step) {
  switch (step) {
    case Step::kPost: return "the exchange of counts and addresses";
    case Step::kGrant: return "the grant of a receive block";
    case Step::kArrival: return "the arrival of rows";
    case Step::kRead: return "the reading of rows";
    case Step::kReduced: return "the sums of rows";
    case Step::kSent: return "the arrival of rows";
  }
  return "an unknown step";
}

inline const char* operation_name(Operation operation) {
  switch (operation) {
    case Operation::kDispatch: return "dispatch";
    case Operation::kCombine: return "combine";
    case Operation::kLowDispatch: return "low-latency dispatch";
    case Operation::kLowCombine: return "low-latency combine";
  }
  return "an unknown operation";
}

// A wait that ended without its event.
struct FailedWait {
  int rank;
  int source;
  std::int64_t pid;
  Step step;
  const char* operation;
  std::uint64_t sequence;
  std::uint64_t seen;
  bool timed_out;  // otherwise the peer is known to be gone
  double timeout_s;
};

inline std::string describe(const FailedWait& wait, const std::string& why) {
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%.3g s ", wait.timeout_s);
  return "rank " + std::to_string(wait.rank) + " waited " + (wait.timed_out ? seconds : "") + "for rank " +
         std::to_string(wait.source) + " (pid " + std::to_string(wait.pid) + ") in " + step_name(wait.step) + " of " +
         wait.operation + " " + std::to_string(wait.sequence) + ", but " + why + "; expected operation " +
         std::to_string(wait.sequence) + ", seen " + std::to_string(wait.seen);
}

// The first fields of a post, in their order, which all ranks must have alike.
inline constexpr const char* kComparedFields[] = {
    "operation (0 dispatch, 1 combine)",
    "layout (0 expert, 1 rank)",
    "element type",
    "bytes per row",
    "scale bytes per row",
    "topk",
    "has topk_weights",
    "has row_values",
    "handle (the operation that made it; 0: none)",
};
static_assert(sizeof(kComparedFields) / sizeof(kComparedFields[0]) == kNumComparedFields, "one name a field");

// The first words of a low-latency post, likewise.
inline constexpr const char* kLowComparedFields[] = {
    "operation (2 low-latency dispatch, 3 low-latency combine)",
    "element type",
    "topk",
    "has topk_weights",
    "which of the two buffers",
    "handle (the operation that made it; 0: none)",
};
static_assert(sizeof(kLowComparedFields) / sizeof(kLowComparedFields[0]) == kNumLowCompared, "one name a word");

inline std::string describe_difference(int source, int rank, std::uint64_t sequence, const char* field,
                                       std::int64_t theirs, std::int64_t mine) {
  return "rank " + std::to_string(source) + " differs from rank " + std::to_string(rank) + " at operation " +
         std::to_string(sequence) + ": " + field + " is " + std::to_string(theirs) + " there and " +
         std::to_string(mine) + " here; call the same operations in the same order on every rank";
}

// `route`: 1 + its flat index in topk_idx, as ranks report it.
inline std::string describe_route(std::int64_t route, std::int64_t topk, std::int64_t expert) {
  return "topk_idx[" + std::to_string((route - 1) / topk) + ", " + std::to_string((route - 1) % topk) + "] is " +
         std::to_string(expert);
}

inline std::string describe_bad_route(std::int64_t route, std::int64_t topk, std::int64_t expert,
                                      std::int64_t num_experts) {
  return describe_route(route, topk, expert) + ", but expert ids run from 0 to " + std::to_string(num_experts - 1) +
         " (-1: none); fix the router or num_experts";
}

inline std::string describe_full_slots(int rank, std::int64_t need, std::int64_t capacity) {
  return "an expert of rank " + std::to_string(rank) + " would receive " + std::to_string(need) +
         " rows, but it has slots for " + std::to_string(capacity) +
         " (one a token of every rank); send a token to an expert once only";
}

inline std::string describe_other_route(std::int64_t route, std::int64_t topk, std::int64_t expert) {
  return describe_route(route, topk, expert) +
         ", but the handle's dispatch sent it to another expert; pass the ids that were dispatched, or -1 to leave a "
         "route out";
}

inline std::string describe_overflow(int rank, std::int64_t need, std::int64_t limit) {
  return "rank " + std::to_string(rank) + " would receive " + std::to_string(need) +
         " rows, but its max_recv_tokens is " + std::to_string(limit) +
         "; raise max_recv_tokens or leave it out for exact sizes";
}

}  // namespace moe_ep
