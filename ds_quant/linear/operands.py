"""The operands of a layer's integer products: their codes, laid out as the device multiplies them.

CPUs multiply codes as they lie, so each operand has one matrix of them. GPUs want both operands of a product contiguous
along what it contracts, and padded (`numerics.products`). With `codes` as the operand lies in memory and `turned` as it
is transposed, the three products of a layer take

               Linear, W [out, in]                    Conv1D, W [in, out]
    Y          X codes          W codes               X codes          W turned
    dX         G codes (rows)   W turned              G codes (rows)   W codes
    dW         G turned         X turned              X turned         G turned (columns)

and of each operand only those are made that are used. X is held for the backward turned, one byte an element as on
CPUs; a weight whose codes are kept has both, two bytes.

Quantizers are operators under torch.compile, but for X rounded to nearest with a scale a token: its definition is
traced there, so that Inductor fuses it into the norm or the GELU before it. A gradient would be computed twice, for its
maxima and for its codes, and W comes from memory.
"""

import torch
from torch import Tensor

from ds_quant.kernels.compiling import divides_exactly
from ds_quant.kernels.int8 import ops
from ds_quant.linear.recipe import (
    STREAM_ACTIVATION,
    STREAM_GRAD_INPUT,
    STREAM_GRAD_WEIGHT,
    Codes,
    Plan,
    Quantizer,
)
from ds_quant.numerics import products as reference
from ds_quant.numerics.products import ALIGNMENT, padded
from ds_quant.numerics.random import derive_key


@torch.compiler.assume_constant_result
def pads(device: torch.device) -> bool:
    """Whether codes are padded and turned on a device."""
    return ops.pads(device)


def input_ways(plan: Plan, *, trains: bool) -> str:
    """Those of X that a layer needs whose weight's gradient is wanted or not."""
    return "both" if trains and plan.grad_weight and not plan.original_operands else "codes"


def weight_ways(plan: Plan, *, forward: bool, backward: bool) -> str:
    """Those of W that its products need."""
    ways = ("turned", "codes") if plan.transposed else ("codes", "turned")
    wanted = [ways[0]] if forward and plan.activation else []
    wanted += [ways[1]] if backward and plan.grad_input and not plan.original_operands else []
    return "both" if len(wanted) == 2 else (*wanted, "codes")[0]


def quantize_input(x: Tensor, plan: Plan, dtype: torch.dtype, key: Tensor | None, ways: str = "codes") -> Codes:
    """Codes [tokens, in] and scale [tokens] or [1] of x [..., in], seen in `dtype`."""
    quantizer = plan.activation
    assert quantizer is not None
    x2 = x.detach().to(dtype).reshape(-1, x.shape[-1])
    if pads(x.device):
        if torch.compiler.is_compiling() and _is_fusible(x2, quantizer):
            found = fusible_codes(x2, quantizer.levels, ways)
            return _codes(*found, ways)
        return _padded(x2, quantizer, quantizer.granularity, None, key, plan.stream + STREAM_ACTIVATION, ways)
    subkey = _subkey(quantizer, key, plan.stream + STREAM_ACTIVATION)
    if quantizer.granularity == "tensor":
        return Codes(*ops.quantize_tensor(x2, quantizer.levels, subkey))
    return Codes(*ops.quantize_rows(x2, quantizer.levels, None, subkey))


def quantize_weight(weight: Tensor, plan: Plan, ways: str = "codes") -> Codes:
    """Codes in the layout of `weight`, scale [out] or [1]."""
    assert plan.weight is not None
    levels, weight = plan.weight.levels, weight.detach()
    granularity = plan.weight.granularity
    if granularity != "tensor":
        granularity = "column" if plan.transposed else "row"
    if pads(weight.device):
        return _padded(weight, plan.weight, granularity, None, None, 0, ways)
    if granularity == "tensor":
        return Codes(*ops.quantize_tensor(weight, levels))
    return Codes(*(ops.quantize_columns if granularity == "column" else ops.quantize_rows)(weight, levels))


def arrange_weight(codes: Tensor, scale: Tensor, ways: str) -> Codes:
    """Codes in the layout of a weight, laid out as `quantize_weight` would have them."""
    if not pads(codes.device):
        return Codes(codes, scale)
    return Codes(None if ways == "turned" else padded(codes), scale, None if ways == "codes" else padded(codes.t()))


