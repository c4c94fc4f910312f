"""Linear layers whose matrix products see quantized operands.

A linear layer is three products. With tokens as rows, X [tokens, in], W [out, in] and the output gradient
G [tokens, out]:

    forward   Y  = X W^T + b     contracts `in`
    dX        dX = G W           contracts `out`
    dW        dW = G^T X         contracts `tokens`

Each of X, W and G is quantized or left alone as the configuration says. A scale that does not lie on the contracted
axis commutes with the sum, so those products multiply integer values, accumulate in fp32, apply the scales there and
round once to the model's dtype. A scale on the contracted axis cannot leave the sum: such operands are dequantized,
rounded to the model's dtype and multiplied as usual. A product whose two operands are unquantized is the one of
nn.Linear, bit for bit.

Gradient granularity `outer` keeps every scale off the contracted axis: for dX the scale of W (one per output feature)
is multiplied into G, which is then quantized per token; for dW the scale of X (one per token) is multiplied into G,
which is then quantized per output feature. The other operand then takes part with its integer values alone.

With `backward_operands: original` the backward sees the unquantized X and W, as in the published version of
Chitsaz et al., EMNLP 2024 (arXiv 2407.11722); the bias gradient is always the sum of the unquantized G. Gradients pass
the quantizers of X and W unchanged (straight-through estimator without a clipping mask).

Weights stay the Parameters they were: shared with an embedding where they were tied, partitioned by ZeRO-3 where they
were, in Conv1D's (in, out) layout where they were. Only the Parameter is held for the backward, never a quantized or
gathered copy.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_quant.config import GradientConfig, LinearConfig
from ds_quant.numerics.integer import Quantized, dequantize, integer_values, quantize
from ds_quant.numerics.random import derive_key
from ds_quant.stepkey import StepKey

# The four quantizers of one layer draw from streams of their own.
_STREAM_WEIGHT, _STREAM_ACTIVATION, _STREAM_GRAD_INPUT, _STREAM_GRAD_WEIGHT = range(4)
NUM_STREAMS = 4

# The JSON's granularities as those of a matrix: W [out, in], X and G [tokens, features].
_WEIGHT = {"tensor": "tensor", "channel": "row", "block": "block"}
_ACTIVATION = {"tensor": "tensor", "token": "row", "channel": "column", "block": "block"}
_GRADIENT = {"tensor": "tensor", "token": "row", "channel": "column"}


class _Quantizer(NamedTuple):
    bits: int
    granularity: str
    symmetric: bool
    rounding: str
    block_size: int = 128
    fold: bool = False

    def __call__(self, x: Tensor, key: Tensor | None, stream: int) -> Quantized:
        return quantize(
            x,
            self.bits,
            granularity=self.granularity,
            block_size=self.block_size,
            symmetric=self.symmetric,
            rounding=self.rounding,
            key=derive_key(key, stream) if key is not None and self.rounding == "stochastic" else None,
        )


class _Plan(NamedTuple):
    """What one layer quantizes, in the terms of its three products."""

    weight: _Quantizer | None
    activation: _Quantizer | None
    grad_input: _Quantizer | None
    grad_weight: _Quantizer | None
    original_operands: bool
    transposed: bool
    stream: int

    @property
    def stochastic(self) -> bool:
        quantizers = (self.weight, self.activation, self.grad_input, self.grad_weight)
        return any(q is not None and q.rounding == "stochastic" for q in quantizers)


def _plan(config: LinearConfig, *, transposed: bool, stream: int) -> _Plan:
    w, a, g = config.weight, config.activation, config.gradient
    weight = activation = grad_input = grad_weight = None
    if w:
        weight = _Quantizer(w.bits, _WEIGHT[w.granularity], w.symmetric, w.rounding, w.block_size)
    if a:
        activation = _Quantizer(a.bits, _ACTIVATION[a.granularity], a.symmetric, a.rounding, a.block_size)
    if g:
        outer = g.granularity == "outer"
        if "input" in g.used_for:
            rows = "row" if outer else _GRADIENT[g.granularity]
            grad_input = _Quantizer(g.bits, rows, g.symmetric, g.rounding, fold=outer)
        if "weight" in g.used_for:
            columns = "column" if outer else _GRADIENT[g.granularity]
            grad_weight = _Quantizer(g.bits, columns, g.symmetric, g.rounding, fold=outer)
    return _Plan(
        weight, activation, grad_input, grad_weight, config.backward_operands == "original", transposed, stream
    )


class _Operand(NamedTuple):
    """One side of a product: a matrix whose dimension `contracted` is summed over.

    `value` is a tensor in the model's dtype, or quantized. `scaled` is False where the scale of a quantized operand
    was folded into the other one.
    """

    value: Tensor | Quantized
    contracted: int
    scaled: bool = True

    @property
    def scale_is_contracted(self) -> bool:
        if not isinstance(self.value, Quantized) or not self.scaled:
            return False
        # Blocks run along the features, so their scale varies along both dimensions.
        return self.value.granularity in ("block", "column" if self.contracted == 1 else "row")

    def _contracted_last(self, tensor: Tensor) -> Tensor:
        return tensor if self.contracted == 1 else tensor.t()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[rows, contracted] in dtype, dequantized."""
        value = dequantize(self.value, dtype) if isinstance(self.value, Quantized) else self.value.to(dtype)
        return self._contracted_last(value)

    def factors(self) -> Tensor:
        """fp32 [rows, contracted]: what is multiplied before any scale is applied."""
        value = integer_values(self.value) if isinstance(self.value, Quantized) else self.value.float()
        return self._contracted_last(value)

    def scale(self) -> Tensor | None:
        """fp32 scale of each row, [rows, 1] or one element; None where there is none to apply."""
        if not isinstance(self.value, Quantized) or not self.scaled:
            return None
        return self.value.scale.reshape(-1, 1)


