"""Layers whose operands are padded and turned, as on GPUs, have the bits of those whose operands are not.

The operations are their definitions here; `tests/kernels/test_int8_triton.py` holds the kernels to these.
"""

import gc

import pytest
import torch
from helpers.linear_oracle import IN, OUT, W8A8G8_INT8, random_case, run
from linear.padded_backend import NAMES, add_padded_backend
from test_int8 import CONFIGS, TOKENS, step, tiny

import ds_quant
from ds_quant.config import LinearConfig
from ds_quant.kernels import registry
from ds_quant.kernels.int8 import ops
from ds_quant.linear.convert import convert, remove_forward_counter, step_key_of
from ds_quant.linear.operands import arrange_weight, input_ways, quantize_weight, weight_ways
from ds_quant.linear.recipe import plan_of
from ds_quant.linear.weight_codes import weights_changed
from ds_quant.numerics import products as reference


@pytest.fixture
def calls(monkeypatch):
    yield add_padded_backend(monkeypatch)
    registry._serving.cache_clear()


def both_ways(monkeypatch, function):
    """What it gives on a CPU, and with padded operands."""
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
    usual = function()
    monkeypatch.setenv("DS_QUANT_KERNELS", "padded")
    weights_changed()  # codes that a layer keeps lie as they were made
    return usual, function()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_the_three_products(monkeypatch, calls, layout, rounding):
    """All allowed configurations, unquantized operands among them."""
    for config in CONFIGS:
        for name in ("activation", "gradient"):
            if name in config:
                config = {**config, name: {**config[name], "rounding": rounding}}
        case = random_case(torch.bfloat16, int(torch.randint(2**31, ()).item()))

        def trial(config=config, case=case):
            torch.manual_seed(0)
            return run(config, *case, layout)

        for a, b, name in zip(*both_ways(monkeypatch, trial), ("Y", "dX", "dW", "db"), strict=True):
            assert torch.equal(a, b), f"{name} of {config}"
    assert {name for name, *_ in calls} == set(NAMES)


@pytest.mark.parametrize("transposed", [False, True])
def test_codes_that_came_are_laid_out_as_those_that_are_made(monkeypatch, calls, transposed):
    weight = torch.randn(13, 37)
    for others in (("activation",), ("gradient",), ("activation", "gradient")):
        config = LinearConfig.parse({"backend": "int8", **{name: {"bits": 8} for name in ("weight", *others)}})
        plan = plan_of(config, transposed=transposed, stream=0)
        ways = weight_ways(plan, forward=True, backward=True)
        monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
        usual = quantize_weight(weight, plan)
        assert arrange_weight(usual.codes, usual.scale, ways) == usual
        monkeypatch.setenv("DS_QUANT_KERNELS", "padded")
        want = quantize_weight(weight, plan, ways)
        found = arrange_weight(usual.codes, usual.scale, ways)
        for one, other in zip(found, want, strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_what_is_made_and_held(monkeypatch, calls, layout, rounding):
    """Six operations a layer; the second micro step has the weight's codes; X is held once, at one byte an element."""
    config = {**W8A8G8_INT8, "gradient": {"bits": 8, "rounding": rounding}}
    monkeypatch.setenv("DS_QUANT_KERNELS", "padded")
    make = ds_quant.QuantLinear if layout == "linear" else lambda a, b, **k: ds_quant.QuantConv1D(b, a, **k)
    module = make(IN, OUT, config=config)
    for expected in (2, 1):
        x = torch.randn(11, IN, requires_grad=True)
        calls.clear()
        y = module(x)
        assert [name for name, *_ in calls] == ["quantize_operand"] * expected + ["padded_matmul"]
        held = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.int8]
        assert [t.shape for t in held] == [(48, 16)]
        calls.clear()
        y.sum().backward()
        assert [name for name, *_ in calls] == ["quantize_gradient", "padded_matmul", "padded_matmul"]
    for name, args, _ in calls[1:]:
        assert name == "padded_matmul"
        assert all(operand.is_contiguous() and operand.shape[1] % 16 == 0 for operand in args[:2])
    with torch.no_grad():
        calls.clear()
        module.eval()(x)
    ways = [kwargs["ways"] for name, _, kwargs in calls if name == "quantize_operand"]
    assert ways == ["codes", "codes" if layout == "linear" else "turned"]


