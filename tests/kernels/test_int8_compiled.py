"""Operands and results of int8 products under torch.compile: the reference's bits, and how often it compiles.

On the CPU here, and on a GPU where there is one.
"""

import itertools

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ds_quant.kernels import compiling
from ds_quant.kernels.int8 import compiled as kernels
from ds_quant.kernels.int8 import matmul
from ds_quant.numerics import products as reference
from ds_quant.numerics.integer import symmetric_levels
from ds_quant.numerics.random import fold_key

LEVELS = symmetric_levels(8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whole vectors and their rests, square, small ones that are not compiled, empty ones.
SHAPES = ((9, 64), (130, 100), (33, 33), (2, 3), (3, 2), (7, 5000), (1, 1), (1, 50), (70, 1), (0, 5), (5, 0), (0, 0))
KEYS = (fold_key(1), fold_key(2, step=3))
NAMES = ("rows", "columns", "both", "tensor", "full rows", "full tensor")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def to(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


def numbers(rng, shape, dtype=torch.float32):
    return torch.from_numpy(rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 3)).to(dtype)


def scales(rng, count):
    return torch.from_numpy(10.0 ** rng.uniform(-4, 1, size=count)).float()


def assert_same(got, expected, context=""):
    """Strides as well, of contiguous tensors. Of NaNs, any is as good as another."""
    for number, (left, right) in enumerate(zip(got, expected, strict=True)):
        right = right.contiguous()
        assert (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride()), context
        same = (left == right) | (left.isnan() & right.isnan())
        if left.is_floating_point():
            same &= (left.signbit() == right.signbit()) | left.isnan()
        assert same.all(), f"{context} result {number}: {(~same).sum()} differ, first {(~same).nonzero()[0]}"


def operands(module, x, bits, column_scale, row_scale, keys, names=NAMES):
    first, second = keys or (None, None)
    levels, full = symmetric_levels(bits), symmetric_levels(bits, full_range=True)
    both = {"row_key": first, "column_key": second}
    calls = {
        "rows": lambda: module.quantize_rows(x, levels, column_scale=column_scale, key=first),
        "columns": lambda: module.quantize_columns(x, levels, row_scale=row_scale, key=second),
        "both": lambda: module.quantize_both(x, levels, column_scale=column_scale, row_scale=row_scale, **both),
        "tensor": lambda: module.quantize_tensor(x, levels, key=first),
        "full rows": lambda: module.quantize_rows(x, full, column_scale=column_scale, key=first),
        "full tensor": lambda: module.quantize_tensor(x, full, key=first),
    }
    return [result for name in names for result in calls[name]()]


def check(device, x, bits, column_scale, row_scale, keys, context="", names=NAMES):
    x, column_scale, row_scale, *keys = to(device, x, column_scale, row_scale, *(keys or ()))
    arguments = (x, bits, column_scale, row_scale, tuple(keys) or None, names)
    assert_same(operands(kernels, *arguments), operands(reference, *arguments), context)


# Each combination of functions, dtype and rounding compiles for some seconds. "both" is of rows and of columns.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "keys", "names"),
    [
        (torch.float32, None, NAMES),
        (torch.float32, KEYS, ("both", "full tensor")),
        (torch.bfloat16, None, ("both",)),
        (torch.bfloat16, KEYS, ("rows",)),
        (torch.float16, None, ("both",)),
    ],
    ids=["fp32", "fp32 stochastic", "bf16", "bf16 stochastic", "fp16"],
)
def test_quantizers(rng, dtype, keys, names, device):
    for shape in SHAPES:
        x = numbers(rng, shape, dtype)
        check(device, x, 8, scales(rng, shape[1]), scales(rng, shape[0]), keys, f"{shape}", names)


@pytest.mark.parametrize("device", DEVICES)
def test_scales(rng, device):
    """None, one number in all its shapes, strided."""
    x = numbers(rng, (20, 37))
    one, many = scales(rng, 1), scales(rng, 80)
    for column_scale, row_scale in (
        *((None, None), (one, one.reshape(())), (one.reshape(()), one.reshape(1, 1))),
        *((many[:74:2], many[:60:3]), (one.expand(37), many[5:25])),
    ):
        check(device, x, 8, column_scale, row_scale, None, names=("both",))


@pytest.mark.parametrize("device", DEVICES)
def test_bits(rng, device):
    x = numbers(rng, (6, 37), torch.bfloat16)
    for bits in (2, 4):
        check(device, x, bits, scales(rng, 37), scales(rng, 6), None, f"{bits}", ("rows",))


