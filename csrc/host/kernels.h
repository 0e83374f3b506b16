// The loops over row elements, compiled once per instruction set and chosen when the library loads.
//
// Every variant gives the same bits: products are rounded before they are added (no fused multiply-add),
// and conversions round to nearest even.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/heap_layout.h"

namespace moe_ep {

inline std::size_t scales_per_row(std::int64_t hidden) {
  return (static_cast<std::size_t>(hidden) + kFp8Block - 1) / kFp8Block;
}

// Whether `bytes` of rows are to be written past the caches: above this size they would push everything
// else out, and stores that need not read their cache line first are three times as fast.
inline bool streams(std::size_t bytes, std::size_t row_bytes) {
  return row_bytes % 16 == 0 && bytes >= (std::size_t{1} << 20);
}

// One addend of a token's sum. Terms of one rank follow each other and are summed on their own first.
struct ReduceTerm {
  const void* row;
  float weight;
  bool starts_rank;
};

struct Kernels {
  const char* name;
  // Copies a multiple of 16 bytes; with `stream`, past the caches (call `fence` before publishing).
  void (*copy_row)(void* destination, const void* source, std::size_t bytes, bool stream);
  void (*fence)();
  // out[i] = sum over ranks of (sum over the rank's terms of weight * row[i]), in fp32, in the order given.
  void (*reduce)(Element element, const ReduceTerm* terms, std::size_t num_terms, void* out, std::size_t hidden);
  // The same of rows that are fp32 whatever the element of `out` is.
  void (*reduce_floats)(Element element, const ReduceTerm* terms, std::size_t num_terms, void* out, std::size_t hidden);
  // e4m3 with one scale per block of 128; see moe_ep_plugin/wire.py for the format.
  void (*quantize)(Element element, const void* row, std::size_t hidden, bool power_of_two, std::uint8_t* quantized,
                   float* scales);
  // The fp32 products of such a row's elements and scales.
  void (*dequantize)(const std::uint8_t* quantized, const float* scales, std::size_t hidden, float* row);
};

const Kernels& baseline_kernels();
#if defined(MOE_EP_HAVE_AVX2)
const Kernels& avx2_kernels();
#endif

// The best variant that this processor runs.
const Kernels& kernels();

}  // namespace moe_ep
