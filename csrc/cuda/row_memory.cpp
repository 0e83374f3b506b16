#include "cuda/row_memory.h"

#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>

#include "common/index.h"
#include "cuda/check.h"

namespace moe_ep {
namespace gpu {
namespace {

// The driver is not linked: machines that only compile have none.
template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  MOE_EP_CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
#else
  MOE_EP_CUDA_CHECK(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result));
#endif
  if (result != cudaDriverEntryPointSuccess || found == nullptr) {
    throw Error(ErrorKind::kUnavailable, std::string("the driver has no ") + name + "; install a newer one");
  }
  return reinterpret_cast<Function>(found);
}

// Of the allocation at an address; 0: there is none.
std::uint64_t id_of(const void* address) {
  static const auto get =
      driver_function<CUresult(CUDAAPI*)(void*, CUpointer_attribute, CUdeviceptr)>("cuPointerGetAttribute");
  unsigned long long id = 0;
  const CUresult result = get(&id, CU_POINTER_ATTRIBUTE_BUFFER_ID, reinterpret_cast<CUdeviceptr>(address));
  return result == CUDA_SUCCESS ? id : 0;
}

bool range_of(const void* address, std::uint8_t*& base, std::size_t& bytes) {
  static const auto get =
      driver_function<CUresult(CUDAAPI*)(CUdeviceptr*, std::size_t*, CUdeviceptr)>("cuMemGetAddressRange");
  CUdeviceptr start = 0;
  if (get(&start, &bytes, reinterpret_cast<CUdeviceptr>(address)) != CUDA_SUCCESS) return false;
  base = reinterpret_cast<std::uint8_t*>(start);
  return true;
}

}  // namespace

RowMemory::RowMemory(int num_ranks)
    : own_(kMostRowSegments),
      mapped_(at(num_ranks) * kMostRowSegments),
      mapped_ids_(at(num_ranks) * kMostRowSegments) {}

// At the end of a process the driver may be gone already: nothing is checked.
RowMemory::~RowMemory() {
  for (std::size_t i = 0; i < mapped_.size(); ++i) unmap(i);
}

void RowMemory::unmap(std::size_t place) {
  if (mapped_[place] != nullptr) cudaIpcCloseMemHandle(mapped_[place]);
  mapped_[place] = nullptr;
  mapped_ids_[place] = 0;
}

RowPlace RowMemory::note(const void* rows) {
  RowPlace place;
  const std::uint64_t id = id_of(rows);
  if (id == 0) return place;
  auto known = known_.find(id);
  if (known == known_.end()) {
    int index = -1;
    RowSegment segment{};
    const auto free = std::find_if(own_.begin(), own_.end(), [](const RowSegment& s) { return s.id == 0; });
    if (free != own_.end() && range_of(rows, segment.base, segment.bytes)) {
      index = static_cast<int>(free - own_.begin());
      segment.index = index;
      segment.id = id;
      *free = segment;
    }
    known = known_.emplace(id, index).first;
  }
  if (known->second < 0) return place;
  const RowSegment& segment = own_[at(known->second)];
  const auto offset = static_cast<std::size_t>(static_cast<const std::uint8_t*>(rows) - segment.base) / 16;
  if (offset > std::numeric_limits<std::uint32_t>::max()) return place;
  place.segment = segment.index;
  place.offset = static_cast<std::uint32_t>(offset);
  place.id = id;
  place.registered = segment.registered;
  return place;
}

void RowMemory::forget(bool all) {
  for (RowSegment& segment : own_) {
    if (segment.id == 0 || (!all && id_of(segment.base) == segment.id)) continue;
    known_.erase(segment.id);
    segment = RowSegment{};
  }
  for (auto known = known_.begin(); known != known_.end();) {
    known = known->second < 0 ? known_.erase(known) : std::next(known);
  }
}

std::vector<RowSegment> RowMemory::offer(std::string& refused) {
  std::vector<RowSegment> offers;
  for (const auto& [id, index] : known_) {
    if (index < 0) refused = "more than " + std::to_string(kMostRowSegments) + " allocations have rows in them";
  }
  for (RowSegment& segment : own_) {
    if (segment.id == 0) continue;
    cudaIpcMemHandle_t handle;
    const cudaError_t error = cudaIpcGetMemHandle(&handle, segment.base);
    if (error != cudaSuccess) {
      cudaGetLastError();
      refused = cudaGetErrorString(error);
      known_[segment.id] = -1;
      segment = RowSegment{};
      continue;
    }
    std::memcpy(segment.handle.data(), &handle, sizeof(handle));
    offers.push_back(segment);
  }
  return offers;
}

std::vector<int> RowMemory::map(int rank, const std::vector<RowSegment>& offers, std::string& refused) {
  const std::size_t first = at(rank) * kMostRowSegments;
  std::vector<std::uint64_t> wanted(kMostRowSegments);
  for (const RowSegment& offer : offers) wanted.at(at(offer.index)) = offer.id;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (mapped_ids_[first + i] != wanted[i]) unmap(first + i);
  }
  std::vector<int> indices;
  for (const RowSegment& offer : offers) {
    const std::size_t place = first + at(offer.index);
    if (mapped_[place] == nullptr) {
      cudaIpcMemHandle_t handle;
      std::memcpy(&handle, offer.handle.data(), sizeof(handle));
      void* base = nullptr;
      const cudaError_t error = cudaIpcOpenMemHandle(&base, handle, cudaIpcMemLazyEnablePeerAccess);
      if (error != cudaSuccess) {
        cudaGetLastError();
        refused = cudaGetErrorString(error);
        continue;
      }
      mapped_[place] = static_cast<std::uint8_t*>(base);
      mapped_ids_[place] = offer.id;
    }
    indices.push_back(offer.index);
  }
  return indices;
}

void RowMemory::commit(const std::vector<int>& indices) {
  for (RowSegment& segment : own_) segment.registered = false;
  for (const int index : indices) own_[at(index)].registered = own_[at(index)].id != 0;
}

std::vector<std::uint64_t> RowMemory::registered() const {
  std::vector<std::uint64_t> ids;
  for (const RowSegment& segment : own_) ids.push_back(segment.registered ? segment.id : 0);
  return ids;
}

std::size_t RowMemory::registered_bytes() const {
  std::size_t bytes = 0;
  for (const RowSegment& segment : own_) bytes += segment.registered ? segment.bytes : 0;
  return bytes;
}

}  // namespace gpu
}  // namespace moe_ep
