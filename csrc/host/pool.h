// Leases of heap memory.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>

#include "common/free_list.h"
#include "common/heap_layout.h"
#include "common/low_latency_layout.h"
#include "host/segment.h"

namespace moe_ep {

// A rank's own segment and the leases of its pool. Lives as long as any lease does.
class Pool : public std::enable_shared_from_this<Pool> {
 public:
  // Takes memory for the control region and for all of `low`, the layout of the low-latency region; throws
  // kUnavailable if there is none.
  Pool(Segment segment, const HeapLayout& layout, const LowLayout& low = {});

  // A block of the pool, given back when destroyed; any thread may do that.
  class Lease {
   public:
    Lease(std::shared_ptr<Pool> pool, std::size_t offset, std::size_t bytes);
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    std::size_t offset() const { return offset_; }
    std::size_t bytes() const { return bytes_; }
    std::uint8_t* data() const { return pool_->segment_.base() + offset_; }
    // Gives back what lies past `bytes`.
    void trim(std::size_t bytes);

   private:
    std::shared_ptr<Pool> pool_;
    std::size_t offset_;
    std::size_t bytes_;
  };

  // Null if there is no room; `last_errno` then tells a full tmpfs (ENOSPC) from a used-up pool (0).
  std::shared_ptr<Lease> allocate(std::size_t bytes);
  int last_errno() const;
  bool contains(const void* address) const;
  std::size_t leased_bytes() const;
  // Takes memory for the first `bytes` of the overflow region. Returns 0 or errno.
  int commit_overflow(std::size_t bytes);

  const Segment& segment() const { return segment_; }
  const HeapLayout& layout() const { return layout_; }
  const LowLayout& low() const { return low_; }

 private:
  void release(std::size_t offset, std::size_t bytes);
  // Takes memory for [begin, end), or throws kUnavailable: no room for so many `what`.
  void take_at_once(std::size_t begin, std::size_t end, const std::string& what, const std::string& remedy);
  int commit(std::size_t& committed, std::size_t end, std::size_t limit);

  Segment segment_;
  HeapLayout layout_;
  LowLayout low_;
  mutable std::mutex mutex_;
  FreeList free_;
  std::size_t leased_ = 0;
  std::size_t pool_committed_;      // end offset of the pool's memory taken so far
  std::size_t overflow_committed_;  // the same for the overflow region
  int last_errno_ = 0;
};

}  // namespace moe_ep
