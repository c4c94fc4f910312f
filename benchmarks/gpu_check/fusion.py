"""Step 6: RMSNorm and the int8 codes of its output, fused as compiled layers do it, beside the operator."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.device_timing import Timer
from benchmarks.generated import QUANTIZERS
from benchmarks.gpu_check.recording import Record

_ROUNDS = 5


def run(record: Record) -> None:
    """Times of both, in bf16; `fused_codes` is how many times as fast the fused one is."""
    tokens, features = record.pick((8192, 2048), (32, 48))
    x = torch.randn(tokens, features, device=record.device, dtype=torch.bfloat16)
    weight = torch.rand(features, device=record.device, dtype=torch.bfloat16)
    seconds = []
    for name, quantize in QUANTIZERS.items():
        compiled = torch.compile(
            functools.partial(_norm_and_codes, quantize),
            fullgraph=True,
            backend="eager" if record.dry_run else "inductor",
        )
        timer = Timer(functools.partial(compiled, x, weight), record.device, iterations=20)
        seconds.append(timer.measure(_ROUNDS).device)
        size = f"{tokens} x {features}"
        record.row("a norm and codes of its output", size=size, codes=name, us=seconds[-1] * 1e6)
    record.measure("fused_codes", seconds[0] / seconds[1])


def _norm_and_codes(quantize: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return quantize(torch.nn.functional.rms_norm(x, x.shape[-1:], weight))
