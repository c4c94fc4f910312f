"""QuantAdamW for the steps that check it: in its formats, and beside the definition from the same state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import contenders
from benchmarks.gpu_check.kernels import by_definition
from ds_quant import QuantAdamW

Moments = tuple[dict[str, Any] | None, dict[str, Any] | None]


def _both(moment: dict[str, Any]) -> Moments:
    return moment, moment


FORMATS: dict[str, Moments] = {
    "float 8": _both({"bits": 8, "map": "float", "block_size": 256}),
    "power 8": _both({"bits": 8, "map": "power", "block_size": 256}),
    "m4v8": ({"bits": 4}, {"bits": 8}),
    "power 4": _both({"bits": 4, "map": "power", "block_size": 128}),
    "dynamic": _both({"bits": 8, "map": "dynamic"}),
}
"""As `exp_avg` and `exp_avg_sq` of the JSON."""

LR, WEIGHT_DECAY = 1e-2, 0.1
_STEPS_BEFORE = 2


def make(name: str, params: list[nn.Parameter]) -> QuantAdamW:
    """QuantAdamW in a format, with weight decay."""
    exp_avg, exp_avg_sq = FORMATS[name]
    return QuantAdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def pair(
    name: str, dtype: torch.dtype, device: torch.device, numels: Sequence[int], *, nonfinite: bool = False
) -> tuple[QuantAdamW, QuantAdamW]:
    """After a step by the kernels that serve, and after the same step by definition, from the same state.

    nonfinite: an Inf and a NaN are among that step's gradients.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(scale: float) -> list[Tensor]:
        return [(torch.randn(numel, generator=generator) * scale).to(device, dtype) for numel in numels]

    start = drawn(1.0)
    optimizers = [make(name, [nn.Parameter(tensor.clone()) for tensor in start]) for _ in range(2)]

    def step(optimizer: QuantAdamW, gradients: list[Tensor]) -> None:
        for param, gradient in zip(parameters(optimizer), gradients, strict=True):
            param.grad = gradient.clone()
        optimizer.step()

    for _ in range(_STEPS_BEFORE):
        gradients = drawn(1e-2)
        for optimizer in optimizers:
            with by_definition():
                step(optimizer, gradients)
    gradients = drawn(1e-2)
    if nonfinite:
        gradients[0][3], gradients[0][-1] = torch.inf, torch.nan
    step(optimizers[0], gradients)
    with by_definition():
        step(optimizers[1], gradients)
    return optimizers[0], optimizers[1]


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def stored(optimizer: QuantAdamW) -> list[Tensor]:
    """Parameters, codes and scales."""
    found: list[Tensor] = [param.detach() for param in parameters(optimizer)]
    return found + moments(optimizer)


def moments(optimizer: QuantAdamW) -> list[Tensor]:
    """Codes and scales of all moments."""
    states = [optimizer.state[param] for param in parameters(optimizer)]
    values = [state[key] for state in states for key in QuantAdamW.STATES]
    return [tensor for value in values for tensor in contenders.stored(value)]
