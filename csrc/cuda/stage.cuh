// Rows from anywhere into the heap while peers read them there: a part is copied, its reader told, and the reader finds
// it in the L2 cache. Every source's rows advance alike, as every source reads its tokens in order.
#pragma once

#include "cuda/memory.cuh"
#include "cuda/reduce.cuh"
#include "cuda/state.h"
#include "cuda/wait.cuh"

namespace moe_ep {
namespace gpu {

// What readers know of the parts, in shared memory: which they have found readable, so that each is asked for once.
struct PartTable {
  std::int32_t* first;   // [num_ranks] this rank's first slot at each rank; -1: readable from the start
  std::uint32_t* ready;  // [num_ranks * staged_parts] bits

  __host__ __device__ static std::size_t words(std::size_t num_ranks, std::size_t staged_parts) {
    return num_ranks + (num_ranks * staged_parts + 31) / 32;
  }
};

struct PartGate {
  const Group* group;
  PartTable table;
  std::uint64_t sequence;

  // All lanes, each with its entry. A wait that fails ends the operation; what is read then does not matter.
  __device__ void wait(const Entry& entry) const {
    if (entry.rank >= 0 && table.first[entry.rank] >= 0) {
      const int part = (entry.slot - table.first[entry.rank]) / static_cast<int>(kRowsAPart);
      const int bit = entry.rank * static_cast<int>(group->layout.staged_parts) + part;
      std::uint32_t* word = table.ready + bit / 32;
      const std::uint32_t mask = 1u << (bit % 32);
      if ((*reinterpret_cast<volatile std::uint32_t*>(word) & mask) == 0) {
        const std::uint64_t* flag = staged_flag_of(*group, group->rank, entry.rank, part);
        wait_until(*group, flag, Step::kStaged, entry.rank, sequence, Operation::kCombine);
        __threadfence_block();
        atomicOr(word, mask);
      }
    }
    __threadfence_block();
    fence_bulk_to_global();
    __syncwarp();
  }
};

struct StageRing {
  std::uint8_t* stages;     // [stage_warps][2][kStageChunk]
  std::uint64_t* barriers;  // [stage_warps][2], initialised with one arrival
};

// The block's warps after those that sum.
__device__ inline void stage_rows(const CombineParams& params, std::uint64_t sequence, const StageRing& ring) {
  const Group& group = params.group;
  const int own = threadIdx.x / 32 - params.pipeline.warps;
  if (own < 0 || own >= params.stage_warps || (threadIdx.x & 31) != 0) return;
  std::uint8_t* stages = ring.stages + own * 2 * kStageChunk;
  std::uint64_t* barriers = ring.barriers + own * 2;
  const std::size_t row_bytes = static_cast<std::size_t>(params.hidden) * element_bytes(params.element);
  std::uint8_t* heap = group.bases[group.rank] + params.rows_offset;
  std::int64_t most = 0;
  for (int source = 0; source < group.num_ranks; ++source) {
    const std::int64_t rows = params.routing.source_first[source + 1] - params.routing.source_first[source];
    most = rows > most ? rows : most;
  }
  const auto parts = static_cast<std::int64_t>((most + kRowsAPart - 1) / kRowsAPart);
  std::uint32_t loads = 0;
  std::uint32_t stores = 0;
  std::uint64_t* unannounced = nullptr;
  const auto announce = [&] {
    if (unannounced == nullptr) return;
    bulk_wait_written();
    fence_bulk_to_global();
    fence_system();
    store_release_system(unannounced, sequence);
  };
  for (std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * params.stage_warps + own;
       unit < parts * group.num_ranks; unit += static_cast<std::int64_t>(gridDim.x) * params.stage_warps) {
    const std::int64_t part = unit / group.num_ranks;
    const int source = static_cast<int>((unit + group.rank) % group.num_ranks);
    const std::int64_t begin = params.routing.source_first[source] + part * static_cast<std::int64_t>(kRowsAPart);
    const std::int64_t limit = params.routing.source_first[source + 1];
    const std::int64_t end =
        begin + static_cast<std::int64_t>(kRowsAPart) < limit ? begin + static_cast<std::int64_t>(kRowsAPart) : limit;
    if (begin >= end) continue;
    const std::size_t offset = begin * row_bytes;
    const std::size_t bytes = (end - begin) * row_bytes;
    const auto size_at = [&](std::size_t at) {
      return static_cast<std::uint32_t>(bytes - at < kStageChunk ? bytes - at : kStageChunk);
    };
    const auto load = [&](std::size_t at) {
      const std::uint32_t stage = loads++ & 1;
      barrier_arrive_expect(barriers + stage, size_at(at));
      bulk_load_once(stages + stage * kStageChunk, params.unstaged + offset + at, size_at(at), barriers + stage);
    };
    bulk_wait_read<0>();
    load(0);
    // While that is on its way, the part before has been written.
    announce();
    for (std::size_t at = 0; at < bytes; at += kStageChunk) {
      if (at + kStageChunk < bytes) {
        bulk_wait_read<0>();
        load(at + kStageChunk);
      }
      const std::uint32_t stage = stores & 1;
      barrier_wait(barriers + stage, (stores >> 1) & 1);
      ++stores;
      bulk_store_kept(heap + offset + at, stages + stage * kStageChunk, size_at(at));
      bulk_commit();
    }
    unannounced = staged_flag_of(group, source, group.rank, part);
  }
  announce();
}

}  // namespace gpu
}  // namespace moe_ep
