// Rows to e4m3 with one scale per 128 elements; moe_ep_plugin/wire.py is the plain statement of the format.
#pragma once

#include <cuda_fp8.h>

#include "cuda/elements.cuh"

namespace moe_ep {
namespace gpu {

// The smallest amax told from zero, as in moe_ep_plugin/wire.py.
constexpr float kMinAmax = 7.888609052210118e-31f;  // 2^-100
constexpr float kFp8Max = 448.0f;

// a / 448, rounded correctly: a product and one step of refinement, which tests compare with the division.
__device__ inline float divided_by_fp8_max(float a) {
  constexpr float kInverse = 1.0f / kFp8Max;
  const float quotient = __fmul_rn(a, kInverse);
  return __fmaf_rn(__fmaf_rn(-kFp8Max, quotient, a), kInverse, quotient);
}

// The scale of a block whose largest finite magnitude is `amax`.
__device__ inline float block_scale(float amax, bool power_of_two) {
  float scale = divided_by_fp8_max(fmaxf(amax, kMinAmax));
  if (power_of_two) scale = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u);
  return scale;
}

// 1 / scale of a block_scale(), rounded correctly. No such scale nor its reciprocal is a denormal number or overflows,
// so that one step of refinement does; __frcp_rn() looks for those first.
__device__ inline float reciprocal_of_scale(float scale) {
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(scale));
  return __fmaf_rn(estimate, __fmaf_rn(-scale, estimate, 1.0f), estimate);
}

__device__ inline float finite_magnitude(float value) {
  const float magnitude = fabsf(value);
  return magnitude < __uint_as_float(0x7f800000u) ? magnitude : 0.0f;
}

// NaN and infinities become NaN; rounding in the reciprocal may push the largest element one ulp past 448.
__device__ inline float scaled_for_fp8(float value, float reciprocal) {
  const float scaled = fminf(fmaxf(__fmul_rn(value, reciprocal), -kFp8Max), kFp8Max);
  return fabsf(value) < __uint_as_float(0x7f800000u) ? scaled : __uint_as_float(0x7fffffffu);
}

__device__ inline std::uint32_t to_e4m3x4(const float* values, float reciprocal) {
  const float2 low = make_float2(scaled_for_fp8(values[0], reciprocal), scaled_for_fp8(values[1], reciprocal));
  const float2 high = make_float2(scaled_for_fp8(values[2], reciprocal), scaled_for_fp8(values[3], reciprocal));
  return static_cast<std::uint32_t>(__nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3)) |
         (static_cast<std::uint32_t>(__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3)) << 16);
}

// The same for finite values: the conversion itself ends at 448.
__device__ inline std::uint32_t finite_to_e4m3x4(const float* values, float reciprocal) {
  const float2 low = make_float2(__fmul_rn(values[0], reciprocal), __fmul_rn(values[1], reciprocal));
  const float2 high = make_float2(__fmul_rn(values[2], reciprocal), __fmul_rn(values[3], reciprocal));
  return static_cast<std::uint32_t>(__nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3)) |
         (static_cast<std::uint32_t>(__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3)) << 16);
}

template <class T>
__device__ inline void load_four(const std::uint8_t* from, float (&values)[4]) {
  if constexpr (T::kBytes == 4) {
    T::unpack(*reinterpret_cast<const uint4*>(from), values);
  } else {
    const uint2 pair = *reinterpret_cast<const uint2*>(from);
    float eight[8];
    T::unpack(make_uint4(pair.x, pair.y, 0, 0), eight);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = eight[i];
  }
}

template <class T>
__device__ inline void unpack_eight(const uint4 (&vectors)[8 / T::kPerVector], float (&values)[8]) {
#pragma unroll
  for (int v = 0; v < 8 / T::kPerVector; ++v) {
    float unpacked[T::kPerVector];
    T::unpack(vectors[v], unpacked);
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) values[v * T::kPerVector + i] = unpacked[i];
  }
}

// One block, four elements a lane, whatever is in it. Lanes past the row's end have zeros.
struct QuantizedFour {
  std::uint32_t bytes;
  float scale;  // of the block
};
__device__ inline QuantizedFour quantize_four(const float (&values)[4], bool power_of_two) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) amax = fmaxf(amax, finite_magnitude(values[i]));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, distance));
  }
  const float scale = block_scale(amax, power_of_two);
  return QuantizedFour{to_e4m3x4(values, __frcp_rn(scale)), scale};
}

// Blocks of a chunk in place, one after the other: for the rare ones with infinities or NaN, which do not count.
template <class T, int kAtOnce = kQuantizedAtOnce>
__device__ __noinline__ void quantize_any_blocks(std::uint8_t* chunk, int first, int elements, bool power_of_two,
                                                 float* scales) {
  const int lane = threadIdx.x & 31;
  const int end = min(elements, first * static_cast<int>(kFp8Block) + kAtOnce);
  for (int block = first; block * static_cast<int>(kFp8Block) < end; ++block) {
    const int column = block * static_cast<int>(kFp8Block) + lane * 4;
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (column < end) load_four<T>(chunk + column * T::kBytes, values);
    const QuantizedFour quantized = quantize_four(values, power_of_two);
    __syncwarp();
    if (column < end) *reinterpret_cast<std::uint32_t*>(chunk + column) = quantized.bytes;
    if (lane == 0) scales[block] = quantized.scale;
  }
  __syncwarp();
}

