"""CPU time of layers, optimizer steps and messages, of whichever ds_quant is imported: a commit beside another.

    PYTHONPATH=CHECKOUT python benchmarks/cpu_calls.py [PART OF A NAME]

It needs nothing but what ds_quant has had since 2026-11-28, and prints the seconds of each call as JSON: the medians of
nine, all calls in turns. Run it for both commits in turns, several times, and compare the runs of a pair.
"""

from __future__ import annotations

import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import ds_quant
from ds_quant.comm import layout
from ds_quant.kernels import wire
from ds_quant.numerics.wire import Residuals, WireFormat

_REPEATS, _SECONDS = 9, 0.01
_RANKS, _BLOCK = 4, 256
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MESSAGES = {
    "8 bits, 4M": (8, "none", False, [2**20] * 4),
    "8 bits, stochastic, error feedback, 4M": (8, "none", True, [2**20] * 4),
    "4 bits, rotated, 4M": (4, "hadamard", False, [2**20] * 4),
    "8 bits, stochastic, error feedback, 148 pieces of 1000": (8, "none", True, [1000] * 148),
}
Call = Callable[[], object]


def layers() -> dict[str, Call]:
    """Forward and backward, with the codes of the weight, as after a step."""
    calls: dict[str, Call] = {}
    for name, dtype in _DTYPES.items():
        for backend in ("int8", "simulated"):
            for rounding in ("nearest", "stochastic"):
                section: dict[str, Any] = {
                    "weight": {"bits": 8, "granularity": "channel"},
                    "activation": {"bits": 8, "granularity": "token"},
                    "gradient": {"bits": 8, "granularity": "outer", "rounding": rounding},
                    "backend": backend,
                }
                for tokens, features in ((512, 768), (16, 16)):
                    module = ds_quant.QuantLinear(features, features, dtype=dtype, config=section)
                    module._forward_pre_hooks.clear()  # they count steps, as a model does once for all of its layers
                    size = f"{tokens} tokens, {features} → {features}"
                    calls[f"{backend}, {rounding}, {name}: {size}"] = _layer(module, tokens, features, dtype)
        calls[f"nn.Linear, {name}: 512 tokens, 768 → 768"] = _layer(nn.Linear(768, 768, dtype=dtype), 512, 768, dtype)
    return calls


def _layer(module: nn.Module, tokens: int, features: int, dtype: torch.dtype) -> Call:
    values, g = torch.randn(tokens, features, dtype=dtype), torch.randn(tokens, features, dtype=dtype)

    def call() -> None:
        module.zero_grad()
        ds_quant.weights_changed()
        module(values.detach().requires_grad_()).backward(g)

    return call


def steps() -> dict[str, Call]:
    """QuantAdamW of one large parameter, and of GPT-2 small's number of small ones."""
    calls: dict[str, Call] = {}
    for bits in (8, 4):
        for sizes in ([2**21], [256] * 148):
            params = [nn.Parameter(torch.randn(size)) for size in sizes]
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer = ds_quant.QuantAdamW(params, exp_avg={"bits": bits}, exp_avg_sq={"bits": bits})
            calls[f"{bits} bits, {len(sizes)} of {sizes[0]:,} elements"] = optimizer.step
    return calls


def messages() -> dict[str, Call]:
    """What a rank does in an all-reduce, without sending."""
    calls: dict[str, Call] = {}
    for name, given in _MESSAGES.items():
        for function, call in _all_reduce(*given).items():
            calls[f"{function}: {name}"] = call
    return calls


def _all_reduce(bits: int, rotation: Any, has_feedback: bool, numels: Sequence[int]) -> dict[str, Call]:
    fmt = WireFormat(bits, _BLOCK, rotation)
    ends = np.cumsum(numels).tolist()
    spans = [layout.Span(f"{end}", 0, 0, end - numel, numel) for end, numel in zip(ends, numels, strict=True)]
    found = layout.build(layout.cut_evenly(spans, fmt, _RANKS), fmt, _RANKS, 0)
    own, *others = found.message_bytes
    tensors = [torch.randn(ends[-1])]
    sent, slot, gathered = (torch.zeros(size, dtype=torch.uint8) for size in (sum(others), own, 4 * found.slot_bytes))
    received: Any = torch.zeros(_RANKS - 1, own, dtype=torch.uint8)
    if "Sequence" in str(inspect.signature(wire.reduce).parameters["received"]):  # until 2026-11-28
        received = list(received.unbind())

    def options(pieces: Sequence[layout.Piece]) -> dict[str, Any]:
        read, write = ([torch.zeros(piece.numel).bfloat16() for piece in pieces] for _ in range(2))
        return {"key": (1, 2), "residuals": Residuals(read, write, 1.0, 1.0)} if has_feedback else {}

    of_sent, of_own = options(found.sent_pieces), options(found.own_pieces)
    return {
        "quantize": lambda: wire.quantize(tensors, found.sent, sent, fmt, **of_sent),
        "reduce": lambda: wire.reduce(tensors, found.own, received, 0, fmt, factor=0.25, message=slot, **of_own),
        "dequantize": lambda: wire.dequantize(gathered, found.gathered, tensors, fmt),
    }


def measure(calls: dict[str, Call]) -> dict[str, float]:
    """Median seconds of CPU time of each, in turns, as many at a time as take a hundredth of a second."""
    many = {}
    for name, call in calls.items():
        for _ in range(3):  # the first ones compile, and fill caches
            call()
        many[name] = max(1, min(50, int(_SECONDS / max(_timed(call, 1), 1e-6))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_REPEATS):
        for name, call in calls.items():
            seconds[name].append(_timed(call, many[name]))
    return {name: statistics.median(found) for name, found in seconds.items()}


def _timed(call: Call, times: int) -> float:
    begin = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - begin) / times


if __name__ == "__main__":
    torch.set_num_threads(1)
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    every = {**layers(), **steps(), **messages()}
    json.dump(measure({name: call for name, call in every.items() if part in name}), sys.stdout, ensure_ascii=False)
