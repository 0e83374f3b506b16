// Element types as eight floats at a time, with the roundings of the host backend and of torch on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/state.h"

namespace moe_ep {
namespace gpu {

struct Float32 {
  static constexpr int kBytes = 4;
  static constexpr int kPerVector = 4;
  __device__ static void unpack(const uint4& vector, float (&values)[4]) {
    values[0] = __uint_as_float(vector.x);
    values[1] = __uint_as_float(vector.y);
    values[2] = __uint_as_float(vector.z);
    values[3] = __uint_as_float(vector.w);
  }
  // Bits of the largest magnitude, NaN and infinities above all others; and what they stand for.
  __device__ static std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }
  __device__ static std::uint32_t peak(const uint4& vector) {
    constexpr std::uint32_t kMagnitude = 0x7fffffffu;
    return larger(larger(vector.x & kMagnitude, vector.y & kMagnitude),
                  larger(vector.z & kMagnitude, vector.w & kMagnitude));
  }
  __device__ static float magnitude(std::uint32_t peak) { return __uint_as_float(peak); }
  __device__ static uint4 pack(const float (&values)[4]) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                      __float_as_uint(values[3]));
  }
};

// What the types of two bytes share.
struct TwoByteElement {
  static constexpr int kBytes = 2;
  static constexpr int kPerVector = 8;
  // As in Float32, two elements a word.
  __device__ static std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return __vmaxu2(a, b); }
  __device__ static std::uint32_t peak(const uint4& vector) {
    constexpr std::uint32_t kMagnitudes = 0x7fff7fffu;
    return larger(larger(vector.x & kMagnitudes, vector.y & kMagnitudes),
                  larger(vector.z & kMagnitudes, vector.w & kMagnitudes));
  }
};

struct BFloat16 : TwoByteElement {
  __device__ static void unpack(const uint4& vector, float (&values)[8]) {
    const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  __device__ static float magnitude(std::uint32_t peak) {
    const std::uint32_t bits = (peak & 0xffffu) > (peak >> 16) ? peak & 0xffffu : peak >> 16;
    return __uint_as_float(bits << 16);
  }
  __device__ static std::uint32_t pack2(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  __device__ static uint4 pack(const float (&values)[8]) {
    return make_uint4(pack2(values[0], values[1]), pack2(values[2], values[3]), pack2(values[4], values[5]),
                      pack2(values[6], values[7]));
  }
};

struct Float16 : TwoByteElement {
  __device__ static void unpack(const uint4& vector, float (&values)[8]) {
    const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
  __device__ static float magnitude(std::uint32_t peak) {
    const std::uint32_t bits = (peak & 0xffffu) > (peak >> 16) ? peak & 0xffffu : peak >> 16;
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
  __device__ static std::uint32_t pack2(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  __device__ static uint4 pack(const float (&values)[8]) {
    return make_uint4(pack2(values[0], values[1]), pack2(values[2], values[3]), pack2(values[4], values[5]),
                      pack2(values[6], values[7]));
  }
};

// Calls `visit` with the element type's tag. Rows of FP8 have no arithmetic: they never come here.
template <class Visitor>
__device__ inline void visit_element(Element element, Visitor&& visit) {
  switch (element) {
    case Element::kFloat32: visit(Float32{}); return;
    case Element::kBFloat16: visit(BFloat16{}); return;
    case Element::kFloat16: visit(Float16{}); return;
    case Element::kFloat8: break;
  }
  __trap();
}

// The same on the host, for what `visit` returns.
template <class Visitor>
cudaError_t visit_element_on_host(Element element, Visitor&& visit) {
  switch (element) {
    case Element::kFloat32: return visit(Float32{});
    case Element::kBFloat16: return visit(BFloat16{});
    case Element::kFloat16: return visit(Float16{});
    case Element::kFloat8: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace gpu
}  // namespace moe_ep
