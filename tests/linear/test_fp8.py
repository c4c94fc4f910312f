"""Backend fp8: its products by their definition, that they are fp8 ones, and that all else is what `simulated` does."""

import itertools

import pytest
import torch
from helpers.linear_oracle import IN, OUT, assert_compiles_to_the_same_bits, assert_within, expected, random_case, run

import ds_quant
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.kernels.fp8 import aten, ops
from ds_quant.kernels.fp8_units import fp8_units

E4M3, E5M2 = {"format": "fp8_e4m3"}, {"format": "fp8_e5m2"}
ALL = {"weight": E4M3, "activation": E4M3, "gradient": E5M2, "backend": "fp8"}


def allowed_configs():
    tensor = {"granularity": "tensor"}
    weights, activations = (None, E4M3, {**E4M3, **tensor}), (None, E4M3, {**E4M3, **tensor})
    gradients = (None, E4M3, E5M2, {**E5M2, **tensor}, {**E4M3, "used_for": ["weight"]})
    for weight, activation, gradient, operands in itertools.product(
        weights, activations, gradients, ("quantized", "original")
    ):
        config = {"weight": weight, "activation": activation, "gradient": gradient}
        config = {key: value for key, value in config.items() if value}
        config |= {"backward_operands": operands, "backend": "fp8"}
        try:
            LinearConfig.parse(config)
        except ConfigError:
            continue  # nothing to quantize, or a scale that would stay on the contraction axis
        yield config


CONFIGS = list(allowed_configs())


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_three_products(dtype, layout, monkeypatch):
    """Within the bound of fp32 sums in any order, by an oracle that shares no code; those promised are fp8 ones."""
    fp8_units(torch.device("cpu"))  # which multiplies, once
    calls, real = [], torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, *more, **how: (calls.append(1), real(a, b, *more, **how))[1])
    assert len(CONFIGS) > 60
    for config in CONFIGS:
        seed = int(torch.randint(2**31, ()).item())
        x, w, bias, g = random_case(dtype, seed)
        calls.clear()
        got = run(config, x, w, bias, g, layout)
        case = f"{config} {dtype} {layout} seed {seed}"
        module = ds_quant.QuantLinear(1, 1, config=config)
        assert len(calls) == len(module._quant_plan.both_quantized), case
        for a, want, name in zip(got, expected(x, w, bias, g, config, dtype), "y dX dW".split(), strict=False):
            assert a.dtype == dtype
            assert_within(a, want, f"{name} of {case}")
        assert torch.equal(got[3], g.sum(0)), case


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_where_no_units_serve_it_is_simulated(layout, monkeypatch):
    """Bit for bit, random bits too: one function, whatever multiplies."""
    monkeypatch.setenv("DS_QUANT_KERNELS", "reference")
    config = {**ALL, "activation": {**E4M3, "rounding": "stochastic"}, "gradient": {**E5M2, "rounding": "stochastic"}}
    x, w, bias, g = random_case(torch.bfloat16, int(torch.randint(2**31, ()).item()))
    x[3, 5], g[2, 1] = torch.nan, torch.inf
    results = []
    for backend in ("fp8", "simulated"):
        torch.manual_seed(0)
        results.append(run({**config, "backend": backend}, x, w, bias, g, layout))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_values_that_are_not_finite_stay_in_their_groups():
    x, w, bias, g = random_case(torch.bfloat16, 1)
    x[3, 5], x[4, 0], g[2, 1] = torch.nan, torch.inf, torch.inf
    x[6] = 0.0
    y, dx, dw, _ = run(ALL, x, w, bias, g, "linear")
    assert y[[3, 4]].isnan().all()
    assert y.isnan().sum() == 2 * OUT
    assert torch.equal(y[6], bias)
    assert dx[2].isnan().all()
    assert dx.isnan().sum() == IN
    assert dw.isnan().all(), "dW sums over tokens: the NaN of one reaches all, as in full precision"


def test_what_the_backward_holds():
    """Of X a byte an element and its scales, of W the Parameter."""
    module = ds_quant.QuantLinear(64, 32, bias=False, config=ALL).bfloat16()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        module(torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True))
    assert sum(t.numel() * t.element_size() for t in saved if t is not module.weight) == 100 * 64 + 100 * 4


@pytest.mark.parametrize(
    ("layout", "backend"),
    [
        ("linear", "aot_eager"),
        *(pytest.param(layout, "inductor", marks=pytest.mark.slow) for layout in ("linear", "conv1d")),
    ],
)
@pytest.mark.thorough
def test_compiled_as_one_graph(layout, backend):
    """What Inductor makes of the quantizers is in numerics/test_number_formats.py: a layer takes it half a minute."""
    torch._dynamo.reset()
    config = {**ALL, "gradient": {**E5M2, "rounding": "stochastic"}}
    module = ds_quant.QuantLinear(IN, OUT, config=config) if layout == "linear" else None
    if module is None:
        module = ds_quant.QuantConv1D(OUT, IN, config=config)
    assert_compiles_to_the_same_bits(module, torch.randn(21, IN), backend)


def test_autocast():
    assert ops.fp8_matmul.on(torch.device("cpu")) is aten.fp8_matmul
    module = ds_quant.QuantLinear(IN, OUT, config=ALL)
    x = torch.randn(5, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == module.weight.grad.dtype == torch.float32


def test_how_layers_describe_themselves():
    module = ds_quant.QuantLinear(8, 8, config=ALL)
    wanted = "W fp8_e4m3 channel, A fp8_e4m3 token, G fp8_e5m2 outer for dW+dX (fp8: Y, dX, dW)"
    assert module.describe() == wanted
    only = ds_quant.QuantLinear(8, 8, config={"weight": E4M3, "backend": "fp8"})
    assert only.describe() == "W fp8_e4m3 channel (fp8: no product, each has an unquantized operand)"