@pytest.mark.parametrize("device", DEVICES)
def test_strides(rng, device):
    whole = numbers(rng, (90, 150))
    for x in (whole[3:], whole[:, 3:120], whole[::3], whole.t(), whole[:, ::2], whole[:1].expand(40, 150)):
        check(device, x, 8, scales(rng, x.shape[1]), scales(rng, x.shape[0]), KEYS, f"{x.shape} {x.stride()}")


@pytest.mark.parametrize("device", DEVICES)
def test_extremes(rng, device):
    """Rows and columns of zeros, of denormals, and with what is not finite, beside usual ones."""
    for extreme, keys in itertools.product(
        (0.0, 2.0**-149, 1e-44, 2.0**-127, 1e-37, 3.4e38, np.inf, -np.inf, np.nan), (None, KEYS)
    ):
        x = numbers(rng, (20, 40))
        with np.errstate(all="ignore"):
            x[:5] = torch.from_numpy(extreme * rng.choice([-1.0, 0.0, 0.3, 0.5, 1.0], size=(5, 40)))
        x[9] = 0.0
        x[15, 20] = extreme
        column_scale, row_scale = scales(rng, 40), scales(rng, 20)
        check(device, x, 8, torch.ones(40), torch.ones(20), keys, f"{extreme}")
        column_scale[3], row_scale[7], column_scale[30], row_scale[11] = abs(extreme), abs(extreme), 3e38, 0.0
        check(device, x, 8, column_scale, row_scale, keys, f"{extreme} scales")


