// Non-negative 64-bit counts as container indices.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_ep {

inline std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

}  // namespace moe_ep
