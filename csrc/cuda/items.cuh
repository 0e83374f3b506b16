// Walking over (token, chunk) items with a fixed stride, without a division per step.
#pragma once

#include <cstdint>

namespace moe_ep {
namespace gpu {

struct ItemCursor {
  std::int32_t token;
  std::int32_t chunk;
  std::int32_t end;  // token past the last
  std::int32_t chunks;
  std::int32_t token_step;
  std::int32_t chunk_step;

  __device__ ItemCursor(std::int64_t first_token, std::int64_t end_token, int row_chunks, int first_item, int stride)
      : token(static_cast<std::int32_t>(first_token) + first_item / row_chunks),
        chunk(first_item % row_chunks),
        end(static_cast<std::int32_t>(end_token)),
        chunks(row_chunks),
        token_step(stride / row_chunks),
        chunk_step(stride % row_chunks) {}

  __device__ bool valid() const { return token < end; }
  __device__ void advance() {
    if (!valid()) return;
    token += token_step;
    chunk += chunk_step;
    if (chunk >= chunks) {
      chunk -= chunks;
      ++token;
    }
  }
};

}  // namespace gpu
}  // namespace moe_ep
