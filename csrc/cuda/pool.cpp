#include "cuda/pool.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "cuda/check.h"

namespace moe_ep {
namespace gpu {

std::uint64_t capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id);
  if (error == cudaErrorStreamCaptureImplicit) {
    // The null stream can't be asked while another one is captured; it is not part of that capture.
    cudaGetLastError();
    return 0;
  }
  MOE_EP_CUDA_CHECK(error);
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

namespace {

// Peers map an allocation of whole large pages with large pages, any other one with small pages, whose address
// translation then costs more than the copies (half the bandwidth with 8 ranks on one GPU).
constexpr std::size_t kPageBytes = std::size_t{2} << 20;

}  // namespace

Pool::Pool(int device, const HeapLayout& layout, const LowLayout& low) : device_(device), layout_(layout), low_(low) {
  const DeviceGuard guard(device);
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, align_up(layout.total_bytes(), kPageBytes));
  if (error != cudaSuccess) {
    cudaGetLastError();
    std::size_t available = 0, total = 0;
    cudaMemGetInfo(&available, &total);
    throw Error(ErrorKind::kUnavailable,
                "no room for a heap of " + std::to_string(layout.total_bytes() >> 20) + " MiB on device " +
                    std::to_string(device) + " (" + std::to_string(available >> 20) +
                    " MiB are free): " + cudaGetErrorString(error) +
                    "; set pool_bytes, or lower max_tokens_per_rank or low_latency_tokens_per_rank");
  }
  base_ = static_cast<std::uint8_t*>(memory);
  MOE_EP_CUDA_CHECK(cudaMemset(base_, 0, layout.control_bytes()));
  if (low_.receive_bytes > 0) MOE_EP_CUDA_CHECK(cudaMemset(base_ + low_.base, 0, low_.receive(0) - low_.base));
  MOE_EP_CUDA_CHECK(cudaMemcpy(base_, &kHeapMagic, sizeof(kHeapMagic), cudaMemcpyHostToDevice));
  MOE_EP_CUDA_CHECK(cudaDeviceSynchronize());
  free_.give(layout_.pool(), layout_.pool_bytes);
}

// At the end of a process the driver may be gone already: nothing is checked.
Pool::~Pool() {
  for (auto& home : homes_) {
    if (home.second.event != nullptr) cudaEventDestroy(home.second.event);
  }
  cudaFree(base_);
}

IpcHandle Pool::ipc_handle() const {
  cudaIpcMemHandle_t handle;
  MOE_EP_CUDA_CHECK(cudaIpcGetMemHandle(&handle, base_));
  IpcHandle bytes{};
  std::memcpy(bytes.data(), &handle, sizeof(handle));
  return bytes;
}

std::shared_ptr<Pool::Lease> Pool::allocate(std::size_t bytes, cudaStream_t user, cudaStream_t home) {
  bytes = align_up(bytes == 0 ? 1 : bytes, kLeaseAlignment);
  const std::uint64_t capture = capture_of(user);
  std::lock_guard<std::mutex> lock(mutex_);
  if (capture != 0) {
    const auto again = free_of_capture_[capture].take(bytes);
    if (again) return lease(*again, user, home, capture);
  }
  const auto range = free_.take(bytes);
  return range ? lease(*range, user, home, capture) : nullptr;
}

std::shared_ptr<Pool::Lease> Pool::allocate_largest(std::size_t most, cudaStream_t user, cudaStream_t home) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto range = free_.take_largest(align_up(most, kLeaseAlignment));
  return range ? lease(*range, user, home, 0) : nullptr;
}

std::shared_ptr<Pool::Lease> Pool::lease(FreeList::Range range, cudaStream_t user, cudaStream_t home,
                                         std::uint64_t capture) {
  leased_ += range.bytes;
  // A stream under capture can't wait for one that is not; captures begin on an idle device.
  if (capture == 0) order_after_releases(user);
  return std::make_shared<Lease>(shared_from_this(), range, home, capture);
}

void Pool::order_after_releases(cudaStream_t user) {
  for (auto& [stream, home] : homes_) {
    if (stream == user || home.seen[user] == home.releases || capture_of(stream) != 0) continue;
    if (home.event != nullptr) MOE_EP_CUDA_CHECK(cudaStreamWaitEvent(user, home.event, 0));
    home.seen[user] = home.releases;
  }
}

// Never throws: it also runs when leases die.
void Pool::record(cudaStream_t stream, Home& home) {
  if (home.event == nullptr && cudaEventCreateWithFlags(&home.event, cudaEventDisableTiming) != cudaSuccess) {
    home.event = nullptr;
    return;
  }
  cudaEventRecord(home.event, stream);
}

void Pool::release(FreeList::Range range, cudaStream_t home, std::uint64_t capture, bool used) {
  if (range.bytes == 0) return;
  const DeviceGuard guard(device_);
  std::lock_guard<std::mutex> lock(mutex_);
  leased_ -= range.bytes;
  if (capture != 0) {
    free_of_capture_[capture].give(range.offset, range.bytes);
    return;
  }
  free_.give(range.offset, range.bytes);
  if (!used) return;
  Home& of = homes_[home];
  ++of.releases;
  // Here and now, so that another stream does not wait for what is queued later.
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(home, &status) == cudaSuccess && status == cudaStreamCaptureStatusNone) record(home, of);
}

bool Pool::contains(const void* address) const {
  const auto* at = static_cast<const std::uint8_t*>(address);
  const auto* begin = base_ + layout_.pool();
  return at >= begin && at < begin + layout_.pool_bytes;
}

std::size_t Pool::leased_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return leased_;
}

Pool::Lease::~Lease() { pool_->release(range_, home_, capture_, true); }

void Pool::Lease::trim(std::size_t bytes) {
  bytes = align_up(bytes == 0 ? 1 : bytes, kLeaseAlignment);
  if (bytes >= range_.bytes) return;
  pool_->release(FreeList::Range{range_.offset + bytes, range_.bytes - bytes}, home_, capture_, false);
  range_.bytes = bytes;
}

}  // namespace gpu
}  // namespace moe_ep
