"""The products of a linear layer with quantized operands, in floating point: what the integer ones are held against.

Where no scale lies on the contracted axis the products multiply integer values, accumulate in fp32, apply the scales
there and round once to the model's dtype. Operands with a scale on the contracted axis are dequantized, rounded to the
model's dtype and multiplied as usual. A product of two unquantized operands is the one of nn.Linear, bit for bit.

Activations in the full range are a server's, and so is the forward of a model in fp32: it multiplies the dequantized
operands, with the very operations of compressed-tensors and transformers. The full range puts the largest magnitude of
each group on a tie between two codes, so that inputs that differ in their last bit soon have other codes.

On CUDA devices integer values are multiplied in bf16, which has them exactly up to 256, with sums and results in fp32;
so are unquantized operands that are bf16 already (or fp16, and then the integers too). Asymmetric codes, whose zero
point has no bound, and unquantized fp32 remain fp32. Quantizers and what follows the products are compiled there
(`kernels.simulated`), and have the same bits.

With backend `fp8` products of two quantized operands, which are then e4m3 or e5m2 with no scale on the contracted axis,
are those of `kernels.fp8`: on the device's own units where it has them. All else is as above, code for code.

For the backward the codes of X are held, one byte an element, and of W nothing but the Parameter itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_quant.kernels.simulated import ops as kernels
from ds_quant.linear import fused_outputs, outlier_channels, token_means
from ds_quant.linear.outlier_channels import WithOutliers
from ds_quant.linear.products import Operand, product
from ds_quant.linear.recipe import (
    STREAM_ACTIVATION,
    STREAM_GRAD_INPUT,
    STREAM_GRAD_WEIGHT,
    STREAM_WEIGHT,
    Plan,
    Quantizer,
)
from ds_quant.linear.rotated import quantize_rotated, rotate_operand, rotation_of
from ds_quant.linear.weight_gradients import adjusted
from ds_quant.numerics.integer import Quantized


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
        loss_share: float,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            w = weight.t() if plan.transposed else weight  # [out, in]
            x2 = x.reshape(-1, x.shape[-1])
            centred, x_mean = token_means.split(x2, plan.activation)
            x_value, w_value = _forward_operands(centred, w, plan, local_key, replicated_key)
            a, b = Operand(x_value, 1), Operand(w_value, 1)
            has_bias, bias_dtype = bias is not None, None if bias is None else bias.dtype
            bias = token_means.as_bias(x_mean, b, bias, rotation_of(plan, "Y", local_key, x.device))
            cast_bias = None if bias is None else bias.to(dtype)
            if not (plan.activation or plan.weight):
                y = F.linear(x, w.to(dtype), cast_bias)
            elif plan.activation and plan.activation.full_range and dtype == torch.float32:
                y = F.linear(a.dense(dtype).reshape(x.shape), b.dense(dtype), cast_bias)
            else:
                # No view, which a model could not go on to change in place, as Falcon's layers do.
                y = torch.ops.aten._unsafe_view(
                    product(a, b, dtype, bias, in_fp8=plan.in_fp8), (*x.shape[:-1], w.shape[0])
                )
        ctx.plan, ctx.dtype, ctx.x_shape, ctx.loss_share = plan, dtype, x.shape, loss_share
        ctx.has_bias, ctx.bias_dtype = has_bias, bias_dtype
        wants_weight = ctx.needs_input_grad[1]
        qx = _for_weight_gradient(centred, x_value, plan, local_key) if wants_weight else None
        if qx is None:
            ctx.x_rebuild = x_mean = None
            x_saved: tuple[Tensor | None, ...] = (x2 if wants_weight else None, None, None)
        else:
            # One byte an element instead of the activation itself.
            x_saved, ctx.x_rebuild = qx.apart() if isinstance(qx, WithOutliers) else (qx[:3], qx[3:])
        ctx.save_for_backward(weight, local_key, replicated_key, x_mean, *x_saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, local_key, replicated_key, x_mean, *x_saved = ctx.saved_tensors
        plan, dtype = ctx.plan, ctx.dtype
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(grad_output.device.type, enabled=False):
            g = grad_output.reshape(-1, grad_output.shape[-1])
            wanted = zip((plan.grad_input, plan.grad_weight), ctx.needs_input_grad[:2], strict=True)
            # Both quantizers are of one section of the JSON: what one splits off, the other does.
            quantizer = next((each for each, is_needed in wanted if each and is_needed), None)
            centred, g_mean = token_means.split(g, quantizer)
            if ctx.needs_input_grad[0]:
                # From the Parameter once more: with ZeRO-3 it is gathered for this layer's backward only.
                w = weight.t() if plan.transposed else weight
                a, b = _input_gradient_operands(centred if plan.grad_input else g, w, plan, local_key, replicated_key)
                mean = g_mean if plan.grad_input else None
                term = token_means.as_bias(mean, b, None, rotation_of(plan, "dX", local_key, g.device))
                grad_x = product(a, b, dtype, term, in_fp8=plan.in_fp8).reshape(ctx.x_shape)
            if ctx.needs_input_grad[1]:
                x = _rebuilt(x_saved, ctx.x_rebuild)
                a, b = _weight_gradient_operands(centred if plan.grad_weight else g, x, plan, local_key)
                if plan.transposed:
                    a, b = b, a
                grad_weight = product(a, b, dtype, in_fp8=plan.in_fp8)
                if x_mean is not None:
                    grad_weight = grad_weight.float() + token_means.outer(g, x_mean, plan.transposed)
                grad_weight = adjusted(grad_weight.to(weight.dtype), weight, plan, ctx.loss_share)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                grad_bias = g.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, *([None] * 5)


def _forward_operands(
    x: Tensor, w: Tensor, plan: Plan, local_key: Tensor | None, replicated_key: Tensor | None
) -> tuple[Tensor | Quantized | WithOutliers, Tensor | Quantized]:
    """X [tokens, in] and W [out, in] for Y."""
    x_stream, w_stream = plan.stream + STREAM_ACTIVATION, plan.stream + STREAM_WEIGHT
    if rotation := rotation_of(plan, "Y", local_key, x.device):
        return (
            rotate_operand(x, plan.activation, local_key, x_stream, rotation),
            rotate_operand(w, plan.weight, replicated_key, w_stream, rotation),
        )
    return (
        _quantized_input(x, plan.activation, local_key, x_stream) if plan.activation else x,
        _quantized(w, plan.weight, replicated_key, w_stream) if plan.weight else w,
    )


def _for_weight_gradient(
    x: Tensor, in_forward: Tensor | Quantized | WithOutliers, plan: Plan, key: Tensor | None
) -> Quantized | WithOutliers | None:
    """X as dW contracts it: [in, tokens] where that is rotated, else [tokens, in]; None where it is not quantized."""
    if plan.activation is None or plan.original_operands:
        return None
    stream = plan.stream + STREAM_ACTIVATION
    if rotation := rotation_of(plan, "dW", key, x.device):
        return quantize_rotated(x.t(), plan.activation, key, stream, rotation)
    if "Y" in plan.rotated:
        return _quantized(x, plan.activation, key, stream)
    assert not isinstance(in_forward, Tensor)
    return in_forward


def _input_gradient_operands(
    g: Tensor, w: Tensor, plan: Plan, local_key: Tensor | None, replicated_key: Tensor | None
) -> tuple[Operand, Operand]:
    """G [tokens, out] and W [out, in] for dX."""
    g_stream, w_stream = plan.stream + STREAM_GRAD_INPUT, plan.stream + STREAM_WEIGHT
    weight = None if plan.original_operands else plan.weight
    if rotation := rotation_of(plan, "dX", local_key, g.device):
        a = rotate_operand(g, plan.grad_input, local_key, g_stream, rotation)
        return Operand(a, 1), Operand(rotate_operand(w.t(), weight, replicated_key, w_stream, rotation), 1)
    other = _quantized(w, weight, replicated_key, w_stream) if weight else w
    return _gradient_product(g, other, plan.grad_input, local_key, g_stream, 1)


def _weight_gradient_operands(
    g: Tensor, x: Tensor | Quantized | WithOutliers, plan: Plan, key: Tensor | None
) -> tuple[Operand, Operand]:
    """G [tokens, out] and X, as `_for_weight_gradient` left it, for dW."""
    stream = plan.stream + STREAM_GRAD_WEIGHT
    if rotation := rotation_of(plan, "dW", key, g.device):
        a = rotate_operand(g.t(), plan.grad_weight, key, stream, rotation)
        b = rotate_operand(x.t(), None, key, stream, rotation) if isinstance(x, Tensor) else x
        return Operand(a, 1), Operand(b, 1)
    return _gradient_product(g, x, plan.grad_weight, key, stream, 0)


def _gradient_product(
    g: Tensor,
    other: Tensor | Quantized | WithOutliers,
    quantizer: Quantizer | None,
    key: Tensor | None,
    stream: int,
    contracted: int,
) -> tuple[Operand, Operand]:
    """The two operands of dX (G contracted over dimension 1) or dW (over dimension 0)."""
    if quantizer is None:
        return Operand(g, contracted), Operand(other, 0)
    if quantizer.parts > 1:
        return Operand(fused_outputs.quantize(g, quantizer, key, stream), contracted), Operand(other, 0)
    if quantizer.turned:  # blocks of consecutive tokens, which are contracted
        return Operand(_quantized(g.t(), quantizer, key, stream), 1), Operand(other, 0)
    if not (quantizer.fold and isinstance(other, Quantized)):
        return Operand(_quantized(g, quantizer, key, stream), contracted), Operand(other, 0)
    # `other` is [contracted, free] with one scale per contracted index, or one scale in all.
    scale = other.scale.reshape(-1)
    return Operand(
        _quantized(g, quantizer, key, stream, scale if contracted == 1 else scale.reshape(-1, 1)), contracted
    ), Operand(other, 0, scaled=False)


def _rebuilt(saved: list[Tensor], how: Any) -> Tensor | Quantized | WithOutliers:
    """What the forward left of X."""
    if how is None:
        return saved[0]
    if len(saved) > 3:
        return outlier_channels.together(saved, how)
    codes, scale, zero_point = saved
    return Quantized(codes, scale, zero_point, *how)


def _quantized_input(x: Tensor, quantizer: Quantizer, key: Tensor | None, stream: int) -> Quantized | WithOutliers:
    if quantizer.outlier_share:
        return outlier_channels.quantize(x, quantizer, key, stream)
    return _quantized(x, quantizer, key, stream)


def _quantized(
    x: Tensor, quantizer: Quantizer, key: Tensor | None, stream: int, factor: Tensor | None = None
) -> Quantized:
    """x, times `factor` in fp32 where there is one, quantized."""
    return kernels.quantize(x, factor, quantizer.format, quantizer.rounding, key, stream)
