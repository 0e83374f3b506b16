// One rank's heap in GPU memory and the leases of its pool.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "common/free_list.h"
#include "common/heap_layout.h"
#include "common/low_latency_layout.h"

namespace moe_ep {
namespace gpu {

using IpcHandle = std::array<char, sizeof(cudaIpcMemHandle_t)>;

// Rows start at multiples of this, so that copies of 16 bytes and whole cache lines fit.
constexpr std::size_t kLeaseAlignment = 256;

// Lives as long as any lease does. Leases follow the order of streams, as torch's allocator does: memory given back
// may be used again by work that is queued later on its home stream, and by work on other streams once they have been
// made to wait for the home stream.
class Pool : public std::enable_shared_from_this<Pool> {
 public:
  // The low-latency region is `low`, of no bytes without that mode.
  Pool(int device, const HeapLayout& layout, const LowLayout& low);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  class Lease {
   public:
    Lease(std::shared_ptr<Pool> pool, FreeList::Range range, cudaStream_t home, std::uint64_t capture)
        : pool_(std::move(pool)), range_(range), home_(home), capture_(capture) {}
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    std::size_t offset() const { return range_.offset; }
    std::size_t bytes() const { return range_.bytes; }
    std::uint8_t* data() const { return pool_->base() + range_.offset; }
    int device() const { return pool_->device(); }
    // Gives back what lies past `bytes`, which nothing has used.
    void trim(std::size_t bytes);

   private:
    std::shared_ptr<Pool> pool_;
    FreeList::Range range_;
    cudaStream_t home_;
    std::uint64_t capture_;
  };

  // Memory that work on `user` writes next and whose last use will be queued on `home`. Null if there is no room.
  // What a CUDA graph captures belongs to that capture for good: its replays use it again and again.
  std::shared_ptr<Lease> allocate(std::size_t bytes, cudaStream_t user, cudaStream_t home);
  // The largest free range, cut to `most` bytes.
  std::shared_ptr<Lease> allocate_largest(std::size_t most, cudaStream_t user, cudaStream_t home);

  bool contains(const void* address) const;
  std::size_t leased_bytes() const;
  std::uint8_t* base() const { return base_; }
  int device() const { return device_; }
  const HeapLayout& layout() const { return layout_; }
  const LowLayout& low() const { return low_; }
  IpcHandle ipc_handle() const;

 private:
  struct Home {
    cudaEvent_t event = nullptr;  // after the last release
    std::uint64_t releases = 0;
    std::map<cudaStream_t, std::uint64_t> seen;  // by stream: releases that it is ordered after
  };

  std::shared_ptr<Lease> lease(FreeList::Range range, cudaStream_t user, cudaStream_t home, std::uint64_t capture);
  void order_after_releases(cudaStream_t user);
  static void record(cudaStream_t stream, Home& home);
  void release(FreeList::Range range, cudaStream_t home, std::uint64_t capture, bool used);

  int device_;
  HeapLayout layout_;
  LowLayout low_;
  std::uint8_t* base_ = nullptr;
  mutable std::mutex mutex_;
  FreeList free_;
  std::map<std::uint64_t, FreeList> free_of_capture_;
  std::map<cudaStream_t, Home> homes_;
  std::size_t leased_ = 0;
};

// The id of the capture that `stream` takes part in; 0: none.
std::uint64_t capture_of(cudaStream_t stream);

}  // namespace gpu
}  // namespace moe_ep