def test_ways():
    config = W8A8G8_INT8
    plan = ds_quant.QuantLinear(2, 2, config=config)._quant_plan
    assert input_ways(plan, trains=True) == "both"
    assert input_ways(plan, trains=False) == "codes"
    frozen = plan._replace(original_operands=True)
    assert (input_ways(frozen, trains=True), weight_ways(frozen, forward=True, backward=True)) == ("codes", "codes")
    assert weight_ways(plan, forward=False, backward=True) == "turned"
    turned = plan._replace(transposed=True)
    assert weight_ways(turned, forward=True, backward=False) == "turned"
    assert weight_ways(turned, forward=False, backward=True) == "codes"
    assert weight_ways(plan._replace(activation=None, grad_input=None), forward=True, backward=True) == "codes"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models(monkeypatch, calls, kind):
    """Eager, with inputs that layers share, and under gradient checkpointing."""
    model = tiny(kind).train()
    convert(model, W8A8G8_INT8)
    usual, got = both_ways(monkeypatch, lambda: step(model, model, TOKENS))
    assert all(torch.equal(a, b) for a, b in zip(usual, got, strict=True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert all(torch.equal(a, b) for a, b in zip(usual, step(model, model, TOKENS), strict=True))


@pytest.mark.thorough
def test_compiled(monkeypatch, calls):
    changes = {"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0}
    model = tiny("gpt2", **changes)
    names = convert(model, W8A8G8_INT8)
    remove_forward_counter(model)
    monkeypatch.setenv("DS_QUANT_KERNELS", "padded")
    want = [step(model, model, TOKENS, number) for number in (1, 2)]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    calls.clear()
    for number, expected in zip((1, 2), want, strict=True):
        for a, b in zip(step(model, compiled, TOKENS, number), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert sum(name == "padded_matmul" for name, *_ in calls) == 2 * 3 * len(names)
    assert step_key_of(model).step == 2
    gc.collect()


def test_operators_hold_what_they_promise_to_compilers():
    g, rows, columns = torch.randn(6, 10, dtype=torch.bfloat16), torch.rand(6), torch.rand(10)
    key = torch.tensor([1, 2])
    a, b = (torch.randint(-127, 128, (16, 32), dtype=torch.int8) for _ in range(2))
    for operator, arguments in (
        *((ops.quantize_operand.operator, (g, 127.0, "row", columns, key, 3, ways)) for ways in reference.WAYS),
        (ops.quantize_operand.operator, (g, 127.0, "column", rows, None, 0, "both")),
        (ops.quantize_operand.operator, (g, 127.5, "tensor", None, None, 0, "both")),
        (ops.quantize_gradient.operator, (g, 127.0, columns, rows, key, 1, 2, True)),
        (ops.quantize_gradient.operator, (g, 127.0, None, None, None, 1, 2, False)),
        (ops.padded_matmul.operator, (a, b, 5, 13, torch.rand(5), None, torch.randn(13), torch.bfloat16)),
    ):
        torch.library.opcheck(operator, arguments)


def test_what_is_refused():
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"quantize_operand\(granularity\): got block; allowed: row, column or tensor"):
        ops.quantize_operand(x, 127.0, "block")
    with pytest.raises(ValueError, match=r"quantize_operand\(ways\): got up; allowed: codes, turned, both"):
        ops.quantize_operand(x, 127.0, "row", ways="up")
    with pytest.raises(ValueError, match=r"quantize_operand\(factor\): got torch.float32 of shape \(1,\) on cpu"):
        ops.quantize_operand(x, 127.0, "tensor", torch.ones(1))
    with pytest.raises(ValueError, match=r"quantize_gradient\(row_scale\)"):
        ops.quantize_gradient(x, 127.0, None, torch.ones(5), None, 0, 1, False)
