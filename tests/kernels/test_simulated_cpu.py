"""Layers in floating point on the CPU: the C++ kernels give the definitions' bits, and take what they have."""

import itertools
import random

import pytest
import torch

from ds_quant.base.number_formats import FORMATS, FOUR_SIX, SCALE_RULES
from ds_quant.kernels import build, native
from ds_quant.kernels.simulated import cpu, cpu_formats, cpu_rotation, ops, reference
from ds_quant.numerics.format import Format, Group, Integers, ScaleCodec, named_format
from ds_quant.numerics.integer import expand_scale
from ds_quant.numerics.random import fold_key

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
GROUPS = (Group("row"), Group("column"), Group("tensor"), Group("block", 16), Group("block", 32))
BLOCKS = (Group("block", 16), Group("block", 16, 16))
KEYS = (None, fold_key(5))
SHAPES = ((9, 64), (33, 50), (1, 40), (7, 1), (64, 96), (0, 5), (3, 0))

pytestmark = pytest.mark.skipif(not build.load().library, reason=f"no C++ kernels: {build.load().reason}")


def numbers(shape, dtype, *, odd=True):
    """Normal numbers with rows and columns of zeros, tiny and huge ones, an Inf and a NaN."""
    x = torch.randn(shape) * torch.rand(shape[0], 1).mul(6).exp()
    if odd and x.numel() > 300:
        x[1], x[:, 3] = 0, 0
        x[2, 5], x[4, 7], x[6] = torch.inf, torch.nan, 1e-41
    return x.to(dtype)


def assert_same(got, want):
    for mine, right in zip(got, want, strict=True):
        if isinstance(right, torch.Tensor):
            assert (mine.dtype, mine.shape) == (right.dtype, right.shape)
            assert torch.equal(mine.nan_to_num(nan=-7.5), right.nan_to_num(nan=-7.5))
        else:
            assert mine == right


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{group.granularity}{group.block_size}")
def test_quantizers_and_what_they_leave(group):
    for shape, dtype, bits, key in itertools.product(SHAPES, (FP32, BF16, FP16), (8, 4), (None, fold_key(5))):
        x, to = numbers(shape, dtype), Format(Integers(bits), group)
        for laid_out in (x, x.t().contiguous().t(), torch.cat((x, x), 1)[:, : shape[1]]):
            arguments = (laid_out, None, to, "nearest" if key is None else "stochastic", key)
            got, want = cpu.quantize(*arguments), reference.quantize(*arguments)
            assert_same(got, want)
            for target in (FP32, BF16, FP16):
                assert_same([cpu.dequantize(got, target)], [reference.dequantize(want, target)])


def test_factors_and_the_full_range():
    for shape in SHAPES:
        x = numbers(shape, BF16)
        by_column, by_row = torch.rand(shape[1]), torch.rand(shape[0], 1)
        for group, factor, full_range in itertools.product(
            GROUPS, (None, by_column, by_column.view(1, -1), by_row, torch.rand(1), torch.rand(1, 1)), (False, True)
        ):
            arguments = (x, factor, Format(Integers(8, full_range=full_range), group), "nearest", None)
            assert_same(cpu.quantize(*arguments), reference.quantize(*arguments))


@pytest.mark.parametrize("name", FORMATS)
def test_named_formats(name):
    """Elements in floating point and scales in 8 bits: all groups, rules, dtypes, roundings, odd sizes, odd numbers."""
    fmt = FORMATS[name]
    groups = BLOCKS if fmt.block_size else GROUPS
    rules = {"e8m0": SCALE_RULES, "e4m3": (FOUR_SIX, "") if name == "nvfp4" else ("",)}.get(fmt.scale, ("",))
    targets = itertools.cycle((FP32, BF16, FP16))
    for group, rule, shape, dtype, key in itertools.product(groups, rules, SHAPES, (FP32, BF16, FP16), KEYS):
        to = named_format(name, group.granularity, group.block_size, block_rows=group.block_rows, scale_rule=rule)
        x, factor = numbers(shape, dtype), random.choice((None, torch.rand(shape[1]), torch.rand(shape[0], 1)))
        laid_out = random.choice((x, x.t().contiguous().t(), torch.cat((x, x), 1)[:, : shape[1]]))
        arguments = (laid_out, factor, to, "nearest" if key is None else "stochastic", key)
        got, want = cpu.quantize(*arguments), reference.quantize(*arguments)
        assert_same(got, want)
        target = next(targets)
        assert_same([cpu.dequantize(got, target)], [reference.dequantize(want, target)])


@pytest.mark.parametrize("name", FORMATS)
def test_named_formats_on_each_instruction_set(name):
    """Rows of several pieces, a denormal scale, ties, and numbers that round to -0."""
    x = torch.randn(7, 2100) * torch.rand(7, 1).mul(20).exp()
    x[1] = torch.arange(2100) % 40 * 0.25 - 5
    x[2], x[3, ::2], x[4] = 1e-42, -1e-30, -0.0
    for isa, key in itertools.product(native.ISAS[: native.library().widest + 1], KEYS):
        to = named_format(name, "row")
        want = reference.quantize(x, None, to, "nearest" if key is None else "stochastic", key)
        assert_same(cpu_formats.quantize(x, to, key, isa), want)
        for target in (FP32, BF16, FP16):
            got = cpu_formats.dequantize(want, target, isa)
            assert_same([got], [reference.dequantize(want, target)])
            assert torch.equal(got.signbit(), reference.dequantize(want, target).signbit())


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.elements == "integer"])
@pytest.mark.parametrize("quantize", [reference.quantize, cpu.quantize], ids=["definition", "C++"])
def test_integers_have_no_code_without_its_negative(quantize, name):
    """-128 or -8 would be the nearest code, or one of two, of what a block's scale makes of some elements."""
    to = named_format(name)
    n = to.elements.levels
    # Of mxint8 blocks whose largest number is just below the next power of two; of nvint4 such whose scale e4m3 rounds
    # down, so that stochastic rounding may leave 7 for 8.
    x = torch.randn(64, 320)
    x[:8, ::32] = -127.9
    for rounding, key in zip(("nearest", "stochastic"), KEYS, strict=True):
        q = quantize(x, None, to, rounding, key)
        steps = x / expand_scale(q)
        assert (steps < -(n + 0.25)).any(), "nothing that would round to the code"
        assert int(q.codes.min()) == -n
        assert int(q.codes.max()) == n
        if key is None:
            mirrored = quantize(-x, None, to, rounding, key)
            assert torch.equal(mirrored.codes, -q.codes)


