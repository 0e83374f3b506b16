// Flags between ranks and what happens when one does not come: every wait is bounded, and the first failure of a
// rank is written to host-mapped memory for Python to raise.
#pragma once

#include "cuda/memory.cuh"
#include "cuda/state.h"

namespace moe_ep {
namespace gpu {

__device__ inline std::uint64_t* flag_of(const Group& group, int reader, Step step, int source) {
  return &reinterpret_cast<Flag*>(group.bases[reader] + group.layout.flag(step, static_cast<std::size_t>(source)))
              ->value;
}

__device__ inline OperationPost* post_of(const Group& group, int reader, std::uint64_t sequence, int source) {
  return reinterpret_cast<OperationPost*>(group.bases[reader] +
                                          group.layout.post(sequence & 1, static_cast<std::size_t>(source)));
}

__device__ inline void write_outcome(ReportedOutcome& to, Outcome outcome, Operation operation, std::uint64_t sequence,
                                     const std::int64_t (&values)[kReportValues]) {
  to.outcome = static_cast<std::uint32_t>(outcome);
  to.operation = static_cast<std::uint32_t>(operation);
  to.sequence = sequence;
  for (int i = 0; i < kReportValues; ++i) to.values[i] = values[i];
}

// A word of the report of the call with `ticket`; see state.h.
__device__ inline void tell(const Group& group, std::uint64_t ticket, int word, std::int64_t value) {
  store_relaxed_system(words_of(group.report) + word, tagged_word(ticket, value));
}
__device__ inline void tell(const Group& group, std::uint64_t ticket, Word word, std::int64_t value) {
  tell(group, ticket, static_cast<int>(word), value);
}

// fence_system() as far as peers on their GPUs are concerned. Where those are all on this GPU, whose L2 all of them
// share, the narrower scope suffices, and saves one to two microseconds.
__device__ inline void fence_for_peers(const Group& group) {
  if (group.on_one_device) {
    fence_device();
  } else {
    fence_system();
  }
}

// Keeps the first failure for the host. One thread of the grid calls it for an outcome that all threads see; any
// number may for a wait that failed.
__device__ inline void record_failure(const Group& group, Outcome outcome, Operation operation, std::uint64_t sequence,
                                      const std::int64_t (&values)[kReportValues]) {
  if (is_fatal(outcome)) {
    if (atomicExch(&group.state->failed, 1u) != 0) return;
  }
  auto* failure_state = reinterpret_cast<volatile std::uint32_t*>(&group.report->failure_state);
  if (*failure_state != 0 && !is_fatal(outcome)) return;
  *failure_state = 1;
  fence_system();
  write_outcome(group.report->failure, outcome, operation, sequence, values);
  fence_system();
  *failure_state = 2;
  fence_system();
}

// Waits until `source` has signalled `step` for `sequence` (of steps that tell how much is done, a progress_flag()) or
// a later one, and acquires its writes. False: the wait was given up, by this thread or another one, and the failure is
// recorded.
__device__ inline bool wait_for(const Group& group, Step step, int source, std::uint64_t sequence,
                                Operation operation) {
  const std::uint64_t* flag = flag_of(group, group.rank, step, source);
  if (load_acquire_system(flag) >= sequence) return true;
  const auto* departure = reinterpret_cast<const std::uint32_t*>(
      group.bases[group.rank] + group.layout.departure(static_cast<std::size_t>(source)));
  const std::uint64_t started = nanoseconds();
  for (unsigned spin = 1;; ++spin) {
    const std::uint64_t seen = load_acquire_system(flag);
    if (seen >= sequence) return true;
    if ((spin & 127) != 0) continue;
    if (load_relaxed_device(&group.state->failed) != 0) return false;
    Outcome outcome = Outcome::kOk;
    const std::uint32_t left = load_acquire_system(departure);
    if (left != 0) outcome = Outcome::kLost;
    if (nanoseconds() - started > group.timeout_ns) outcome = Outcome::kTimeout;
    // Host memory is far away: ask it rarely.
    if ((spin & 16383) == 0 && load_acquire_system(&group.report->abort) != 0) outcome = Outcome::kAborted;
    if (outcome == Outcome::kOk) continue;
    // A peer may have done its part and left right after: look at the flag again before blaming it.
    if (load_acquire_system(flag) >= sequence) return true;
    const int beside = progress_bits(step);
    const std::int64_t values[kReportValues] = {source, static_cast<std::int64_t>(step),
                                                static_cast<std::int64_t>(seen >> beside),
                                                static_cast<std::int64_t>(left)};
    record_failure(group, outcome, operation, sequence >> beside, values);
    return false;
  }
}

// All threads of a block: waits for every rank. The answer is the same for all of them.
__device__ inline bool wait_for_all(const Group& group, Step step, std::uint64_t sequence, Operation operation) {
  bool ok = true;
  for (int source = threadIdx.x; source < group.num_ranks; source += blockDim.x) {
    ok = wait_for(group, step, source, sequence, operation) && ok;
  }
  return __syncthreads_and(ok) != 0;
}

// The threads of a block, after a barrier: tells every rank that this one has done `step`, releasing what the block
// has seen written.
__device__ inline void signal_all(const Group& group, Step step, std::uint64_t sequence) {
  if (threadIdx.x >= group.num_ranks) return;
  fence_for_peers(group);
  for (int i = threadIdx.x; i < group.num_ranks; i += blockDim.x) {
    // Starting behind oneself spreads the stores, as every rank does this at about the same time.
    const int reader = (group.rank + 1 + i) % group.num_ranks;
    store_relaxed_system(flag_of(group, reader, step, group.rank), sequence);
  }
}

// All threads of all blocks: whether this block is the last to come here; it then sees what the others wrote.
// `counter` returns to 0 by itself.
__device__ inline bool is_last_block(std::uint32_t* counter) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_device();
    last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    if (last) fence_device();
  }
  __syncthreads();
  return last;
}

// A barrier of all blocks in two parts, so that a block has something to do in between. All threads; `mark` is another
// one than the last time.
__device__ inline void arrive_at_blocks(const Group& group, std::uint32_t mark) {
  if (!is_last_block(&group.state->blocks[0])) return;
  __syncthreads();
  if (threadIdx.x != 0) return;
  fence_device();
  store_relaxed_device(&group.state->passed, mark);
}

// Returns when each block has arrived, and sees what the others wrote. False: the operation has been given up, or not
// all blocks found room on the GPU in time.
__device__ inline bool wait_for_blocks(const Group& group, std::uint32_t mark) {
  DeviceState* state = group.state;
  bool ok = true;
  if (threadIdx.x == 0) {
    const std::uint64_t started = nanoseconds();
    while (ok && load_acquire_device(&state->passed) != mark) {
      ok = load_relaxed_device(&state->failed) == 0;
      if (!ok || nanoseconds() - started <= group.timeout_ns) continue;
      const std::int64_t values[kReportValues] = {group.rank, static_cast<std::int64_t>(Step::kArrival),
                                                  static_cast<std::int64_t>(state->sequence), 0};
      record_failure(group, Outcome::kTimeout, Operation::kDispatch, state->sequence + 1, values);
      ok = false;
    }
  }
  return __syncthreads_and(ok) != 0;
}

// Of the one barrier of a dispatch.
__device__ inline std::uint32_t mark_of(std::uint64_t sequence) { return static_cast<std::uint32_t>(sequence) + 1; }

}  // namespace gpu
}  // namespace moe_ep
