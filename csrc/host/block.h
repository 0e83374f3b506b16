// Memory handed to a caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace moe_ep {

// A lease of the heap, one of its low-latency buffers, or ordinary memory.
struct Block {
  std::uint8_t* data = nullptr;
  std::size_t bytes = 0;
  std::shared_ptr<void> owner;
};

}  // namespace moe_ep
