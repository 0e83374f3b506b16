// Rows of FP8 as a dispatch received them, laid out anew for a grouped GEMM: what the kernels of fp8_layout.cu are
// told.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "common/heap_layout.h"

namespace moe_ep {
namespace gpu {

constexpr int kMostUnitExperts = 512;

// Rows of local experts, one expert's after the other's, cut into units of kRows that begin anew at every expert's
// first row; only an expert's last unit may be short. Small enough to be a kernel's parameter, so nothing is copied.
template <int kRows>
struct ExpertUnits {
  std::int32_t num_experts;
  std::int32_t starts[kMostUnitExperts + 1];  // an expert's first row; then the end of all
  // Units before an expert, less starts / kRows: short ones count as whole, and an expert has at most one.
  std::uint16_t extra[kMostUnitExperts + 1];

  // Throws Error where there are more experts, or more rows, than fit.
  static ExpertUnits of(const std::vector<std::int64_t>& rows_per_expert);

  MOE_EP_HOST_DEVICE std::int32_t first_unit(int expert) const { return starts[expert] / kRows + extra[expert]; }
  MOE_EP_HOST_DEVICE std::int32_t num_units() const { return first_unit(num_experts); }
  MOE_EP_HOST_DEVICE std::int32_t rows(int expert) const { return starts[expert + 1] - starts[expert]; }
  MOE_EP_HOST_DEVICE std::int32_t units(int expert) const { return first_unit(expert + 1) - first_unit(expert); }

  // Whose unit it is: the last expert that begins there or before, as those without rows end where they begin.
  MOE_EP_HOST_DEVICE int expert_of(std::int32_t unit) const {
    int expert = 0;
    for (int end = num_experts; end - expert > 1;) {
      const int middle = (expert + end) / 2;
      (first_unit(middle) <= unit ? expert : end) = middle;
    }
    return expert;
  }
};

// Columns of a transposed scale tensor are a multiple of this, as TransformerEngine reads them.
constexpr int kScaleMultiple = 4;

// fp32 [rows, blocks of 128 columns]; strides in elements.
struct RowScales {
  const float* data;
  std::int64_t row_stride;
  std::int64_t block_stride;
};

struct TransposeScalesParams {
  RowScales scales;
  std::int32_t num_blocks;
  float* out;  // of each expert [num_blocks, rows rounded up to kScaleMultiple], zero past the rows
  ExpertUnits<kScaleMultiple> experts;
};

struct QuantizeColumnsParams {
  const std::uint8_t* data;  // [rows, hidden] e4m3, aligned to 4 bytes
  RowScales scales;
  std::int32_t hidden;  // a multiple of 16
  bool power_of_two;
  std::uint8_t* codes;   // of each expert [hidden, rows] e4m3, aligned to 16 bytes
  float* column_scales;  // of each expert [units, hidden]
  ExpertUnits<static_cast<int>(kFp8Block)> experts;
};

// One launch each, none where there is nothing to write; they return CUDA's error code.
cudaError_t launch_transpose_scales(const TransposeScalesParams& params, cudaStream_t stream);
cudaError_t launch_quantize_columns(const QuantizeColumnsParams& params, cudaStream_t stream);

}  // namespace gpu
}  // namespace moe_ep