def _product(a: _Operand, b: _Operand, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a [M, K] times the transpose of b [N, K], plus bias [N], rounded once to dtype [M, N]."""
    quantized = isinstance(a.value, Quantized) or isinstance(b.value, Quantized)
    if not quantized or a.scale_is_contracted or b.scale_is_contracted:
        return F.linear(a.dense(dtype), b.dense(dtype), None if bias is None else bias.to(dtype))
    y = torch.mm(a.factors(), b.factors().t())
    a_scale, b_scale = a.scale(), b.scale()
    if a_scale is not None:
        y = y * a_scale
    if b_scale is not None:
        y = y * b_scale.t()
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


class _QuantizedLinearFunction(torch.autograd.Function):
    """The three products of one layer. Inputs: x [..., in], weight as stored, bias [out] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: _Plan,
        dtype: torch.dtype,
        local_key: Tensor | None,
        replicated_key: Tensor | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            w = weight.t() if plan.transposed else weight  # [out, in]
            x2 = x.reshape(-1, x.shape[-1])
            qx = plan.activation(x2, local_key, plan.stream + _STREAM_ACTIVATION) if plan.activation else None
            qw = plan.weight(w, replicated_key, plan.stream + _STREAM_WEIGHT) if plan.weight else None
            if qx is None and qw is None:
                y = F.linear(x, w.to(dtype), None if bias is None else bias.to(dtype))
            else:
                a = _Operand(x2 if qx is None else qx, 1)
                b = _Operand(w if qw is None else qw, 1)
                y = _product(a, b, dtype, bias).reshape(*x.shape[:-1], w.shape[0])
        ctx.plan, ctx.dtype, ctx.x_shape = plan, dtype, x.shape
        ctx.has_bias = bias is not None
        ctx.bias_dtype = None if bias is None else bias.dtype
        if qx is None or plan.original_operands:
            ctx.x_rebuild = None
            x_saved: tuple[Tensor | None, ...] = (x2, None, None)
        else:
            # One byte an element instead of the activation itself.
            ctx.x_rebuild = (qx.granularity, qx.block_size)
            x_saved = (qx.codes, qx.scale, qx.zero_point)
        ctx.save_for_backward(weight, local_key, replicated_key, *x_saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, local_key, replicated_key, *x_saved = ctx.saved_tensors
        plan, dtype = ctx.plan, ctx.dtype
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(grad_output.device.type, enabled=False):
            g = grad_output.reshape(-1, grad_output.shape[-1])
            if ctx.needs_input_grad[0]:
                w = weight.t() if plan.transposed else weight
                other: Tensor | Quantized = w
                if plan.weight and not plan.original_operands:
                    # Made again from the Parameter: with ZeRO-3 it is gathered for this layer's backward only.
                    other = plan.weight(w, replicated_key, plan.stream + _STREAM_WEIGHT)
                a, b = _gradient_product(g, other, plan.grad_input, local_key, plan.stream + _STREAM_GRAD_INPUT, 1)
                grad_x = _product(a, b, dtype).reshape(ctx.x_shape)
            if ctx.needs_input_grad[1]:
                x = x_saved[0] if ctx.x_rebuild is None else Quantized(*x_saved, *ctx.x_rebuild)
                a, b = _gradient_product(g, x, plan.grad_weight, local_key, plan.stream + _STREAM_GRAD_WEIGHT, 0)
                if plan.transposed:
                    a, b = b, a
                grad_weight = _product(a, b, dtype).to(weight.dtype)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                grad_bias = g.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _gradient_product(
    g: Tensor, other: Tensor | Quantized, quantizer: _Quantizer | None, key: Tensor | None, stream: int, contracted: int
) -> tuple[_Operand, _Operand]:
    """The two operands of dX (G contracted over dimension 1) or dW (over dimension 0)."""
    if quantizer is None:
        return _Operand(g, contracted), _Operand(other, 0)
    if not (quantizer.fold and isinstance(other, Quantized)):
        return _Operand(quantizer(g, key, stream), contracted), _Operand(other, 0)
    # `other` is [contracted, free] with one scale per contracted index, or one scale in all.
    scale = other.scale.reshape(-1)
    folded = g.float() * (scale if contracted == 1 else scale.reshape(-1, 1))
    return _Operand(quantizer(folded, key, stream), contracted), _Operand(other, 0, scaled=False)


class QuantizedModule(nn.Module):
    """What a linear layer gains by conversion. Base of QuantLinear, QuantConv1D and of a user's own classes.

    A subclass has a Parameter `weight` of two dimensions and a Parameter `bias` or None, and sets `transposed` where
    its weight is (in, out).
    """

    transposed = False
    weight: Tensor
    quant_config: LinearConfig
    step_key: StepKey
    _quant_plan: _Plan

    def configure_quantization(self, config: LinearConfig, step_key: StepKey, index: int = 0) -> None:
        """Set what is quantized. `index` numbers the layers of a model, so that each draws its own random bits."""
        self.quant_config = config
        self.step_key = step_key
        self._quant_plan = _plan(config, transposed=self.transposed, stream=NUM_STREAMS * index)

    def quantized_forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in the autocast dtype where autocast is on and in x's dtype otherwise.

        Raises:
            ValueError: x and weight differ in dtype and autocast is off.
        """
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        elif x.dtype != self.weight.dtype:
            raise ValueError(
                f"{type(self).__name__}: got an input of {x.dtype} for a weight of {self.weight.dtype}; allowed: the "
                "same dtype; remedy: cast the input, or turn autocast on"
            )
        local_key = replicated_key = None
        if self._quant_plan.stochastic:
            local_key, replicated_key = self.step_key.local(x.device), self.step_key.replicated(x.device)
        return _QuantizedLinearFunction.apply(
            x, self.weight, getattr(self, "bias", None), self._quant_plan, x.dtype, local_key, replicated_key
        )

    def describe(self) -> str:
        """One line such as ``W8 channel, A8 token (simulated)``."""
        return describe(self.quant_config)


class QuantLinear(QuantizedModule, nn.Linear):
    """nn.Linear with quantized products. Made by :func:`ds_quant.convert`, or directly.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        config: what to quantize; `ds_quant.QuantConfig.load(...).linear` or the JSON object.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        config: LinearConfig | dict,
    ):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.configure_quantization(LinearConfig.parse(config), StepKey(torch.initial_seed()))

    def forward(self, input: Tensor) -> Tensor:
        return self.quantized_forward(input)


def describe(config: LinearConfig) -> str:
    """A linear configuration in one line: ``W8 channel, A8 token, G8 outer stochastic for dX+dW (simulated)``."""
    parts = []
    for letter, operand in (("W", config.weight), ("A", config.activation), ("G", config.gradient)):
        if operand is None:
            continue
        text = f"{letter}{operand.bits} {operand.granularity}"
        if not isinstance(operand, GradientConfig) and operand.granularity == "block":
            text += f" of {operand.block_size}"
        if not operand.symmetric:
            text += " asymmetric"
        if operand.rounding != "nearest":
            text += f" {operand.rounding}"
        parts.append(text)
    if config.gradient:
        parts[-1] += " for " + "+".join({"input": "dX", "weight": "dW"}[name] for name in config.gradient.used_for)
    if config.backward_operands == "original":
        parts.append("original operands in the backward")
    return ", ".join(parts) + f" ({config.backend})"
