"""The products of a linear layer with quantized operands, in floating point: what the integer ones are held against.

Where no scale lies on the contracted axis the products multiply integer values, accumulate in fp32, apply the scales
there and round once to the model's dtype. Operands with a scale on the contracted axis are dequantized, rounded to the
model's dtype and multiplied as usual. A product of two unquantized operands is the one of nn.Linear, bit for bit.

Activations in the full range are a server's, and so is the forward of a model in fp32: it multiplies the dequantized
operands, with the very operations of compressed-tensors and transformers. The full range puts the largest magnitude of
each group on a tie between two codes, so that inputs that differ in their last bit soon have other codes.

For the backward the codes of X are held, one byte an element, and of W nothing but the Parameter itself.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_quant.linear.recipe import (
    STREAM_ACTIVATION,
    STREAM_GRAD_INPUT,
    STREAM_GRAD_WEIGHT,
    STREAM_WEIGHT,
    Plan,
    Quantizer,
)
from ds_quant.numerics.integer import Quantized, dequantize, integer_values


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


class SimulatedLinear(torch.autograd.Function):
    """The three products of one layer. Inputs: x [..., in], weight as stored, bias [out] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: Plan,
        dtype: torch.dtype,
        local_key: Tensor | None,
        replicated_key: Tensor | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            w = weight.t() if plan.transposed else weight  # [out, in]
            x2 = x.reshape(-1, x.shape[-1])
            qx = plan.activation(x2, local_key, plan.stream + STREAM_ACTIVATION) if plan.activation else None
            qw = plan.weight(w, replicated_key, plan.stream + STREAM_WEIGHT) if plan.weight else None
            a = _Operand(x2 if qx is None else qx, 1)
            b = _Operand(w if qw is None else qw, 1)
            cast_bias = None if bias is None else bias.to(dtype)
            if qx is None and qw is None:
                y = F.linear(x, w.to(dtype), cast_bias)
            elif plan.activation and plan.activation.full_range and dtype == torch.float32:
                y = F.linear(a.dense(dtype).reshape(x.shape), b.dense(dtype), cast_bias)
            else:
                # No view, which a model could not go on to change in place, as Falcon's layers do.
                y = torch.ops.aten._unsafe_view(_product(a, b, dtype, bias), (*x.shape[:-1], w.shape[0]))
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
                    other = plan.weight(w, replicated_key, plan.stream + STREAM_WEIGHT)
                a, b = _gradient_product(g, other, plan.grad_input, local_key, plan.stream + STREAM_GRAD_INPUT, 1)
                grad_x = _product(a, b, dtype).reshape(ctx.x_shape)
            if ctx.needs_input_grad[1]:
                x = x_saved[0] if ctx.x_rebuild is None else Quantized(*x_saved, *ctx.x_rebuild)
                a, b = _gradient_product(g, x, plan.grad_weight, local_key, plan.stream + STREAM_GRAD_WEIGHT, 0)
                if plan.transposed:
                    a, b = b, a
                grad_weight = _product(a, b, dtype).to(weight.dtype)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                grad_bias = g.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _gradient_product(
    g: Tensor, other: Tensor | Quantized, quantizer: Quantizer | None, key: Tensor | None, stream: int, contracted: int
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
