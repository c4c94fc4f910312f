"""Products of a model's linear layers with operands that are changed, measured or quantized on their way."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_quant.linear.convert import linear_modules
from ds_quant.numerics import fake_quantize
from studying.arms import Operands


@dataclass(frozen=True)
class Rounded:
    """One quantizer: of weights or activations, to nearest, symmetric."""

    operand: str
    """`weight` or `activation`."""
    granularity: str
    """`tensor`, or `row`: a weight's channels, an activation's tokens."""
    bits: int = 4


@dataclass
class Outliers:
    """Of the operands of one kind in all layers: mean over layers of what stands out."""

    peaks: list[float] = field(default_factory=list)
    """Largest magnitude over RMS, mean over the rows of an operand."""
    kurtoses: list[float] = field(default_factory=list)
    """Fourth moment about the mean over the squared variance, of all of an operand's elements; 3 where Gaussian."""

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """x [..., features]. Rows of zeros have no peak."""
        rows = x.detach().flatten(0, -2).float()
        rms = rows.square().mean(-1).sqrt()
        there = rms > 0
        self.peaks.append(float((rows.abs().amax(-1)[there] / rms[there]).mean()))
        centred = rows.double() - rows.double().mean()
        self.kurtoses.append(float(centred.pow(4).mean() / centred.square().mean().square()))

    @property
    def peak(self) -> float:
        return statistics.fmean(self.peaks)

    @property
    def kurtosis(self) -> float:
        return statistics.fmean(self.kurtoses)


@contextmanager
def products(
    model: nn.Module,
    operands: Operands | None = None,
    rounded: Rounded | None = None,
    seen: dict[str, Outliers] | None = None,
) -> Iterator[None]:
    """Within it every nn.Linear of `model` multiplies what `operands` makes of its operands, quantized by `rounded`.

    `seen` gets the outliers of what is multiplied, before it is quantized, as `weight` and `activation`.
    """
    layers = [layer for layer in linear_modules(model).values() if isinstance(layer, nn.Linear)]
    for layer in layers:
        layer.forward = functools.partial(_product, layer, operands, rounded, seen)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _product(
    layer: nn.Linear,
    operands: Operands | None,
    rounded: Rounded | None,
    seen: dict[str, Outliers] | None,
    x: Tensor,
) -> Tensor:
    weight: Tensor = layer.weight
    if operands is not None:
        x, weight = operands(x, weight)
    if seen is not None:
        seen["weight"].see(weight)
        seen["activation"].see(x)
    if rounded is not None and rounded.operand == "weight":
        weight = fake_quantize(weight, rounded.bits, granularity=rounded.granularity)
    if rounded is not None and rounded.operand == "activation":
        x = fake_quantize(x, rounded.bits, granularity=rounded.granularity)
    return F.linear(x, weight, layer.bias)
