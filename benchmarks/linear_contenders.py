"""One linear layer by many hands: torch's, torchao's and ours, and its three bare integer products."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from benchmarks import recipes, timing, torchao_float8, torchao_int8
from benchmarks.single_layers import as_in_a_model
from ds_quant import QuantLinear, weights_changed

L = TypeVar("L", bound=nn.Module)


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
    """The package that it comes from, if it is not ours."""
    products: str = ""
    """Those whose operands have 8 bits: what it is capable of."""


FORWARD_ONLY, ALL_THREE = "Y", "Y dX dW"
BASE, OURS = "bf16 nn.Linear", "ds_quant "
CEILING = "raw int8 products"


def contenders(backend: str, device: torch.device) -> list[Contender]:
    """All of them that are for the device, ours with this backend.

    On CUDA every peer is there compiled, and peers that only run there are too.
    """
    ours = {
        "W8A8": recipes.w8a8(backend),
        "W8A8G8": recipes.w8a8g8(backend),
        "W8A8G8, stochastic G": recipes.w8a8g8(backend, rounding="stochastic"),
    }
    if backend == "simulated":
        ours["MXFP8"] = recipes.named_format("mxfp8")
        ours["NVFP4, stochastic G"] = recipes.named_format("nvfp4", rounding="stochastic")
    capable = {name: ALL_THREE if "gradient" in section else FORWARD_ONLY for name, section in ours.items()}
    return [
        Contender("fp32 nn.Linear", lambda o: Layer(_linear(o, torch.float32), o, torch.float32)),
        Contender(BASE, lambda o: Layer(_linear(o), o, torch.bfloat16)),
        *(_on_cuda() if device.type == "cuda" else ()),
        Contender("torchao int8", _torchao(compiled=False), "torchao", ALL_THREE),
        Contender("torchao int8, compiled", _torchao(compiled=True), "torchao", ALL_THREE),
        *(Contender(f"{OURS}{name}", _ours(section), None, capable[name]) for name, section in ours.items()),
    ]


def matched_speed_ups(seconds: dict[str, list[float]], chosen: Sequence[Contender]) -> dict[str, float]:
    """How many times as fast each of ours is as the fastest peer that has the same products in 8 bits, if there is one.

    seconds: of each contender, an entry a round.
    """
    products = {each.name: each.products for each in chosen if each.name in seconds}
    found = {}
    for name in products:
        peers = [peer for peer in products if not peer.startswith(OURS) and products[peer] == products[name]]
        if name.startswith(OURS) and peers:
            fastest = min(peers, key=lambda peer: statistics.median(seconds[peer]))
            found[name] = 1 / timing.ratios({name: seconds[name]} | {fastest: seconds[fastest]}, fastest)[name].p50
    return found


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
        layer = as_in_a_model(QuantLinear(in_features, out_features, **options, config=section))
    return _filled(layer, operands)


def _filled(layer: L, operands: Operands) -> L:
    """With the weight and bias of the operands."""
    with torch.no_grad():
        layer.get_parameter("weight").copy_(operands.weight)
        if operands.bias is not None:
            layer.get_parameter("bias").copy_(operands.bias)
    return layer


def _ours(section: recipes.Section) -> Callable[[Operands], Layer]:
    return lambda operands: Layer(_linear(operands, section=section), operands, torch.bfloat16)


def _on_cuda() -> list[Contender]:
    def float8(recipe: str) -> Callable[[Operands], Layer]:
        def make(operands: Operands) -> Layer:
            layer = torchao_float8.convert_linears_(nn.Sequential(_linear(operands)), recipe)
            return Layer(layer, operands, torch.bfloat16, compiled=True)

        return make

    return [
        Contender(f"{BASE}, compiled", lambda o: Layer(_linear(o), o, torch.bfloat16, compiled=True)),
        *(
            Contender(f"torchao float8 {name}, compiled", float8(name), "torchao", ALL_THREE)
            for name in torchao_float8.RECIPES
        ),
        Contender("bitsandbytes int8", _bitsandbytes, "bitsandbytes", FORWARD_ONLY),
        Contender("Transformer Engine float8", _transformer_engine, "transformer_engine", ALL_THREE),
    ]


def _bitsandbytes(operands: Operands) -> Layer:
    """LLM.int8 with weights that are trained, and without a search for outliers: all features in int8."""
    bnb: Any = importlib.import_module("bitsandbytes")
    out_features, in_features = operands.weight.shape
    layer = bnb.nn.Linear8bitLt(
        in_features, out_features, bias=operands.bias is not None, has_fp16_weights=True, threshold=0.0
    )
    layer = layer.to(device=operands.x.device, dtype=torch.bfloat16)
    return Layer(_filled(layer, operands), operands, torch.bfloat16)


def _transformer_engine(operands: Operands) -> Layer:
    """Its linear layer, in float8 with delayed scaling, which is its default."""
    te: Any = importlib.import_module("transformer_engine.pytorch")
    out_features, in_features = operands.weight.shape
    has_bias = operands.bias is not None
    layer = te.Linear(in_features, out_features, bias=has_bias, params_dtype=torch.bfloat16, device="cuda")

    class InFloat8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            with te.fp8_autocast(enabled=True):
                return self.layer(x)

    _filled(layer, operands)
    return Layer(InFloat8(), operands, torch.bfloat16)


def _torchao(*, compiled: bool) -> Callable[[Operands], Layer]:
    def make(operands: Operands) -> Layer:
        layer = torchao_int8.quantize_linears_(_linear(operands))
        return Layer(layer, operands, torch.bfloat16, compiled=compiled)

    return make