def test_what_is_left_to_the_definitions(monkeypatch):
    """Asymmetric codes, blocks of integers that do not cut rows evenly, other dimensions; nothing else."""
    x, seen = torch.randn(20, 48), []
    real = reference.quantize
    monkeypatch.setattr(reference, "quantize", lambda *a: seen.append(a[2]) or real(*a))
    left = [
        Format(Integers(8, symmetric=False), Group("row")),
        Format(Integers(4), Group("block", 32)),
        Format(Integers(4), Group("block", 16, 16)),
    ]
    for to in left:
        assert_same(cpu.quantize(x, None, to, "nearest", None), real(x, None, to, "nearest", None))
        q = real(x, None, to, "nearest", None)
        assert_same([cpu.dequantize(q, BF16)], [reference.dequantize(q, BF16)])
    assert seen == left
    cube = torch.randn(2, 3, 4)
    cpu.quantize(cube, None, Format(Integers(8), Group("row")), "nearest", None)
    assert len(seen) == len(left) + 1
    for group in (Group("row"), Group("column"), Group("tensor"), Group("block", 16)):
        cpu.quantize(x, None, Format(Integers(8), group), "nearest", None)
    for to in (Format(Integers(4), Group("block", 16), ScaleCodec("e8m0")), named_format("nvfp4")):
        cpu.quantize(x, None, to, "nearest", None)
    assert len(seen) == len(left) + 1
    with pytest.raises(ValueError, match=r"quantize\(x\): got torch.float64"):
        cpu.quantize(x.double(), None, Format(Integers(8), Group("row")), "nearest", None)
    with pytest.raises(ValueError, match=r"quantize\(key\): got None"):
        cpu.quantize(x, None, named_format("mxfp8"), "stochastic", None)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_the_end_of_products(dtype):
    for rows, columns in ((5, 40), (40, 5), (1, 8), (0, 3), (33, 129)):
        y = numbers((rows, columns), FP32)
        by_row = (None, torch.rand(rows, 1), torch.rand(1, 1))
        by_column = (None, torch.rand(columns, 1), torch.rand(1, 1))
        for a, b, bias in itertools.product(
            by_row, by_column, (None, torch.randn(columns), torch.randn(columns).to(BF16))
        ):
            want = reference.finish(y.clone(), a, b, bias, dtype)
            assert_same([cpu.finish(y.clone(), a, b, bias, dtype)], [want])
            assert_same([cpu.finish(y.t().contiguous().t(), a, b, bias, dtype)], [want])


def test_the_cpu_takes_them(monkeypatch):
    device = torch.device("cpu")
    assert ops.quantize.on(device) is cpu.quantize
    assert ops.dequantize.on(device) is cpu.dequantize
    assert ops.finish.on(device) is cpu.finish
    monkeypatch.setenv("DS_QUANT_KERNELS", "reference")
    assert ops.quantize.on(device) is reference.quantize


@pytest.mark.parametrize("block", [1, 2, 8, 16, 32, 128, 1024, 4096, 8192])
def test_rotated_rows(block):
    """Rows shorter than a block, with a short block at their end, and of no elements; drawn signs and the same ones."""
    widths = {0, 1, 7, block, 2 * block, 2 * block + block // 2 + 1, random.randrange(1, 3 * block + 2)}
    for width, rows, dtype, key in itertools.product(widths, (0, 1, 5), (FP32, BF16, FP16), KEYS):
        x = torch.randn(rows, width) * 100
        if rows > 4 and width:
            x[1], x[2, 0], x[3, -1], x[4] = -0.0, torch.inf, torch.nan, -1e-41
        x = x.to(dtype)
        for laid_out in (x, x.t().contiguous().t(), torch.cat((x, x), 1)[:, :width]):
            want = reference.rotate_rows(laid_out, block, key)
            assert want.is_contiguous()
            assert_same([ops.rotate_rows(laid_out, block, key)], [want])
            for isa in native.ISAS[: native.library().widest + 1]:
                got = cpu_rotation.rotate_rows(laid_out, block, key, isa=isa)
                assert_same([got], [want])
                assert torch.equal(got.signbit()[~got.isnan()], want.signbit()[~want.isnan()]), "zeros have signs"


def test_threads_change_no_bit_of_rotated_rows():
    x, before = torch.randn(300, 700), torch.get_num_threads()
    want = reference.rotate_rows(x, 128, fold_key(3))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same([cpu_rotation.rotate_rows(x, 128, fold_key(3))], [want])
    finally:
        torch.set_num_threads(before)
    assert ops.rotate_rows.on(torch.device("cpu")) is cpu.rotate_rows
