"""`range` of `linear.activation`: what the section takes, and that layers and models train with it."""

import copy
import itertools

import pytest
import torch
from helpers.linear_oracle import IN, OUT, random_case
from torch.utils.checkpoint import checkpoint

import ds_quant
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.linear.convert import convert, remove_forward_counter, step_key_of
from ds_quant.linear.recipe import plan_of
from ds_quant.numerics import quantize

BACKENDS = ("simulated", "int8")


def w8a8(**activation):
    return {"weight": {"bits": 8}, "activation": {"bits": 8, **activation}}


FULL = w8a8(range="full")


# ---- the section


def test_values_and_default():
    assert LinearConfig.parse(w8a8()).activation.range == "narrow"
    assert LinearConfig.parse(w8a8(range="narrow")) == LinearConfig.parse(w8a8())
    full = LinearConfig.parse(FULL)
    assert full.activation.range == "full"
    assert LinearConfig.parse(full.model_dump()) == full
    assert full != LinearConfig.parse(w8a8())
    assert plan_of(full, transposed=False, stream=0).activation.full_range
    assert not plan_of(full, transposed=False, stream=0).weight.full_range


@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "block"])
def test_every_granularity_takes_it(granularity):
    config = LinearConfig.parse(w8a8(range="full", granularity=granularity))
    module = ds_quant.QuantLinear(IN, OUT, config=config)
    plain = ds_quant.QuantLinear(IN, OUT, config=w8a8(granularity=granularity))
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5, IN)
    assert not torch.equal(module(x), plain(x))
    if granularity in ("channel", "block"):
        with pytest.raises(ConfigError, match="any other scale lies on a contraction axis"):
            LinearConfig.parse({**w8a8(range="full", granularity=granularity), "backend": "int8"})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            w8a8(range="full", symmetric=False),
            r'activation.range: got "full"; allowed: "narrow" with symmetric false: asymmetric .*remove it, or set',
        ),
        (w8a8(range="ful"), r'activation.range: got "ful"; allowed: "narrow", "full"; fix: did you mean "full"\?'),
        (w8a8(range=True), r'activation.range: got true; allowed: "narrow", "full"'),
        (w8a8(range="auto"), r'activation.range: got "auto"; allowed: a value'),
        ({"weight": {"bits": 8, "range": "full"}}, r'weight.range: got "full"; allowed: the keys bits, .*remove it'),
        (
            {"gradient": {"bits": 8, "range": "full"}},
            r'gradient.range: got "full"; allowed: the keys bits, .*remove it',
        ),
    ],
)
def test_refusals(section, message):
    with pytest.raises(ConfigError, match=message):
        LinearConfig.parse(section)


def test_it_is_named():
    config = LinearConfig.parse({**w8a8(range="full", rounding="stochastic"), "backend": "int8"})
    assert ds_quant.linear.describe(config) == "W8 channel, A8 token full range stochastic (int8: Y)"
    assert ds_quant.linear.describe(LinearConfig.parse(w8a8())) == "W8 channel, A8 token (simulated)"


# ---- layers


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_backward_holds_are_the_codes_of_the_full_range(backend):
    module = ds_quant.QuantLinear(IN, OUT, config={**FULL, "backend": backend})
    x = torch.randn(64, IN)
    x[:, 0] = -x.abs().amax(1)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        module(x.requires_grad_())
    (codes,) = [t for t in saved if t.dtype == torch.int8]
    assert torch.equal(codes, quantize(x, 8, granularity="row", full_range=True).codes)
    assert codes.min() == -128


def test_layers_that_share_an_input_in_other_ranges():
    torch.manual_seed(0)
    layers = [ds_quant.QuantLinear(IN, OUT, config={**c, "backend": "int8"}) for c in (FULL, w8a8(), FULL)]
    x = torch.randn(5, IN)
    alone = [layer(x.clone()) for layer in layers]
    shared = layers[0]._shared_inputs
    for layer in layers:
        layer._shared_inputs = shared
        layer.load_state_dict(layers[0].state_dict())
    first, second, third = (layer(x) for layer in layers)
    assert torch.equal(first, alone[0])
    assert torch.equal(third, first)
    assert not torch.equal(second, first)
    assert len(shared._entries) == 2


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("bits", [2, 8])
def test_stochastic_rounding(bits, layout, granularity):
    """Both backends draw the same codes, and integer products of codes down to -2^(bits-1) are exact."""
    config = {**w8a8(range="full", rounding="stochastic", granularity=granularity), "gradient": {"bits": 8}}
    config["activation"]["bits"] = bits
    results = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        if layout == "linear":
            module = ds_quant.QuantLinear(IN, OUT, config={**config, "backend": backend}).bfloat16()
        else:
            module = ds_quant.QuantConv1D(OUT, IN, config={**config, "backend": backend}).bfloat16()
        x, _, _, g = random_case(torch.bfloat16, 3)
        x = x.requires_grad_()
        y = module(x)
        y.backward(g)
        results.append((y.detach(), x.grad, module.weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_visible(backend, value):
    module = ds_quant.QuantLinear(IN, OUT, config={**FULL, "backend": backend})
    x = torch.randn(5, IN)
    clean = module(x)
    x[2, 3], x[4] = value, 0.0
    y = module(x)
    assert y[2].isnan().all()
    assert torch.equal(y[:2], clean[:2])
    assert torch.equal(y[4], module.bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(backend, use_reentrant):
    config = {**w8a8(range="full", rounding="stochastic"), "gradient": {"bits": 8}, "backend": backend}
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT), torch.nn.Tanh(), torch.nn.Linear(OUT, 3))
    convert(model, config)
    remove_forward_counter(model)  # as an engine does: the repetition is no step of its own
    x = torch.randn(7, IN)
    results = []
    for recompute in (False, True):
        step_key_of(model).set(1)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = checkpoint(model, leaf, use_reentrant=use_reentrant) if recompute else model(leaf)
        y.square().sum().backward()
        results.append([leaf.grad, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.thorough
def test_compiled(backend):
    """One graph, whose quantizer is that of the full range; Inductor makes it in numerics/test_full_range.py."""
    module = ds_quant.QuantLinear(IN, OUT, config={**FULL, "backend": backend})
    narrow = copy.deepcopy(module)
    narrow.configure_quantization(LinearConfig.parse({**w8a8(), "backend": backend}), module.step_key)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, IN)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-6)
        assert (module(x) - narrow(x)).abs().max() > 1e-4


def test_fewer_bits_train():
    """W4A8, W8A2 and the like: the loss of a small regression falls in both backends."""
    for (weight, bits), backend in itertools.product(((4, 8), (8, 4), (8, 2)), BACKENDS):
        torch.manual_seed(0)
        config = {"weight": {"bits": weight}, "activation": {"bits": bits, "range": "full"}, "backend": backend}
        module = ds_quant.QuantLinear(IN, OUT, config=config)
        x = torch.randn(64, IN)
        target = x @ torch.randn(IN, OUT)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        losses = []
        for _ in range(60):
            loss = (module(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0], config
