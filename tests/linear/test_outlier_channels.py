"""Outlier channels of X in 8 bits: by their definition, which ones they are, and what it is for."""

import pytest
import torch
from helpers.linear_oracle import IN, OUT, assert_compiles_to_the_same_bits, check_products, random_case, run

import ds_quant
from ds_quant.diagnostics.quantization_error import QuantizationErrorRecorder
from ds_quant.linear.outlier_channels import channels_of

W4, G8 = {"bits": 4}, {"bits": 8, "granularity": "token"}
ACTIVATIONS = [
    {"bits": 4},
    {"bits": 2, "granularity": "tensor", "range": "full"},
    {"bits": 4, "granularity": "channel"},
    {"bits": 4, "granularity": "block", "block_size": 16},
    {"bits": 4, "symmetric": False},
    {"format": "fp4_e2m1"},
    {"format": "fp6_e3m2", "granularity": "block", "block_size": 32},
    {"format": "mxfp4", "scale_rule": "up"},
    {"format": "nvfp4", "scale_rule": "four_six"},
    {"format": "nvint4"},
]


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_three_products(dtype, layout):
    for activation in ACTIVATIONS:
        for share in (0.001, 0.1, 0.6, 0.99):  # one feature, a few, most and all
            x = {**activation, "outlier_share": share}
            check_products({"weight": W4, "activation": x, "gradient": G8}, dtype, layout)
    check_products({"activation": {"bits": 4, "outlier_share": 0.1}}, dtype, layout)
    check_products(
        {"weight": W4, "activation": x, "gradient": {"bits": 8}, "backward_operands": "original"}, dtype, layout
    )


def test_which_channels():
    x = torch.tensor([[1.0, -3.0, 2.0, 0.0, 3.0], [-2.0, 0.5, -2.0, 0.0, 1.0]])
    assert channels_of(x, 0.4).tolist() == [1, 4]
    assert channels_of(x, 0.41).tolist() == [0, 1, 4], "rounded up; of equal ones the first"
    x[1, 3] = torch.nan
    assert channels_of(x, 0.2).tolist() == [3]
    assert channels_of(torch.zeros(0, 10), 0.7).tolist() == list(range(7))


def test_outliers_lose_less():
    """Three features of X of 30 times the others' size, of which 4 of 37 take 8 bits.

    Of a token the step in 4 bits is then the largest of 33 normal deviates over 7, some 2.2 / 7, in place of some 30 *
    1.4 / 7, and the outliers' is 30 * 1.4 / 127: the error falls to about 0.1. Over 11 tokens it is never near a half.
    """
    x, w, bias, g = random_case(torch.float32, 0)
    x = torch.randn(11, IN)
    x[:, [3, 8, 36]] *= 30
    exact = x @ w.t() + bias
    errors = []
    for more in ({}, {"outlier_share": 0.1}):
        y = run({"activation": {"bits": 4, **more}}, x, w, bias, g, "linear")[0]
        errors.append(float((y - exact).norm()))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_as_one_graph(backend):
    torch._dynamo.reset()
    x = {"bits": 4, "rounding": "stochastic", "outlier_share": 0.2}
    config = {"weight": W4, "activation": x, "gradient": G8}
    assert_compiles_to_the_same_bits(ds_quant.QuantLinear(IN, 8, config=config), torch.randn(21, IN), backend)


def test_what_the_backward_holds():
    """Codes of all features, those of the outliers, two scales a token, and which they are."""
    config = {"activation": {"bits": 4, "outlier_share": 0.25}}
    module = ds_quant.QuantLinear(64, 32, bias=False, config=config)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        module(torch.randn(96, 64))
    held = sum(t.numel() * t.element_size() for t in saved if t is not module.weight)
    assert held == 96 * (64 + 16) + 2 * 96 * 4 + 16 * 8


def test_edges():
    module = ds_quant.QuantLinear(IN, OUT, config={"activation": {"bits": 4, "outlier_share": 0.1}})
    assert module(torch.zeros(0, IN)).shape == (0, OUT)
    assert torch.equal(module(torch.zeros(3, IN)), module.bias.expand(3, OUT))
    x = torch.randn(4, IN)
    x[1, 2] = torch.inf
    y = module(x)
    assert y[1].isnan().all(), "the scale of the outliers of a token"
    assert y[[0, 2, 3]].isfinite().all()
    assert "A4 token with 0.1 of the channels in 8 bits" in module.describe()


def test_what_diagnostics_see():
    """The error of the forward's own operand."""
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    ds_quant.convert(model, {"activation": {"bits": 4, "outlier_share": 0.1}, "exclude": []})
    x = torch.randn(11, IN)
    x[:, 5] *= 100
    recorder = QuantizationErrorRecorder()
    recorder.prepare("0", model[0])
    recorder.observe_input("0", model[0], x)
    (row,) = recorder.result(None).rows
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(OUT, IN))
        model[0].bias.zero_()
        first = model(x) - x[:, :OUT]  # of the first features as the layer has them
        model[0].weight.copy_(torch.eye(IN).flip(0)[:OUT])
        others = (model(x) - x.flip(1)[:, :OUT])[:, : IN - OUT]
    want = torch.cat((first, others), 1).double().norm() / x.double().norm()
    assert row["relative_l2"] == pytest.approx(float(want), rel=1e-6)