@pytest.mark.parametrize("device", DEVICES)
def test_ties(rng, device):
    """Steps that lie between two codes, and next to that: the division must round to nearest."""
    halves = np.arange(-126.5, 127)
    for absmax, levels in itertools.product((127.0, 127.5, 1.0, *rng.uniform(1, 2, size=5)), (127, 127.5)):
        scale = np.float32(absmax) / np.float32(levels)
        x = (halves * scale).astype(np.float32).view(np.int32)
        x = (x + rng.integers(-2, 3, size=(40, 1), dtype=np.int32)).view(np.float32)
        x[:, 77], x[:20, 78] = absmax, -absmax
        check(device, torch.from_numpy(x), 8, torch.ones(254), torch.ones(40), None, f"{absmax} {levels}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue(rng, dtype, device):
    for shape in SHAPES:
        integers = (rng.choice([-1, 1], size=shape) * 2.0 ** rng.uniform(0, 31, size=shape)).clip(-(2**31), 2**31 - 1)
        products = torch.from_numpy(integers.astype(np.int32))
        row_scale, column_scale = scales(rng, shape[0]), scales(rng, shape[1])
        column_scale[1:4] = torch.tensor([np.nan, 1e-44, 2.0**90])[: len(column_scale[1:4])]
        # Sums that cancel to the rounding error of the products, which a fused sum would not have.
        bias = -(products[:1].float() * row_scale[:1].reshape(-1, 1) * column_scale).sum(0)
        for rows, columns, added in (
            *((row_scale, column_scale, bias), (None, None, None)),
            *((row_scale[:1], column_scale[:1], bias.bfloat16()), (row_scale, None, bias.half())),
        ):
            matrix, rows, columns, added = to(device, products, rows, columns, added)
            options = {"row_scale": rows, "column_scale": columns, "bias": added, "dtype": dtype}
            for view in (matrix, matrix.t().contiguous().t()):
                got, expected = kernels.epilogue(view, **options), reference.epilogue(view, **options)
                assert_same([got], [expected], f"{shape} {options}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(rng, dtype, device):
    largest = torch.finfo(dtype).max
    special = torch.tensor([0.0, np.nan, 1e-42, largest / 127 * 1.003, largest / 126.5, largest / 100])
    for shape in SHAPES:
        codes = torch.from_numpy(rng.integers(-128, 128, size=shape)).to(torch.int8)
        for name, count in (("row_scale", shape[0]), ("column_scale", shape[1]), ("column_scale", 1)):
            scale = scales(rng, count)
            scale[1 : 1 + len(special)] = special[: len(scale[1 : 1 + len(special)])]
            matrix, scale = to(device, codes, scale)
            got = kernels.dequantize(matrix, **{name: scale}, dtype=dtype)
            assert_same([got], [reference.dequantize(matrix, **{name: scale}, dtype=dtype)], f"{shape} {name}")


def test_products_are_never_held_as_a_whole(rng, monkeypatch):
    """Rows at a time, with the bits of all of them at once; one row, none, and a contraction that takes int64."""
    held, int_mm = [], matmul.int_mm

    def record(a, b):
        held.append(int_mm(a, b))
        return held[-1]

    record.on = int_mm.on
    monkeypatch.setattr(matmul, "int_mm", record)
    monkeypatch.setattr(matmul, "LEAST_ROWS", 4)
    monkeypatch.setattr(matmul, "_DEVICE_SCRATCH_BYTES", 4 * 30 * 7)
    for m, k, limit in ((23, 40, 131_072), (1, 40, 131_072), (0, 40, 131_072), (23, 40, 16)):
        monkeypatch.setattr(matmul, "MAX_CONTRACTION", limit)
        a, b = (torch.from_numpy(rng.integers(-127, 128, size=size)).to(torch.int8) for size in ((m, k), (30, k)))
        options = {"column_scale": scales(rng, 30), "bias": None, "dtype": torch.bfloat16}
        row_scale = scales(rng, m)
        held.clear()
        got = kernels.scaled_matmul(a, b.t(), row_scale=row_scale, **options)
        assert len(held) == max(1, -(-m // (7 if limit > k else 4)))
        products = (a.long() @ b.t().long()).int()
        assert torch.equal(got, reference.epilogue(products, row_scale=row_scale, **options))


def test_autograd_sees_nothing(rng):
    x, scale = numbers(rng, (5, 40)).requires_grad_(), scales(rng, 40).requires_grad_()
    bias = torch.nn.Parameter(numbers(rng, 40))
    products = torch.from_numpy(rng.integers(-1000, 1000, size=(5, 40))).int()
    options = {"column_scale": scale, "bias": bias, "dtype": torch.bfloat16}
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            got = (*kernels.quantize_rows(x, LEVELS, column_scale=scale), kernels.epilogue(products, **options))
            expected = (
                *reference.quantize_rows(x, LEVELS, column_scale=scale),
                reference.epilogue(products, **options),
            )
        assert_same(got, expected)
        assert not any(t.requires_grad for t in got)


@pytest.fixture
def counters(monkeypatch):
    """By function and constant, a backend of torch.compile that counts compilations and runs operations as they are."""
    compiled, found = compiling.compiled_with, {}

    def count(*kind):
        return compiled(*kind, backend=found.setdefault(kind, CompileCounter()))

    monkeypatch.setattr(kernels, "compiled_with", count)
    yield found
    compiled.cache_clear()


def test_nothing_compiles_again(rng, counters):
    """For new shapes, numbers of scales that happen to be others' sizes, values and keys."""
    shapes = [(9, 64), (64, 9), (64, 64), (2, 2), (2, 9), (9, 2), (768, 3072), (3072, 768), (1, 9), (9, 1), (0, 9)]
    for number, shape in enumerate(shapes):
        x, keys = numbers(rng, shape, torch.bfloat16), (fold_key(number), fold_key(2**63 + number))
        column_scale, row_scale = scales(rng, shape[1]), scales(rng, shape[0])
        arguments = (x, 8, column_scale, row_scale, keys)
        assert_same(operands(kernels, *arguments), operands(reference, *arguments), f"{shape}")
        kernels.epilogue(
            x.int(), row_scale=row_scale, column_scale=column_scale, bias=column_scale, dtype=torch.bfloat16
        )
    assert len(counters) == 7
    assert {counter.frame_count for counter in counters.values()} == {1}


def test_square_first_compiles_once_more(rng, counters):
    for shape in ((64, 64), (32, 32), (9, 64), (64, 9), (2, 2), (40, 40)):
        arguments = (numbers(rng, shape), 8, scales(rng, shape[1]), scales(rng, shape[0]), KEYS)
        operands(kernels, *arguments)
    assert max(counter.frame_count for counter in counters.values()) <= 2


@torch._dynamo.config.patch(accumulated_recompile_limit=3)
def test_limits_of_compilations_are_each_functions_own(rng, counters):
    """Kinds of calls that share a code object would add up to the limit, and raise."""
    x = numbers(rng, (3, 8))
    for levels, key in itertools.product((127.0, 127.5, 7.0), (None, KEYS[0])):
        kernels.quantize_rows(x, levels, key=key)
        kernels.quantize_columns(x, levels, key=key)
    assert [counter.frame_count for counter in counters.values()] == [2] * 6
