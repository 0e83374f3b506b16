// Which ranges of a region are free: first fit from the low end, so that the same few pages are used again and
// again; neighbours are merged. Not synchronised: its owner locks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <map>
#include <optional>

namespace moe_ep {

class FreeList {
 public:
  struct Range {
    std::size_t offset;
    std::size_t bytes;
  };

  FreeList() = default;
  FreeList(std::size_t offset, std::size_t bytes) { give(offset, bytes); }

  // The lowest range of exactly `bytes`.
  std::optional<Range> take(std::size_t bytes) {
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      if (block->second >= bytes) return cut(block, bytes);
    }
    return std::nullopt;
  }

  // The largest free range, cut to `most`.
  std::optional<Range> take_largest(std::size_t most) {
    const auto block =
        std::max_element(free_.begin(), free_.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
    if (block == free_.end()) return std::nullopt;
    return cut(block, std::min(block->second, most));
  }

  void give(std::size_t offset, std::size_t bytes) {
    if (bytes == 0) return;
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && offset + bytes == next->first) {
      bytes += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto previous = std::prev(next);
      if (previous->first + previous->second == offset) {
        previous->second += bytes;
        return;
      }
    }
    free_[offset] = bytes;
  }

 private:
  Range cut(std::map<std::size_t, std::size_t>::iterator block, std::size_t bytes) {
    const Range range{block->first, bytes};
    const std::size_t left = block->second - bytes;
    free_.erase(block);
    if (left > 0) free_[range.offset + bytes] = left;
    return range;
  }

  std::map<std::size_t, std::size_t> free_;  // offset to bytes
};

}  // namespace moe_ep
