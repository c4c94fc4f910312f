"""Products of int8 matrices are exact on every way, and what a layer makes of them is the reference's."""

import logging
import os
import platform
import random
import subprocess
import sys

import pytest
import torch

from ds_quant.kernels import integer_units
from ds_quant.kernels.int8 import aten, cpu_parts, matmul, ops
from ds_quant.kernels.int8.matmul import MAX_CONTRACTION, fp32_products, int_mm
from ds_quant.numerics import products as reference
from ds_quant.numerics.random import fold_key

CPU = torch.device("cpu")
UNITS = {
    "integer units": integer_units.IntegerUnits(is_exact=True, names="", speed=2.0),
    "slow": integer_units.IntegerUnits(is_exact=True, names="", speed=0.1),
    "wrong": integer_units.IntegerUnits(is_exact=False, names=""),
}

SHAPES = (
    *((1, 1, 1), (1, 64, 5), (5, 1, 3), (33, 40, 1), (5, 7, 3), (16, 8, 8)),
    *((17, 33, 65), (31, 1030, 9), (64, 96, 48), (3, 2050, 1)),
)
WAYS = {"int_mm": int_mm, "fp32": fp32_products, "padded": aten.padded_int_mm}


def codes(*shape, lowest=-127):
    return torch.randint(lowest, 128, shape, dtype=torch.int8)


def scaled_matmul(a, b, *, row_scale=None, column_scale=None, bias=None, dtype):
    return ops.scaled_matmul(a, b, row_scale, column_scale, bias, dtype)


def layouts(x):
    """The same matrix as it may lie in memory."""
    yield x
    yield x.t().contiguous().t()
    yield x.repeat_interleave(2, dim=1)[:, ::2]
    yield torch.cat([x, x], dim=1)[:, : x.shape[1]]
    yield x.contiguous().view(-1).as_strided(x.shape, (1, 1)) if 1 in x.shape else x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_exact(shape, way):
    m, k, n = shape
    for lowest in (-127, -128):
        a, b = codes(m, k, lowest=lowest), codes(k, n)
        a[0], b[:, 0] = 127, -127
        a[-1] = lowest
        expected = a.long() @ b.long()
        for left in layouts(a):
            for right in layouts(b):
                got = WAYS[way](left, right)
                assert got.dtype == torch.int32
                assert torch.equal(got.long(), expected)
                # Activations are the second operand in dW.
                assert torch.equal(WAYS[way](right.t(), left.t()).long(), expected.t())


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0)], ids=str)
def test_empty_products(shape):
    m, k, n = shape
    assert torch.equal(int_mm(codes(m, k), codes(k, n)), torch.zeros(m, n, dtype=torch.int32))
    bias = torch.randn(n)
    got = scaled_matmul(codes(m, k), codes(k, n), row_scale=torch.ones(m), bias=bias, dtype=torch.float32)
    assert torch.equal(got, bias.expand(m, n))


@pytest.mark.parametrize("length", [MAX_CONTRACTION, MAX_CONTRACTION + 1, 2 * MAX_CONTRACTION + 37])
def test_long_contractions_do_not_overflow(length):
    """All products at their largest, of either sign, and mixed; 132,105 of -128 * 127 pass int32."""
    a = torch.full((4, length), 127, dtype=torch.int8)
    a[1] = -127
    a[2] = codes(length, lowest=-128)
    a[3] = -128
    b = torch.full((length, 2), 127, dtype=torch.int8)
    b[:, 1] = codes(length)
    expected = a.long() @ b.long()
    if length > 2 * MAX_CONTRACTION:
        assert expected[0, 0] > 2**31 - 1
    products = int_mm(a, b)
    assert torch.equal(products.long(), expected)
    row_scale, column_scale = torch.rand(4), torch.rand(2)
    got = scaled_matmul(a, b, row_scale=row_scale, column_scale=column_scale, dtype=torch.float32)
    assert torch.equal(got, expected.float() * row_scale[:, None] * column_scale)


