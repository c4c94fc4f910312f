"""Weights gathered as the codes that layers compute with: exact for whoever quantizes them again.

The owner of a channel quantizes it as its layer would (symmetric, to nearest, n = 2^(bits-1) - 1), and sends codes and
the largest magnitude, absmax. The other ranks write down

    value = sign(code) * absmax     where |code| is the largest that absmax itself takes
            code * scale            elsewhere, scale as `numerics.integer` makes it of absmax, rounded to the dtype

and a layer that quantizes these values finds the same scales and codes: absmax is among them, and no value is larger;
and a value in bf16, the coarsest dtype, differs from code * scale by at most 2^-8 * |code * scale| <= 2^-8 * 127 scales
< 0.497 scales, so that it is rounded back to its code. (Where 127 scales are denormal, values have an absolute spacing
that is above the scale's, or the error is smaller still.) A channel with an Inf or a NaN comes back as NaN, as layers
make of it.

A channel that lies in several partitions has its absmax from all of them, by an all-reduce before the gather.
"""

import torch
from torch import Tensor

from ds_quant.comm.weight_layout import PACKED_BLOCK, Run
from ds_quant.kernels.int8 import ops
from ds_quant.numerics.integer import divide, symmetric_codes, symmetric_levels, symmetric_scale
from ds_quant.numerics.packing import pack, unpack


def shared_absmax(flat: Tensor, runs: tuple[Run, ...], num_shared: int) -> Tensor:
    """fp32 [num_shared]: of what `runs` have of the shared channels; Inf where that is not finite, 0 of other ranks'.

    No NaN, which a maximum over ranks could lose.
    """
    found = torch.zeros(num_shared, dtype=torch.float32, device=flat.device)
    for run in runs:
        magnitudes = flat[run.start : run.start + run.numel].float().abs()
        if run.first_column < 0:
            channels, largest = found[run.first_channel : run.first_channel + 1], magnitudes.amax().view(1)
        else:
            channels = found[run.first_channel : run.first_channel + run.width]
            # Elements of rows before and after those that the run has: no magnitude is below 0.
            before = run.first_column
            after = -(before + run.numel) % run.width
            rows = torch.nn.functional.pad(magnitudes, (before, after)).view(-1, run.width)
            largest = rows.amax(0)
        channels.copy_(largest)  # an owner has one run of each
    return torch.where(found.isfinite(), found, torch.inf)


def encode(flat: Tensor, run: Run, shared: Tensor | None, message: Tensor) -> None:
    """Write what `run` sends of `flat` into a message, uint8."""
    values = flat[run.start : run.start + run.numel]
    if run.kind == "whole":
        _view(message, run.at, run.numel, flat.dtype).copy_(values)
        return
    if run.kind == "shared":
        codes = symmetric_codes(values, scale_of(_shared(run, shared), run.bits), run.bits)
    else:
        matrix = values.view(-1, run.width)
        quantize = ops.quantize_rows if run.kind == "rows" else ops.quantize_columns
        codes, scale = quantize(matrix, symmetric_levels(run.bits))
        if flat.dtype == torch.float32:
            absmax = matrix.abs().amax(1 if run.kind == "rows" else 0)
        else:  # n scales differ from it by a rounding in fp32
            absmax = (scale * symmetric_levels(run.bits)).to(flat.dtype)
        _view(message, run.absmax_at, run.num_channels, flat.dtype).copy_(absmax)
    codes = codes.view(-1)
    target = message[run.at : run.at + run.num_bytes]
    target.copy_(codes.view(torch.uint8) if run.bits == 8 else pack(codes, PACKED_BLOCK, run.bits))


def decode(message: Tensor, run: Run, shared: Tensor | None, flat: Tensor) -> None:
    """Write what an owner has sent of `run` into `flat`."""
    if run.kind == "whole":
        flat[run.start : run.start + run.numel].copy_(_view(message, run.at, run.numel, flat.dtype))
        return
    codes, absmax = sent_codes(message, run, shared, flat.dtype)
    write_values(codes, absmax, run, flat)


def sent_codes(message: Tensor, run: Run, shared: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes int8 [numel] of a run that is not whole, and fp32 the absmax of its rows, its columns or its elements."""
    codes = unpacked(message[run.at : run.at + run.num_bytes], run)
    if run.kind == "shared":
        return codes, _shared(run, shared)
    return codes, _view(message, run.absmax_at, run.num_channels, dtype).float()


def unpacked(codes: Tensor, run: Run) -> Tensor:
    """int8 [numel], a view where codes are sent a byte each."""
    if run.bits == 8:
        return codes.view(torch.int8)
    return unpack(codes, run.numel, PACKED_BLOCK, signed=True, bits=run.bits)


def write_values(codes: Tensor, absmax: Tensor, run: Run, flat: Tensor) -> None:
    """Write what layers find the codes of `run` in into `flat`."""
    flat[run.start : run.start + run.numel].copy_(values_of(codes, absmax, run, flat.dtype))


def values_of(codes: Tensor, absmax: Tensor, run: Run, dtype: torch.dtype) -> Tensor:
    """What layers find the codes of `run` in, [numel] of `dtype`, or fp32."""
    scale = scale_of(absmax, run.bits)
    if run.kind == "shared":
        return _values(codes, absmax, scale)
    codes = codes.view(-1, run.width)
    by_row, by_column = (scale, None) if run.kind == "rows" else (None, scale)
    if dtype == torch.float32:
        broadcast = (-1, 1) if run.kind == "rows" else (1, -1)
        return _values(codes, absmax.view(broadcast), scale.view(broadcast)).view(-1)
    # Absmax comes back from its code by itself: its dtype is coarser than the rounding of fp32.
    return ops.dequantize(codes, by_row, by_column, dtype).view(-1)


def _values(codes: Tensor, absmax: Tensor, scale: Tensor) -> Tensor:
    """fp32 of codes, with absmax itself for the code that it takes."""
    steps = codes.float()
    top = torch.round(divide(absmax.expand_as(scale), scale))
    exact = torch.where(steps.abs() == top, absmax * steps.sign(), steps * scale)
    return torch.where(absmax.isfinite(), exact, torch.nan)


def scale_of(absmax: Tensor, bits: int) -> Tensor:
    """fp32, of channels with this absmax: the layers' own."""
    return symmetric_scale(absmax, symmetric_levels(bits))


def _shared(run: Run, shared: Tensor | None) -> Tensor:
    """fp32 absmax of a shared run: of its row, [1], or of each of its elements."""
    assert shared is not None
    if run.first_column < 0:
        return shared[run.first_channel : run.first_channel + 1]
    columns = torch.arange(run.first_column, run.first_column + run.numel, device=shared.device) % run.width
    return shared[run.first_channel + columns]


def _view(message: Tensor, at: int, count: int, dtype: torch.dtype) -> Tensor:
    return message[at : at + count * dtype.itemsize].view(dtype)
