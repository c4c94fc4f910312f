"""Codes of X that compiled code makes where X is computed: those of X as it would be stored."""

import functools

import pytest
import torch
from linear.padded_backend import add_padded_backend

from ds_quant.config import LinearConfig
from ds_quant.kernels import registry
from ds_quant.linear import operands
from ds_quant.linear.recipe import plan_of

TOKENS, FEATURES = 48, 64
SECTION = {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": {"bits": 8}, "backend": "int8"}


@pytest.fixture
def padded(monkeypatch):
    """Layers go the way of GPUs."""
    calls = add_padded_backend(monkeypatch)
    monkeypatch.setenv("DS_QUANT_KERNELS", "padded")
    yield calls
    registry._serving.cache_clear()


def plan_with(**activation):
    section = {**SECTION, "activation": {**SECTION["activation"], **activation}}
    return plan_of(LinearConfig.parse(section), transposed=False, stream=0)


def scaled_codes(x, s, *, plan, key=None):
    codes = operands.quantize_input(x * s, plan, x.dtype, key, "both")
    return codes.codes, codes.turned, codes.scale


def inputs(dtype):
    x, s = torch.randn(TOKENS, FEATURES), torch.randn(FEATURES)
    x *= 10.0 ** torch.randint(-38, 38, (TOKENS, 1))
    x[0], x[1, 3], x[2, 4], x[3, 5] = 0.0, float("nan"), float("inf"), float("-inf")
    x[4, :2] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    return x.to(dtype), s.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fused_codes_are_those_of_what_would_be_stored(padded, dtype):
    """Products of bf16 numbers, which Inductor would pass on unrounded to the quantizer."""
    torch.compiler.reset()
    x, s = inputs(dtype)
    function = functools.partial(scaled_codes, plan=plan_with())
    want = function(x, s)
    assert [name for name, *_ in padded] == ["quantize_operand"]
    got = torch.compile(function, fullgraph=True, dynamic=False)(x, s)
    assert len(padded) == 1, "compiled code called the operator"
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "shape", "dtype"),
    [
        ({"rounding": "stochastic"}, (TOKENS, FEATURES), torch.bfloat16),
        ({"granularity": "tensor"}, (TOKENS, FEATURES), torch.bfloat16),
        ({}, (TOKENS + 1, FEATURES), torch.bfloat16),
        ({}, (TOKENS, FEATURES), torch.float16),
    ],
    ids=str,
)
def test_others_stay_operators(padded, changes, shape, dtype):
    torch.compiler.reset()
    function = functools.partial(scaled_codes, plan=plan_with(**changes), key=torch.tensor([1, 2]))
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="eager")
    compiled(torch.randn(shape).to(dtype), torch.randn(FEATURES).to(dtype))
    assert [name for name, *_ in padded] == ["quantize_operand"]


def test_torch_that_divides_otherwise_keeps_the_operator(padded, monkeypatch):
    """Before 2.13 Inductor divides approximately unless it is told not to, by whoever compiles the model."""
    torch.compiler.reset()
    monkeypatch.setattr(operands, "divides_exactly", lambda: False)
    compiled = torch.compile(functools.partial(scaled_codes, plan=plan_with()), fullgraph=True, backend="eager")
    compiled(*inputs(torch.bfloat16))
    assert [name for name, *_ in padded] == ["quantize_operand"]
