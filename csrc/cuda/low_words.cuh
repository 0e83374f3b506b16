// Words between ranks in low-latency mode: posting them, waiting for them, and leaving out ranks that are masked.
#pragma once

#include "cuda/low_state.h"
#include "cuda/wait.cuh"

namespace moe_ep {
namespace gpu {

constexpr int kQuickSpins = 256;  // for a word, before looking what keeps it

// n / divisor, with inverse_of(divisor).
__device__ inline int quotient(int n, std::uint32_t inverse) {
  return inverse == 0 ? n : static_cast<int>(__umulhi(static_cast<unsigned>(n), inverse));
}

// A rank's heap, as this process maps it.
template <class Params>
__device__ inline std::uint8_t* heap_of(const Params& params, int rank) {
  const Group& group = params.low.group;
  return group.num_ranks <= kHeapsAtHand ? params.heaps[rank] : group.bases[rank];
}

// On the host: where an operation's words are, and what its post says that does not depend on the kind of operation.
template <class Params>
void complete_words(Params& params, LowKind kind, Operation operation, Element element, bool has_weights) {
  const auto index = static_cast<std::size_t>(params.index);
  const LowLayout& layout = params.low.layout;
  params.posts_offset = layout.post(kind, index, 0);
  params.arrivals_offset = layout.arrivals(kind, index, static_cast<std::size_t>(params.low.group.rank));
  params.post_stride = static_cast<std::int32_t>(layout.post_stride() / sizeof(std::uint64_t));
  params.post[static_cast<int>(LowWord::kOperation)] = static_cast<std::uint32_t>(operation);
  params.post[static_cast<int>(LowWord::kElement)] = static_cast<std::uint32_t>(element);
  params.post[static_cast<int>(LowWord::kTopk)] = static_cast<std::uint32_t>(params.topk);
  params.post[static_cast<int>(LowWord::kHasWeights)] = has_weights ? 1 : 0;
  params.post[static_cast<int>(LowWord::kIndex)] = static_cast<std::uint32_t>(params.index);
}

// How a wait for a word ended.
enum class Wait : int {
  kCame = 0,
  kMissing = 1,  // the rank is masked from the next operation on
  kFailed = 2,   // and so has this rank
};

__device__ inline std::uint64_t* low_post_of(const LowGroup& low, std::uint8_t* heap, LowKind kind, int index,
                                             int source) {
  return reinterpret_cast<std::uint64_t*>(
      heap + low.layout.post(kind, static_cast<std::size_t>(index), static_cast<std::size_t>(source)));
}

__device__ inline std::uint64_t* low_arrivals_of(const LowGroup& low, std::uint8_t* heap, LowKind kind, int index,
                                                 int source) {
  return reinterpret_cast<std::uint64_t*>(
      heap + low.layout.arrivals(kind, static_cast<std::size_t>(index), static_cast<std::size_t>(source)));
}

// Whether operation `sequence` leaves out a rank with this entry of masked_since.
__device__ inline bool is_masked(std::uint32_t since, std::uint32_t sequence) {
  return since != 0 && static_cast<std::int32_t>(sequence - since) >= 0;
}

// What a thread waits for.
struct LowAwaited {
  LowKind kind;
  std::int32_t index;
  std::uint32_t sequence;
  Step step;
};

__device__ inline Operation operation_of(LowKind kind) {
  return kind == LowKind::kDispatch ? Operation::kLowDispatch : Operation::kLowCombine;
}

// Whether `source` has begun another operation with this sequence number, which is then told as a difference.
static __device__ __noinline__ bool differs(const LowGroup& low, const LowAwaited& awaited, int source) {
  for (int set = 0; set < static_cast<int>(kLowSets); ++set) {
    const auto kind = static_cast<LowKind>(set / static_cast<int>(kLowBuffers));
    const int index = set % static_cast<int>(kLowBuffers);
    if (kind == awaited.kind && index == awaited.index) continue;
    const std::uint64_t word =
        load_acquire_system(low_post_of(low, low.group.bases[low.group.rank], kind, index, source));
    if (low_lead(word, awaited.sequence) != 0 || low_value(word) == kLowWithdrawn) continue;
    const bool same = kind == awaited.kind;
    const std::int64_t values[kReportValues] = {
        source, static_cast<std::int64_t>(same ? LowWord::kIndex : LowWord::kOperation),
        same ? index : static_cast<std::int64_t>(operation_of(kind)),
        same ? awaited.index : static_cast<std::int64_t>(operation_of(awaited.kind))};
    record_failure(low.group, Outcome::kMismatch, operation_of(awaited.kind), awaited.sequence, values);
    return true;
  }
  return false;
}

// Leaves `source` out of what has not begun yet. It may only be late: what it was posted it must not find any more, or
// it would write rows into a buffer that has been given to a later dispatch by then.
static __device__ __noinline__ void mask_late_rank(const LowGroup& low, const LowAwaited& awaited, int source) {
  const std::uint32_t next = load_relaxed_device(&low.state->sequence) + 1;
  const std::uint32_t since = low_lead(low_word(next, 0), awaited.sequence) > 0 ? next : awaited.sequence + 1;
  if (atomicCAS(low.masked_since + source, 0u, since) != 0) return;
  if (awaited.kind != LowKind::kDispatch) return;
  store_relaxed_system(low_post_of(low, low.group.bases[source], awaited.kind, awaited.index, low.group.rank),
                       low_word(awaited.sequence, kLowWithdrawn));
}

// Waits until a word in this rank's heap, which `source` writes, has come for the operation or a later one, and
// acquires what came before it.
static __device__ __noinline__ Wait await_late_word(const LowGroup& low, const std::uint64_t* at,
                                                    const LowAwaited& awaited, int source, std::uint64_t& word) {
  const Group& group = low.group;
  const auto* departure = reinterpret_cast<const std::uint32_t*>(
      group.bases[group.rank] + group.layout.departure(static_cast<std::size_t>(source)));
  const std::uint64_t started = nanoseconds();
  // A reader is never ahead, but a word of long ago may look so.
  const auto came = [&] {
    const std::int32_t lead = low_lead(word, awaited.sequence);
    return awaited.step == Step::kRead ? lead == 0 : lead >= 0;
  };
  for (unsigned spin = 1;; ++spin) {
    word = load_acquire_system(at);
    if (came()) return Wait::kCame;
    if ((spin & 127) != 0) continue;
    if (load_relaxed_device(&group.state->failed) != 0) return Wait::kFailed;
    if (load_relaxed_device(low.masked_since + source) != 0) return Wait::kMissing;
    Outcome outcome = Outcome::kOk;
    const std::uint32_t left = load_acquire_system(departure);
    if (left != 0) outcome = Outcome::kLost;
    if (nanoseconds() - started > group.timeout_ns) outcome = Outcome::kTimeout;
    if ((spin & 16383) == 0) {
      if (awaited.step == Step::kPost && differs(low, awaited, source)) return Wait::kFailed;
      // Host memory is far away: ask it rarely.
      if (load_acquire_system(&group.report->abort) != 0) outcome = Outcome::kAborted;
    }
    if (outcome == Outcome::kOk) continue;
    // A peer may have done its part and left right after: look at the word again before blaming it.
    word = load_acquire_system(at);
    if (came()) return Wait::kCame;
    if (low.mask_on_timeout && outcome != Outcome::kAborted) {
      mask_late_rank(low, awaited, source);
      return Wait::kMissing;
    }
    const std::int64_t values[kReportValues] = {source, static_cast<std::int64_t>(awaited.step),
                                                static_cast<std::int64_t>(word >> 32), static_cast<std::int64_t>(left)};
    record_failure(group, outcome, operation_of(awaited.kind), awaited.sequence, values);
    return Wait::kFailed;
  }
}

__device__ inline Wait await_word(const LowGroup& low, const std::uint64_t* at, const LowAwaited& awaited, int source,
                                  std::uint64_t& word) {
  word = load_acquire_system(at);
  if (low_lead(word, awaited.sequence) >= 0) return Wait::kCame;
  return await_late_word(low, at, awaited, source, word);
}

// One thread of each block, once, after a barrier: counts the blocks that have read the sequence number and the handle;
// the last one, which the answer tells, advances it.
__device__ inline bool begin_operation(const LowGroup& low, std::uint32_t sequence) {
  if (atomicInc(&low.state->blocks, gridDim.x - 1) != gridDim.x - 1) return false;
  store_relaxed_device(&low.state->sequence, sequence);
  return true;
}

// Which ranks are left out, into the words of a post. A warp, which sees them then.
static __device__ __noinline__ void post_masks(std::uint32_t* post, const std::uint8_t* masked, int num_ranks) {
#pragma unroll 1
  for (int first = 0; first < num_ranks; first += 32) {
    const int rank = first + static_cast<int>(threadIdx.x & 31);
    const unsigned out = __ballot_sync(0xffffffffu, rank < num_ranks && masked[rank] != 0);
    if (rank == first) post[static_cast<int>(LowWord::kMask) + first / 32] = out;
  }
  __syncwarp();
}

// Threads [0, threads) of every block: writes the words of a post, `value_of(word)`, into the heap of every rank that
// is not left out, a rank a block where there are as many. `masked` says which are left out; `offset` is that of posts
// in every heap, and `stride` from one rank's to the next, in words.
template <class ValueOf>
__device__ inline void publish_post(const Group& group, std::uint8_t* const* heaps, const std::uint8_t* masked,
                                    std::size_t offset, int stride, std::uint32_t sequence, int words, int threads,
                                    ValueOf&& value_of) {
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x); i < group.num_ranks; i += static_cast<int>(gridDim.x)) {
    // Starting behind oneself spreads the stores, as every rank does this at about the same time.
    int reader = group.rank + 1 + i;
    if (reader >= group.num_ranks) reader -= group.num_ranks;
    if (masked[reader] != 0) continue;
    auto* to = reinterpret_cast<std::uint64_t*>(heaps[reader] + offset) + group.rank * stride;
#pragma unroll 1
    for (int word = static_cast<int>(threadIdx.x); word < words; word += threads) {
      store_relaxed_system(to + word, low_word(sequence, value_of(word)));
    }
  }
}

