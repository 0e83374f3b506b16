// Row kernels for x86-64 processors with AVX2 and F16C. Compiled with -mavx2 -mf16c.
#include "host/kernels.h"

#include <immintrin.h>

#include <cstring>
#include <stdexcept>

namespace moe_ep {
namespace {

#include "host/kernels_impl.h"

void copy_row(void* destination, const void* source, std::size_t bytes, bool stream) {
  if (!stream) {
    std::memcpy(destination, source, bytes);
    return;
  }
  auto* to = static_cast<char*>(destination);
  const auto* from = static_cast<const char*>(source);
  std::size_t at = 0;
  // Slots are 16-byte aligned; 32-byte streaming stores need the first one stepped over at times.
  if (reinterpret_cast<std::uintptr_t>(to) % 32 != 0 && bytes >= 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    at = 16;
  }
  for (; at + 32 <= bytes; at += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
  }
  if (at < bytes) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)));
  }
}

void fence() { _mm_sfence(); }

}  // namespace

const Kernels& avx2_kernels() {
  static const Kernels table{"avx2", copy_row, fence, reduce, reduce_floats, quantize, dequantize};
  return table;
}

}  // namespace moe_ep
