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
the backward; W is rounded to nearest only, so they are the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_quant.kernels.int8 import ops
from ds_quant.linear.recipe import (
    STREAM_ACTIVATION,
    STREAM_GRAD_INPUT,
    STREAM_GRAD_WEIGHT,
    Codes,
    Plan,
    Quantizer,
)
from ds_quant.numerics.random import derive_key


def quantize_input(x: Tensor, plan: Plan, dtype: torch.dtype, key: Tensor | None) -> Codes:
    """Codes [tokens, in] and scale [tokens] or [1] of x [..., in], seen in `dtype`."""
    quantizer = plan.activation
    assert quantizer is not None
    x2 = x.detach().to(dtype).reshape(-1, x.shape[-1])
    subkey = _subkey(quantizer, key, plan.stream + STREAM_ACTIVATION)
    if quantizer.granularity == "tensor":
        return Codes(*ops.quantize_tensor(x2, quantizer.bits, subkey, quantizer.full_range))
    return Codes(*ops.quantize_rows(x2, quantizer.bits, None, subkey, quantizer.full_range))


def quantize_weight(weight: Tensor, plan: Plan) -> Codes:
    """Codes in the layout of `weight`, scale [out] or [1]."""
    assert plan.weight is not None
    bits, weight = plan.weight.bits, weight.detach()
    if plan.weight.granularity == "tensor":
        return Codes(*ops.quantize_tensor(weight, bits))
    return Codes(*(ops.quantize_columns if plan.transposed else ops.quantize_rows)(weight, bits))