@pytest.mark.parametrize("num_rows", [3, 4, 11])
def test_long_contractions_of_padded_codes_go_in_rows(monkeypatch, num_rows):
    """As on GPUs, where the int32 and int64 products of all rows are never in memory together."""
    monkeypatch.setattr(matmul, "_DEVICE_SCRATCH_BYTES", 1)
    monkeypatch.setattr(matmul, "LEAST_ROWS", 4)
    sizes = []

    def record(a, b):
        sizes.append(a.shape[0])
        return int_mm(a, b)

    record.on = int_mm.on
    monkeypatch.setattr(matmul, "int_mm", record)
    length = MAX_CONTRACTION + 16
    a, b = codes(16, length, lowest=-128), codes(16, length)
    a[0], b[0] = -128, 127
    options = {
        "row_scale": random.choice((None, torch.rand(1), torch.rand(num_rows))),
        "column_scale": torch.rand(5),
        "bias": torch.randn(5),
        "dtype": torch.bfloat16,
    }
    got = ops.padded_matmul(a, b, num_rows, 5, **options)
    assert torch.equal(got, reference.padded_matmul(a, b, num_rows, 5, **options))
    assert sizes == [min(4, num_rows - begin) for begin in range(0, num_rows, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scratch", [1, 2**20], ids=["rows in parts", "all rows at once"])
@pytest.mark.parametrize("units", ["integer units", "slow"])
def test_scaled_products(monkeypatch, dtype, scratch, units):
    """The two ways have the same bits, so ranks may choose differently."""
    if not integer_units.is_int_mm_exact(CPU):
        units = "wrong"
    monkeypatch.setattr(cpu_parts, "integer_units", lambda device: UNITS[units])
    monkeypatch.setattr(cpu_parts, "_SCRATCH_BYTES", scratch)
    monkeypatch.setattr(cpu_parts, "_FP32_SCRATCH_BYTES", scratch)
    monkeypatch.setattr(cpu_parts, "LEAST_ROWS", 4)
    for m, k, n in SHAPES:
        a, b = codes(m, k), codes(k, n)
        expected = (a.long() @ b.long()).to(torch.int32)
        for scales in (
            {"row_scale": torch.rand(m), "column_scale": torch.rand(n), "bias": torch.randn(n).to(dtype)},
            {"row_scale": torch.rand(1), "column_scale": torch.rand(1)},
            {"row_scale": torch.rand(m)},
            {"column_scale": torch.rand(n)},
            {},
        ):
            for left, right in zip(layouts(a), layouts(b), strict=True):
                got = scaled_matmul(left, right, **scales, dtype=dtype)
                assert got.dtype == dtype
                wanted = reference.epilogue(expected, **scales, dtype=dtype)
                assert torch.equal(got, wanted)
                assert torch.equal(got.signbit(), wanted.signbit())


def test_results_do_not_share_the_scratch_memory():
    a, b = codes(20, 8), codes(8, 12)
    one = torch.ones(1)
    with torch.inference_mode():
        scaled_matmul(codes(64, 8), b, row_scale=one, dtype=torch.float32)
    first = scaled_matmul(a, b, row_scale=one, dtype=torch.float32)
    kept = first.clone()
    scaled_matmul(codes(20, 8), b, row_scale=one, dtype=torch.float32)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("units", ["slow", "wrong"])
def test_without_integer_units_products_stay_exact(monkeypatch, units):
    """Also under autocast, which would round products of fp32 to bf16."""
    a, b = codes(9, 3000, lowest=-128), codes(3000, 5)
    a[0] = -128
    expected = (a.long() @ b.long()).float()
    for module in (aten, cpu_parts):
        monkeypatch.setattr(module, "integer_units", lambda device: UNITS[units])
    monkeypatch.setattr(torch, "_int_mm", None)
    assert torch.equal(int_mm(a, b).float(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = scaled_matmul(a, b, row_scale=torch.ones(1), dtype=torch.float32)
    assert torch.equal(got, expected)


PROBE = """
import torch
from ds_quant.kernels import integer_units
from ds_quant.kernels.int8 import matmul
a = torch.full((40, 600), 127, dtype=torch.int8)
print("saturates", torch._int_mm(a, a.t())[0, 0].item() != 600 * 127**2)
print("exact", integer_units.integer_units(torch.device("cpu")).is_exact)
print("serve", integer_units.integer_units(torch.device("cpu")).serve)
for _ in range(2):
    print("right", bool((matmul.int_mm(a, a.t()) == 600 * 127**2).all()))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's instruction sets of x86")
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_processors_whose_sums_saturate_are_found_out(isa):
    """oneDNN as it is on a processor without VNNI.

    Where there is no AVX-512, torch never asks it: sums are right, and so slow that they are not taken either.
    """
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=400, check=True
    )
    saturates = "saturates True" in run.stdout
    assert saturates == torch.cpu._is_avx512_supported(), "the probe shows nothing on this processor"
    assert f"exact {not saturates}" in run.stdout
    assert "serve False" in run.stdout
    assert run.stdout.count("right True") == 2
    assert run.stderr.count("int8 products run in fp32, exact: torch._int_mm ") == 1


def test_what_devices_have(monkeypatch, caplog):
    cpu = torch.device("cpu")
    for flags, names in (
        ({"avx512f", "avx512_vnni"}, "AVX-512 VNNI"),
        ({"avx_vnni"}, "AVX-VNNI"),
        ({"asimddp", "i8mm"}, "NEON dot products, NEON int8 matrix products"),
        ({"avx2"}, ""),
    ):
        monkeypatch.setattr(integer_units, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert integer_units.unit_names(cpu) == names
    assert integer_units.unit_names(torch.device("meta")) == ""
    integer_units.integer_units.cache_clear()
    monkeypatch.setattr(integer_units, "is_int_mm_exact", lambda device: True)
    monkeypatch.setattr(integer_units, "int_mm_speed", lambda: 0.02)
    with caplog.at_level(logging.WARNING, logger="ds_quant"):
        found = integer_units.integer_units(cpu)
        assert not found.is_fast
        assert not found.serve
    assert "int8 products run in fp32, exact: torch._int_mm took 50 times as long here" in caplog.text
    integer_units.integer_units.cache_clear()
    caplog.clear()
    monkeypatch.setattr(integer_units, "int_mm_speed", lambda: 2.5)
    monkeypatch.setattr(integer_units, "cpu_flags", lambda: frozenset({"avx_vnni"}))
    with caplog.at_level(logging.WARNING, logger="ds_quant"):
        found = integer_units.integer_units(cpu)
        assert found.is_fast
        assert found.serve
    assert found.line() == "int8 products run on AVX-VNNI, 2.5 times as fast here as exact products in fp32"
    assert not caplog.text
    integer_units.integer_units.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, names in (((7, 0), ""), ((7, 5), "tensor cores"), ((9, 0), "tensor cores")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert integer_units.unit_names(torch.device("cuda", 0)) == names


def test_each_layout_is_probed(monkeypatch):
    """By the names that cuBLAS has for them; one that raises or is wrong says nothing of the others."""
    real = torch._int_mm

    def int_mm(a, b):
        first, second = "NT"[b.stride(0) == 1], "TN"[a.stride(1) == 1]
        if first + second == "NN":
            raise RuntimeError("not supported")
        return real(a, b) + (first + second == "TT")

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    integer_units.int_mm_states.cache_clear()
    states = integer_units.int_mm_states(CPU)
    integer_units.int_mm_states.cache_clear()
    assert list(states) == ["TN", "NN", "TT", "NT"]
    assert (states["TN"], states["NN"], states["NT"]) == ("is exact", "raises RuntimeError", "is exact")
    assert states["TT"].startswith("gives wrong sums here")


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("flawed", ["none", "NN", "TN"])
def test_gpus_multiply_one_layout(monkeypatch, caplog, flawed, has_kernels):
    states = {layout: "raises RuntimeError" if layout == flawed else "is exact" for layout in ("TN", "NN", "TT", "NT")}
    monkeypatch.setattr(integer_units, "int_mm_states", lambda device: states)
    monkeypatch.setattr(integer_units, "_has_kernels", lambda device: has_kernels)
    monkeypatch.setattr(integer_units, "unit_names", lambda device: "tensor cores")
    integer_units.integer_units.cache_clear()
    with caplog.at_level(logging.WARNING, logger="ds_quant"):
        found = integer_units.integer_units(torch.device("cuda", 0))
    integer_units.integer_units.cache_clear()
    assert found.serve == (flawed != "TN")
    assert found.is_fast == (found.serve or has_kernels) == (not caplog.text)
    without = "on Triton's kernels alone, as of torch._int_mm" if has_kernels else "in fp32, exact: torch._int_mm"
    expected = {
        "none": "on tensor cores",
        "NN": "on tensor cores (of torch._int_mm NN raises RuntimeError)",
        "TN": f"{without} TN raises RuntimeError",
    }
    assert found.line().startswith(f"int8 products run {expected[flawed]}")


def test_operands_of_other_layouts_are_copied_for_cublas(monkeypatch):
    real = torch._int_mm

    def int_mm(a, b):
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    a, b = codes(33, 64), codes(64, 48)
    for left in layouts(a):
        for right in layouts(b):
            assert torch.equal(aten.padded_int_mm(left, right).long(), a.long() @ b.long())


def test_the_probe_finds_out_what_is_slow(monkeypatch):
    clock = 0.0

    def takes(seconds):
        def multiply(a, b):
            nonlocal clock
            clock += seconds

        return multiply

    monkeypatch.setattr(integer_units.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(torch, "mm", takes(0.01))
    # Ratios beyond 4 are told by the small matrices alone, the others by the large ones.
    for seconds in (0.1, 0.02, 0.005, 0.001):
        monkeypatch.setattr(torch, "_int_mm", takes(seconds))
        assert integer_units.int_mm_speed() == pytest.approx(0.01 / seconds)


def test_operators_hold_what_they_promise_to_compilers():
    key = fold_key(1)
    x, scale = torch.randn(6, 10, dtype=torch.bfloat16), torch.rand(10)
    a, b = codes(6, 10), codes(10, 4)
    for operator, arguments in (
        (ops.quantize_rows.operator, (x, 127.0, scale, key)),
        (ops.quantize_rows.operator, (x, 127.0, None, None)),
        (ops.quantize_columns.operator, (x, 7.0, torch.rand(6), None)),
        (ops.quantize_both.operator, (x, 127.0, scale, torch.rand(6), key, key)),
        (ops.quantize_both.operator, (x, 127.0, None, None, None, None)),
        (ops.quantize_tensor.operator, (x, 127.0, key)),
        (ops.quantize_rows.operator, (x, 127.5, None, None)),
        (ops.quantize_tensor.operator, (x, 127.5, key)),
        (ops.dequantize.operator, (a, torch.rand(6), None, torch.bfloat16)),
        (ops.scaled_matmul.operator, (a, b, torch.rand(6), torch.rand(4), torch.randn(4), torch.bfloat16)),
        (ops.scaled_matmul.operator, (a.t(), codes(6, 4), None, None, None, torch.float32)),
    ):
        torch.library.opcheck(operator, arguments)
