// Shared memory without a name: nothing to unlink, so nothing is left behind however a process ends.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace moe_ep {

// How a peer finds a segment: through /proc/<pid>/fd/<descriptor>, checked by device and inode.
struct SegmentAddress {
  std::int64_t pid;
  std::int64_t descriptor;
  std::uint64_t device;
  std::uint64_t inode;
  std::uint64_t bytes;
};

class Segment {
 public:
  // Makes a segment of `bytes` in the tmpfs `directory`; memory is taken by `commit` only.
  static Segment create(const std::string& directory, std::size_t bytes);
  static Segment open(const SegmentAddress& address);

  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&&) = delete;
  Segment(const Segment&) = delete;
  ~Segment();

  std::uint8_t* base() const { return base_; }
  std::size_t bytes() const { return bytes_; }
  SegmentAddress address() const;

  // Takes memory for [begin, end); later writes there can't fail. Returns 0, or errno (ENOSPC: tmpfs is full).
  int commit(std::size_t begin, std::size_t end);
  const std::string& directory() const { return directory_; }

 private:
  Segment(int descriptor, std::uint8_t* base, std::size_t bytes, std::string directory);

  int descriptor_;
  std::uint8_t* base_;
  std::size_t bytes_;
  std::string directory_;
};

}  // namespace moe_ep
