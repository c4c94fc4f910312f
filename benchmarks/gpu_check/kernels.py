"""Step 3: quantizers, random keys and the wire against their definitions; how long they compile, and host times."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.device_timing import synchronize
from benchmarks.gpu_check.recording import Record
from ds_quant import comm
from ds_quant.comm.layout import Layout, Span, build, cut_each
from ds_quant.kernels import wire
from ds_quant.kernels.choice import REFERENCE, VARIABLE
from ds_quant.kernels.int8 import ops
from ds_quant.kernels.wire import WireFormat
from ds_quant.numerics.integer import symmetric_levels
from ds_quant.numerics.random import derive_key, derive_words, fold_key, fold_words

_LEVELS, _FULL = symmetric_levels(8), symmetric_levels(8, full_range=True)
_SHAPES = ((2048, 3072), (1021, 768), (333, 1001))
_SMALL_SHAPES = ((33, 40),)
_FORMATS = (WireFormat(8, 256), WireFormat(4, 128), WireFormat(4, 128, "hadamard"), WireFormat(4, 16, format="nvfp4"))
_WORLDS = (8, 64)
"""Ranks whose first reductions are timed. A compilation that unrolls ranks takes some 12 s and 60 s for them."""
_ALL_REDUCED = 124_000_000


def run(record: Record) -> None:
    """All of it; what compiles longest comes last."""
    with record.part("quantizers"):
        _quantizers(record)
    with record.part("keys"):
        _keys(record)
    with record.part("wire"):
        _wire(record)
    with record.part("host time"):
        _host_time(record)
    with record.part("compilation"):
        _compilation(record)


@contextmanager
def by_definition() -> Iterator[None]:
    """Within it, all families run their definitions in `numerics`, on the tensors' own device."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = REFERENCE
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def differences(got: Sequence[Tensor], want: Sequence[Tensor]) -> int:
    """Elements that are not equal; any NaN is as good as another, and -0 as 0."""
    pairs = zip(got, want, strict=True)
    return sum(int(((a != b) & ~((a != a) & (b != b))).sum()) for a, b in pairs)


