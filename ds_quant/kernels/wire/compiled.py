"""Gradients on the wire, on CUDA devices: the definition of `numerics.wire` under torch.compile. No GPU has run it yet.

The pieces of a call are laid side by side in one flat tensor, whose blocks become the rows of a matrix: all whole
blocks go through one compiled call, all last blocks that are shorter through another, filled up to the block size.
Nothing compiles again for new pieces, keys or factors. Each format, dtype, operation and number of ranks compiles at
its first call, once for whole and once for shorter blocks, and again for a lone block: tens of seconds with a rotation.

Results are close to the reference's, not equal: Inductor may fuse products into sums. Its price: temporaries of
several times the tensors' size, and where `errors` is given, waiting for the device.

What `ops` checks is not checked again here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_quant.kernels.compiling import compile_whole
from ds_quant.kernels.wire import ops
from ds_quant.kernels.wire.rows import (
    Rows,
    Settings,
    dequantize_rows,
    quantize_rows,
    reduce_to_message,
    reduce_to_output,
)
from ds_quant.numerics.random import derive_words
from ds_quant.numerics.wire import Parts, Residuals, WireFormat


@ops.quantize.by("compiled")
@torch.no_grad()
def quantize(
    tensors: Sequence[Tensor],
    parts: Parts,
    message: Tensor,
    fmt: WireFormat,
    *,
    key: tuple[int, int] | None = None,
    residuals: Residuals | None = None,
    errors: np.ndarray | None = None,
) -> None:
    """`numerics.wire.quantize`."""
    settings = Settings(fmt, stochastic=key is not None, with_errors=errors is not None)
    call = _compiled(quantize_rows, settings)
    _send(call, (), tensors, parts, message, fmt, key, residuals, errors)


@ops.reduce.by("compiled")
@torch.no_grad()
def reduce(
    tensors: Sequence[Tensor],
    parts: Parts,
    received: Tensor,
    own_rank: int,
    fmt: WireFormat,
    *,
    factor: float = 1.0,
    output: Tensor | None = None,
    message: Tensor | None = None,
    key: tuple[int, int] | None = None,
    residuals: Residuals | None = None,
    errors: np.ndarray | None = None,
) -> None:
    """`numerics.wire.reduce`."""
    others = tuple(row.data for row in received.unbind())
    sum_of = (others, torch.tensor(factor, dtype=torch.float32, device=received.device))
    if output is None:
        assert message is not None
        settings = Settings(fmt, own_rank, key is not None, errors is not None)
        call = _compiled(reduce_to_message, settings)
        return _send(call, sum_of, tensors, parts, message, fmt, key, residuals, errors)
    own = _own(tensors, parts, residuals)
    call = _compiled(reduce_to_output, Settings(fmt, own_rank))
    for rows in _rows(parts, fmt, None, output.device):
        call(rows, *own, *sum_of, output.data)
    return None


@ops.dequantize.by("compiled")
@torch.no_grad()
def dequantize(message: Tensor, parts: Parts, tensors: Sequence[Tensor], fmt: WireFormat) -> None:
    """`numerics.wire.dequantize`."""
    flat = tensors[0].new_empty(int(parts.numel.sum()))
    call = _compiled(dequantize_rows, Settings(fmt))
    for rows in _rows(parts, fmt, None, flat.device):
        call(rows, message.data, flat)
    torch._foreach_copy_(_slices(tensors, parts), flat.split(parts.numel.tolist()))


def _send(
    call: Callable,
    sum_of: tuple,
    tensors: Sequence[Tensor],
    parts: Parts,
    message: Tensor,
    fmt: WireFormat,
    key: tuple[int, int] | None,
    residuals: Residuals | None,
    errors: np.ndarray | None,
) -> None:
    own = _own(tensors, parts, residuals)
    written = None
    inverse = torch.ones((), device=message.device)
    if residuals is not None:
        inverse.fill_(residuals.inverse)
        if any(residual is not None for residual in residuals.write):
            written = torch.empty_like(own[0], dtype=torch.bfloat16)
    sums = [
        call(rows, *own, *sum_of, message.data, written, inverse) for rows in _rows(parts, fmt, key, message.device)
    ]
    if errors is not None:
        errors += torch.stack(sums).sum(dim=0).cpu().numpy()
    if written is not None:
        assert residuals is not None
        pairs = zip(residuals.write, written.split(parts.numel.tolist()), strict=True)
        kept = [(to, piece) for to, piece in pairs if to is not None]
        torch._foreach_copy_([to for to, _ in kept], [piece for _, piece in kept])


def _slices(tensors: Sequence[Tensor], parts: Parts) -> list[Tensor]:
    places = zip(parts.source.tolist(), parts.start.tolist(), parts.numel.tolist(), strict=True)
    return [tensors[source][start : start + numel] for source, start, numel in places]


def _own(
    tensors: Sequence[Tensor], parts: Parts, residuals: Residuals | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The pieces side by side, their residuals, and what these are multiplied with."""
    flat = torch.cat(_slices(tensors, parts))
    if residuals is None or all(residual is None for residual in residuals.read):
        return flat, None, None
    known = [  # -0.0 leaves all as it is, zeros with their signs
        flat.new_full((numel,), -0.0, dtype=torch.bfloat16) if residual is None else residual
        for residual, numel in zip(residuals.read, parts.numel.tolist(), strict=True)
    ]
    return flat, torch.cat(known), torch.full((), residuals.scale, device=flat.device)


def _rows(parts: Parts, fmt: WireFormat, key: tuple[int, int] | None, device: torch.device) -> list[Rows]:
    """The whole blocks of a call, and the shorter ones; without those that are none."""
    begin = np.cumsum(parts.numel) - parts.numel
    words = np.zeros((len(begin), 2), dtype=np.int64)
    if key is not None:
        words[:] = [derive_words(key, stream) for stream in parts.stream.tolist()]
    num_whole, tail = np.divmod(parts.numel, fmt.block_size)
    groups = []
    for repeats in (num_whole, (tail > 0).astype(np.int64)):
        piece = np.repeat(np.arange(len(begin)), repeats)
        if not len(piece):
            continue
        number = np.arange(len(piece)) - (np.cumsum(repeats) - repeats)[piece]
        if repeats is not num_whole:
            number = num_whole[piece]
        first = number * fmt.block_size
        columns = np.stack(
            (
                *(begin[piece] + first, parts.scale_at[piece] + 4 * number),
                *(parts.codes_at[piece] + first * fmt.bits // 8, tail[piece], first),
                *(words[piece, 0], words[piece, 1]),
            )
        )
        sent = torch.from_numpy(columns)
        sent = (sent.pin_memory() if device.type == "cuda" else sent).to(device, non_blocking=True).unsqueeze(-1)
        element, scale_at, codes_at, length, first_at = (column.data for column in sent[:5].unbind())
        is_short = repeats is not num_whole
        subkey = None if key is None else sent[5:].data
        groups.append(Rows(element, scale_at, codes_at, length if is_short else None, first_at, subkey))
    return groups


@functools.cache
def _compiled(function: Callable, settings: Settings, backend: str | Callable = "inductor") -> Callable[..., Any]:
    # Called once, while compiling: what it returns is constant, whereas integers of a closure may become symbols.
    @torch.compiler.assume_constant_result
    def constant() -> Settings:
        return settings

    def call(*arguments: Any) -> Any:
        return function(constant(), *arguments)

    return compile_whole(call, 64, backend)
