"""Layers in every format of the registry: the three products, what they hold, graphs, recomputation."""

import pytest
import torch
from helpers.linear_oracle import IN, OUT, assert_compiles_to_the_same_bits, check_products
from torch import nn
from torch.utils.checkpoint import checkpoint

import ds_quant
from ds_quant.base.number_formats import FORMATS
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.kernels.simulated import ops as kernels
from ds_quant.linear.convert import convert, step_key_of
from ds_quant.linear.products import Operand, sums
from ds_quant.numerics.format import named_format, quantize_to

IN_BLOCKS = [name for name, named in FORMATS.items() if named.block_size]
ANY_GROUP = [name for name in FORMATS if name not in IN_BLOCKS]


def all_three(name, **more):
    return {operand: {"format": name, **more} for operand in ("weight", "activation", "gradient")}


def configs(name):
    """What is tried of one format: all operands, and beside integers, each granularity, each use of the gradient."""
    yield all_three(name)
    yield {"weight": {"format": name}, "activation": {"bits": 8}}
    yield {"activation": {"format": name}, "gradient": {"bits": 8, "granularity": "token"}}
    yield {**all_three(name), "backward_operands": "original"}
    for used_for in ("weight", "input"):
        yield {"gradient": {"format": name, "used_for": [used_for]}}
    if name in ANY_GROUP:
        block = {"format": name, "granularity": "block", "block_size": 16}
        yield {"weight": block, "activation": block}
        for granularity in ("tensor", "channel"):
            yield all_three(name, granularity=granularity)
        yield {"weight": {"format": name}, "activation": {"format": "mxint8"}, "gradient": {"format": "nvfp4"}}
    if FORMATS[name].scale == "e8m0":
        yield all_three(name, scale_rule="up")
    if name == "nvfp4":
        yield {**all_three(name, scale_rule="four_six"), "weight": {"format": name, "block_rows": 16}}
    if FORMATS[name].scale == "e4m3":
        yield {**all_three(name), "weight": {"format": name, "block_rows": 16}}


@pytest.mark.parametrize("name", FORMATS)
def test_the_three_products(name):
    for config in configs(name):
        try:
            LinearConfig.parse(config)
        except ConfigError:
            # A scale of an input feature cannot be folded.
            config = {**config, "gradient": {"format": name, "granularity": "token"}}
        for dtype, layout in ((torch.float32, "linear"), (torch.bfloat16, "conv1d")):
            check_products(config, dtype, layout)


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_codes_are_exact_in_16_bits(monkeypatch, name):
    """As on a device that multiplies bf16 with sums in fp32."""
    fmt = named_format(name, "tensor")
    if fmt.group.granularity == "block":
        fmt = fmt._replace(group=fmt.group._replace(granularity="row"), scale=fmt.scale._replace(kind="float"))
    a, b = quantize_to(torch.randn(5, 24), fmt), quantize_to(torch.randn(7, 24), fmt)
    want = sums(Operand(a, 1), Operand(b, 1))
    seen, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, y, out_dtype=None: (seen.append(x.dtype), real(x.float(), y.float()))[1])
    monkeypatch.setattr(kernels, "multiplies_narrow", lambda device: True)
    assert torch.equal(sums(Operand(a, 1), Operand(b, 1)), want)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_backward_holds(name):
    """Of X a byte an element and its scales, of W the Parameter."""
    module = ds_quant.QuantLinear(64, 32, bias=False, config={**all_three(name)}).bfloat16()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        module(torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True))
    scales = 64 // FORMATS[name].block_size if FORMATS[name].block_size else 1
    held = sum(t.numel() * t.element_size() for t in saved if t is not module.weight)
    assert held == 100 * 64 + 100 * 4 * scales


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_and_steps(name, use_reentrant):
    """A layer computed again draws the same bits; another step draws others; no generator is used."""
    config = all_three(name, rounding="stochastic")
    model = nn.Sequential(nn.Linear(IN, IN), nn.GELU(), nn.Linear(IN, IN))
    convert(model, config)
    x, state = torch.randn(5, IN), torch.get_rng_state()

    def results(recompute, step=7):
        step_key_of(model).set(step)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        layers = lambda t: model[2](model[1](model[0](t)))  # noqa: E731
        y = checkpoint(layers, leaf, use_reentrant=use_reentrant) if recompute else layers(leaf)
        y.square().sum().backward()
        return torch.cat([leaf.grad.flatten(), *(p.grad.flatten() for p in model.parameters())])

    first = results(False)
    assert torch.equal(first, results(True))
    assert not torch.equal(first, results(False, step=8))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "backend"),
    [("nvfp4", "aot_eager"), *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in FORMATS)],
)
@pytest.mark.thorough
def test_compiled_gives_the_same_bits(name, backend):
    """What Inductor makes of the quantizers is in numerics/test_number_formats.py: its graphs take most of a minute."""
    torch._dynamo.reset()
    config = {**all_three(name), "gradient": {"format": name, "rounding": "stochastic"}}
    module = ds_quant.QuantLinear(32, 8, config=config)
    assert_compiles_to_the_same_bits(module, torch.randn(20, 32), backend)


def test_non_finite_values_stay_visible():
    for name in FORMATS:
        module = ds_quant.QuantLinear(IN, OUT, config={"weight": {"format": name}, "activation": {"format": name}})
        x = torch.randn(5, IN)
        x[1, 3], x[2, 0] = float("nan"), float("inf")
        y = module(x)
        assert y[[1, 2]].isnan().all(), name
        assert y[[0, 3, 4]].isfinite().all(), name


def test_how_layers_describe_themselves():
    config = {
        "weight": {"format": "nvfp4", "block_rows": 16},
        "activation": {"format": "mxfp8", "scale_rule": "up"},
        "gradient": {"format": "fp8_e5m2"},
    }
    config["backward_operands"] = "original"
    module = ds_quant.QuantLinear(IN, OUT, config=config)
    assert module.describe().startswith(
        "W nvfp4 block of 16 x 16, A mxfp8 block of 32 scales up, G fp8_e5m2 outer for dW+dX, original"
    )
