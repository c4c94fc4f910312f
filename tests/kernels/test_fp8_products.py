"""Products of fp8 matrices: torch's kernels, in both ways, against their definition; what is not left to them."""

import itertools

import pytest
import torch

from ds_quant.kernels import fp8_units as units_module
from ds_quant.kernels.fp8 import aten, ops
from ds_quant.kernels.fp8_units import PAIRS, Fp8Units, fp8_units

CPU = torch.device("cpu")
SHAPES = ((1, 1, 1), (5, 37, 19), (33, 64, 48), (16, 300, 17))


def drawn(rows, columns, dtype):
    largest = torch.finfo(dtype).max
    x = torch.randn(rows, columns) * torch.exp(3 * torch.randn(rows, 1))
    x[torch.rand(rows, columns) < 0.1] = 0.0
    return x.clamp(-largest, largest).to(dtype)


def vectors(count):
    """Of each index, of all, none. With zeros, denormal and large numbers."""
    many = torch.rand(count) * torch.exp(20 * torch.randn(count)).clamp(1e-30, 1e3)
    many[torch.rand(count) < 0.2] = 0.0
    return many, torch.rand(1), None


def assert_is(got, a, b, row_scale, column_scale, bias, dtype):
    """Within the roundings of K sums, two scales and a bias in fp32, and one to dtype."""
    sums, magnitude = a.double() @ b.double().t(), a.double().abs() @ b.double().abs().t()
    for scale, shape in ((row_scale, (-1, 1)), (column_scale, (1, -1))):
        if scale is not None:
            sums, magnitude = (each * scale.double().reshape(shape) for each in (sums, magnitude))
    if bias is not None:
        sums, magnitude = sums + bias.double(), magnitude + bias.double().abs()
    bound = (a.shape[1] + 4) * 2.0**-24 * magnitude
    bound = bound + torch.finfo(dtype).eps / 2 * (sums.abs() + bound) + 4 * torch.finfo(dtype).tiny
    assert got.dtype == dtype
    assert got.shape == sums.shape
    assert got.is_contiguous()
    assert ((got.double() - sums).abs() <= bound).all(), ((got.double() - sums).abs() / bound).max()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("way", ["sums", "scaled"])
def test_both_ways(pair, way):
    """Of any size and strides. `scaled` is what CUDA takes for bf16."""
    assert fp8_units(CPU).multiplies(*pair)
    assert ops.fp8_matmul.on(CPU) is aten.fp8_matmul
    for m, k, n in SHAPES:
        a, b = drawn(m, k, pair[0]), drawn(n, k, pair[1])
        for row_scale, column_scale in itertools.product(vectors(m), vectors(n)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16) if way == "sums" else (torch.bfloat16,):
                for bias in (None, torch.randn(n).to(dtype)):
                    given = (row_scale, column_scale, bias)
                    if way == "sums":
                        turned = a.t().contiguous().t(), b.t().contiguous().t()
                        got = ops.fp8_matmul(a, b, *given, dtype)
                        assert torch.equal(got, ops.fp8_matmul(*turned, *given, dtype))
                    else:
                        left, right = aten.aligned(a), aten.aligned(b, rows=True)
                        assert left.shape[1] % 16 == right.shape[0] % 16 == 0
                        got = aten.scaled(left, right, *given)[:, :n].contiguous()
                    if dtype != torch.float16:
                        assert_is(got, a, b, *given, dtype)
                        assert_is(ops.fp8_matmul.reference(a, b, **named(given), dtype=dtype), a, b, *given, dtype)


def named(given):
    return dict(zip(("row_scale", "column_scale", "bias"), given, strict=True))


def test_groups_that_are_not_finite_stay_alone():
    a, b = drawn(6, 40, torch.float8_e4m3fn), drawn(7, 40, torch.float8_e4m3fn)
    rows, columns = torch.rand(6), torch.rand(7)
    rows[2], columns[5] = torch.nan, torch.nan
    want = torch.zeros(6, 7, dtype=torch.bool)
    want[2], want[:, 5] = True, True
    scaled = aten.scaled(aten.aligned(a), aten.aligned(b, rows=True), rows, columns, None)[:, :7]
    for y in (ops.fp8_matmul(a, b, rows, columns, None, torch.float32), scaled):
        assert torch.equal(y.isnan(), want)


@pytest.mark.parametrize("shape", [(0, 16, 8), (8, 0, 8), (8, 16, 0)])
def test_nothing_to_multiply(shape):
    m, k, n = shape
    a, b = drawn(m, k, torch.float8_e5m2), drawn(n, k, torch.float8_e4m3fn)
    bias = torch.randn(n)
    y = ops.fp8_matmul(a, b, torch.ones(m), None, bias, torch.float32)
    assert torch.equal(y, bias.expand(m, n))


def test_what_a_device_cannot_do_is_left_to_the_definition(monkeypatch):
    def refuses(a, b, *scales, **options):
        if torch.float8_e5m2 in (a.dtype, b.dtype):
            raise RuntimeError("no such numbers")
        return real(a, b, *scales, **options) + (1 if a.shape == (32, 16) else 0)

    real = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    found = units_module.fp8_units.__wrapped__(CPU)
    assert found.sums[0] == "gives wrong results"
    assert "raises RuntimeError: no such numbers" in found.sums[1]
    assert found.line().startswith("fp8 products run as simulated ones: torch._scaled_mm of e4m3fn x e4m3fn gives")
    monkeypatch.setattr(aten, "fp8_units", lambda device: found)
    a, b = drawn(8, 16, torch.float8_e5m2), drawn(8, 16, torch.float8_e4m3fn)
    want = ops.fp8_matmul.reference(a, b, dtype=torch.float32)
    assert torch.equal(ops.fp8_matmul(a, b, None, None, None, torch.float32), want)
    partly = Fp8Units("cuda", ("is exact", "is exact", "raises X: y"), ("is exact",) * 3)
    assert "run on tensor cores; others as simulated ones (torch._scaled_mm of e4m3fn x e5m2 raises" in partly.line()
    assert not partly.multiplies(torch.float8_e5m2, torch.float8_e5m2)


def test_refusals():
    a = drawn(4, 16, torch.float8_e4m3fn)
    for arguments, message in (
        ((a.float(), a, None, None, None), r"fp8_matmul\(a\): got torch.float32"),
        ((a, a[:, :8], None, None, None), "as many columns in both"),
        ((a, a, torch.ones(3), None, None), r"row_scale\): got shape \(3,\); allowed: shape \(4,\), or one element"),
        ((a, a, None, None, torch.ones(1)), r"bias\): got shape \(1,\); allowed: shape \(4,\); flatten"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.fp8_matmul(*arguments, torch.float32)


def test_the_choice_of_other_kernels(monkeypatch):
    monkeypatch.setenv("DS_QUANT_KERNELS", "reference")
    assert ops.fp8_matmul.on(CPU) is ops.fp8_matmul.reference
    monkeypatch.setenv("DS_QUANT_KERNELS", "compiled")
    assert ops.fp8_matmul.on(torch.device("cuda")) is aten.fp8_matmul
