"""Operands whose mean over tokens is split off: against the products of what is left, and what it is for."""

import pytest
import torch
from helpers.linear_oracle import IN, OUT, random_case, run

import ds_quant
from ds_quant.numerics.format import Format, Group, Integers, fake_quantize_to, named_format
from ds_quant.numerics.rotation import rotate_rows, unrotate

NV = {"format": "nvfp4"}
PLAIN = [
    {"weight": NV, "activation": NV, "gradient": NV},
    {"weight": {"bits": 4}, "activation": {"bits": 4}, "gradient": {"bits": 4}},
    {"activation": {"bits": 4}},
    {"weight": NV, "activation": NV, "gradient": NV, "rotation": {"block_size": 16}},
]


def split(config, *names):
    return {key: {**value, "split_mean": True} if key in names else value for key, value in config.items()}


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_the_three_products(layout):
    """Those of centred operands, which `simulated` has without the option, and the terms of means in float64."""
    for config in PLAIN:
        for names in (("activation",), ("activation", "gradient")):
            x, w, bias, g = random_case(torch.float32, int(torch.randint(2**31, ()).item()))
            x, g = x + 3 * torch.randn(IN), g + torch.randn(OUT)
            got = run(split(config, *names), x, w, bias, g, layout)
            # In fp32, as the layer takes it off: the quantizers see the same numbers.
            m, n = x.sum(0) / len(x), g.sum(0) / len(g)
            centred_g = g - n if "gradient" in names and "gradient" in config else g
            y, dx, dw, _ = run(config, x - m, w, torch.zeros(OUT), centred_g, layout)
            want_y = y.double() + seen_weight(config, w) @ m.double() + bias.double()
            of_input = seen_weight(config, w.t()) if "rotation" in config else seen_weight(config, w).t()
            want_dx = dx.double() + (of_input @ n.double() if centred_g is not g else 0)
            want_dw = dw.double() + torch.outer(g.double().sum(0), m.double())
            pairs = (got[0], want_y, "y"), (got[1], want_dx, "dx"), (got[2], want_dw, "dw")
            for (a, b, what), bound in zip(pairs, bounds(x, w, bias, g), strict=True):
                assert (a.double() - b).norm() <= bound, (what, config, names)
            assert torch.equal(got[3], g.sum(0))


def bounds(x, w, bias, g):
    """Norms that Y, dX and dW may be off by, of their sums in fp32 in two orders.

    A sum of K products rounds each of them K times, here and there. Beside that two operands are dequantized, twice;
    a mean is rotated and W turned back (4 stages and two products each); the mean's part, the bias and the mean itself
    are a sum and a product each: 20. What rounds to nearest at most doubles a number, and what is less its mean has no
    larger norm; norms of operands bound that of the sums of magnitudes. A code that is another is 2^-4 of a number off.
    """
    tokens, of_mean = len(x), (x.sum(0) / len(x)).norm() * len(x) ** 0.5
    centred, weight, gradient = (x - x.sum(0) / tokens).norm(), w.norm(), g.norm()
    sums = (
        (IN, 4 * centred * weight + 2 * of_mean * weight + tokens**0.5 * bias.norm()),
        (OUT, 4 * gradient * weight + 2 * gradient * weight),
        (tokens, 4 * gradient * centred + gradient * of_mean),
    )
    return [(2 * count + 20) * 2.0**-24 * float(norm) for count, norm in sums]


def seen_weight(config, w):
    """float64 [free, contracted]: W, or its transpose, as the product that contracts its columns has it."""
    if "weight" not in config:
        return w.double()
    name = config["weight"].get("format")
    fmt = named_format(name) if name else Format(Integers(config["weight"]["bits"]), Group("row"))
    if "rotation" not in config:
        return fake_quantize_to(w, fmt).double()
    rotated = fake_quantize_to(rotate_rows(w.contiguous(), 16), fmt)
    return torch.stack([unrotate(row, 16) for row in rotated]).double()


def test_a_common_part_of_all_tokens_costs_nothing():
    """Of ten times the rest: what the quantizer loses of X falls with it, by more than half in Y and dW."""
    x, w, bias, g = random_case(torch.float32, 0)
    x = torch.randn(64, IN) + 10 * torch.randn(IN)
    g = torch.randn(64, OUT)
    exact = (x @ w.t() + bias, g.t() @ x)
    config = {"activation": {"bits": 4}, "gradient": {"bits": 8}}
    errors = []
    for each in (config, split(config, "activation")):
        y, _, dw, _ = run(each, x, w, bias, g, "linear")
        errors.append([float((y - exact[0]).norm()), float((dw - exact[1]).norm())])
    assert errors[1][0] < errors[0][0] / 2
    assert errors[1][1] < errors[0][1] / 2


@pytest.mark.thorough
def test_compiled_as_one_graph():
    """The same codes; sums of the terms with means may have another order."""
    torch._dynamo.reset()
    module = ds_quant.QuantLinear(IN, 8, config=split(PLAIN[1], "activation", "gradient"))
    x, g = torch.randn(21, IN) + 2, torch.randn(21, 8) + 1
    results = []
    for call in (module, torch.compile(module, fullgraph=True)):
        module.weight.grad = None
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.backward(g)
        results.append((y.detach(), leaf.grad, module.weight.grad))
    limits = bounds(x, module.weight.detach(), module.bias.detach(), g)
    for got, want, bound in zip(*results, limits, strict=True):
        assert (got - want).norm() <= bound


def test_edges():
    config = split(PLAIN[1], "activation", "gradient")
    module = ds_quant.QuantLinear(IN, OUT, config=config)
    assert module(torch.zeros(0, IN)).shape == (0, OUT)
    one = torch.randn(1, IN)
    torch.testing.assert_close(module(one), run_one(module, one))  # a single token is its mean
    x = torch.randn(4, IN)
    x[1, 2] = torch.nan
    assert module(x).isnan().all(), "the mean takes it to all tokens"
    assert "A4 token less its mean, G4 outer less its mean" in module.describe()


def run_one(module, x):
    return x @ seen_weight({"weight": {"bits": 4}}, module.weight.detach()).float().t() + module.bias