def _matrix(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(shape, device=device) * torch.logspace(-3, 3, shape[0], device=device)[:, None]
    x[1] = 0.0
    x[2, 3], x[4, 5] = torch.inf, torch.nan
    return x.to(dtype)


def _quantizers(record: Record) -> None:
    device, total = record.device, 0
    keys = fold_key(1, device=device), fold_key(2, step=3, device=device)
    for shape in record.pick(_SHAPES, _SMALL_SHAPES):
        for dtype in (torch.bfloat16, torch.float32):
            x = _matrix(shape, dtype, device)
            column_scale, row_scale = (torch.rand(n, device=device) + 0.1 for n in reversed(shape))
            for rounding, (first, second) in {"nearest": (None, None), "stochastic": keys}.items():
                calls: dict[str, Callable[[], Any]] = {
                    "rows": partial(ops.quantize_rows, x, _LEVELS, None, first),
                    "full rows": partial(ops.quantize_rows, x, _FULL, None, first),
                    "columns": partial(ops.quantize_columns, x, _LEVELS, None, second),
                    "both": partial(ops.quantize_both, x, _LEVELS, column_scale, row_scale, first, second),
                    "tensor": partial(ops.quantize_tensor, x, _LEVELS, first),
                    **_padded_calls(x, column_scale, row_scale, first),
                }
                for name, call in calls.items():
                    begin = time.perf_counter()
                    got = call()
                    synchronize(device)
                    seconds = time.perf_counter() - begin
                    with by_definition():
                        off = differences(got, call())
                    total += off
                    record.row(
                        "quantizers",
                        what=name,
                        shape=f"{shape[0]}x{shape[1]}",
                        dtype=str(dtype).removeprefix("torch."),
                        rounding=rounding,
                        differences=off,
                        first_call_s=seconds,
                    )
    record.measure("quantizer_differences", total)


def _padded_calls(x: Tensor, column_scale: Tensor, row_scale: Tensor, key: Tensor | None) -> dict[str, Callable]:
    """What layers call on GPUs: codes in both ways, padded."""
    gradient = (x, _LEVELS, column_scale, row_scale, key, 3, 2**33 + 1)
    return {
        "operand, rows": partial(ops.quantize_operand, x, _LEVELS, "row", column_scale, key, 2**33 + 1),
        "operand, full rows": partial(ops.quantize_operand, x, _FULL, "row", None, key, 1),
        "operand, columns": partial(ops.quantize_operand, x, _LEVELS, "column", row_scale, key, 1, "turned"),
        "operand, tensor": partial(ops.quantize_operand, x, _LEVELS, "tensor", None, key, 1),
        "gradient": partial(ops.quantize_gradient, *gradient, False),
        # The sums of the bias are added in another order, and compared in the layers.
        "gradient with sums": lambda: ops.quantize_gradient(*gradient, True)[:4],
    }


def _keys(record: Record) -> None:
    words = fold_words(7, 8, 9, 1, 2)
    on_device = fold_key(7, 8, 9, 1, 2, device=record.device)
    streams = (0, 1, 2**33)
    wrong = sum(tuple(derive_key(on_device, stream).tolist()) != derive_words(words, stream) for stream in streams)
    record.measure("key_differences", wrong)


def _layout(numels: Sequence[int], fmt: WireFormat, world_size: int) -> Layout:
    spans = [Span("", 0, number, 0, numel) for number, numel in enumerate(numels)]
    return build(cut_each(spans, world_size), fmt, world_size, 0)


def _message(layout: Layout, tensors: list[Tensor]) -> Tensor:
    message = torch.zeros(sum(layout.send_splits), dtype=torch.uint8, device=tensors[0].device)
    wire.quantize(tensors, layout.sent, message, layout.fmt, key=(1, 2))
    return message


def _reduced(layout: Layout, tensors: list[Tensor], received: Tensor) -> Tensor:
    output = torch.empty(layout.own_numel, device=received.device)
    wire.reduce(tensors, layout.own, received, layout.rank, layout.fmt, factor=1 / layout.world_size, output=output)
    return output


def _received(layout: Layout, device: torch.device) -> Tensor:
    """Messages of the other ranks, by the definition: they have the same places in theirs."""
    ends = [0] * (max(piece.source for piece in layout.own_pieces) + 1)
    for piece in layout.own_pieces:
        ends[piece.source] = max(ends[piece.source], piece.start + piece.numel)
    rows = torch.zeros(layout.world_size - 1, layout.own_bytes, dtype=torch.uint8, device=device)
    for row in rows:
        with by_definition():
            wire.quantize([torch.randn(end, device=device) for end in ends], layout.own, row, layout.fmt)
    return rows


def _wire(record: Record) -> None:
    device, world_size = record.device, 8
    numels = record.pick((4_000_000, 50_257, 768, 1, 333), (5000, 257, 64, 1, 333))
    tensors = [torch.randn(numel, device=device) for numel in numels]
    share = roundings = 0.0
    for fmt in _FORMATS:
        layout = _layout(numels, fmt, world_size)
        received = _received(layout, device)
        with by_definition():
            want_message, want = _message(layout, tensors), _reduced(layout, tensors, received)
        got_message, got = _message(layout, tensors), _reduced(layout, tensors, received)
        own_share = float((got_message != want_message).double().mean())
        error = float((got - want).double().norm() / want.double().norm()) / ((world_size + 2) * 2.0**-24)
        share, roundings = max(share, own_share), max(roundings, error)
        record.row("wire", format=str(tuple(fmt)), share_of_bytes_different=own_share, sum_error_in_roundings=error)
    record.measure("wire_share_different", share)
    record.measure("wire_sum_roundings", roundings)


def _host_time(record: Record) -> None:
    """Of an all-reduce among ranks that are not there: nothing travels, all else is done."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        numel = record.pick(_ALL_REDUCED, 100_000)
        tensor = torch.randn(numel, device=record.device)
        seconds = []
        for _ in range(7):
            synchronize(record.device)
            begin = time.perf_counter()
            comm.all_reduce(tensor)
            seconds.append(time.perf_counter() - begin)
        synchronize(record.device)
        for number, value in enumerate(seconds):
            record.row("host time of an all-reduce", elements=numel, call=number + 1, ms=value * 1e3)
        # The first compile, and fill the pools of buffers.
        record.measure("wire_host_ms", statistics.median(seconds[2:]) * 1e3)
    finally:
        dist.destroy_process_group()


def _compilation(record: Record) -> None:
    fmt, firsts = WireFormat(8, 64), []
    for world_size in record.pick(_WORLDS, (2, 3)):
        numels = (64 * world_size * 4,)
        layout = _layout(numels, fmt, world_size)
        received = _received(layout, record.device)
        tensors = [torch.randn(numel, device=record.device) for numel in numels]
        synchronize(record.device)
        begin = time.perf_counter()
        _reduced(layout, tensors, received)
        synchronize(record.device)
        firsts.append(time.perf_counter() - begin)
        record.row("first reduction", ranks=world_size, s=firsts[-1])
    record.measure("wire_compile_growth", firsts[1] / firsts[0])
