"""Results of int8 products and codes brought back: C++ against the reference, bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from kernels.int8_cases import DTYPES, ISAS, SHAPES, assert_same, bits_of, needs_compiler, scales, tensor

from ds_quant.kernels.int8 import cpu, ops
from ds_quant.numerics import products as reference


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogue(rng, shape):
    exponents = rng.uniform(0, 31, size=shape)
    numbers = (rng.choice([-1, 1], size=shape) * 2.0**exponents).clip(-(2**31), 2**31 - 1)
    numbers[0, 0], numbers[-1, -1] = -(2**31), 0
    matrix = torch.from_numpy(numbers.astype(np.int32))
    # Down to denormal and up to infinite results of each dtype, signs of zero, NaN.
    row_scale, column_scale = scales(rng, shape[0]), scales(rng, shape[1])
    special = tensor([-0.0, 0.0, np.nan, np.inf, 1e-44, 2.0**-40, 2.0**-130, 2.0**90])
    column_scale[: len(special)] = special[: len(column_scale)]
    row_scale[1:4] = tensor([-0.0, np.nan, 2.0**-12])[: len(row_scale[1:4])]
    row_scale[4:6] = -row_scale[4:6]
    bias = tensor(rng.normal(size=shape[1]))
    bias[3:6] = tensor([-0.0, np.inf, -np.inf])[: len(bias[3:6])]
    for rows, columns, added, dtype in itertools.product(
        (None, row_scale, row_scale[:1]), (None, column_scale, column_scale[-1]), (None, *DTYPES), DTYPES
    ):
        options = {"row_scale": rows, "column_scale": columns, "dtype": dtype}
        options["bias"] = None if added is None else bias.to(added)
        expected = reference.epilogue(matrix, **options)
        for isa in ISAS:
            assert_same([cpu.epilogue(matrix, **options, isa=isa)], [expected], f"{isa} {options}")


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogue_of_whole_numbers_in_fp32(rng, shape):
    integers = tensor(rng.integers(-(2**24), 2**24, size=shape), torch.int32)
    others = tensor(rng.integers(-(2**30), 2**30, size=shape), torch.int32)
    integers[0, 0], others[-1, -1] = 0, -integers[-1, -1]
    whole = integers.float()
    whole[0, 0] = -0.0
    options = {"row_scale": -scales(rng, shape[0]), "column_scale": scales(rng, shape[1])}
    for dtype in DTYPES:
        for added, total in ((None, integers), (others, integers + others)):
            expected = [reference.epilogue(total, **options, dtype=dtype)]
            assert_same([reference.epilogue(whole, others=added, **options, dtype=dtype)], expected, "reference")
            for isa in ISAS:
                got = cpu.epilogue(whole, others=added, **options, dtype=dtype, isa=isa)
                assert_same([got], expected, f"{isa} {dtype} {added is None}")


@needs_compiler
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(rng, shape, dtype):
    codes = tensor(rng.integers(-128, 128, size=shape), torch.int8)
    # Usual scales, and those whose values pass the largest number of the dtype by less and by more than a scale.
    largest = torch.finfo(dtype).max
    special = [0.0, np.nan, 1e-42, largest / 127.5, largest / 127 * 1.003, largest / 126.5, largest / 100, 3e38]
    for name, count in (("row_scale", shape[0]), ("column_scale", shape[1]), ("row_scale", 1), ("column_scale", 1)):
        scale = scales(rng, count)
        drawn = rng.choice(special, size=count).astype(np.float32)
        scale = torch.where(torch.from_numpy(rng.uniform(size=count) < 0.3), torch.from_numpy(drawn), scale)
        expected = reference.dequantize(codes, **{name: scale}, dtype=dtype)
        given = {"row_scale": None, "column_scale": None, name: scale}
        assert torch.equal(bits_of(ops.dequantize(codes, **given, dtype=dtype)), bits_of(expected))
        for isa in ISAS:
            got = cpu.dequantize(codes, **{name: scale}, dtype=dtype, isa=isa)
            assert_same([got], [expected], f"{isa} {name} of {count}")
            strided = codes.repeat(1, 2)[:, : shape[1]]
            assert_same([cpu.dequantize(strided, **{name: scale}, dtype=dtype, isa=isa)], [expected], isa)


def test_epilogue_writes_where_it_is_told(rng):
    integers = tensor(rng.integers(-(2**20), 2**20, size=(5, 7)), torch.int32)
    scale, out = scales(rng, 5), torch.empty(9, 7, dtype=torch.bfloat16)
    expected = ops.epilogue(integers, row_scale=scale, dtype=torch.bfloat16)
    for module in (ops, reference):
        out.fill_(-1)
        got = module.epilogue(integers, row_scale=scale, dtype=torch.bfloat16, out=out[2:7])
        assert got.data_ptr() == out[2:7].data_ptr()
        assert torch.equal(out[2:7], expected)
        assert (out[[0, 1, 7, 8]] == -1).all()
    for wrong in (out[:5].float(), out[:4], out[:5].t().contiguous().t()):
        with pytest.raises(ValueError, match=r"epilogue\(out\): got .*bfloat16 of shape \(5, 7\)"):
            ops.epilogue(integers, row_scale=scale, dtype=torch.bfloat16, out=wrong)