// All threads of a block, after a barrier: tells every rank that is not left out that this block has done its part,
// releasing what the block has seen written. `offset` is that of this rank's arrivals in every heap.
__device__ inline void signal_arrival(const Group& group, std::uint8_t* const* heaps, const std::uint8_t* masked,
                                      std::size_t offset, std::uint32_t sequence, std::uint32_t value) {
#pragma unroll 1
  for (int reader = threadIdx.x; reader < group.num_ranks; reader += kThreads) {
    if (masked[reader] != 0) continue;
    fence_for_peers(group);
    store_relaxed_system(reinterpret_cast<std::uint64_t*>(heaps[reader] + offset) + blockIdx.x,
                         low_word(sequence, value));
  }
}

// All threads of a block: waits for the arrival of all parts of every rank that is not left out, and acquires what
// they wrote. `heap` is this rank's. `blocks_of(source)` says how many parts there are, 0: not known. `found(source,
// wait, value)` is called for each rank by one thread. Ends without a barrier.
template <class BlocksOf, class Found>
__device__ inline void await_arrivals(const LowGroup& low, std::uint8_t* heap, LowKind kind, int index,
                                      std::uint32_t sequence, const std::uint8_t* masked, BlocksOf&& blocks_of,
                                      Found&& found) {
  const LowAwaited awaited{kind, index, sequence, Step::kArrival};
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int source = warp; source < low.group.num_ranks; source += blockDim.x / 32) {
    if (masked[source] != 0) continue;
    const std::uint64_t* words = low_arrivals_of(low, heap, kind, index, source);
    Wait wait = Wait::kCame;
    std::uint64_t word = 0;
    std::uint32_t value = 0;
    int blocks = blocks_of(source);
    if (blocks == 0) {
      wait = await_word(low, words, awaited, source, word);
      // One that is at a later operation has sent all parts of this one.
      blocks = low_lead(word, sequence) == 0 ? static_cast<int>(low_value(word) & (kLowGaveUp - 1)) : 0;
      blocks = __shfl_sync(0xffffffffu, blocks, 0);
    }
#pragma unroll 1
    for (int block = lane; block < blocks && wait == Wait::kCame; block += 32) {
      wait = await_word(low, words + block, awaited, source, word);
      if (low_lead(word, sequence) == 0) value |= low_value(word) & kLowGaveUp;
    }
    __syncwarp();
    const auto worst = static_cast<Wait>(__reduce_max_sync(0xffffffffu, static_cast<unsigned>(wait)));
    value = __reduce_or_sync(0xffffffffu, value);
    if (lane == 0) found(source, worst, value);
  }
}

}  // namespace gpu
}  // namespace moe_ep