// Eight blocks of 128, from block `first` of a chunk, in place: a half-warp takes every other one, eight elements a
// lane. What is written lies before what later calls read. kWhole: all eight are there.
template <class T, bool kWhole>
__device__ inline void quantize_eight_blocks(std::uint8_t* chunk, int first, int elements, bool power_of_two,
                                             float* scales) {
  constexpr int kBlocks = 4;  // of a half-warp
  constexpr int kVectors = 8 / T::kPerVector;
  constexpr int kNext = 2 * static_cast<int>(kFp8Block);  // elements to the half-warp's next block
  const int lane = threadIdx.x & 31;
  const int half = lane & 16;
  const int column = first * static_cast<int>(kFp8Block) + half * 8 + (lane & 15) * 8;
  uint4 vectors[kBlocks][kVectors];
  std::uint32_t peaks[kBlocks];
#pragma unroll
  for (int u = 0; u < kBlocks; ++u) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      vectors[u][v] = make_uint4(0, 0, 0, 0);
      if (kWhole || column + u * kNext < elements) {
        vectors[u][v] = reinterpret_cast<const uint4*>(chunk + (column + u * kNext) * T::kBytes)[v];
      }
    }
    peaks[u] = T::peak(vectors[u][0]);
    if constexpr (kVectors == 2) peaks[u] = T::larger(peaks[u], T::peak(vectors[u][1]));
  }
  // Lanes give away the blocks that others will finish: each ends with the peak of one block, own of its half-warp's.
  const auto exchange = [](bool upper, std::uint32_t low, std::uint32_t high, int distance) {
    return T::larger(upper ? high : low, __shfl_xor_sync(0xffffffffu, upper ? low : high, distance));
  };
  const bool upper = (lane & 8) != 0;
  std::uint32_t peak =
      exchange((lane & 4) != 0, exchange(upper, peaks[0], peaks[2], 8), exchange(upper, peaks[1], peaks[3], 8), 4);
  const int own = (lane & 8) / 4 + (lane & 4) / 4;
#pragma unroll
  for (int distance = 2; distance > 0; distance /= 2) {
    peak = T::larger(peak, __shfl_xor_sync(0xffffffffu, peak, distance));
  }
  const float amax = T::magnitude(peak);
  if (__all_sync(0xffffffffu, amax < __uint_as_float(0x7f800000u)) == 0) {
    quantize_any_blocks<T>(chunk, first, elements, power_of_two, scales);
    return;
  }
  // All have read what is written below.
  __syncwarp();
  const float scale = block_scale(amax, power_of_two);
  const float inverse = __frcp_rn(scale);
  const int block = first + half / 16 + 2 * own;
  if ((lane & 3) == 0 && (kWhole || block * static_cast<int>(kFp8Block) < elements)) scales[block] = scale;
#pragma unroll
  for (int u = 0; u < kBlocks; ++u) {
    const float reciprocal = __shfl_sync(0xffffffffu, inverse, half | (u / 2 * 8) | (u % 2 * 4));
    float values[8];
    unpack_eight<T>(vectors[u], values);
    if (kWhole || column + u * kNext < elements) {
      *reinterpret_cast<uint2*>(chunk + column + u * kNext) =
          make_uint2(finite_to_e4m3x4(values, reciprocal), finite_to_e4m3x4(values + 4, reciprocal));
    }
  }
  __syncwarp();
}

// A chunk in place, in units of 8 elements, in less code, for kernels that go through it once or a few times: four
// blocks at a time, a block by eight lanes.
template <class T>
__device__ inline void quantize_briefly(std::uint8_t* chunk, int elements, bool power_of_two, float* scales) {
  constexpr int kVectors = 8 / T::kPerVector;
  constexpr int kBlock = static_cast<int>(kFp8Block);
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int first = 0; first < elements; first += 4 * kBlock) {
    const int block = first / kBlock + lane / 8;
    const int column = block * kBlock + (lane & 7) * 8;  // and half a block further
    uint4 vectors[2][kVectors];
    std::uint32_t peak = 0;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        vectors[u][v] = make_uint4(0, 0, 0, 0);
        if (column + u * kBlock / 2 < elements) {
          vectors[u][v] = reinterpret_cast<const uint4*>(chunk + (column + u * kBlock / 2) * T::kBytes)[v];
        }
        peak = T::larger(peak, T::peak(vectors[u][v]));
      }
    }
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) {
      peak = T::larger(peak, __shfl_xor_sync(0xffffffffu, peak, distance));
    }
    const float amax = T::magnitude(peak);
    // What is written below lies before what later turns read, and all have read what this one does.
    if (__all_sync(0xffffffffu, amax < __uint_as_float(0x7f800000u)) == 0) {
      quantize_any_blocks<T, 4 * kBlock>(chunk, first / kBlock, elements, power_of_two, scales);
      continue;
    }
    __syncwarp();
    const float scale = block_scale(amax, power_of_two);
    const float reciprocal = reciprocal_of_scale(scale);
    if ((lane & 7) == 0 && column < elements) scales[block] = scale;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      float values[8];
      unpack_eight<T>(vectors[u], values);
      if (column + u * kBlock / 2 < elements) {
        *reinterpret_cast<uint2*>(chunk + column + u * kBlock / 2) =
            make_uint2(finite_to_e4m3x4(values, reciprocal), finite_to_e4m3x4(values + 4, reciprocal));
      }
    }
    __syncwarp();
  }
}

// Quantises a chunk in place: whole blocks of 128 but for a row's last, in units of 16 elements.
template <class T>
__device__ inline void quantize_chunk(std::uint8_t* chunk, int elements, bool power_of_two, float* scales) {
  int done = 0;
  for (; done + kQuantizedAtOnce <= elements; done += kQuantizedAtOnce) {
    quantize_eight_blocks<T, true>(chunk, done / static_cast<int>(kFp8Block), elements, power_of_two, scales);
  }
  if (done < elements) {
    quantize_eight_blocks<T, false>(chunk, done / static_cast<int>(kFp8Block), elements, power_of_two, scales);
  }
}

}  // namespace gpu
}  // namespace moe_ep