def quantize_gradient(
    g: Tensor,
    plan: Plan,
    key: Tensor | None,
    w_scale: Tensor | None,
    x_scale: Tensor | None,
    for_input: Quantizer | None,
    for_weight: Quantizer | None,
    wants_sums: bool,
) -> tuple[Codes | None, Codes | None, Tensor]:
    """G [tokens, out] as dX contracts it, and as dW does, None where it is not quantized; and its sum over tokens.

    Without the other operand's scale, or where that operand is unquantized, there is nothing to fold.
    """
    is_padded = pads(g.device)
    if for_input and for_weight and for_input.fold:
        row_stream, column_stream = plan.stream + STREAM_GRAD_INPUT, plan.stream + STREAM_GRAD_WEIGHT
        if is_padded:
            if for_input.rounding != "stochastic":
                key = None
            codes, scale, turned, more_scale, sums = ops.quantize_gradient(
                g, for_input.levels, w_scale, x_scale, key, row_stream, column_stream, wants_sums
            )
            return Codes(codes, scale), Codes(None, more_scale, turned), sums
        keys = _subkey(for_input, key, row_stream), _subkey(for_weight, key, column_stream)
        codes, scale, more_codes, more_scale = ops.quantize_both(g, for_input.levels, w_scale, x_scale, *keys)
        rows, columns = Codes(codes, scale), Codes(more_codes, more_scale)
        return rows, columns, g.sum(0) if wants_sums else g
    quantize = _padded_side if is_padded else _side
    both = bool(for_input and for_weight and for_input.rounding != "stochastic")  # one scale for all, and no draws
    found_rows = found_columns = None
    if for_input:
        found_rows = quantize(g, for_input, "row", w_scale, key, plan.stream + STREAM_GRAD_INPUT, both)
    if for_weight and both:
        found_columns = found_rows
    elif for_weight:
        found_columns = quantize(g, for_weight, "column", x_scale, key, plan.stream + STREAM_GRAD_WEIGHT, False)
    return found_rows, found_columns, g.sum(0) if wants_sums else g


def _side(
    g: Tensor, quantizer: Quantizer, side: str, scale: Tensor | None, key: Tensor | None, stream: int, both: bool
) -> Codes:
    """G for one of its products; `both`: for the other one as well."""
    subkey = _subkey(quantizer, key, stream)
    if not quantizer.fold:
        return Codes(*ops.quantize_tensor(g, quantizer.levels, subkey))
    return Codes(*(ops.quantize_rows if side == "row" else ops.quantize_columns)(g, quantizer.levels, scale, subkey))


def _padded_side(
    g: Tensor, quantizer: Quantizer, side: str, scale: Tensor | None, key: Tensor | None, stream: int, both: bool
) -> Codes:
    ways = "both" if both else "codes" if side == "row" else "turned"
    granularity, factor = (side, scale) if quantizer.fold else ("tensor", None)
    return _padded(g, quantizer, granularity, factor, key, stream, ways)


def _padded(
    x: Tensor,
    quantizer: Quantizer,
    granularity: str,
    factor: Tensor | None,
    key: Tensor | None,
    stream: int,
    ways: str,
) -> Codes:
    if quantizer.rounding != "stochastic":
        key = None
    found = ops.quantize_operand(x, quantizer.levels, granularity, factor, key, stream, ways)
    return _codes(*found, ways)


def _codes(codes: Tensor, turned: Tensor, scale: Tensor, ways: str) -> Codes:
    return Codes(None if ways == "turned" else codes, scale, None if ways == "codes" else turned)


@torch.compiler.assume_constant_result
def _divides_exactly() -> bool:
    return divides_exactly()


def _is_fusible(x: Tensor, quantizer: Quantizer) -> bool:
    """Whether Inductor makes one kernel of the definition, with its bits: draws, and one scale for all, take more."""
    is_simple = quantizer.rounding != "stochastic" and quantizer.granularity == "row"
    is_even = all(size > 0 and size % ALIGNMENT == 0 for size in x.shape)
    return is_simple and is_even and x.dtype in (torch.float32, torch.bfloat16) and _divides_exactly()


def fusible_codes(x: Tensor, levels: float, ways: str = "both") -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_operand` of x [M, K] by rows, for Inductor to fuse into what x comes from: it is not stored then."""
    return reference.quantize_operand(_as_stored(x), levels, granularity="row", ways=ways)


def _as_stored(x: Tensor) -> Tensor:
    """fp32 of x, rounded to the nearest bf16 if that is its dtype, as it would be in memory.

    Inductor passes on in fp32 what it computes in one kernel, and takes the conversion for done. The bits are rounded
    as integers, which it leaves alone.
    """
    y = x.float()
    if x.dtype != torch.bfloat16:
        return y
    bits = y.view(torch.int32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000
    return torch.where(y.isnan(), y, rounded.view(torch.float32))


def _subkey(quantizer: Quantizer, key: Tensor | None, stream: int) -> Tensor | None:
    return None if key is None or quantizer.rounding != "stochastic" else derive_key(key, stream)


def codes_of(operand: Codes, shape: torch.Size) -> Tensor:
    """A matrix of codes of an operand [..., features] of this shape, a view, whichever way there is."""
    if not pads(operand.scale.device):
        return operand.way(turned=False)
    num_rows, num_columns = shape[:-1].numel(), shape[-1]
    if operand.codes is not None:
        return operand.codes[:num_rows, :num_columns]
    return operand.way(turned=True)[:num_columns, :num_rows].t()
