"""Gradients of weights that are masked or pulled by where the weights lie between their codes."""

import pytest
import torch
from helpers.linear_oracle import IN, OUT, Side, assert_compiles_to_the_same_bits, random_case, run
from torch import nn

import ds_quant

WEIGHTS = [
    {"bits": 4},
    {"bits": 3, "granularity": "tensor"},
    {"bits": 4, "granularity": "block", "block_size": 16},
    {"bits": 2, "symmetric": False},
    {"format": "nvint4", "block_rows": 16},
    {"format": "mxint8"},
]
FLOATING = [{"format": "nvfp4"}, {"format": "fp8_e4m3"}]
FP8 = {"activation": {"format": "fp8_e4m3"}, "gradient": {"format": "fp8_e5m2"}, "backend": "fp8"}
INT8 = {"activation": {"bits": 8}, "gradient": {"bits": 8}, "backend": "int8"}
NAMES = {"tensor": "tensor", "channel": "row", "block": "block"}


def side(w, weight):
    in_blocks = weight.get("format", "").startswith(("nv", "mx"))
    return Side.quantized(w, weight, NAMES[weight.get("granularity", "block" if in_blocks else "channel")])


def cases():
    for weight in WEIGHTS:
        yield weight, {}
        yield weight, {"activation": {"bits": 8}, "gradient": {"bits": 8, "granularity": "token"}}
        yield weight, {"activation": {"bits": 8}, "backward_operands": "original"}
        if weight in WEIGHTS[:2]:
            yield weight, INT8


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mask(dtype, layout):
    """The other gradients are what they were; that of a weight is either that or 0, by numpy's own division."""
    for weight, more in cases():
        x, w, bias, g = random_case(dtype, int(torch.randint(2**31, ()).item()))
        plain = run({"weight": weight, **more}, x, w, bias, g, layout)
        for distance in (0.1, 0.4):
            got = run({"weight": {**weight, "trust_distance": distance}, **more}, x, w, bias, g, layout)
            q = side(w, weight)
            scale = q.scale.float().expand(w.shape)
            steps = torch.where(scale > 0, w.float() / scale, torch.zeros(()))
            trusted = (steps - q.steps.float()).abs() <= distance
            assert torch.equal(got[2], torch.where(trusted, plain[2], torch.zeros((), dtype=dtype))), (weight, more)
            assert all(torch.equal(got[n], plain[n]) for n in (0, 1, 3))
            assert 0 < trusted.double().mean() < 1


def test_how_many_are_masked():
    """Of evenly spread weights 1 - 2 * distance, but for the ends of the range.

    Of 2^16 draws a share of 0.4 spreads by 0.0019; the last halves of the 14 bins from -7 to 7 hold 1/14 of the draws,
    and are as any other half.
    """
    layer = ds_quant.QuantLinear(256, 256, bias=False, config={"weight": {"bits": 4, "trust_distance": 0.3}})
    with torch.no_grad():
        layer.weight.uniform_(-1, 1)
    layer(torch.randn(8, 256)).square().sum().backward()
    assert layer.weight.grad.eq(0).double().mean().item() == pytest.approx(0.4, abs=0.012)


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dampening_is_the_gradient_of_its_loss(dtype, layout):
    """lambda * sum (w - Q(w))^2, Q(w) held constant: 2 lambda (w - Q(w)), in fp32 and rounded once."""
    strength = 3.0
    for weight, more in [*cases(), *((each, {}) for each in FLOATING), (FLOATING[1], FP8)]:
        x, w, bias, g = random_case(dtype, int(torch.randint(2**31, ()).item()))
        plain = run({"weight": weight, **more}, x, w, bias, g, layout)
        got = run({"weight": {**weight, "dampening": strength}, **more}, x, w, bias, g, layout)
        pull = 2 * strength * (w.double() - side(w, weight).values().expand(w.shape))
        want = plain[2].double() + pull
        # Q(w), the difference, the factor and the sum, each rounded once in fp32; w and Q(w) are no larger than this.
        bound = 4 * 2.0**-24 * (2 * strength * 2 * w.double().abs().amax() + plain[2].double().abs())
        bound = bound + torch.finfo(dtype).eps / 2 * (want.abs() + bound)
        assert ((got[2].double() - want).abs() <= bound).all(), (weight, more)
        assert all(torch.equal(got[n], plain[n]) for n in (0, 1, 3))


