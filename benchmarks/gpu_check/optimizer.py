"""Step 5: QuantAdamW in its formats against the definition, with weight decay; times, flat and of a model's tensors."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import contenders
from benchmarks.device_timing import Timer, launches
from benchmarks.gpu_check import optimizers
from benchmarks.gpu_check.recording import Record
from ds_quant import QuantAdamW
from ds_quant.config import ConfigError

_FORMATS = ("float 8", "m4v8", "power 4", "dynamic")
_DTYPES = (torch.float32, torch.bfloat16)
_FLAT = 124_439_808
_ROUNDS = 5


def run(record: Record) -> None:
    """Closeness first, times after."""
    with record.part("closeness"):
        _closeness(record)
    with record.part("times"):
        _times(record)


def _closeness(record: Record) -> None:
    """As tests/kernels has it: parameters within some roundings of their dtype, few codes next to the definition's."""
    share, parameters_off, nonfinite_off = 0.0, 0, 0
    numels = record.pick((75_000, 50_257, 768), (1000, 37))
    for name in _FORMATS:
        for dtype in _DTYPES:
            got, want = optimizers.pair(name, dtype, record.device, numels)
            off = _parameters_off(got, want, dtype)
            differ = _share_of_codes(got, want)
            parameters_off, share = parameters_off + off, max(share, differ)
            lost = _nonfinite(record, name, dtype, numels)
            nonfinite_off += lost not in ("same", "refused")
            record.row(
                "closeness",
                format=name,
                dtype=str(dtype).removeprefix("torch."),
                parameters_off=off,
                share_of_codes=differ,
                inf_and_nan=lost,
            )
    record.measure("codes_different", share)
    record.measure("parameters_off", parameters_off)
    record.measure("nonfinite_off", nonfinite_off)


def _parameters_off(got: torch.optim.Optimizer, want: torch.optim.Optimizer, dtype: torch.dtype) -> int:
    rtol = 1e-5 if dtype == torch.float32 else 2.0**-7
    pairs = zip(optimizers.parameters(got), optimizers.parameters(want), strict=True)
    close = [torch.isclose(a, b, rtol=rtol, atol=1e-5, equal_nan=True) for a, b in pairs]
    return sum(int((~each).sum()) for each in close)


def _share_of_codes(got: QuantAdamW, want: QuantAdamW) -> float:
    shares = [0.0]
    for a, b in zip(optimizers.moments(got), optimizers.moments(want), strict=True):
        if not a.is_floating_point():
            shares.append(float((a != b).double().mean()))
    return max(shares)


def _nonfinite(record: Record, name: str, dtype: torch.dtype, numels: tuple[int, ...]) -> str:
    """How a step with an Inf and a NaN among its gradients ends, beside the definition's."""
    try:
        got, want = optimizers.pair(name, dtype, record.device, numels, nonfinite=True)
    except (ConfigError, ValueError):
        return "refused"
    return "same" if not _parameters_off(got, want, dtype) else "other parameters"


def gpt2_shapes(hidden: int = 768, vocabulary: int = 50_257, positions: int = 1024) -> list[tuple[int, ...]]:
    """Of GPT-2's 148 parameters."""
    h = hidden
    layer = [(h,), (h,), (h, 3 * h), (3 * h,), (h, h), (h,), (h,), (h,), (h, 4 * h), (4 * h,), (4 * h, h), (h,)]
    return [(vocabulary, h), (positions, h), *(shape for _ in range(12) for shape in layer), (h,), (h,)]


def _times(record: Record) -> None:
    device = record.device
    shapes = gpt2_shapes(*record.pick((), (8, 32, 16)))
    kinds: dict[str, list[tuple[int, ...]]] = {"flat": [(record.pick(_FLAT, 4096),)], f"{len(shapes)} tensors": shapes}
    base: float | None = None
    for kind, sizes in kinds.items():
        for name in ("torch fused", *_FORMATS):
            params = [nn.Parameter(torch.randn(size, device=device)) for size in sizes]
            for param in params:
                param.grad = torch.randn_like(param) * 1e-2
            optimizer: torch.optim.Optimizer
            if name == "torch fused":
                optimizer = torch.optim.AdamW(params, lr=optimizers.LR, fused=True)
            else:
                optimizer = optimizers.make(name, params)
            optimizer.step()
            timed = Timer(optimizer.step, device, graphs=False).measure(_ROUNDS)
            base = timed.device if name == "torch fused" else base
            assert base is not None
            number = sum(launches(optimizer.step, device).values())
            record.row(
                "times",
                parameters=kind,
                optimizer=name,
                device_ms=timed.device * 1e3,
                host_ms=timed.host * 1e3,
                launches=number,
                times_as_fast_as_fused=base / timed.device,
                state_bytes_per_parameter=contenders.state_bytes(optimizer) / sum(p.numel() for p in params),
            )
            if kind != "flat" and name == "float 8":
                record.measure("launches_148", number)
            del params, optimizer
