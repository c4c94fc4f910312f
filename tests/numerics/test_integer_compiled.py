"""Integer quantization under torch.compile."""

import pytest
import torch
from numerics.integer_inputs import BLOCK_SIZE, KINDS, assert_equal, make_input, normal

from ds_quant.numerics import dequantize, fake_quantize, fold_key, quantize

pytestmark = pytest.mark.thorough

COMPILED_CASES = [
    # bits, granularity, symmetric, rounding, dtype, features
    (8, "tensor", True, "nearest", torch.float32, 67),
    (8, "row", True, "stochastic", torch.bfloat16, 67),
    (5, "column", True, "nearest", torch.float16, 67),
    (4, "block", True, "stochastic", torch.float32, 64),
    (4, "block", True, "nearest", torch.bfloat16, 67),
    (2, "tensor", False, "stochastic", torch.bfloat16, 67),
    (8, "row", False, "nearest", torch.float32, 67),
    (3, "column", False, "stochastic", torch.float32, 67),
    (8, "block", False, "stochastic", torch.float16, 67),
]


def assert_compiles_to_the_same(call, inputs, dynamic=None):
    """One compilation serves all inputs, with the bits of eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    compiled(*inputs[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for arguments in inputs:
            for got, expected in zip(compiled(*arguments), call(*arguments), strict=True):
                assert_equal(got, expected)


@pytest.mark.parametrize(("bits", "granularity", "symmetric", "rounding", "dtype", "features"), COMPILED_CASES)
def test_compiled_is_bit_equal_to_eager_without_recompilation(
    bits, granularity, symmetric, rounding, dtype, features, rng
):
    options = {"granularity": granularity, "block_size": BLOCK_SIZE, "symmetric": symmetric, "rounding": rounding}

    def call(x, key):
        q = quantize(x, bits, key=key if rounding == "stochastic" else None, **options)
        return *[t for t in q[:3] if t is not None], dequantize(q, dtype)

    inputs = [
        (make_input(rng, kind, (21, features), dtype), fold_key(int(rng.integers(2**63)), step=number))
        for number, kind in enumerate(KINDS)
    ]
    assert_compiles_to_the_same(call, inputs)


def test_compiled_for_any_number_of_rows(rng):
    def call(x, key):
        return (fake_quantize(x, 8, granularity="row", rounding="stochastic", key=key),)

    inputs = [(make_input(rng, normal, (rows, 40), torch.float32), fold_key(rows)) for rows in (5, 8, 33)]
    assert_compiles_to_the_same(call, inputs, dynamic=True)
