"""Gradients on the wire, on CUDA devices: the definition of `numerics.wire` under torch.compile. No GPU has run it yet.

The pieces of a call are laid side by side in one flat tensor, whose blocks become the rows of a matrix: all whole
blocks go through one compiled call, all last blocks that are shorter through another, filled up to the block size.
Nothing compiles again for new pieces, keys, factors or numbers of ranks. Each format, dtype and operation compiles at
its first call, once for whole and once for shorter blocks, and again for a lone block: tens of seconds with a rotation.
A sum over ranks lies in fp32 in memory, and takes a call for each `AT_ONCE` messages; `cuda` has a kernel for it.

Results are close to the reference's, not equal: Inductor may fuse products into sums. Its price: temporaries of
several times the tensors' size. Waits for the device only where `errors` lie on the host.

What `ops` checks is not checked again here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_quant.kernels.compiling import compile_whole
from ds_quant.kernels.transfers import sent
from ds_quant.kernels.wire import ops
from ds_quant.kernels.wire.places import Kept, Places, places_of
from ds_quant.kernels.wire.rows import (
    AT_ONCE,
    Settings,
    add_others,
    add_own,
    dequantize_rows,
    quantize_rows,
    total_to_message,
    total_to_output,
)
from ds_quant.numerics.random import derive_many, derive_words
from ds_quant.numerics.wire import Parts, Residuals, WireFormat

AddMessages = Callable[[WireFormat, Places, Tensor, int, int, Tensor], None]


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
    errors: np.ndarray | Tensor | None = None,
) -> None:
    """`numerics.wire.quantize`."""
    call = _compiled(quantize_rows, Settings(fmt, stochastic=key is not None, with_errors=errors is not None))
    kept = places_of(parts, fmt, message.device)
    own = _own(tensors, kept, residuals)
    _send(call, [(*own,)] * len(kept.groups), kept, parts, message, key, residuals, errors)


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
    errors: np.ndarray | Tensor | None = None,
    add: AddMessages | None = None,
) -> None:
    """`numerics.wire.reduce`. `add` stands for `add_messages`."""
    kept = places_of(parts, fmt, received.device)
    totals = _totals(tensors, kept, received, own_rank, fmt, residuals, add or add_messages)
    times = torch.full((), factor, dtype=torch.float32, device=received.device)
    if output is None:
        assert message is not None
        call = _compiled(total_to_message, Settings(fmt, key is not None, errors is not None))
        return _send(call, [(total, times) for total in totals], kept, parts, message, key, residuals, errors)
    call = _compiled(total_to_output, Settings(fmt))
    for places, total in zip(kept.groups, totals, strict=True):
        call(places, total, times, output.data)
    return None


@ops.dequantize.by("compiled")
@torch.no_grad()
def dequantize(message: Tensor, parts: Parts, tensors: Sequence[Tensor], fmt: WireFormat) -> None:
    """`numerics.wire.dequantize`."""
    kept = places_of(parts, fmt, message.device)
    flat = tensors[0].new_empty(kept.numel)
    call = _compiled(dequantize_rows, Settings(fmt))
    for places in kept.groups:
        call(places, message.data, flat)
    torch._foreach_copy_(_slices(tensors, kept), flat.split([numel for _, _, numel in kept.runs]))


def _totals(
    tensors: Sequence[Tensor],
    kept: Kept,
    received: Tensor,
    own_rank: int,
    fmt: WireFormat,
    residuals: Residuals | None,
    add: AddMessages,
) -> list[Tensor]:
    """The sums over the ranks in their order, fp32 [num_rows, block_size], of each group of places."""
    own, plus_own = _own(tensors, kept, residuals), _compiled(add_own, Settings(fmt))
    shapes = [(len(places.piece), fmt.block_size) for places in kept.groups]
    totals = [torch.zeros(shape, device=received.device) for shape in shapes]
    for places, total in zip(kept.groups, totals, strict=True):
        add(fmt, places, received, 0, own_rank, total)
        plus_own(places, *own, total)
        add(fmt, places, received, own_rank, len(received), total)
    return totals


def add_messages(fmt: WireFormat, places: Places, received: Tensor, first: int, last: int, total: Tensor) -> None:
    """Add the values of messages number `first` to `last` - 1 of `received`, in their order, to the rows of `total`.

    received: uint8 [num_messages, message_bytes], contiguous. total: fp32 [num_rows, block_size]; what lies behind the
    end of a short row means nothing.
    """
    plus_others = _compiled(add_others, Settings(fmt))
    number_of = functools.partial(torch.full, (), dtype=torch.int64, device=received.device)
    messages, num_bytes = received.reshape(-1).data, received.shape[1]
    step = number_of(num_bytes)
    for begin in range(first, last, AT_ONCE):
        count = number_of(min(AT_ONCE, last - begin))
        plus_others(places, messages, number_of(begin * num_bytes), step, count, total)


def _send(
    call: Callable,
    given: Sequence[tuple],
    kept: Kept,
    parts: Parts,
    message: Tensor,
    key: tuple[int, int] | None,
    residuals: Residuals | None,
    errors: np.ndarray | Tensor | None,
) -> None:
    """Quantize what is `given` of each group of places, and record the residuals and errors."""
    written = None
    inverse = torch.full((), 1.0 if residuals is None else residuals.inverse, device=message.device)
    if residuals is not None and any(residual is not None for residual in residuals.write):
        written = torch.empty(kept.numel, dtype=torch.bfloat16, device=message.device)
    words = None if key is None else _words(key, parts, message.device)
    sums = [
        call(places, words, *arguments, message.data, written, inverse)
        for places, arguments in zip(kept.groups, given, strict=True)
    ]
    if isinstance(errors, Tensor):
        for found in sums:
            errors += found
    elif errors is not None:
        errors += torch.stack(sums).sum(dim=0).cpu().numpy()
    if written is not None:
        assert residuals is not None
        pairs = zip(residuals.write, written.split(kept.lengths), strict=True)
        wanted = [(to, piece) for to, piece in pairs if to is not None]
        torch._foreach_copy_([to for to, _ in wanted], [piece for _, piece in wanted])


def _words(key: tuple[int, int], parts: Parts, device: torch.device) -> Tensor:
    """The pieces' keys, int64 [2, num_pieces], as many as the columns of their places."""
    if len(parts.stream) == 1:  # a tenth of the time that arrays take
        return sent(np.array([(word, 0) for word in derive_words(key, int(parts.stream[0]))]), device)
    return sent(derive_many(key, parts.stream), device)


def _slices(tensors: Sequence[Tensor], kept: Kept) -> list[Tensor]:
    return [tensors[source][start : start + numel] for source, start, numel in kept.runs]


def _own(
    tensors: Sequence[Tensor], kept: Kept, residuals: Residuals | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The pieces side by side, their residuals, and what these are multiplied with."""
    flat = torch.cat(_slices(tensors, kept))
    if residuals is None or all(residual is None for residual in residuals.read):
        return flat, None, None
    known = [  # -0.0 leaves all as it is, zeros with their signs
        flat.new_full((numel,), -0.0, dtype=torch.bfloat16) if residual is None else residual
        for residual, numel in zip(residuals.read, kept.lengths, strict=True)
    ]
    return flat, torch.cat(known), torch.full((), residuals.scale, device=flat.device)


@functools.cache
def _compiled(function: Callable, settings: Settings, backend: str | Callable = "inductor") -> Callable[..., Any]:
    # Called once, while compiling: what it returns is constant, whereas integers of a closure may become symbols.
    @torch.compiler.assume_constant_result
    def constant() -> Settings:
        return settings

    def call(*arguments: Any) -> Any:
        return function(constant(), *arguments)

    return compile_whole(call, 64, backend)
