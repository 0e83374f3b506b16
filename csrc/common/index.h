// Non-negative 64-bit counts: as container indices, and in parts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_ep {

inline std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

inline std::int64_t divided_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

}  // namespace moe_ep
