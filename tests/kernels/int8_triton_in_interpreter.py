"""The int8 products of `triton_int8` in Triton's interpreter, which numpy computes: exact sums, nothing fused.

`test_int8_triton.py` runs this file in a process of its own, because TRITON_INTERPRET must be set before triton is
imported. The interpreter's one departure: it truncates where a GPU rounds to bf16.
"""

import itertools

import numpy as np
import pytest
import torch

from ds_quant.kernels.int8 import triton as kernels
from ds_quant.kernels.int8.triton import Tile
from ds_quant.numerics import products as reference

SMALL = Tile(16, 32, 32, 4, 2)
"""Not one of the table: many programs for small matrices."""
LAYOUTS = tuple(itertools.product((False, True), repeat=2))


def codes(rng, shape, low=-127):
    return torch.from_numpy(rng.integers(low, 128, size=shape, dtype=np.int8))


def laid_out(matrix, is_transposed):
    """The same matrix, contiguous along the other dimension where `is_transposed`, with 77 behind each row and all."""
    stored = matrix.t() if is_transposed else matrix
    rows, columns = stored.shape
    wide = torch.full((rows + 1, (columns + 31) // 16 * 16), 77, dtype=torch.int8)
    wide[:rows, :columns] = stored
    view = wide[:rows, :columns]
    return view.t() if is_transposed else view


def exact(a, b):
    return (a.to(torch.int64) @ b.to(torch.int64)).to(torch.int32)


def scales(rng, count):
    return torch.from_numpy(10.0 ** rng.uniform(-4, 1, size=count)).float()


def as_stored(y, dtype):
    """fp32 as the interpreter stores it."""
    if dtype == torch.bfloat16:
        return (y.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return y.to(dtype)


def assert_same(got, expected, context=""):
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), context
    assert got.is_contiguous()
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert same.all(), f"{context}: {(~same).sum()} differ, first {(~same).nonzero()[0]}"


@pytest.fixture
def use(monkeypatch):
    def set_tile(tile):
        monkeypatch.setattr(kernels, "choose_tile", lambda *_: tile)

    return set_tile


# Tiles that are even and not in each dimension, whole bands of them and a rest, less than one tile.
SHAPES = ((1, 1, 1), (16, 32, 32), (17, 33, 48), (32, 64, 48), (8 * 16 + 5, 70, 33), (300, 40, 64))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "".join("NT"[side] for side in layout))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(rng, shape, layout, use):
    use(SMALL)
    m, n, k = shape
    a, b = codes(rng, (m, k), low=-128), codes(rng, (k, n))
    assert_same(kernels.int_mm(laid_out(a, layout[0]), laid_out(b, layout[1])), exact(a, b))


@pytest.mark.parametrize(
    "tile", dict.fromkeys([*kernels.TILES, *kernels.AMPERE_TILES, *kernels.BLACKWELL_TILES]), ids=str
)
def test_tiles_of_the_table(rng, tile, use):
    use(tile)
    for (m, n, k), layout in (
        ((tile.m, tile.n, tile.k), (False, True)),
        ((tile.m + 16, tile.n + 16, tile.k + 16), (True, False)),
        ((tile.m + 3, tile.n - 5, 2 * tile.k + 16), (False, True)),
        ((tile.m + 16, 2 * tile.n, 3 * tile.k + 16), (False, False)),
    ):
        a, b = codes(rng, (m, k)), codes(rng, (k, n))
        row_scale, column_scale, bias = scales(rng, m), scales(rng, n), scales(rng, n)
        options = {"row_scale": row_scale, "column_scale": column_scale, "bias": bias, "dtype": torch.float32}
        got = kernels.scaled_matmul(laid_out(a, layout[0]), laid_out(b, layout[1]), **options)
        assert_same(got, reference.epilogue(exact(a, b), **options), f"{m} {n} {k} {layout}")


def test_largest_sums(rng, use):
    """As far as the contraction may go, with the largest codes of all signs."""
    use(SMALL._replace(k=512))
    length = 131072
    a = torch.full((6, length), 127, dtype=torch.int8)
    a[1], a[2, ::2], a[3, : length // 2] = -127, -127, -127
    a[4] = codes(rng, length, low=-128)
    a[5] = -128
    b = torch.full((length, 3), 127, dtype=torch.int8)
    b[:, 1], b[::2, 2] = -127, -127
    y = kernels.int_mm(a, b)
    assert_same(y, exact(a, b))
    assert y.abs().max() == 128 * 127 * length


def each_once(*kinds):
    """Combinations in which each of the kinds is."""
    return itertools.islice(zip(*map(itertools.cycle, kinds), strict=True), max(map(len, kinds)))


@pytest.mark.parametrize(
    ("dtype", "length"),
    [(torch.float32, 64), (torch.float32, 0), (torch.bfloat16, 64), (torch.float16, 64)],
    ids=str,
)
def test_scales_and_bias(rng, dtype, length, use):
    use(SMALL)
    m, n = 21, 40
    a, b = codes(rng, (m, length)), codes(rng, (length, n))
    rows, columns, bias = scales(rng, m), scales(rng, n), torch.from_numpy(rng.normal(size=n)).float()
    rows[3], columns[5], bias[7] = 0.0, np.nan, -0.0
    if dtype != torch.bfloat16:  # the interpreter has denormals of its own
        columns[6] = 2.0**-130
    kinds = (None, rows, rows[:1]), (None, columns, columns[9]), (None, bias, bias.bfloat16(), bias.half())
    whole = length and dtype == torch.float32
    for row_scale, column_scale, added in itertools.product(*kinds) if whole else each_once(*kinds):
        options = {"row_scale": row_scale, "column_scale": column_scale, "bias": added}
        with np.errstate(over="ignore"):
            got = kernels.scaled_matmul(a, b, **options, dtype=dtype)
        expected = reference.epilogue(exact(a, b), **options, dtype=torch.float32)
        assert_same(got, as_stored(expected, dtype), f"{options}")


def test_strided_scales(rng):
    a, b = codes(rng, (70, 33)), codes(rng, (33, 20))
    rows, columns = scales(rng, 140)[::2], scales(rng, 20).reshape(1, 20)
    for row_scale in (rows, rows.reshape(-1, 1), rows[:1].expand(70), rows[1].reshape(1, 1)):
        options = {"row_scale": row_scale, "column_scale": columns, "dtype": torch.float32}
        assert_same(kernels.scaled_matmul(a, b, **options), reference.epilogue(exact(a, b), **options))


@pytest.mark.parametrize("shape", [(0, 5, 7), (5, 0, 7), (0, 0, 0), (3, 5, 0)], ids=str)
def test_without_elements(shape):
    m, n, k = shape
    a, b = torch.zeros(m, k, dtype=torch.int8), torch.zeros(k, n, dtype=torch.int8)
    assert_same(kernels.int_mm(a, b), torch.zeros(m, n, dtype=torch.int32))
    bias = torch.arange(n).float()
    y = kernels.scaled_matmul(a, b, row_scale=torch.ones(m), column_scale=torch.ones(n), bias=bias, dtype=torch.float16)
    assert_same(y, bias.half().expand(m, n).contiguous())


def test_what_is_read_in_place(rng):
    """Operands [M or N, K]; a copy is contiguous along K and ends with zeros."""
    whole = codes(rng, (65, 96))[1:]
    in_place = (whole, whole[3:], whole[:, 16:64], whole[::3], whole.t(), whole.t()[16:48], whole[:1].expand(7, 96))
    copied = (
        *(whole[:, :33], whole[:, 1:33], whole[:, ::2], whole.t()[:33], whole[:33].t(), whole[:, 5:6].expand(64, 32)),
        *(codes(rng, (8, 33)), codes(rng, (33, 8)).t(), codes(rng, 64 * 32 + 1)[1:].reshape(64, 32)),
        torch.empty(2 * kernels.LARGEST_STRIDE, dtype=torch.int8).as_strided((2, 16), (kernels.LARGEST_STRIDE + 16, 1)),
    )
    for operand in in_place:
        assert kernels._readable(operand) is operand
    for operand in copied:
        copy, length = kernels._readable(operand), operand.shape[1]
        assert copy.shape == (operand.shape[0], -(-length // 16) * 16)
        assert copy.is_contiguous()
        assert torch.equal(copy[:, :length], operand)
        assert not copy[:, length:].any()
    for operand in in_place + copied[:-1]:
        other = codes(rng, (operand.shape[1], 18))
        assert_same(kernels.int_mm(operand, other), exact(operand, other))
        assert_same(kernels.int_mm(other.t(), operand.t()), exact(other.t(), operand.t()))


def test_neighbours_are_left_alone(rng, use):
    use(SMALL)
    m, n = 19, 37
    a, b, big = codes(rng, (m, 48)), codes(rng, (48, n)), torch.full((m * n + 4096,), 77, dtype=torch.int32)
    call = kernels.launch(a, b, big[: m * n].view(m, n))
    call.kernel[call.grid](*call.arguments, **call.options)
    assert_same(big[: m * n].view(m, n), exact(a, b))
    assert (big[m * n :] == 77).all()


def test_operands_of_more_than_2_to_the_31_bytes(rng, monkeypatch, tmp_path):
    """Rows that lie far from each other, in a file that takes room where it is written only."""
    from triton.runtime import interpreter

    # It would copy every tensor onto itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    stride, m = kernels.LARGEST_STRIDE, 520
    size = stride * (m - 1) + 16
    assert size > 2**31
    big = torch.from_file(str(tmp_path / "a"), shared=True, size=size, dtype=torch.int8)
    a = big.as_strided((m, 16), (stride, 1))
    a.copy_(codes(rng, (m, 16)))
    b = codes(rng, (16, 16))
    assert kernels._readable(a) is a
    assert_same(kernels.int_mm(a, b), exact(a, b))
    assert_same(kernels.int_mm(b, a.t()), exact(b, a.t()))
