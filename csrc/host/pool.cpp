#include "host/pool.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "common/errors.h"

namespace moe_ep {
namespace {

// Memory is taken in steps, so that growing a pool row by row does not call the kernel each time.
constexpr std::size_t kCommitStep = std::size_t{2} << 20;

}  // namespace

Pool::Pool(Segment segment, const HeapLayout& layout, const LowLayout& low)
    : segment_(std::move(segment)),
      layout_(layout),
      low_(low),
      pool_committed_(layout.pool()),
      overflow_committed_(layout.overflow()) {
  take_at_once(0, layout_.control_bytes(), "bytes", "");
  take_at_once(layout_.low(), layout_.total_bytes(), "bytes of low-latency slots",
               "lower low_latency_tokens_per_rank, ");
  reinterpret_cast<HeapHeader*>(segment_.base())->magic = kHeapMagic;
  free_.give(layout_.pool(), layout_.pool_bytes);
}

void Pool::take_at_once(std::size_t begin, std::size_t end, const std::string& what, const std::string& remedy) {
  const int failure = segment_.commit(begin, end);
  if (failure == 0) return;
  throw Error(ErrorKind::kUnavailable, "no room for " + std::to_string(end - begin) + " " + what + " in " +
                                           segment_.directory() + ": " + std::strerror(failure) + "; " + remedy +
                                           "enlarge that tmpfs, set shm_dir, or use backend='collective'");
}

int Pool::commit(std::size_t& committed, std::size_t end, std::size_t limit) {
  if (end <= committed) return 0;
  std::size_t taken = std::min(align_up(end, kCommitStep), limit);
  int failure = segment_.commit(committed, taken);
  if (failure == ENOSPC) {
    taken = end;
    failure = segment_.commit(committed, taken);
  }
  if (failure == 0) committed = taken;
  return failure;
}

std::shared_ptr<Pool::Lease> Pool::allocate(std::size_t bytes) {
  bytes = align_up(bytes == 0 ? 1 : bytes, kCacheLine);
  std::size_t offset = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    last_errno_ = 0;
    const auto range = free_.take(bytes);
    if (!range) return nullptr;
    offset = range->offset;
    last_errno_ = commit(pool_committed_, offset + bytes, layout_.pool() + layout_.pool_bytes);
    if (last_errno_ != 0) {
      free_.give(offset, bytes);
      return nullptr;
    }
    leased_ += bytes;
  }
  return std::make_shared<Lease>(shared_from_this(), offset, bytes);
}

void Pool::release(std::size_t offset, std::size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  leased_ -= bytes;
  free_.give(offset, bytes);
}

bool Pool::contains(const void* address) const {
  const auto* at = static_cast<const std::uint8_t*>(address);
  const auto* begin = segment_.base() + layout_.pool();
  return at >= begin && at < begin + layout_.pool_bytes;
}

int Pool::last_errno() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return last_errno_;
}

std::size_t Pool::leased_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return leased_;
}

int Pool::commit_overflow(std::size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  last_errno_ = commit(overflow_committed_, layout_.overflow() + bytes, layout_.low());
  return last_errno_;
}

Pool::Lease::Lease(std::shared_ptr<Pool> pool, std::size_t offset, std::size_t bytes)
    : pool_(std::move(pool)), offset_(offset), bytes_(bytes) {}

Pool::Lease::~Lease() { pool_->release(offset_, bytes_); }

void Pool::Lease::trim(std::size_t bytes) {
  bytes = align_up(bytes == 0 ? 1 : bytes, kCacheLine);
  if (bytes >= bytes_) return;
  pool_->release(offset_ + bytes, bytes_ - bytes);
  bytes_ = bytes;
}

}  // namespace moe_ep
