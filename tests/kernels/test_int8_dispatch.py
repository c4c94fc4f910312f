"""Which kernel serves the operands and results of int8 products, and what all refuse."""

import logging

import pytest
import torch
from kernels.int8_cases import ISAS, KEYS, assert_same, needs_compiler, results, scales, tensor

from ds_quant.kernels import build, registry
from ds_quant.kernels.int8 import aten, compiled, cpu, ops
from ds_quant.kernels.int8.matmul import fp32_products
from ds_quant.numerics import products as reference
from ds_quant.numerics.integer import symmetric_levels

LEVELS = symmetric_levels(8)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_without_elements(rng, shape):
    arguments = (torch.empty(shape), 8, scales(rng, shape[1]), scales(rng, shape[0]), KEYS)
    assert_same(results(ops, *arguments), results(reference, *arguments), "")
    y = ops.epilogue(torch.empty(shape, dtype=torch.int32), bias=torch.empty(shape[1]), dtype=torch.float16)
    assert (y.shape, y.dtype) == (shape, torch.float16)


def test_dispatch(rng, monkeypatch):
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
    arguments = (tensor(rng.normal(size=(9, 40))), 8, scales(rng, 40), scales(rng, 9), KEYS)
    expected = results(reference, *arguments)
    assert_same(results(ops, *arguments), expected, "")
    for name in ("quantize_rows", "quantize_columns", "quantize_both", "quantize_tensor", "dequantize", "epilogue"):
        serving = getattr(ops, name).on
        assert serving(torch.device("cpu")) is getattr(cpu if ISAS else reference, name)
        assert serving(torch.device("cuda")) is getattr(compiled, name)
        assert serving(torch.device("meta")) is getattr(reference, name)
    for name in ("cpu", "cuda"):
        assert ops.int_mm.on(torch.device(name)) is aten.int_mm
    monkeypatch.setenv("DS_QUANT_KERNELS", "reference")
    assert ops.int_mm.on(torch.device("cpu")) is fp32_products
    assert ops.epilogue.on(torch.device("cpu")) is reference.epilogue
    assert_same(results(ops, *arguments), expected, "")


def forget():
    registry._serving.cache_clear()
    registry._is_ready.cache_clear()


def test_without_a_compiler_the_reference_serves_and_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
    monkeypatch.setattr(build, "load", lambda: build.Loaded(None, "no compiler here"))
    forget()
    x = torch.randn(3, 20)
    with caplog.at_level(logging.WARNING, logger="ds_quant"):
        got = [ops.quantize_rows(x, LEVELS), ops.quantize_rows(x, LEVELS)]
    forget()
    for pair in got:
        assert_same(pair, reference.quantize_rows(x, LEVELS), "")
    (said,) = (record.getMessage() for record in caplog.records)
    assert "no compiler here" in said


