"""Quantization in blocks under torch.compile."""

import pytest
import torch
import torch._dynamo.testing
from numerics.block_inputs import KINDS, assert_equal, make_input

from ds_quant.numerics import code_map, dequantize_blockwise, fold_key, quantize_blockwise

pytestmark = pytest.mark.thorough

COMPILED = {
    "whole blocks, nearest": (256, "nearest", [("power", 8, True), ("float", 8, True), ("power", 4, False)]),
    "a tail block, stochastic": (
        301,
        "stochastic",
        [
            ("float", 8, True),
            ("float", 8, False),
            ("power", 4, True),
            ("power", 4, False),
            ("dynamic", 8, True),
            ("dynamic", 4, False),
        ],
    ),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_bits_equal_eager_ones(case, rng):
    length, rounding, cases = COMPILED[case]
    maps = [code_map(name, bits, signed=signed) for name, bits, signed in cases]

    def call(x, key):
        key = key if rounding == "stochastic" else None
        blocks = [
            quantize_blockwise(x if m.signed else x.abs(), m, block_size=32, rounding=rounding, key=key) for m in maps
        ]
        return tuple(t for q in blocks for t in (q.codes, q.scale, dequantize_blockwise(q)))

    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(call, fullgraph=True, dynamic=False, backend=counter)
    for step, kind in enumerate(KINDS):
        x = make_input(rng, kind, length, True)
        key = fold_key(int(rng.integers(2**63)), step)
        for got, expected in zip(compiled(x, key), call(x, key), strict=True):
            assert_equal(got, expected)
    assert counter.frame_count == 1
