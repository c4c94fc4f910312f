"""The products of a linear layer on integer units: X and W are quantized once and serve all three.

With X = Xq sx[token] and W = Wq sw[out], G folded and quantized as `plan` says, and everything in round brackets int8
with exact int32 sums:

    Y  = (Xq Wq^T) sx[token] sw[out] + b
    dX = (Gq Wq)   sg[token]                 Gq sg  from G sw
    dW = (Gq^T Xq) sg[out]                   Gq sg  from G sx

Scales and bias are applied in fp32, and the result is rounded once to the model's dtype. A product with an operand that
is not quantized runs in the model's dtype; a quantized operand of it is dequantized and rounded to that dtype first.

For the backward are held: of X the codes and scales, one byte an element; of W the Parameter, and the codes that the
layer keeps anyway (see `weight_codes`). Where it keeps none (ZeRO-3, evaluation, torch.compile) they are made again in
the backward, unless the weight comes as codes; W is rounded to nearest only, so they are the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_quant.kernels.int8 import ops
from ds_quant.linear.operands import codes_of, pads, quantize_gradient, quantize_weight, weight_ways
from ds_quant.linear.recipe import Codes, Plan, Quantizer
from ds_quant.linear.weight_codes import WeightCodes
from ds_quant.linear.weight_gradients import adjusted


class Int8Linear(torch.autograd.Function):
    """The three products of one layer. Inputs: x [..., in], weight as stored, bias [out] or None, their codes.

    `kept_weight_codes`: the codes of W may be held for the backward, as the layer keeps them.
    `received_weight_codes`: where else the backward finds them, should the weight come as codes again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_codes: Tensor | None,
        x_scale: Tensor | None,
        x_turned: Tensor | None,
        w_codes: Tensor | None,
        w_scale: Tensor | None,
        w_turned: Tensor | None,
        kept_weight_codes: bool,
        received_weight_codes: WeightCodes | None,
        plan: Plan,
        dtype: torch.dtype,
        key: Tensor | None,
        loss_share: float,
    ) -> Tensor:
        out = weight.shape[1] if plan.transposed else weight.shape[0]
        qx = None if x_scale is None else Codes(x_codes, x_scale, x_turned)
        qw = None if w_scale is None else Codes(w_codes, w_scale, w_turned)
        with torch.autocast(x.device.type, enabled=False):
            if qx is not None and qw is not None:
                y = _output(qx, qw, plan, x.shape[:-1].numel(), out, bias, dtype)
            else:
                y = F.linear(
                    _dense_input(x, qx, x.shape, dtype),
                    _dense_weight(weight, qw, plan, dtype),
                    None if bias is None else bias.to(dtype),
                )
        ctx.plan, ctx.dtype, ctx.loss_share = plan, dtype, loss_share
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        hold_x = x if qx is None or plan.original_operands else None
        hold_codes = (None, None, None) if hold_x is not None or qx is None else _for_backward(qx)
        # Not among the saved tensors: what hooks do to those (offloading, say) would be done to the layer's codes.
        ctx.w_codes = qw if kept_weight_codes and not plan.original_operands else None
        ctx.received_codes = received_weight_codes
        ctx.save_for_backward(weight, key, hold_x, *hold_codes)
        # No view, which a model could not go on to change in place, as Falcon's layers do.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], out))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, key, x, x_codes, x_scale, x_turned = ctx.saved_tensors
        plan, dtype = ctx.plan, ctx.dtype
        qx, qw = None if x_scale is None else Codes(x_codes, x_scale, x_turned), ctx.w_codes
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(grad_output.device.type, enabled=False):
            g = grad_output.reshape(-1, grad_output.shape[-1])
            if wants_x and plan.weight and not plan.original_operands and qw is None:
                qw = None if ctx.received_codes is None else ctx.received_codes.find(weight)
                qw = qw or quantize_weight(weight, plan, weight_ways(plan, forward=False, backward=True))
            for_input = plan.grad_input if wants_x else None
            for_weight = plan.grad_weight if wants_weight else None
            wants_bias = wants_bias and ctx.bias_dtype is not None
            rows, columns, sums = quantize_gradient(
                g,
                plan,
                key,
                None if qw is None else qw.scale,
                None if qx is None else qx.scale,
                for_input,
                for_weight,
                wants_bias,
            )
            if wants_x:
                if rows is not None and qw is not None:
                    grad_x = _grad_input(rows, qw, plan, torch.Size((len(g), ctx.x_shape[-1])), dtype)
                else:
                    dense = _dense_gradient(g, rows, plan.grad_input, dtype)
                    grad_x = dense @ _dense_weight(weight, qw, plan, dtype)
                grad_x = grad_x.to(ctx.x_dtype).reshape(ctx.x_shape)
            if wants_weight:
                if columns is not None and qx is not None:
                    grad_weight = _grad_weight(columns, qx, plan, weight.shape, dtype)
                else:
                    dense = _dense_gradient(g, columns, plan.grad_weight, dtype)
                    inputs = _dense_input(x, qx, ctx.x_shape, dtype)
                    grad_weight = inputs.t() @ dense if plan.transposed else dense.t() @ inputs
                grad_weight = adjusted(grad_weight.to(weight.dtype), weight, plan, ctx.loss_share)
            if wants_bias:
                grad_bias = sums.to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, *([None] * 12)