X = torch.zeros(3, 4)
INTEGERS = torch.zeros(3, 4, dtype=torch.int32)
REFUSED = [
    (ops.quantize_rows, (torch.zeros(4), LEVELS), {}, r"quantize_rows\(x\): got torch.float32 of shape \(4,\)"),
    (ops.quantize_columns, (X.double(), LEVELS), {}, r"quantize_columns\(x\): got torch.float64"),
    (ops.quantize_both, ([1.0], LEVELS), {}, r"quantize_both\(g\): got a list"),
    (
        ops.quantize_tensor,
        (X, 8),
        {},
        r"quantize_tensor\(levels\): got 8; allowed: .*: 1, 1.5, 3, .*, 127, 127.5; pass",
    ),
    (ops.quantize_rows, (X, 255.5), {}, r"quantize_rows\(levels\): got 255.5"),
    (ops.quantize_rows, (X, True), {}, r"quantize_rows\(levels\): got True"),
    (ops.quantize_columns, (X, "127"), {}, r"quantize_columns\(levels\): got '127'"),
    (ops.quantize_rows, (X, LEVELS), {"column_scale": torch.ones(3)}, r"quantize_rows\(column_scale\): .*\(3,\)"),
    (ops.quantize_rows, (X, LEVELS), {"column_scale": torch.ones(4, 1)}, r"quantize_rows\(column_scale\)"),
    (ops.quantize_rows, (X, LEVELS), {"column_scale": torch.ones(4).double()}, r"column_scale\): got torch.float64"),
    (ops.quantize_rows, (X, LEVELS), {"column_scale": torch.ones(4, device="meta")}, r"column_scale\): .* on meta"),
    (ops.quantize_rows, (X, LEVELS), {"column_scale": 2.0}, r"column_scale\): got a float"),
    (ops.quantize_columns, (X, LEVELS), {"row_scale": torch.ones(4)}, r"quantize_columns\(row_scale\): .*\(4,\)"),
    (ops.quantize_both, (X, LEVELS), {"column_scale": torch.ones(3)}, r"quantize_both\(column_scale\)"),
    (ops.quantize_both, (X, LEVELS), {"row_scale": torch.ones(4)}, r"quantize_both\(row_scale\)"),
    (ops.quantize_both, (X, LEVELS), {"row_key": KEYS}, r"quantize_both\(row_key\): got a tuple"),
    (ops.quantize_both, (X, LEVELS), {"row_key": KEYS[0], "column_key": 1}, r"quantize_both\(column_key\): got a int"),
    (ops.quantize_rows, (X, LEVELS), {"key": (1, 2)}, r"quantize_rows\(key\): got a tuple"),
    (ops.quantize_columns, (X, LEVELS), {"key": torch.zeros(3)}, r"quantize_columns\(key\): got torch.float32"),
    (ops.quantize_tensor, (X, LEVELS), {"key": torch.zeros(2)}, r"quantize_tensor\(key\): got torch.float32"),
    (ops.epilogue, (X.double(),), {"dtype": torch.float32}, r"epilogue\(products\): got torch.float64"),
    (ops.epilogue, (X,), {"dtype": torch.float32, "others": X}, r"epilogue\(others\): got torch.float32"),
    (ops.epilogue, (X,), {"dtype": torch.float32, "others": INTEGERS[:2]}, r"epilogue\(others\): .*\(2, 4\)"),
    (ops.epilogue, (INTEGERS[0],), {"dtype": torch.float32}, r"epilogue\(products\): .* of shape \(4,\)"),
    (ops.epilogue, (INTEGERS,), {"dtype": torch.int8}, r"epilogue\(dtype\): got torch.int8"),
    (ops.epilogue, (INTEGERS,), {"dtype": torch.float32, "bias": X}, r"epilogue\(bias\): .*\(3, 4\)"),
    (ops.epilogue, (INTEGERS,), {"dtype": torch.float32, "bias": X[0].int()}, r"epilogue\(bias\): got torch.int"),
    (ops.epilogue, (INTEGERS,), {"dtype": torch.float32, "row_scale": X[0]}, r"epilogue\(row_scale\)"),
    (ops.epilogue, (INTEGERS,), {"dtype": torch.float32, "column_scale": X[:, 0]}, r"epilogue\(column_scale\)"),
]


@pytest.mark.parametrize(("function", "arguments", "options", "message"), REFUSED)
def test_refusals(function, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


@needs_compiler
def test_unknown_instruction_set():
    with pytest.raises(ValueError, match=r"quantize\(isa\): got 'neon'"):
        cpu.quantize_rows(X, LEVELS, isa="neon")


def test_what_dequantize_refuses():
    codes, scale = torch.zeros(3, 4, dtype=torch.int8), torch.ones(3)
    good = {"codes": codes, "row_scale": scale, "column_scale": None, "dtype": torch.float32}
    for arguments, match in (
        ({"codes": codes.int()}, r"dequantize\(codes\): got torch.int32"),
        ({"codes": codes[0]}, r"dequantize\(codes\): .*of two dimensions"),
        ({"row_scale": None}, r"dequantize\(row_scale, column_scale\): got none; allowed: one of the two"),
        ({"column_scale": torch.ones(4)}, r"got both; allowed: one of the two"),
        ({"row_scale": torch.ones(4)}, r"dequantize\(row_scale\): .*shape \(3,\)"),
        ({"dtype": torch.float64}, r"dequantize\(dtype\): got torch.float64"),
    ):
        with pytest.raises(ValueError, match=match):
            ops.dequantize(**{**good, **arguments})
