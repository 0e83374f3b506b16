// Memory that the rows of combines lie in, anywhere on this GPU, registered with all ranks: they map it and read it in
// place. An allocation is known by the number that CUDA gives it, so what is freed, and what takes its address, is
// seen.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cuda/low_state.h"
#include "cuda/pool.h"

namespace moe_ep {
namespace gpu {

// One allocation, as its owner offers it to the others.
struct RowSegment {
  int index;           // in the tables of all ranks
  std::uint64_t id;    // CUDA's; 0: none
  std::uint8_t* base;  // as the owner maps it
  std::size_t bytes;
  IpcHandle handle;
  bool registered;  // every rank has mapped it
};

// Where rows lie.
struct RowPlace {
  int segment = -1;          // -1: where they can't be registered
  std::uint32_t offset = 0;  // in units of 16 bytes
  std::uint64_t id = 0;      // CUDA's number of the allocation
  bool registered = false;
};

class RowMemory {
 public:
  explicit RowMemory(int num_ranks);
  ~RowMemory();
  RowMemory(const RowMemory&) = delete;
  RowMemory& operator=(const RowMemory&) = delete;

  // Keeps in mind the allocation that `rows` lie in.
  RowPlace note(const void* rows);
  // Forgets what has been freed and what found no room; or all.
  void forget(bool all);
  // What has been noted, to be mapped by the others. What CUDA does not share is left out; `refused` says why.
  std::vector<RowSegment> offer(std::string& refused);
  // Maps what `rank` offers, and unmaps what it does not offer any more. Those that could not be mapped are left out of
  // the answer: indices.
  std::vector<int> map(int rank, const std::vector<RowSegment>& offers, std::string& refused);
  // These have been mapped by all ranks.
  void commit(const std::vector<int>& indices);

  // Tables for kernels: [num_ranks][kMostRowSegments] addresses here, null: not mapped; and [kMostRowSegments] CUDA's
  // number of this rank's own where they are registered, else 0.
  const std::vector<std::uint8_t*>& mapped() const { return mapped_; }
  std::vector<std::uint64_t> registered() const;
  std::size_t registered_bytes() const;

 private:
  void unmap(std::size_t place);

  std::vector<RowSegment> own_;         // by index
  std::map<std::uint64_t, int> known_;  // by CUDA's number; -1: no room for it, or not to be shared
  std::vector<std::uint8_t*> mapped_;
  std::vector<std::uint64_t> mapped_ids_;  // likewise
};

}  // namespace gpu
}  // namespace moe_ep
