"""One linear layer by many hands: torch's, torchao's and ours, and its three bare integer products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import recipes, torchao_int8
from ds_quant import QuantLinear, weights_changed


class Operands(NamedTuple):
    """What every contender multiplies, fp32: X [tokens, in], W [out, in], the bias [out] or None, G [tokens, out]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor

    @classmethod
    def draw(cls, tokens: int, in_features: int, out_features: int, *, bias: bool, device: torch.device) -> Operands:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        return cls(
            normal(tokens, in_features),
            normal(out_features, in_features) / in_features**0.5,
            normal(out_features) if bias else None,
            normal(tokens, out_features) * 1e-2,
        )


class Layer:
    """A layer that is ready to be called, with an input that requires a gradient."""

    def __init__(self, module: nn.Module, operands: Operands, dtype: torch.dtype, *, compiled: bool = False):
        self.module = module
        self.x = operands.x.to(dtype, copy=True).requires_grad_()
        self.grad = operands.grad.to(dtype)
        self._call = torch.compile(module, dynamic=False) if compiled else module

    def forward(self) -> Tensor:
        return self._call(self.x)

    def forward_backward(self) -> None:
        self.forward().backward(self.grad)

    def clear(self) -> None:
        """Drop all gradients, and make input and weights look new to layers that keep codes of what they have seen."""
        self.module.zero_grad(set_to_none=True)
        self.x = self.x.detach().requires_grad_()
        weights_changed()


class Contender(NamedTuple):
    """A layer, and how it is made for given operands."""

    name: str
    make: Callable[[Operands], Layer]
    needs: str | None = None
    """The package that it comes from, if it is none of ours."""


BASE = "bf16 nn.Linear"
CEILING = "raw int8 products"


def contenders(backend: str) -> list[Contender]:
    """All of them, ours with this backend."""
    ours = {
        "W8A8": recipes.w8a8(backend),
        "W8A8G8": recipes.w8a8g8(backend),
        "W8A8G8, stochastic G": recipes.w8a8g8(backend, rounding="stochastic"),
    }
    return [
        Contender("fp32 nn.Linear", lambda o: Layer(_linear(o, torch.float32), o, torch.float32)),
        Contender(BASE, lambda o: Layer(_linear(o), o, torch.bfloat16)),
        Contender("torchao int8", _torchao(compiled=False), "torchao"),
        Contender("torchao int8, compiled", _torchao(compiled=True), "torchao"),
        *(Contender(f"ds_quant {name}", _ours(section)) for name, section in ours.items()),
    ]


def raw_products(operands: Operands) -> Callable[[], object]:
    """The three integer products alone, on codes that are there: nothing that quantizes can be faster."""
    x, w, g = ((t * (127 / t.abs().max())).round().to(torch.int8) for t in (operands.x, operands.weight, operands.grad))
    # dX and dW multiply different codes of G.
    products = [(x, w.t()), (g, w), (g.clone().t(), x)]
    if x.device.type == "cuda":
        # There the dimension that is summed over has to be the contiguous one.
        products = [(a.contiguous(), b.t().contiguous().t()) for a, b in products]

    def call() -> None:
        for a, b in products:
            torch._int_mm(a, b)

    return call


def _linear(
    operands: Operands, dtype: torch.dtype = torch.bfloat16, section: recipes.Section | None = None
) -> nn.Linear:
    out_features, in_features = operands.weight.shape
    options: dict[str, Any] = {"bias": operands.bias is not None, "device": operands.x.device, "dtype": dtype}
    layer: nn.Linear
    if section is None:
        layer = nn.Linear(in_features, out_features, **options)
    else:
        layer = QuantLinear(in_features, out_features, **options, config=section)
    with torch.no_grad():
        layer.weight.copy_(operands.weight)
        if operands.bias is not None:
            layer.bias.copy_(operands.bias)
    return layer


def _ours(section: recipes.Section) -> Callable[[Operands], Layer]:
    return lambda operands: Layer(_linear(operands, section=section), operands, torch.bfloat16)


def _torchao(*, compiled: bool) -> Callable[[Operands], Layer]:
    def make(operands: Operands) -> Layer:
        layer = torchao_int8.quantize_linears_(_linear(operands))
        return Layer(layer, operands, torch.bfloat16, compiled=compiled)

    return make