def _output(
    x: Codes, w: Codes, plan: Plan, num_tokens: int, num_outputs: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if pads(x.scale.device):
        a, b = x.way(turned=False), w.way(plan.transposed)
        return ops.padded_matmul(a, b, num_tokens, num_outputs, x.scale, w.scale, bias, dtype)
    return ops.scaled_matmul(x.way(False), _in_last(w.way(False), plan).t(), x.scale, w.scale, bias, dtype)


def _grad_input(g: Codes, w: Codes, plan: Plan, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`shape`: of the result, [tokens, in]."""
    assert plan.grad_input is not None
    scale = None if plan.grad_input.fold else w.scale
    if pads(g.scale.device):
        a, b = g.way(turned=False), w.way(not plan.transposed)
        return ops.padded_matmul(a, b, shape[0], shape[1], g.scale, scale, None, dtype)
    return ops.scaled_matmul(g.way(False), _in_last(w.way(False), plan), g.scale, scale, None, dtype)


def _grad_weight(g: Codes, x: Codes, plan: Plan, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`shape`: of the result, which is that of the weight."""
    assert plan.grad_weight is not None
    scale = None if plan.grad_weight.fold else x.scale
    if pads(g.scale.device):
        sides = [(g.way(turned=True), g.scale), (x.way(turned=True), scale)]
        (a, a_scale), (b, b_scale) = sides[::-1] if plan.transposed else sides
        return ops.padded_matmul(a, b, shape[0], shape[1], a_scale, b_scale, None, dtype)
    if plan.transposed:
        return ops.scaled_matmul(x.way(False).t(), g.way(False), scale, g.scale, None, dtype)
    return ops.scaled_matmul(g.way(False).t(), x.way(False), g.scale, scale, None, dtype)


def _for_backward(x: Codes) -> Codes:
    """What dW contracts, where there are two ways."""
    return x if x.turned is None else x._replace(codes=None)


def _in_last(w: Tensor, plan: Plan) -> Tensor:
    """[out, in], a view."""
    return w.t() if plan.transposed else w


def _dense_weight(weight: Tensor, w: Codes | None, plan: Plan, dtype: torch.dtype) -> Tensor:
    """[out, in] in dtype."""
    if w is None:
        dense = weight.to(dtype)
    else:
        by_row, by_column = (None, w.scale) if plan.transposed else (w.scale, None)
        dense = ops.dequantize(codes_of(w, weight.shape), by_row, by_column, dtype)
    return _in_last(dense, plan)


def _dense_input(x: Tensor | None, codes: Codes | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """[tokens, in] in dtype, of x [..., in] or its codes."""
    if codes is not None:
        return ops.dequantize(codes_of(codes, shape), codes.scale, None, dtype)
    assert x is not None
    return x.to(dtype).reshape(-1, x.shape[-1])


def _dense_gradient(g: Tensor, codes: Codes | None, quantizer: Quantizer | None, dtype: torch.dtype) -> Tensor:
    """[tokens, out] in dtype."""
    if codes is None or quantizer is None:
        return g.to(dtype)
    by_row, by_column = (None, codes.scale) if quantizer.granularity == "column" else (codes.scale, None)
    return ops.dequantize(codes_of(codes, g.shape), by_row, by_column, dtype)
