"""Works of AdamW steps for tests of the kernels: made from a generator, copied, compared."""

import numpy as np
import torch

from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.numerics.adam import adamw_scalars
from ds_quant.numerics.blockwise import QuantizedBlocks, quantize_blockwise
from ds_quant.numerics.codes import CodeMap, code_map

FORMATS = [None, ("float", 8), *((name, bits) for name in ("power", "linear", "dynamic") for bits in (8, 4))]
"""How a moment may be stored: in fp32, or with a map and bits."""
SECOND_FORMATS = [*FORMATS, ("log", 4)]
"""The same of exp_avg_sq."""
SCALARS = adamw_scalars(1e-2, (0.9, 0.95), 1e-8, 0.1, 3)
KEY, SQ_KEY = (0x05790411, 0x1899FB8C), (0xDBE6CCB1, 0xFC4B6E43)


def rough_values(rng, numel):
    """fp32 with zeros, and magnitudes over many orders in each block."""
    values = rng.standard_normal(numel) * 10.0 ** rng.uniform(-6, 0, numel) * (rng.random(numel) > 0.1)
    return torch.from_numpy(values.astype(np.float32))


def make_moment(values, form, block_size, signed):
    if form is None:
        return values.clone()
    chosen = form if isinstance(form, CodeMap) else code_map(*form, signed=signed)
    return quantize_blockwise(values, chosen, block_size=block_size)


def make_work(
    rng, numel, first=None, second=None, *, block_sizes=(256, 256), stochastic=(False, True), dtypes=None, stream=9
):
    param_dtype, grad_dtype = dtypes or (torch.float32, torch.float32)
    moment = rough_values(rng, numel)
    return AdamWWork(
        rough_values(rng, numel).to(param_dtype),
        rough_values(rng, numel).to(grad_dtype),
        make_moment(moment, first, block_sizes[0], True),
        make_moment(moment.square() * 2, second, block_sizes[1], False),
        SCALARS,
        KEY if stochastic[0] else None,
        SQ_KEY if stochastic[1] else None,
        stream,
    )


def copy_moment(moment):
    if isinstance(moment, QuantizedBlocks):
        return moment._replace(codes=moment.codes.clone(), scale=moment.scale.clone())
    return moment.clone()


def copy_work(work):
    return work._replace(
        param=work.param.clone(), exp_avg=copy_moment(work.exp_avg), exp_avg_sq=copy_moment(work.exp_avg_sq)
    )


def tensors(work):
    yield "param", work.param
    for name in ("exp_avg", "exp_avg_sq"):
        moment = getattr(work, name)
        if isinstance(moment, QuantizedBlocks):
            yield f"{name}.codes", moment.codes
            yield f"{name}.scale", moment.scale
        else:
            yield name, moment


def assert_same(got, expected, context=""):
    """Bit for bit, but that any NaN equals any other."""
    for (name, left), (_, right) in zip(tensors(got), tensors(expected), strict=True):
        assert_same_bits(name, left, right, context)


def assert_same_bits(name, left, right, context=""):
    """The same of two tensors."""
    if left.dtype.is_floating_point:
        integer = torch.int32 if left.dtype == torch.float32 else torch.int16
        differ = (left.view(integer) != right.view(integer)) & ~(left.isnan() & right.isnan())
    else:
        differ = left != right
    if differ.any():
        where = differ.reshape(-1).nonzero().reshape(-1)
        first = where[0].item()
        raise AssertionError(
            f"{context} {name}: {len(where)} of {left.numel()} differ, first at {first}: "
            f"{left.reshape(-1)[first].item()!r}, expected {right.reshape(-1)[first].item()!r}"
        )
