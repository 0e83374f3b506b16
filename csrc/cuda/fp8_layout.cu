// FP8 rows as a grouped GEMM reads them, all local experts in one launch: scales transposed and padded, for products
// with the rows; data quantised again in blocks of 128 rows and transposed, for weight gradients. The bits are those of
// moe_ep_plugin/fp8.py: Fp8Rows.transposed_scale and Fp8Rows.columns.
#include "cuda/fp8_layout.h"

#include <limits>
#include <string>

#include "common/errors.h"
#include "cuda/quantize.cuh"

namespace moe_ep {
namespace gpu {

template <int kRows>
ExpertUnits<kRows> ExpertUnits<kRows>::of(const std::vector<std::int64_t>& rows_per_expert) {
  if (rows_per_expert.size() > kMostUnitExperts) {
    throw Error(ErrorKind::kConfig, std::to_string(rows_per_expert.size()) + " local experts are more than the " +
                                        std::to_string(kMostUnitExperts) + " of one launch; use more ranks");
  }
  ExpertUnits result{};
  std::int64_t start = 0;
  std::int64_t units = 0;
  for (const std::int64_t rows : rows_per_expert) {
    // Leaves room to round up.
    if (rows < 0 || rows > std::numeric_limits<std::int32_t>::max() - kMostUnitExperts * kRows - start) {
      throw Error(ErrorKind::kConfig, "an expert has " + std::to_string(rows) + " rows after " + std::to_string(start) +
                                          " of others, but rows are counted in 31 bits; pass the counts of a dispatch");
    }
    start += rows;
    units += (rows + kRows - 1) / kRows;
    ++result.num_experts;
    result.starts[result.num_experts] = static_cast<std::int32_t>(start);
    result.extra[result.num_experts] = static_cast<std::uint16_t>(units - start / kRows);
  }
  return result;
}

template struct ExpertUnits<kScaleMultiple>;
template struct ExpertUnits<static_cast<int>(kFp8Block)>;

namespace {

constexpr int kTileWarps = 8;
constexpr int kTileThreads = 32 * kTileWarps;

// Transposing scales: 32 rows, padding included, by 32 blocks of columns. Tiles take no notice of where experts begin.
constexpr int kScaleTile = 32;

__global__ void __launch_bounds__(kTileThreads)
    transpose_scales_kernel(const __grid_constant__ TransposeScalesParams params) {
  __shared__ float tile[kScaleTile][kScaleTile + 1];
  const auto& experts = params.experts;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  // Of this lane's row: which it is of its expert's, and of the input's, if it is no padding.
  const std::int32_t padded_row = static_cast<std::int32_t>(blockIdx.x) * kScaleTile + lane;
  const std::int32_t unit = padded_row / kScaleMultiple;
  const bool inside = unit < experts.num_units();
  const int expert = inside ? experts.expert_of(unit) : 0;
  const std::int32_t before = experts.first_unit(expert) * kScaleMultiple;
  const std::int32_t row = padded_row - before;
  const std::int32_t source = inside && row < experts.rows(expert) ? experts.starts[expert] + row : -1;
  const int first_block = static_cast<int>(blockIdx.y) * kScaleTile;
  // Lanes read what lies next to each other: scales of one row, or, transposed already, of one block.
  const bool by_block = params.scales.row_stride <= params.scales.block_stride;
#pragma unroll
  for (int i = 0; i < kScaleTile / kTileWarps; ++i) {
    const int other = warp + i * kTileWarps;
    const std::int32_t others_source = __shfl_sync(0xffffffffu, source, other);
    const std::int32_t from = by_block ? source : others_source;
    const int block = first_block + (by_block ? other : lane);
    float value = 0.0f;
    if (from >= 0 && block < params.num_blocks) {
      value = params.scales.data[from * params.scales.row_stride + block * params.scales.block_stride];
    }
    tile[by_block ? lane : other][by_block ? other : lane] = value;
  }
  __syncthreads();
  if (!inside) return;
  const std::int64_t width = static_cast<std::int64_t>(experts.units(expert)) * kScaleMultiple;
  float* out = params.out + static_cast<std::int64_t>(before) * params.num_blocks + row;
#pragma unroll
  for (int i = 0; i < kScaleTile / kTileWarps; ++i) {
    const int block = warp + i * kTileWarps;
    if (first_block + block < params.num_blocks) out[(first_block + block) * width] = tile[lane][block];
  }
}

// Quantising columns: a thread block has 128 rows of an expert by 128 columns, which are one block of scales both ways.
// A warp has 16 of the rows, and a lane four columns of them: words of four columns come in, and four rows of a column
// at a time go through the conversion, which so transposes them.
constexpr int kTile = static_cast<int>(kFp8Block);
constexpr int kWarpRows = kTile / kTileWarps;
constexpr int kLaneColumns = kTile / 32;
constexpr float kLargestFloat = std::numeric_limits<float>::max();
static_assert(kWarpRows == sizeof(uint4) && kLaneColumns == sizeof(std::uint32_t), "vectors of 16 rows, words of 4");

struct ColumnsShared {
  // Column c * 32 + lane has a lane's column c. Lanes write vectors of 16 bytes a column apart: that is nine vectors,
  // so eight lanes reach all banks.
  alignas(16) std::uint8_t codes[kTile][kTile + sizeof(uint4)];
  alignas(16) float row_scales[kTile];
  alignas(16) float peaks[kTileWarps][kTile];
  alignas(16) float reciprocals[kTile];
};

__device__ inline void unpack_e4m3x4(std::uint32_t word, float (&values)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(word >> (16 * half));
    const float2 wide = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    values[2 * half] = wide.x;
    values[2 * half + 1] = wide.y;
  }
}

// What four columns of four rows dequantise to, before limits: infinite where fp32 ends.
__device__ inline void dequantize(const std::uint32_t* words, const float* row_scales,
                                  float (&values)[4][kLaneColumns]) {
  const float4 vector = *reinterpret_cast<const float4*>(row_scales);
  const float scales[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    unpack_e4m3x4(words[i], values[i]);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) values[i][c] = __fmul_rn(values[i][c], scales[i]);
  }
}

__device__ inline float within_float32(float value) {
  return isnan(value) ? value : fminf(fmaxf(value, -kLargestFloat), kLargestFloat);
}

// Sixteen rows of four columns to codes. kLimits: some of the block's values are infinite. NaN needs no care where none
// is, since a conversion makes it the code that scaled_for_fp8's becomes.
template <bool kLimits>
__device__ inline void requantize(const std::uint32_t (&words)[kWarpRows], const float* row_scales,
                                  const float (&reciprocals)[kLaneColumns], uint4 (&columns)[kLaneColumns]) {
  std::uint32_t codes[kLaneColumns][kWarpRows / 4];
#pragma unroll
  for (int quad = 0; quad < kWarpRows / 4; ++quad) {
    float values[4][kLaneColumns];
    dequantize(words + quad * 4, row_scales + quad * 4, values);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      float column[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) column[i] = kLimits ? within_float32(values[i][c]) : values[i][c];
      codes[c][quad] = kLimits ? to_e4m3x4(column, reciprocals[c]) : finite_to_e4m3x4(column, reciprocals[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) columns[c] = make_uint4(codes[c][0], codes[c][1], codes[c][2], codes[c][3]);
}

__global__ void __launch_bounds__(kTileThreads)
    quantize_columns_kernel(const __grid_constant__ QuantizeColumnsParams params) {
  __shared__ ColumnsShared shared;
  const auto& experts = params.experts;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  // Blocks that run at the same time share rows: what they read, the cache lines of their scales too, lies together.
  const unsigned tiles = (static_cast<unsigned>(params.hidden) + kTile - 1) / kTile;
  const auto unit = static_cast<std::int32_t>(blockIdx.x / tiles);
  const auto tile = static_cast<std::int32_t>(blockIdx.x % tiles);
  const int expert = experts.expert_of(unit);
  const std::int32_t count = experts.rows(expert);
  const std::int32_t first = (unit - experts.first_unit(expert)) * kTile;  // of the expert's rows
  const std::int32_t rows = min(kTile, count - first);
  const std::int32_t columns = min(kTile, params.hidden - tile * kTile);
  const std::int32_t row = warp * kWarpRows;
  const std::int64_t source = static_cast<std::int64_t>(experts.starts[expert]) + first + row;

  // Rows that are not there are zeros with a scale of zero, and change no column's peak.
  std::uint32_t words[kWarpRows];
  const std::uint8_t* from = params.data + source * params.hidden + tile * kTile + lane * kLaneColumns;
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    const bool there = row + i < rows && lane * kLaneColumns < columns;
    words[i] = there ? __ldcs(reinterpret_cast<const std::uint32_t*>(from + i * std::int64_t{params.hidden})) : 0;
  }
  float* row_scales = shared.row_scales + row;
  if (lane < kWarpRows) {
    const std::int64_t at = (source + lane) * params.scales.row_stride + tile * params.scales.block_stride;
    row_scales[lane] = row + lane < rows ? params.scales.data[at] : 0.0f;
  }
  __syncwarp();

  // fmaxf passes over NaN, and leaves infinity to be found below.
  float peaks[kLaneColumns] = {};
#pragma unroll
  for (int quad = 0; quad < kWarpRows; quad += 4) {
    float values[4][kLaneColumns];
    dequantize(words + quad, row_scales + quad, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) peaks[c] = fmaxf(peaks[c], fabsf(values[i][c]));
    }
  }
  reinterpret_cast<float4*>(shared.peaks[warp])[lane] = make_float4(peaks[0], peaks[1], peaks[2], peaks[3]);
  __syncthreads();
  bool infinite = false;
  if (thread < kTile) {
    float peak = 0.0f;
#pragma unroll
    for (int i = 0; i < kTileWarps; ++i) peak = fmaxf(peak, shared.peaks[i][thread]);
    infinite = peak > kLargestFloat;
    const float scale = block_scale(within_float32(peak), params.power_of_two);
    shared.reciprocals[thread] = __frcp_rn(scale);
    if (thread < columns) {
      params.column_scales[static_cast<std::int64_t>(unit) * params.hidden + tile * kTile + thread] = scale;
    }
  }
  const bool limits = __syncthreads_or(infinite) != 0;

  const float4 vector = reinterpret_cast<const float4*>(shared.reciprocals)[lane];
  const float reciprocals[kLaneColumns] = {vector.x, vector.y, vector.z, vector.w};
  uint4 transposed[kLaneColumns];
  if (limits) {
    requantize<true>(words, row_scales, reciprocals, transposed);
  } else {
    requantize<false>(words, row_scales, reciprocals, transposed);
  }
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) {
    *reinterpret_cast<uint4*>(&shared.codes[c * 32 + lane][row]) = transposed[c];
  }
  __syncthreads();

