"""Quantized against unquantized weight gradients, layer by layer on the same batch (arXiv 2407.11722's analysis).

The exact one is dW = G^T X in fp32 of what the layer got. The quantized one is what the layer's own quantizers make of
the same G and X, in fp32 too, so that the difference is theirs alone; then, where asked for, what the wire makes of it.
"""

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.base.patterns import check_patterns
from ds_quant.comm.reducer import wire_format
from ds_quant.config import GradientCommunicationConfig, GradientConfig, LinearConfig
from ds_quant.diagnostics.measurement import Measurement, Row
from ds_quant.diagnostics.recorder import Recorder, is_transposed, zeros
from ds_quant.linear import fused_outputs, outlier_channels, token_means
from ds_quant.linear.fused_outputs import parts_of
from ds_quant.linear.modules import QuantizedModule, describe
from ds_quant.linear.recipe import STREAM_ACTIVATION, STREAM_GRAD_WEIGHT, Plan, Quantizer, plan_of
from ds_quant.linear.rotated import rotate_operand, rotation_of
from ds_quant.linear.shapes import out_features
from ds_quant.numerics import wire
from ds_quant.numerics.integer import Quantized, dequantize, integer_values
from ds_quant.numerics.random import fold_key, fold_words

_SUMS = ("dot", "exact_square", "quantized_square", "error_square", "error_abs", "exact_abs", "calls")


def quantized_weight_gradient(x: Tensor, grad_output: Tensor, plan: Plan, key: Tensor | None = None) -> Tensor:
    """dW [out, in] in fp32 of x [tokens, in] and G [tokens, out], both seen as the layer of `plan` sees them.

    key: for quantizers that round stochastically.
    """
    x, x_mean = token_means.split(x, None if plan.original_operands else plan.activation)
    centred, _ = token_means.split(grad_output, plan.grad_weight)
    found = _product_of_quantized(x, centred, plan, key)
    return found if x_mean is None else found + token_means.outer(grad_output, x_mean, transposed=False)


def _product_of_quantized(x: Tensor, grad_output: Tensor, plan: Plan, key: Tensor | None) -> Tensor:
    if rotation := rotation_of(plan, "dW", key, x.device):
        sides = (
            (grad_output, plan.grad_weight, plan.stream + STREAM_GRAD_WEIGHT),
            (x, None if plan.original_operands else plan.activation, plan.stream + STREAM_ACTIVATION),
        )
        found = [rotate_operand(t.t(), q, key, stream, rotation) for t, q, stream in sides]
        a, b = (each.float() if isinstance(each, Tensor) else dequantize(each) for each in found)
        return torch.mm(a, b.t())
    operand: Tensor | Quantized = x
    if plan.activation and not plan.original_operands:
        operand = _input(x, plan.activation, key, plan.stream + STREAM_ACTIVATION)
    g, folds = grad_output.float(), False
    if plan.grad_weight:
        folds = plan.grad_weight.fold and isinstance(operand, Quantized)
        if folds:
            assert isinstance(operand, Quantized)
            g = g * operand.scale.reshape(-1, 1)
        stream = plan.stream + STREAM_GRAD_WEIGHT
        if plan.grad_weight.parts > 1:
            g = fused_outputs.quantize(g, plan.grad_weight, key, stream).dense(torch.float32)
        else:
            turned = plan.grad_weight.turned  # blocks of consecutive tokens
            g = dequantize(plan.grad_weight(g.t() if turned else g, key, stream))
            g = g.t() if turned else g
    if isinstance(operand, Quantized):
        operand = integer_values(operand) if folds else dequantize(operand)
    return torch.mm(g.t(), operand.float())


def _input(x: Tensor, quantizer: Quantizer, key: Tensor | None, stream: int) -> Tensor | Quantized:
    if quantizer.outlier_share:
        return outlier_channels.quantize(x, quantizer, key, stream).dense(torch.float32)
    return quantizer(x, key, stream)


def through_wire(grad: Tensor, config: GradientCommunicationConfig, key: tuple[int, int] | None = None) -> Tensor:
    """`grad` of any shape, fp32, as another rank reads it: quantized from its first element on and dequantized.

    key: two words for stochastic rounding. Error feedback carries over from step to step and is not in here.
    """
    fmt = wire_format(config)
    flat = grad.detach().float().reshape(-1).clone()
    scales = wire.scale_bytes(flat.numel(), fmt)
    numbers = {"source": 0, "start": 0, "numel": flat.numel(), "scale_at": 0, "codes_at": scales}
    parts = wire.Parts(**{name: np.array([value]) for name, value in numbers.items()}, stream=np.zeros(1, np.uint64))
    message = torch.empty(scales + wire.code_bytes(flat.numel(), fmt), dtype=torch.uint8, device=flat.device)
    wire.quantize([flat], parts, message, fmt, key=key)
    wire.dequantize(message, parts, [flat], fmt)
    return flat.reshape(grad.shape)


class GradientError(NamedTuple):
    """How a quantized gradient differs from the exact one."""

    cosine: float
    """Of the angle between them: 1 where they point the same way."""
    relative_l2: float
    """|quantized - exact| / |exact|, Euclidean."""
    relative_l1: float
    """sum |quantized - exact| / sum |exact|."""
    norm_ratio: float
    """|quantized| / |exact|."""


