"""The three products of a quantized linear against the definition in ds_quant/linear.py, once more in float64."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from numerics import oracle
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import ds_quant
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.conversion import convert, step_key_of

TOKENS, IN, OUT = 11, 37, 19

WEIGHTS = {
    "none": None,
    "8 channel": {"bits": 8},
    "4 tensor": {"bits": 4, "granularity": "tensor"},
    "8 block": {"bits": 8, "granularity": "block", "block_size": 16},
    "5 channel asymmetric": {"bits": 5, "symmetric": False},
}
ACTIVATIONS = {
    "none": None,
    "8 token": {"bits": 8},
    "4 tensor": {"bits": 4, "granularity": "tensor"},
    "6 channel": {"bits": 6, "granularity": "channel"},
    "4 token asymmetric": {"bits": 4, "symmetric": False},
    "8 block": {"bits": 8, "granularity": "block", "block_size": 16},
}
GRADIENTS = [
    None,
    {"bits": 8},
    {"bits": 4, "granularity": "token"},
    {"bits": 8, "granularity": "tensor"},
    {"bits": 6, "granularity": "channel", "symmetric": False},
]


class Side:
    """One operand of a product as a matrix [free, contracted]: values in float64, and whether its scale may wait."""

    def __init__(self, steps, scale, contracted_scale):
        self.steps, self.scale, self.contracted_scale = steps, scale, contracted_scale

    @classmethod
    def plain(cls, x):
        return cls(x.double(), torch.ones((), dtype=torch.float64), False)

    @classmethod
    def quantized(cls, x, config, granularity, *, transposed=False):
        """Quantize x [rows, features]; contracted over the features, or over the rows if transposed."""
        block = config.get("block_size", 128)
        array = x.float().numpy()
        codes, scale, zero = oracle.quantize(
            array,
            config["bits"],
            granularity=granularity,
            block_size=block,
            symmetric=config.get("symmetric", True),
        )
        zeros = oracle.expand(zero, array.shape, granularity, block)
        scales = torch.from_numpy(oracle.expand(scale, array.shape, granularity, block)).double()
        steps = torch.from_numpy(codes.astype(np.float32) - zeros).double()
        contracted = granularity == "block" or granularity == ("column" if not transposed else "row")
        return cls(steps.t(), scales.t(), contracted) if transposed else cls(steps, scales, contracted)

    def values(self):
        return self.steps * self.scale


def product(a, b, dtype, bias=None):
    """(float64 result of a b^T + bias, bound of the rounding error that an fp32 accumulation to dtype may make)."""
    left, right = a.values(), b.values()
    operands_round = a.contracted_scale or b.contracted_scale
    if operands_round:
        # Each was rounded to the model's dtype once, from a product that was fp32.
        left, right = left.float().to(dtype).double(), right.float().to(dtype).double()
    exact = left @ right.t()
    magnitude = left.abs() @ right.abs().t()
    if bias is not None:
        exact = exact + bias.double()
        magnitude = magnitude + bias.double().abs()
    # Accumulating K terms in fp32, two scales and a bias: (K + 4) roundings of 2^-24; then one to dtype, whose unit
    # roundoff is eps / 2. An operand rounded to dtype from fp32 may land one unit off where fp32 hit a tie.
    unit = torch.finfo(dtype).eps / 2
    bound = (left.shape[1] + 4) * 2.0**-24 * magnitude + unit * exact.abs() * (1 + 2.0**-10)
    if operands_round and dtype != torch.float32:
        bound = bound + unit * magnitude * 2.0**-7
    return exact, bound + torch.finfo(torch.float32).tiny


def expected(x, w, bias, g, config, dtype):
    """(y, dX, dW), each with its bound. x [tokens, in], w [out, in], g [tokens, out], all in dtype."""
    names_w = {"tensor": "tensor", "channel": "row", "block": "block"}
    names_x = {"tensor": "tensor", "token": "row", "channel": "column", "block": "block"}
    weight, activation, gradient = config.get("weight"), config.get("activation"), config.get("gradient")

    def of_weight(transposed):
        if not weight:
            return Side.plain(w.t() if transposed else w)
        return Side.quantized(w, weight, names_w[weight.get("granularity", "channel")], transposed=transposed)

    def of_activation(transposed):
        if not activation:
            return Side.plain(x.t() if transposed else x)
        return Side.quantized(x, activation, names_x[activation.get("granularity", "token")], transposed=transposed)

    y = product(of_activation(False), of_weight(False), dtype, bias)
    original = config.get("backward_operands") == "original"
    other_w = Side.plain(w.t()) if original else of_weight(True)
    other_x = Side.plain(x.t()) if original else of_activation(True)
    used = gradient.get("used_for", ("weight", "input")) if gradient else ()
    granularity = gradient.get("granularity", "outer") if gradient else None

    def with_gradient(other, other_is_quantized, outer_name, transposed):
        """other [free, contracted]; g is contracted over its features, or over its rows if transposed."""
        folded = g.float()
        if granularity == "outer" and other_is_quantized:
            scale = other.scale[0].float()  # the same for every free index: it belongs to the contracted one
            folded = folded * (scale.reshape(-1, 1) if transposed else scale)
            other = Side(other.steps, torch.ones((), dtype=torch.float64), False)
        name = outer_name if granularity == "outer" else names_x[granularity]
        return product(Side.quantized(folded, gradient, name, transposed=transposed), other, dtype)

    if "input" in used:
        dx = with_gradient(other_w, bool(weight) and not original, "row", False)
    else:
        dx = product(Side.plain(g), other_w, dtype)
    if "weight" in used:
        dw = with_gradient(other_x, bool(activation) and not original, "column", True)
    else:
        dw = product(Side.plain(g.t()), other_x, dtype)
    return y, dx, dw


def run(config, x, w, bias, g, layout):
    """(y, dX, dW as [out, in], db) of the module."""
    if layout == "linear":
        module = ds_quant.QuantLinear(IN, OUT, dtype=x.dtype, config=config)
    else:
        module = ds_quant.QuantConv1D(OUT, IN, config=config).to(x.dtype)
    with torch.no_grad():
        module.weight.copy_(w if layout == "linear" else w.t())
        module.bias.copy_(bias)
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(g)
    dw = module.weight.grad if layout == "linear" else module.weight.grad.t()
    return y.detach(), x.grad, dw, module.bias.grad


def assert_within(got, want, what):
    exact, bound = want
    excess = ((got.double() - exact).abs() - bound).max()
    assert excess <= 0, f"{what}: off by {(got.double() - exact).abs().max():.3e}, {excess:.3e} above the bound"


def random_case(dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        rows = torch.exp(torch.randn(shape[0], 1, generator=generator))
        return (torch.randn(*shape, generator=generator) * rows).to(dtype)

    return draw(TOKENS, IN), draw(OUT, IN), draw(OUT, 1).flatten(), draw(TOKENS, OUT)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda name: f"A {name}")
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda name: f"W {name}")
def test_the_three_products(weight, activation):
    """Every gradient, use of it, backward operand, dtype and layout."""
    tried = 0
    uses = (["weight"], ["input"], ["weight", "input"])
    for gradient, used_for, operands in itertools.product(GRADIENTS, uses, ("quantized", "original")):
        config = {"weight": WEIGHTS[weight], "activation": ACTIVATIONS[activation], "backward_operands": operands}
        config = {key: value for key, value in config.items() if value is not None}
        if gradient is None and used_for != uses[0]:
            continue
        if gradient is not None:
            config["gradient"] = {**gradient, "used_for": used_for}
        try:
            LinearConfig.parse(config)
        except ConfigError:
            continue  # nothing to quantize, or a scale that cannot be folded: test_config.py has these
        for dtype, layout in itertools.product((torch.float32, torch.bfloat16), ("linear", "conv1d")):
            seed = int(torch.randint(2**31, ()).item())
            x, w, bias, g = random_case(dtype, seed)
            y, dx, dw, db = run(config, x, w, bias, g, layout)
            case = f"{config} {dtype} {layout} seed {seed}"
            for got, want, name in zip(
                (y, dx, dw), expected(x, w, bias, g, config, dtype), "y dX dW".split(), strict=True
            ):
                assert got.dtype == dtype
                assert_within(got, want, f"{name} of {case}")
            assert torch.equal(db, g.sum(0)), case
            tried += 1
    assert tried >= 4 or (weight, activation) == ("none", "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_quantized_is_the_linear_of_torch(dtype):
    """Bit for bit: the whole forward without W and A, and each backward product that sees no quantized operand."""
    x, w, bias, g = random_case(dtype, 0)
    plain = nn.Linear(IN, OUT, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(w)
        plain.bias.copy_(bias)
    leaf = x.clone().requires_grad_()
    want = plain(leaf)
    want.backward(g)
    y, dx, dw, db = run({"gradient": {"bits": 2, "used_for": ["weight"]}}, x, w, bias, g, "linear")
    assert torch.equal(y, want)
    assert torch.equal(dx, leaf.grad)
    assert not torch.equal(dw, plain.weight.grad)
    y, dx, dw, db = run({"gradient": {"bits": 2, "used_for": ["input"]}}, x, w, bias, g, "linear")
    assert torch.equal(dw, plain.weight.grad)
    assert not torch.equal(dx, leaf.grad)
    assert torch.equal(db, plain.bias.grad)
    paper = {"weight": {"bits": 4}, "activation": {"bits": 4}, "backward_operands": "original"}
    y, dx, dw, db = run(paper, x, w, bias, g, "linear")
    assert not torch.equal(y, want)
    assert torch.equal(dx, leaf.grad)
    assert torch.equal(dw, plain.weight.grad)


W8A8G8 = {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": {"bits": 8, "rounding": "stochastic"}}


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (3, IN), (2, 3, IN), (2, 1, 3, IN)])
def test_shapes(shape):
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8)
    x = torch.randn(shape, requires_grad=True)
    y = module(x)
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.isfinite(module.weight.grad).all()


def test_strided_input_and_gradient():
    module = ds_quant.QuantLinear(IN, OUT, bias=False, config={"weight": {"bits": 8}, "activation": {"bits": 8}})
    x = torch.randn(IN, 4, 6).permute(1, 2, 0)
    g = torch.randn(OUT, 4, 6).permute(1, 2, 0)
    results = []
    for inputs, grads in ((x, g), (x.contiguous(), g.contiguous())):
        module.weight.grad = None
        leaf = inputs.detach().requires_grad_()
        y = module(leaf)
        y.backward(grads)
        results.append((y.detach(), leaf.grad, module.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_non_finite_values_stay_visible():
    module = ds_quant.QuantLinear(IN, OUT, config={"weight": {"bits": 8}, "activation": {"bits": 8}})
    x = torch.randn(5, IN)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    y = module(x)
    assert y[[1, 2]].isnan().all()
    assert y[[0, 3, 4]].isfinite().all()


def saved_by(module, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        module(x)
    return saved


def test_what_the_backward_holds():
    """One byte an element of X and four a token; of the weight nothing but the Parameter itself."""
    config = {"weight": {"bits": 8}, "activation": {"bits": 8}}
    module = ds_quant.QuantLinear(64, 32, bias=False, dtype=torch.bfloat16, config=config)
    x = torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True)
    saved = saved_by(module, x)
    assert any(tensor is module.weight for tensor in saved)
    held = sum(t.numel() * t.element_size() for t in saved if t is not module.weight)
    assert held == 100 * 64 + 100 * 4
    original = ds_quant.QuantLinear(64, 32, config={**config, "backward_operands": "original"}).bfloat16()
    assert sum(t.numel() * t.element_size() for t in saved_by(original, x) if t is not original.weight) == 2 * 100 * 64


def gradients(module, x, key_step):
    step_key_of(module).set(*key_step)
    module.weight.grad = None
    leaf = x.clone().requires_grad_()
    module(leaf).square().sum().backward()
    return torch.cat([module.weight.grad.flatten(), leaf.grad.flatten()])


def test_stochastic_rounding_follows_the_step_and_nothing_else():
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8)
    x = torch.randn(6, IN)
    state = torch.get_rng_state()
    first = gradients(module, x, (3, 0))
    assert torch.equal(state, torch.get_rng_state()), "a torch generator was consumed"
    for other in ((4, 0), (3, 1)):
        assert not torch.equal(first, gradients(module, x, other))
    assert torch.equal(first, gradients(module, x, (3, 0)))
    step_key_of(module).reseed(step_key_of(module).seed, rank=1)
    assert not torch.equal(first, gradients(module, x, (3, 0))), "ranks draw the same bits for different data"


def test_stochastic_weights_round_alike_on_all_ranks():
    config = {"weight": {"bits": 4, "rounding": "stochastic"}}
    module = ds_quant.QuantLinear(IN, OUT, config=config)
    x = torch.randn(6, IN)
    step_key_of(module).reseed(1, rank=0)
    first = module(x)
    step_key_of(module).reseed(1, rank=1)
    assert torch.equal(first, module(x))
    step_key_of(module).set(1)
    assert not torch.equal(first, module(x))


def test_stochastic_gradients_are_unbiased():
    """The mean over N steps lies within 6 standard errors of the unquantized product, in every element."""
    torch.manual_seed(0)
    config = {"gradient": {"bits": 4, "rounding": "stochastic"}}
    module = ds_quant.QuantLinear(16, 8, config=config)
    x, g = torch.randn(12, 16), torch.randn(12, 8)
    want = torch.cat([(g @ module.weight).flatten(), (g.t() @ x).flatten()]).double()
    draws = []
    for step in range(400):
        step_key_of(module).set(step)
        module.weight.grad = None
        leaf = x.clone().requires_grad_()
        module(leaf).backward(g)
        draws.append(torch.cat([leaf.grad.flatten(), module.weight.grad.flatten()]).double())
    stacked = torch.stack(draws)
    error = (stacked.mean(0) - want).abs()
    assert (error <= 6 * stacked.std(0) / len(draws) ** 0.5 + 1e-5).all()
    nearest = ds_quant.QuantLinear(16, 8, config={"gradient": {"bits": 4}})
    nearest.load_state_dict(module.state_dict())
    leaf = x.clone().requires_grad_()
    nearest(leaf).backward(g)
    biased = (leaf.grad.flatten().double() - want[: leaf.numel()]).abs()
    assert (biased > 6 * stacked.std(0)[: leaf.numel()] / len(draws) ** 0.5).any(), "the test could not see a bias"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_draws_the_same_bits(use_reentrant):
    config = {**W8A8G8, "activation": {"bits": 4, "rounding": "stochastic"}}
    model = nn.Sequential(nn.Linear(IN, IN), nn.GELU(), nn.Linear(IN, IN))
    convert(model, config)
    x = torch.randn(5, IN)

    def run_model(recompute):
        step_key_of(model).set(7)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        # The layers one by one: the model's own call would count as another step.
        y = (
            checkpoint(lambda t: model[2](model[1](model[0](t))), leaf, use_reentrant=use_reentrant)
            if recompute
            else (model[2](model[1](model[0](leaf))))
        )
        y.square().sum().backward()
        return [leaf.grad, *(p.grad.clone() for p in model.parameters())]

    for a, b in zip(run_model(False), run_model(True), strict=True):
        assert torch.equal(a, b)


def test_autocast():
    config = {"weight": {"bits": 8}, "activation": {"bits": 8}}
    module = ds_quant.QuantLinear(IN, OUT, config=config)
    x = torch.randn(6, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        plain = nn.functional.linear(x, module.weight, module.bias)
    assert y.dtype == torch.bfloat16
    # Quantized from the fp32 master, whatever autocast would have made of it.
    want, bound = expected(
        x.detach().bfloat16(), module.weight.detach(), module.bias.detach(), y.detach().float(), config, torch.bfloat16
    )[0]
    assert_within(y, (want, bound), "y")
    assert not torch.equal(y, plain)
    y.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32
    assert x.grad.dtype == torch.float32


def test_dtype_mismatch_is_named():
    module = ds_quant.QuantLinear(4, 4, config={"weight": {"bits": 8}})
    with pytest.raises(ValueError, match=r"float64 for a weight of torch.float32.*remedy"):
        module(torch.randn(2, 4, dtype=torch.float64))


def test_frozen_parameters_get_no_gradient():
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8)
    module.weight.requires_grad_(False)
    x = torch.randn(3, IN, requires_grad=True)
    module(x).sum().backward()
    assert module.weight.grad is None
    assert x.grad is not None
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8)
    module(torch.randn(3, IN)).sum().backward()
    assert module.weight.grad is not None


def test_copies_and_pickles():
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8)
    conv = ds_quant.QuantConv1D(OUT, IN, config=W8A8G8)
    x = torch.randn(3, IN)
    for original in (module, conv):
        for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert type(twin) is type(original)
            assert torch.equal(twin(x), original(x))


def test_compiled_gives_the_same_bits():
    torch.manual_seed(0)
    module = ds_quant.QuantLinear(16, 8, config=W8A8G8)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(4, 16)
    for step in (1, 2):
        results = []
        for call in (module, compiled):
            step_key_of(module).set(step)
            module.weight.grad = None
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad, module.weight.grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_conv1d_is_still_a_conv1d():
    assert isinstance(ds_quant.QuantConv1D(OUT, IN, config=W8A8G8), Conv1D)
    assert isinstance(ds_quant.QuantLinear(IN, OUT, config=W8A8G8), nn.Linear)
