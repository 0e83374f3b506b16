"""FP8 rows as a dispatch received them, laid out for a grouped GEMM: one launch for all local experts.

The layouts are those that TransformerEngine keeps beside the data of a ``Float8BlockwiseQTensor``: scales with the rows
innermost, padded to a multiple of 4, and, for weight gradients, the data transposed. On a GPU, kernels read the rows
once and write what is asked for; elsewhere :mod:`moe_ep_plugin.fp8` makes the same bits an expert at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _extension
from .backends.gpu_tensors import aligned
from .errors import ConfigError
from .fp8 import Fp8Rows, check_counts
from .types import FP8_BLOCK

MOST_LOCAL_EXPERTS = 512
"""As many as the parameters of a kernel hold."""

# The inner dimension of a scale tensor, and the hidden dimension of rows, are multiples of these.
_SCALE_MULTIPLE = 4
_HIDDEN_MULTIPLE = 16


def transposed_scales(rows: Fp8Rows, counts: Sequence[int]) -> list[torch.Tensor]:
    """The scales of each local expert's rows, in TransformerEngine's order for a product with the rows.

    Args:
        rows: [rows, hidden], grouped by local expert.
        counts: Rows of each local expert, on the host; zero allowed. Rows past their sum are in no result.

    Returns:
        An fp32 tensor an expert, [ceil(hidden / 128), count rounded up to a multiple of 4], contiguous; columns past
        the count are zero. On a GPU they lie one after the other in one allocation; elsewhere some may be views of
        ``rows.scale``, see :meth:`Fp8Rows.transposed_scale`.

    Raises:
        ConfigError: A count is negative, there are fewer rows than the counts add up to, or there are more than 512
            local experts.
        BackendUnavailable: The rows are on a GPU, and the compiled CUDA part is not there or does not load.
    """
    experts = _checked(rows, counts)
    if rows.data.device.type != "cuda":
        return [part.transposed_scale(_SCALE_MULTIPLE) for part in rows.split(experts)]
    kernels = _extension.load_cuda()
    num_blocks = rows.scale.shape[1]
    widths = [-(-count // _SCALE_MULTIPLE) * _SCALE_MULTIPLE for count in experts]
    out = torch.empty(num_blocks * sum(widths), dtype=torch.float32, device=rows.data.device)
    kernels.transpose_fp8_scales(num_blocks=num_blocks, out=out.data_ptr(), **_scales_and_place(rows, experts))
    parts = out.split([num_blocks * width for width in widths])
    return [part.view(num_blocks, width) for part, width in zip(parts, widths, strict=True)]


def columns(rows: Fp8Rows, counts: Sequence[int], *, power_of_two: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Quantise each local expert's rows again, in blocks of 128 of its rows: the inputs of the weight gradients.

    The bits are those of :meth:`Fp8Rows.columns` for every expert's rows alone: dequantised in fp32, what is past its
    largest value taken for that, NaN kept, and quantised down the columns. Rows with scales of zero, which pad an
    expert, become zeros.

    Args:
        rows: [rows, hidden], grouped by local expert; hidden is a multiple of 16. Data that does not start at a
            multiple of 16 bytes is copied first.
        counts: Rows of each local expert, on the host; zero allowed. Rows past their sum are in no result. Multiples
            of 16, as FP8 GEMMs take them, are written fastest.
        power_of_two: Round the new scales up to powers of two.

    Returns:
        ``(codes, scale)`` an expert, both contiguous: e4m3 as uint8 [hidden, count], and fp32
        [ceil(count / 128), hidden], the order of :meth:`Fp8Cols.transposed_scale`. Its rows need no padding: hidden
        is a multiple of 4. On a GPU the experts' parts lie one after the other in one allocation for each of the two.

    Raises:
        ConfigError: hidden is no multiple of 16, a count is negative, there are fewer rows than the counts add up to,
            or there are more than 512 local experts.
        BackendUnavailable: The rows are on a GPU, and the compiled CUDA part is not there or does not load.
    """
    experts = _checked(rows, counts)
    hidden = rows.data.shape[1]
    if hidden % _HIDDEN_MULTIPLE:
        limit = f"hidden must be a multiple of {_HIDDEN_MULTIPLE}"
        raise ConfigError.of("rows.data.shape", list(rows.data.shape), limit, "use such a hidden size for FP8")
    if rows.data.device.type != "cuda":
        quantized = (part.columns(power_of_two=power_of_two) for part in rows.split(experts))
        return [(part.codes, part.transposed_scale(_SCALE_MULTIPLE)) for part in quantized]
    kernels = _extension.load_cuda()
    device = rows.data.device
    blocks = [-(-count // FP8_BLOCK) for count in experts]
    codes = torch.empty(hidden * sum(experts), dtype=torch.uint8, device=device)
    scale = torch.empty(hidden * sum(blocks), dtype=torch.float32, device=device)
    # A copy may go at once: its memory is used again only after the kernel, on the same stream.
    data, _ = aligned(rows.data)
    kernels.quantize_fp8_columns(
        data=data.data_ptr(),
        hidden=hidden,
        power_of_two=power_of_two,
        codes=codes.data_ptr(),
        column_scales=scale.data_ptr(),
        **_scales_and_place(rows, experts),
    )
    parts = codes.split([hidden * count for count in experts])
    scales = scale.split([hidden * count for count in blocks])
    return [
        (part.view(hidden, count), of.view(num_blocks, hidden))
        for part, count, of, num_blocks in zip(parts, experts, scales, blocks, strict=True)
    ]


def _checked(rows: Fp8Rows, counts: Sequence[int]) -> list[int]:
    experts = list(counts)
    check_counts(experts, len(rows.data))
    if len(experts) > MOST_LOCAL_EXPERTS:
        limit = f"one launch serves {MOST_LOCAL_EXPERTS} local experts"
        raise ConfigError.of("len(counts)", len(experts), limit, "spread the experts over more ranks")
    return experts


def _scales_and_place(rows: Fp8Rows, experts: list[int]) -> dict[str, Any]:
    """What both kernels are told: the rows' scales, whose rows they are, and where to run."""
    device = rows.data.device
    row_stride, block_stride = rows.scale.stride()
    return {
        "scales": rows.scale.data_ptr(),
        "row_stride": row_stride,
        "block_stride": block_stride,
        "rows_per_expert": experts,
        "device": device.index,
        "stream": torch.cuda.current_stream(device).cuda_stream,
    }