  const auto column_of = [](int slot) { return slot % 32 * kLaneColumns + slot / 32; };
  std::uint8_t* to = params.codes + static_cast<std::int64_t>(experts.starts[expert]) * params.hidden +
                     static_cast<std::int64_t>(tile) * kTile * count + first;
  if (count % static_cast<int>(sizeof(uint4)) == 0) {
    constexpr int kVectors = kTile / static_cast<int>(sizeof(uint4));  // of a column
    const int at = thread % kVectors * static_cast<int>(sizeof(uint4));
#pragma unroll
    for (int i = 0; i < kTile * kVectors / kTileThreads; ++i) {
      const int slot = thread / kVectors + i * (kTileThreads / kVectors);
      const std::int64_t column = column_of(slot);
      if (column < columns && at < rows) {
        *reinterpret_cast<uint4*>(to + column * count + at) = *reinterpret_cast<const uint4*>(&shared.codes[slot][at]);
      }
    }
    return;
  }
  for (int slot = warp; slot < kTile; slot += kTileWarps) {
    const std::int64_t column = column_of(slot);
    if (column >= columns) continue;
    for (int at = lane; at < rows; at += 32) to[column * count + at] = shared.codes[slot][at];
  }
}

}  // namespace

cudaError_t launch_transpose_scales(const TransposeScalesParams& params, cudaStream_t stream) {
  const std::int32_t rows = params.experts.num_units() * kScaleMultiple;
  if (rows == 0 || params.num_blocks == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>((rows + kScaleTile - 1) / kScaleTile),
                    static_cast<unsigned>((params.num_blocks + kScaleTile - 1) / kScaleTile));
  transpose_scales_kernel<<<blocks, kTileThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t launch_quantize_columns(const QuantizeColumnsParams& params, cudaStream_t stream) {
  const std::int64_t tiles = (std::int64_t{params.hidden} + kTile - 1) / kTile;
  const std::int64_t blocks = tiles * params.experts.num_units();
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<std::int32_t>::max()) return cudaErrorInvalidConfiguration;
  quantize_columns_kernel<<<static_cast<unsigned>(blocks), kTileThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace gpu
}  // namespace moe_ep