def test_both():
    """The mask is of the loss's own gradient: what is pulled is pulled everywhere."""
    weight = {"bits": 4, "trust_distance": 0.2}
    x, w, bias, g = random_case(torch.float32, 0)
    masked = run({"weight": weight}, x, w, bias, g, "linear")[2]
    got = run({"weight": {**weight, "dampening": 1.0}}, x, w, bias, g, "linear")[2]
    pull = 2 * (w.double() - side(w, weight).values())
    assert masked.eq(0).any()
    # As above: Q(w), the difference, its product with 2 and the sum.
    bound = 4 * 2.0**-24 * (2 * 2 * w.double().abs().amax() + masked.double().abs())
    assert ((got.double() - masked.double() - pull).abs() <= bound).all()


def test_weights_come_to_rest_on_their_codes():
    """By SGD at a rate r each step leaves (1 - 2 lambda r) of what is off: a row's largest, which sets the scale, is on
    its code and stays there."""
    layer = ds_quant.QuantLinear(IN, OUT, bias=False, config={"weight": {"bits": 4, "dampening": 0.5}})
    q = side(layer.weight.detach(), {"bits": 4}).values()
    off = layer.weight.detach().double() - q
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
    for _ in range(8):
        optimizer.zero_grad()
        (layer(torch.randn(3, IN)) * 0).sum().backward()
        optimizer.step()
    left = layer.weight.detach().double() - q
    # In units of 2^-24 of the largest weight. A step takes a quarter of w - Q(w), at most 1/14: a quarter of what
    # rounding Q(w) and the difference loses, and the rounding of the new weight, 1.27, of which three quarters remain
    # each time: 4 times as much in the end. The largest of a row is 2 off its own code, by the scale and its product.
    # It comes nearer by a half and is rounded, 1.5 a step, and takes the scale with it: after 8 steps codes are up to
    # 12 + 2 off, which reach the weights as they do.
    bound = (4 * 1.27 + 14) * 2.0**-24 * q.abs().max().item() * (1 + 2.0**-20)
    assert ((left - off * 0.75**8).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_as_one_graph(backend):
    torch._dynamo.reset()
    config = {"weight": {"bits": 4, "trust_distance": 0.3, "dampening": 0.1}, "gradient": {"bits": 8}}
    assert_compiles_to_the_same_bits(ds_quant.QuantLinear(IN, 8, config=config), torch.randn(21, IN), backend)


def test_edges():
    """Weights of zero, of which none is far from its code; and values that are not finite stay visible."""
    config = {"weight": {"bits": 4, "trust_distance": 0.1, "dampening": 1.0}}
    layer = ds_quant.QuantLinear(IN, OUT, bias=False, config=config)
    x = torch.randn(4, IN)
    with torch.no_grad():
        layer.weight.zero_()
    layer(x).sum().backward()
    # Three additions in fp32 here, and three there.
    assert ((layer.weight.grad - x.sum(0)).abs() <= 6 * 2.0**-24 * x.abs().sum(0)).all()
    layer.weight.grad = None
    with torch.no_grad():
        layer.weight[2, 3] = torch.nan
    layer(x).sum().backward()
    assert layer.weight.grad[2].isnan().all()
    assert layer.weight.grad[[0, 1]].isfinite().all()
    assert "W4 channel trusted within 0.1 dampened by 1 (simulated)" in layer.describe()


def test_micro_steps_share_it(single_rank):
    """An engine that accumulates several losses, of no gradient here, pulls once a step: SGD's step is the pull."""
    for micro_steps in (1, 2):
        model = nn.Sequential(nn.Linear(IN, OUT))
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": micro_steps,
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"ds_quant_required": True, "stage": 1},
            "ds_quant": {"linear": {"weight": {"bits": 4, "dampening": 0.5}, "exclude": []}},
        }
        engine = ds_quant.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        before = model[0].weight.detach().clone()
        for _ in range(micro_steps):
            engine.backward(engine(torch.randn(4, IN)).sum() * 0)
            engine.step()
        pull = 0.5 * (before.double() - side(before, {"bits": 4}).values())
        # Of weights of at most 1 / sqrt(37): half of what Q(w), and of 1/14 the difference and the sum of two micro
        # steps, lose, and the new weight's rounding: 1.6 in units of 2^-24 of the largest.
        assert ((before.double() - model[0].weight.detach().double() - pull).abs() <= 1.6 * 2.0**-24 / 37**0.5).all()
        assert pull.abs().max() > 2.0**-10
    ds_quant.disable()
