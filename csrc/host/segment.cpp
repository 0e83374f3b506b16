#include "host/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/errors.h"

namespace moe_ep {
namespace {

constexpr std::size_t kLargestStep = std::size_t{64} << 20;

std::uint8_t* map_shared(int descriptor, std::size_t bytes, const std::string& what) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, descriptor, 0);
  if (base == MAP_FAILED) {
    const std::string reason = std::strerror(errno);
    ::close(descriptor);
    throw Error(ErrorKind::kUnavailable, "can't map " + std::to_string(bytes) + " bytes of " + what + ": " + reason);
  }
  // Fewer TLB misses where the system lets shared memory have huge pages; no harm where it does not.
  madvise(base, bytes, MADV_HUGEPAGE);
  madvise(base, bytes, MADV_DONTDUMP);
  return static_cast<std::uint8_t*>(base);
}

}  // namespace

Segment::Segment(int descriptor, std::uint8_t* base, std::size_t bytes, std::string directory)
    : descriptor_(descriptor), base_(base), bytes_(bytes), directory_(std::move(directory)) {}

Segment::Segment(Segment&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)),
      base_(std::exchange(other.base_, nullptr)),
      bytes_(other.bytes_),
      directory_(std::move(other.directory_)) {}

Segment::~Segment() {
  if (base_ != nullptr) munmap(base_, bytes_);
  if (descriptor_ >= 0) ::close(descriptor_);
}

Segment Segment::create(const std::string& directory, std::size_t bytes) {
  const int descriptor = ::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (descriptor < 0) {
    throw Error(ErrorKind::kUnavailable, "can't make shared memory in " + directory + ": " + std::strerror(errno) +
                                             "; mount a tmpfs there or set shm_dir");
  }
  if (ftruncate(descriptor, static_cast<off_t>(bytes)) != 0) {
    const std::string reason = std::strerror(errno);
    ::close(descriptor);
    throw Error(ErrorKind::kUnavailable,
                "can't make " + std::to_string(bytes) + " bytes of shared memory in " + directory + ": " + reason);
  }
  std::uint8_t* base = map_shared(descriptor, bytes, "shared memory in " + directory);
  return Segment(descriptor, base, bytes, directory);
}

Segment Segment::open(const SegmentAddress& address) {
  const std::string path = "/proc/" + std::to_string(address.pid) + "/fd/" + std::to_string(address.descriptor);
  const int descriptor = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (descriptor < 0) {
    throw Error(ErrorKind::kUnavailable, "can't open a peer's shared memory at " + path + ": " + std::strerror(errno) +
                                             "; ranks need one PID namespace and one user");
  }
  struct stat status{};
  if (fstat(descriptor, &status) != 0 || static_cast<std::uint64_t>(status.st_dev) != address.device ||
      static_cast<std::uint64_t>(status.st_ino) != address.inode) {
    ::close(descriptor);
    throw Error(ErrorKind::kUnavailable, path + " is not the peer's shared memory; ranks need one PID namespace");
  }
  std::uint8_t* base = map_shared(descriptor, address.bytes, "a peer's shared memory");
  ::close(descriptor);
  return Segment(-1, base, address.bytes, path);
}

SegmentAddress Segment::address() const {
  struct stat status{};
  fstat(descriptor_, &status);
  return SegmentAddress{static_cast<std::int64_t>(getpid()), descriptor_, static_cast<std::uint64_t>(status.st_dev),
                        static_cast<std::uint64_t>(status.st_ino), bytes_};
}

int Segment::commit(std::size_t begin, std::size_t end) {
  // In steps, and again after an interruption: older kernels give up a tmpfs allocation at any signal.
  while (begin < end) {
    const std::size_t step = std::min(end - begin, kLargestStep);
    const int failure = posix_fallocate(descriptor_, static_cast<off_t>(begin), static_cast<off_t>(step));
    if (failure == EINTR) continue;
    if (failure != 0) return failure;
    begin += step;
  }
  return 0;
}

}  // namespace moe_ep
