"""Products whose operands are rotated: by their definition, one by one, and what it is for."""

import pytest
import torch
from helpers.linear_oracle import IN, OUT, assert_compiles_to_the_same_bits, check_products, random_case, run

import ds_quant
from ds_quant.config import ConfigError, LinearConfig

FP4 = {"format": "fp4_e2m1"}
BLOCK = {"bits": 4, "granularity": "block", "block_size": 16}
NV = {"format": "nvfp4"}
CONFIGS = [
    {"weight": NV, "activation": NV, "gradient": NV},
    {"weight": {**NV, "block_rows": 16}, "activation": {**NV, "scale_rule": "four_six"}, "gradient": NV},
    {"weight": {"bits": 4}, "activation": {"bits": 8}, "gradient": {"bits": 8}},
    {"weight": BLOCK, "activation": BLOCK, "gradient": BLOCK},
    {"weight": BLOCK, "activation": BLOCK, "gradient": {"bits": 4}},
    {"weight": {"format": "mxfp4"}, "activation": {**FP4, "granularity": "tensor"}, "gradient": FP4},
    {"weight": {"bits": 4, "symmetric": False}, "activation": {"bits": 4}, "gradient": {"bits": 4, "symmetric": False}},
]
ALL = ("output", "input", "weight")


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_three_products(dtype, layout):
    for config in CONFIGS:
        for rotation in ({"block_size": 16}, {"block_size": 32, "used_for": ["output"]}, {"used_for": ["weight"]}):
            config = {**config, "rotation": rotation}
            try:
                LinearConfig.parse(config)
            except ConfigError:  # scales of blocks fold into no product that is not rotated
                config["gradient"] = {**config["gradient"], "granularity": "tensor"}
            check_products(config, dtype, layout)


@pytest.mark.parametrize("used_for", ALL)
def test_one_product_alone(used_for):
    """The others are what they were, bit for bit, whatever the forward quantizes."""
    x, w, bias, g = random_case(torch.bfloat16, int(torch.randint(2**31, ()).item()))
    rotated = run({**CONFIGS[0], "rotation": {"used_for": [used_for]}}, x, w, bias, g, "linear")
    plain = run(CONFIGS[0], x, w, bias, g, "linear")
    for product, got, want in zip(ALL, rotated, plain, strict=False):
        assert torch.equal(got, want) == (product != used_for)


def test_outliers_lose_less():
    """One feature of X and one token of G of 30 times the others' size, in 4 bits with a scale for 37 or 64 elements.

    Unrotated the step is 30 / 7 of the others' size, which then become 0; rotated by blocks of 32 it is some 30 / 7 /
    sqrt(32) times the largest of a few normal deviates. The median error of Y is 0.39 of the unrotated one, that of dW
    0.60, which is larger in one draw of seven (of 320 draws): of 31 draws' median that is one in millions.
    """
    config = {"weight": {"bits": 8}, "activation": {"bits": 4}, "gradient": {"bits": 4}}
    ratios = []
    for _ in range(31):
        x, w, g, bias = torch.randn(64, IN), torch.randn(OUT, IN), torch.randn(64, OUT), torch.zeros(OUT)
        x[:, 3] *= 30
        g[5] *= 30
        plain, rotated = (
            run(each, x, w, bias, g, "linear") for each in (config, {**config, "rotation": {"block_size": 32}})
        )
        exact = {0: x @ w.t(), 2: g.t() @ x}
        ratios.append([((rotated[n] - exact[n]).norm() / (plain[n] - exact[n]).norm()).item() for n in exact])
    of_y, of_dw = torch.tensor(ratios).median(0).values.tolist()
    assert of_y < 0.5
    assert of_dw < 1.0


def test_what_the_backward_holds():
    """Of X codes and scales once, for dW; nothing of it where no gradient is wanted."""
    module = ds_quant.QuantLinear(64, 32, bias=False, config={**CONFIGS[0], "rotation": {}}).bfloat16()
    saved = []
    x = torch.randn(96, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        module(x)
    assert sum(t.numel() * t.element_size() for t in saved if t is not module.weight) == 64 * 96 + 64 * 6 * 4


@pytest.mark.thorough
def test_compiled_as_one_graph():
    """With tails of tokens and of features, which are rotated in parts."""
    torch._dynamo.reset()
    config = {**CONFIGS[2], "gradient": {"bits": 8, "rounding": "stochastic"}, "rotation": {"block_size": 16}}
    assert_compiles_to_the_same_bits(ds_quant.QuantLinear(IN, 8, config=config), torch.randn(21, IN))


def test_values_that_are_not_finite_stay_visible():
    x, w, bias, g = random_case(torch.float32, 1)
    x[3, 5] = torch.nan
    y, dx, _, _ = run({**CONFIGS[0], "rotation": {}}, x, w, bias, g, "linear")
    assert y[3].isnan().all()
    assert y.isnan().sum() == OUT
    assert dx.isfinite().all()


def test_how_layers_describe_themselves():
    config = {**CONFIGS[0], "rotation": {"block_size": 32, "used_for": ["weight", "output"]}}
    assert ", Hadamard 32 for Y+dW (simulated)" in ds_quant.QuantLinear(8, 8, config=config).describe()
