"""A part of step 6: products of fp8 on tensor cores, exact where all hardware is, and how fast."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks.device_timing import Timer
from benchmarks.gpu_check.recording import Record
from ds_quant import QuantLinear
from ds_quant.kernels.fp8 import ops
from ds_quant.kernels.fp8_units import PAIRS, fp8_units

# M, K, N: sums of so many products of -1, 0 and 1 take 10 bits, of which Hopper's tensor cores keep more.
_SIZES = ((1021, 1000, 3072), (333, 768, 1001), (16, 16, 16))
_SMALL = ((33, 40, 50), (1, 16, 3))
_SECTION = {
    "weight": {"format": "fp8_e4m3"},
    "activation": {"format": "fp8_e4m3"},
    "gradient": {"format": "fp8_e5m2"},
    "backend": "fp8",
}
_ROUNDS = 5


def run(record: Record) -> None:
    """Numbers, then times of the products and of a layer."""
    units = fp8_units(record.device)
    record.row("fp8", units=units.line(), scales_applied=str(units.scaled))
    if not any(units.multiplies(*pair) for pair in PAIRS):
        record.not_measured("fp8_differences", units.line())
        return
    record.measure("fp8_differences", sum(_differences(record, *sizes) for sizes in record.pick(_SIZES, _SMALL)))
    _times(record)


def _differences(record: Record, m: int, k: int, n: int) -> int:
    """Results other than exact, of whole numbers with scales that are powers of two, in every layout."""
    left, right = (torch.randint(-1, 2, shape, device=record.device).float() for shape in ((m, k), (n, k)))
    rows, columns = (2.0 ** torch.randint(-3, 4, (count,), device=record.device) for count in (m, n))
    one = torch.full((1,), 0.5, device=record.device)
    bias = torch.randint(-3, 4, (n,), device=record.device).bfloat16()
    sums = left.double() @ right.double().t()
    found = 0
    for pair in PAIRS:
        a, b = left.to(pair[0]), right.to(pair[1])
        for by_row, by_column in ((rows, columns), (rows, None), (one, one)):
            want = sums * by_row.double().reshape(-1, 1) + 0.0
            want = want if by_column is None else want * by_column.double().reshape(1, -1)
            for dtype in (torch.float32, torch.bfloat16):
                exact = (want + bias.double()).float().to(dtype)
                wrong = 0
                for operands in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
                    wrong += int((ops.fp8_matmul(*operands, by_row, by_column, bias, dtype) != exact).sum())
                found += wrong
                names = " x ".join(str(each).removeprefix("torch.float8_") for each in pair)
                scales = "one" if by_row is one else "rows" if by_column is None else "rows and columns"
                record.row("fp8 products", what=names, m=m, k=k, n=n, scales=scales, dtype=str(dtype), wrong=wrong)
    return found


def _times(record: Record) -> None:
    features, tokens = record.pick((4096, 8192), (64, 32))
    matrices = [torch.randn(count, features, device=record.device).bfloat16() for count in (tokens, features)]
    a, b = (matrix.to(torch.float8_e4m3fn) for matrix in matrices)
    rows, columns = (torch.rand(count, device=record.device) for count in (tokens, features))
    x, grad = (torch.randn(tokens, features, device=record.device).bfloat16() for _ in range(2))
    x.requires_grad_()
    layers = {
        "bf16 layer": torch.nn.Linear(features, features, bias=False, device=record.device).bfloat16(),
        "fp8 layer": QuantLinear(features, features, bias=False, device=record.device, config=_SECTION).bfloat16(),
    }
    calls: dict[str, Callable[[], object]] = {
        "bf16 product": lambda: torch.mm(matrices[0], matrices[1].t()),
        "fp8 product": lambda: ops.fp8_matmul(a, b, rows, columns, None, torch.bfloat16),
        **{name: functools.partial(_forward_backward, layer, x, grad) for name, layer in layers.items()},
    }
    for name, call in calls.items():
        timed = Timer(call, record.device, iterations=5).measure(_ROUNDS)
        record.row("fp8, times", what=name, features=features, tokens=tokens, device_us=timed.device * 1e6)


def _forward_backward(layer: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
    torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)
