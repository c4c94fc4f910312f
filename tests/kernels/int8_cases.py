"""What the tests of int8 operands and results share: inputs, and bits compared."""

import numpy as np
import pytest
import torch

from ds_quant.kernels import build, native
from ds_quant.numerics.integer import symmetric_levels
from ds_quant.numerics.random import fold_key

ISAS = native.ISAS[: native.ISAS.index(native.isa()) + 1] if build.load().library else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Beside whole vectors and their rests: blocks of columns (16384) and a bit, chunks of rows and groups of four.
SHAPES = ((1, 1), (1, 50), (70, 1), (3, 15), (4, 16), (5, 17), (9, 64), (130, 100), (5, 16387), (60, 1111), (2, 33000))
KEYS = (fold_key(1), fold_key(2, step=3))

needs_compiler = pytest.mark.skipif(not ISAS, reason=f"no C++ kernels: {build.load().reason}")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def scales(rng, count):
    return tensor(10.0 ** rng.uniform(-4, 1, size=count))


def bits_of(x):
    """Integers that tell all numbers apart and no NaN from another."""
    if not x.dtype.is_floating_point:
        return x
    integer, nan = (torch.int32, 0x7FC00000) if x.dtype == torch.float32 else (torch.int16, 0x7FC0)
    bits = x.view(integer)
    return torch.where(x.isnan(), torch.full_like(bits, nan), bits)


def assert_same(got, expected, context):
    for number, (left, right) in enumerate(zip(got, expected, strict=True)):
        assert (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride()), context
        differ = bits_of(left) != bits_of(right)
        assert not differ.any(), f"{context} result {number}: {differ.sum()} differ, first {differ.nonzero()[0]}"


def results(module, x, bits, column_scale, row_scale, keys, **options):
    """All that the quantizers give in both ranges, with and without factors."""
    levels, full = symmetric_levels(bits), symmetric_levels(bits, full_range=True)
    first, second = keys or (None, None)
    both = {"row_key": first, "column_key": second}
    return (
        *module.quantize_rows(x, levels, key=first, **options),
        *module.quantize_rows(x, levels, column_scale=column_scale, key=first, **options),
        *module.quantize_columns(x, levels, key=first, **options),
        *module.quantize_columns(x, levels, row_scale=row_scale, key=second, **options),
        *module.quantize_both(x, levels, column_scale=column_scale, row_scale=row_scale, **both, **options),
        *module.quantize_both(x, levels, **both, **options),
        *module.quantize_tensor(x, levels, key=first, **options),
        *module.quantize_rows(x, full, key=first, **options),
        *module.quantize_rows(x, full, column_scale=column_scale, key=first, **options),
        *module.quantize_columns(x, full, row_scale=row_scale, key=second, **options),
        *module.quantize_tensor(x, full, key=first, **options),
    )