def error_sums(exact: Tensor, quantized: Tensor) -> Tensor:
    """What `gradient_error` needs of two gradients of one shape, and which adds up over batches: fp64 of shape (7,)."""
    a, b = exact.double(), quantized.double()
    error = b - a
    calls = torch.ones((), dtype=torch.float64, device=a.device)
    return torch.stack(
        [
            (a * b).sum(),
            a.square().sum(),
            b.square().sum(),
            error.square().sum(),
            error.abs().sum(),
            a.abs().sum(),
            calls,
        ]
    )


def gradient_error(sums: Tensor) -> GradientError:
    """From what `error_sums` gave; NaN where the exact gradient is zero."""
    found = dict(zip(_SUMS, sums.tolist(), strict=True))
    if not found["exact_square"]:
        return GradientError(math.nan, math.nan, math.nan, math.nan)
    norms = math.sqrt(found["exact_square"]) * math.sqrt(found["quantized_square"])
    return GradientError(
        found["dot"] / norms if norms else 0.0,
        math.sqrt(found["error_square"] / found["exact_square"]),
        found["error_abs"] / found["exact_abs"],
        math.sqrt(found["quantized_square"] / found["exact_square"]),
    )


class GradientErrorRecorder(Recorder):
    """The error of each layer's weight gradient: two products a layer and call. Calls of a layer are pooled.

    Args:
        gradient: quantize the output gradients so; None: as each layer does, and layers that quantize neither G nor X
            in the backward are passed over (unless there is a wire).
        wire: quantize the weight gradients so, afterwards.
        seed: of stochastic rounding.
    """

    kind = "gradient_error"
    watches_output_gradients = True

    def __init__(
        self,
        gradient: GradientConfig | None = None,
        wire: GradientCommunicationConfig | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.gradient, self.wire, self.seed = gradient, wire, seed
        self._plans: dict[str, Plan] = {}
        self._texts: dict[str, str] = {}

    def prepare(self, name: str, module: nn.Module) -> None:
        plan, text = self._plan(name, module)
        quantizes = plan.grad_weight or (plan.activation and not plan.original_operands)
        if quantizes or self.wire:
            self._plans[name], self._texts[name] = plan, text
            self._sums.setdefault(name, zeros(len(_SUMS), module.weight))  # type: ignore[arg-type]

    def _plan(self, name: str, module: nn.Module) -> tuple[Plan, str]:
        config = module.quant_config if isinstance(module, QuantizedModule) else None
        if self.gradient is not None:
            own = {} if config is None else config.model_dump(mode="json", exclude_unset=True)
            own = {key: value for key, value in own.items() if key not in ("include", "exclude")}
            asked = self.gradient.model_dump(mode="json", exclude_unset=True)
            config = LinearConfig.parse({**own, "backend": "simulated", "gradient": asked})
        if config is None:
            nothing = Plan(None, None, None, None, True, is_transposed(module), 0)
            return nothing, "not quantized"
        stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        transposed = is_transposed(module)
        parts = parts_of(config, name, out_features(module, transposed=transposed))
        return plan_of(config, transposed=transposed, stream=stream, parts=parts), describe(config)

    def observe_grad_output(self, name: str, module: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        plan = self._plans.get(name)
        if plan is None:
            return
        x2, g2 = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        exact = torch.mm(g2.float().t(), x2.float())
        found = exact
        if plan.grad_weight or plan.activation:
            found = quantized_weight_gradient(x2, g2, plan, fold_key(self.seed % 2**64, device=x.device))
        if self.wire:
            words = fold_words(self.seed % 2**64, stream=plan.stream) if self.wire.rounding == "stochastic" else None
            stored = found.t().contiguous() if plan.transposed else found
            sent = through_wire(stored, self.wire, words)
            found = sent.t() if plan.transposed else sent
        self._sums[name] += error_sums(exact, found)

    def result(self, step: int | None) -> Measurement:
        if not self._plans:
            raise fail(
                "diagnostics: gradient_error",
                "a model whose layers quantize neither gradients nor, in the backward, inputs, and no wire",
                "a quantizer of gradients",
                'name one, such as {"bits": 8}, or train with ds_quant.linear.gradient',
            )
        if self.gradient is not None:
            check_patterns("gradient.split_qkv", "linear module", self.gradient.split_qkv, list(self._plans))
        self._check_seen(sum(float(sums[-1]) for sums in self._sums.values()))
        rows: list[Row] = [
            {"layer": name, "quantized": self._texts[name], **gradient_error(sums)._asdict()}
            for name, sums in self._sums.items()
            if sums[-1]
        ]
        errors = [gradient_error(sums) for sums in self._sums.values() if sums[-1]]
        pooled = gradient_error(sum(self._sums.values(), torch.zeros_like(next(iter(self._sums.values())))))
        scalars = {
            **pooled._asdict(),
            "lowest_cosine": min(error.cosine for error in errors),
            "highest_relative_l2": max(error.relative_l2 for error in errors),
        }
        settings: dict[str, Any] = {
            "gradient": None if self.gradient is None else self.gradient.model_dump(mode="json"),
            "wire": None if self.wire is None else self.wire.model_dump(mode="json"),
            "seed": self.seed,
        }
        return Measurement(self.kind, step, scalars, rows, settings)
