// Row kernels for any processor, and the choice between variants.
#include "host/kernels.h"

#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace moe_ep {
namespace {

#include "host/kernels_impl.h"

void copy_row(void* destination, const void* source, std::size_t bytes, bool stream) {
#if defined(__x86_64__)
  if (stream) {
    auto* to = static_cast<__m128i*>(destination);
    const auto* from = static_cast<const __m128i*>(source);
    for (std::size_t i = 0; i < bytes / sizeof(__m128i); ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
    return;
  }
#else
  (void)stream;
#endif
  std::memcpy(destination, source, bytes);
}

void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace

const Kernels& baseline_kernels() {
  static const Kernels table{"baseline", copy_row, fence, reduce, reduce_floats, quantize, dequantize};
  return table;
}

const Kernels& kernels() {
#if defined(MOE_EP_HAVE_AVX2)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (has_avx2) return avx2_kernels();
#endif
  return baseline_kernels();
}

}  // namespace moe_ep
