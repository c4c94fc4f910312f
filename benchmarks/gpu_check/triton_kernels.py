"""Step 4: Triton's GEMM and AdamW against their definitions, bit for bit, and the GEMM's rate by layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.device_timing import Timer
from benchmarks.gpu_check import optimizers
from benchmarks.gpu_check.int_mm import drawn_codes, exact_products, laid_out
from benchmarks.gpu_check.kernels import differences
from benchmarks.gpu_check.recording import Record
from ds_quant.kernels.adamw.ops import adamw_
from ds_quant.kernels.choice import VARIABLE
from ds_quant.kernels.int8 import ops
from ds_quant.numerics import products

_LARGE = (4096, 4096, 4096)
_SIZES = (_LARGE, (2048, 768, 3072), (1021, 769, 1003), (17, 33, 50257))
_SMALL = ((33, 40, 50), (17, 16, 24))
_LAYOUTS = ("TN", "NN", "NT", "TT")
_ROUNDS = 3
_FORMATS = ("power 8", "power 4", "m4v8")


def run(record: Record) -> None:
    """Both kernels, as DS_QUANT_KERNELS=triton chooses them; on a CPU, which they do not serve, what serves there."""
    with by_triton():
        record.row("kernels", operation="scaled_matmul", served_by=ops.scaled_matmul.implementation(record.device))
        record.row("kernels", operation="adamw_", served_by=adamw_.implementation(record.device))
        with record.part("GEMM"):
            _gemm(record)
        with record.part("AdamW"):
            _adamw(record)


@contextmanager
def by_triton() -> Iterator[None]:
    """Within it Triton's kernels serve, where there are any for the device."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "triton"
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def _gemm(record: Record) -> None:
    device, total, tn_tops = record.device, 0, None
    for m, k, n in record.pick(_SIZES, _SMALL):
        left, right = drawn_codes(m, k, n, device)
        row_scale, column_scale = (torch.rand(size, device=device) + 0.1 for size in (m, n))
        bias = torch.randn(n, device=device).bfloat16()
        want = products.epilogue(
            exact_products(left, right), row_scale=row_scale, column_scale=column_scale, bias=bias, dtype=torch.bfloat16
        )
        for layout in _LAYOUTS:
            a, b = laid_out(left, right, layout)

            def call(a: Tensor = a, b: Tensor = b) -> Tensor:
                return ops.scaled_matmul(a, b, row_scale, column_scale, bias, torch.bfloat16)  # noqa: B023

            off = differences([call()], [want])
            total += off
            timed = Timer(call, device, iterations=5).measure(_ROUNDS)
            tops = 2 * m * k * n / timed.device / 1e12
            if layout == "TN" and (record.dry_run or (m, k, n) == _LARGE):
                tn_tops = tops
            record.row(
                "GEMM",
                layout=layout,
                m=m,
                k=k,
                n=n,
                differences=off,
                tops=tops,
                host_us=timed.host * 1e6,
                timed_by=timed.how,
            )
    record.measure("gemm_differences", total)
    if tn_tops is not None:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
            record.not_measured("gemm_tn_tops", "predictions are for compute capability 9.0")
        else:
            record.measure("gemm_tn_tops", tn_tops)


def _adamw(record: Record) -> None:
    total = 0
    for name in _FORMATS:
        got, want = optimizers.pair(name, torch.float32, record.device, record.pick((75_000, 768), (1000, 37)))
        off = differences(optimizers.stored(got), optimizers.stored(want))
        total += off
        record.row("AdamW", format=name, differences=off)
    record.measure("adamw_differences", total)