class Int8Linear(torch.autograd.Function):
    """The three products of one layer. Inputs: x [..., in], weight as stored, bias [out] or None, their codes.

    `kept_weight_codes`: the codes of W may be held for the backward, as the layer keeps them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_codes: Tensor | None,
        x_scale: Tensor | None,
        w_codes: Tensor | None,
        w_scale: Tensor | None,
        kept_weight_codes: bool,
        plan: Plan,
        dtype: torch.dtype,
        key: Tensor | None,
    ) -> Tensor:
        out = weight.shape[1] if plan.transposed else weight.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            if x_codes is not None and w_codes is not None:
                y = ops.scaled_matmul(x_codes, _out_last(w_codes, plan), x_scale, w_scale, bias, dtype)
            else:
                y = F.linear(
                    _dense_input(x, x_codes, x_scale, dtype),
                    _dense_weight(weight, w_codes, w_scale, plan, dtype),
                    None if bias is None else bias.to(dtype),
                )
        ctx.plan, ctx.dtype = plan, dtype
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        hold_x = x if x_codes is None or plan.original_operands else None
        hold_codes = (None, None) if hold_x is not None else (x_codes, x_scale)
        # Not among the saved tensors: what hooks do to those (offloading, say) would be done to the layer's codes.
        ctx.w_codes = (w_codes, w_scale) if kept_weight_codes and not plan.original_operands else (None, None)
        ctx.save_for_backward(weight, key, hold_x, *hold_codes)
        # No view, which a model could not go on to change in place, as Falcon's layers do.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], out))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, key, x, x_codes, x_scale = ctx.saved_tensors
        plan, dtype = ctx.plan, ctx.dtype
        w_codes, w_scale = ctx.w_codes
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(grad_output.device.type, enabled=False):
            g = grad_output.reshape(-1, grad_output.shape[-1])
            if wants_x and plan.weight and not plan.original_operands and w_codes is None:
                w_codes, w_scale = quantize_weight(weight, plan)
            for_input = plan.grad_input if wants_x else None
            for_weight = plan.grad_weight if wants_weight else None
            rows, columns = _quantize_gradient(g, plan, key, w_scale, x_scale, for_input, for_weight)
            if wants_x:
                if rows is not None and w_codes is not None:
                    scale = None if plan.grad_input.fold else w_scale
                    grad_x = ops.scaled_matmul(rows.codes, _in_last(w_codes, plan), rows.scale, scale, None, dtype)
                else:
                    dense = _dense_gradient(g, rows, plan.grad_input, dtype)
                    grad_x = dense @ _dense_weight(weight, w_codes, w_scale, plan, dtype)
                grad_x = grad_x.to(ctx.x_dtype).reshape(ctx.x_shape)
            if wants_weight:
                if columns is not None and x_codes is not None:
                    scale = None if plan.grad_weight.fold else x_scale
                    if plan.transposed:
                        grad_weight = ops.scaled_matmul(x_codes.t(), columns.codes, scale, columns.scale, None, dtype)
                    else:
                        grad_weight = ops.scaled_matmul(columns.codes.t(), x_codes, columns.scale, scale, None, dtype)
                else:
                    dense = _dense_gradient(g, columns, plan.grad_weight, dtype)
                    inputs = _dense_input(x, x_codes, x_scale, dtype)
                    grad_weight = inputs.t() @ dense if plan.transposed else dense.t() @ inputs
                grad_weight = grad_weight.to(weight.dtype)
            if ctx.bias_dtype is not None and wants_bias:
                grad_bias = g.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, *([None] * 8)


def _quantize_gradient(
    g: Tensor,
    plan: Plan,
    key: Tensor | None,
    w_scale: Tensor | None,
    x_scale: Tensor | None,
    for_input: Quantizer | None,
    for_weight: Quantizer | None,
) -> tuple[Codes | None, Codes | None]:
    """G [tokens, out] as dX contracts it, and as dW does; None where it is not quantized.

    Without the other operand's scale, or where that operand is unquantized, there is nothing to fold.
    """
    row_key = _subkey(for_input, key, plan.stream + STREAM_GRAD_INPUT)
    column_key = _subkey(for_weight, key, plan.stream + STREAM_GRAD_WEIGHT)
    if for_input and for_weight and for_input.fold:
        codes, scale, more_codes, more_scale = ops.quantize_both(
            g, for_input.bits, w_scale, x_scale, row_key, column_key
        )
        return Codes(codes, scale), Codes(more_codes, more_scale)
    rows = columns = None
    if for_input:
        if for_input.fold:
            rows = Codes(*ops.quantize_rows(g, for_input.bits, w_scale, row_key))
        else:
            rows = Codes(*ops.quantize_tensor(g, for_input.bits, row_key))
    if for_weight:
        if for_weight.fold:
            columns = Codes(*ops.quantize_columns(g, for_weight.bits, x_scale, column_key))
        elif rows is not None and column_key is None:
            columns = rows
        else:
            columns = Codes(*ops.quantize_tensor(g, for_weight.bits, column_key))
    return rows, columns


def _subkey(quantizer: Quantizer | None, key: Tensor | None, stream: int) -> Tensor | None:
    if quantizer is None or key is None or quantizer.rounding != "stochastic":
        return None
    return derive_key(key, stream)


def _out_last(w_codes: Tensor, plan: Plan) -> Tensor:
    """[in, out], a view."""
    return w_codes if plan.transposed else w_codes.t()


def _in_last(w_codes: Tensor, plan: Plan) -> Tensor:
    """[out, in], a view."""
    return w_codes.t() if plan.transposed else w_codes


def _dense_weight(weight: Tensor, codes: Tensor | None, scale: Tensor | None, plan: Plan, dtype: torch.dtype) -> Tensor:
    """[out, in] in dtype."""
    if codes is None:
        dense = weight.to(dtype)
    elif plan.transposed:
        dense = ops.dequantize(codes, None, scale, dtype)
    else:
        dense = ops.dequantize(codes, scale, None, dtype)
    return _in_last(dense, plan)


def _dense_input(x: Tensor | None, codes: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[tokens, in] in dtype."""
    if codes is not None:
        return ops.dequantize(codes, scale, None, dtype)
    assert x is not None
    return x.to(dtype).reshape(-1, x.shape[-1])


def _dense_gradient(g: Tensor, codes: Codes | None, quantizer: Quantizer | None, dtype: torch.dtype) -> Tensor:
    """[tokens, out] in dtype."""
    if codes is None or quantizer is None:
        return g.to(dtype)
    if quantizer.granularity == "column":
        return ops.dequantize(codes.codes, None, codes.scale, dtype)
    return ops.dequantize(codes.codes, codes.scale, None, dtype)
