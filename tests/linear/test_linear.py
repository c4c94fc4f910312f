"""The three products of a quantized linear against their definition, once more in float64."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers.linear_oracle import IN, OUT, assert_compiles_to_the_same_bits, assert_within, expected, random_case, run
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import ds_quant
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.linear.convert import convert, step_key_of
from ds_quant.linear.step_key import remove_forward_counter

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
    "8 token full": {"bits": 8, "range": "full"},
    "3 channel full": {"bits": 3, "granularity": "channel", "range": "full"},
    "5 block full": {"bits": 5, "granularity": "block", "block_size": 16, "range": "full"},
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
            continue  # nothing to quantize, or a scale that cannot be folded: test_linear_rules.py has these
        for dtype in (torch.float32, torch.bfloat16):
            seed = int(torch.randint(2**31, ()).item())
            x, w, bias, g = random_case(dtype, seed)
            wanted = expected(x, w, bias, g, config, dtype)
            for layout in ("linear", "conv1d"):
                y, dx, dw, db = run(config, x, w, bias, g, layout)
                case = f"{config} {dtype} {layout} seed {seed}"
                for got, want, name in zip((y, dx, dw), wanted, "y dX dW".split(), strict=True):
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


BACKENDS = ("simulated", "int8")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(IN,), (0, IN), (3, IN), (2, 3, IN), (2, 1, 3, IN)])
def test_shapes(shape, backend):
    module = ds_quant.QuantLinear(IN, OUT, config={**W8A8G8, "backend": backend})
    x = torch.randn(shape, requires_grad=True)
    y = module(x)
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.isfinite(module.weight.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_and_gradient(backend):
    config = {"weight": {"bits": 8}, "activation": {"bits": 8}, "backend": backend}
    module = ds_quant.QuantLinear(IN, OUT, bias=False, config=config)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_values_stay_visible(backend):
    module = ds_quant.QuantLinear(
        IN, OUT, config={"weight": {"bits": 8}, "activation": {"bits": 8}, "backend": backend}
    )
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_backward_holds(backend):
    """One byte an element of X and four a token; of the weight nothing but the Parameter itself."""
    config = {"weight": {"bits": 8}, "activation": {"bits": 8}, "backend": backend}
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_follows_the_step_and_nothing_else(backend):
    module = ds_quant.QuantLinear(IN, OUT, config={**W8A8G8, "backend": backend})
    remove_forward_counter(module)
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
    remove_forward_counter(module)
    x = torch.randn(6, IN)
    step_key_of(module).reseed(1, rank=0)
    first = module(x)
    step_key_of(module).reseed(1, rank=1)
    assert torch.equal(first, module(x))
    step_key_of(module).set(1)
    assert not torch.equal(first, module(x))


def test_a_layer_alone_counts_its_training_forwards():
    module = ds_quant.QuantLinear(IN, OUT, config={"weight": {"bits": 4, "rounding": "stochastic"}})
    conv = ds_quant.QuantConv1D(OUT, IN, config={"weight": {"bits": 4, "rounding": "stochastic"}})
    x = torch.randn(6, IN)
    for layer in (module, conv):
        first, second = layer(x), layer(x)
        assert not torch.equal(first, second), "the same bits at two steps"
        step_key_of(layer).set(0)
        assert torch.equal(first, layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x)), "an evaluation is no step"
    nearest = ds_quant.QuantLinear(IN, OUT, config={"weight": {"bits": 4}})
    assert not nearest._forward_pre_hooks


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_layer_alone_draws_the_same_bits_when_it_is_computed_again(use_reentrant):
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8)
    x = torch.randn(6, IN)

    def gradients(call):
        step_key_of(module).set(7)
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        return torch.cat([module.weight.grad.flatten(), leaf.grad.flatten()])

    again = gradients(lambda leaf: checkpoint(module, leaf, use_reentrant=use_reentrant))
    assert torch.equal(gradients(module), again)


@pytest.mark.parametrize(
    ("key", "linear"),
    [
        ("forward_full_precision_from", {"weight": {"bits": 4}, "forward_full_precision_from": 10}),
        ("weight.oscillation_reset", {"weight": {"bits": 4, "oscillation_reset": {}}}),
    ],
)
def test_a_layer_alone_refuses_to_train_with_what_only_an_engine_applies(key, linear):
    module = ds_quant.QuantLinear(IN, OUT, config=linear)
    with pytest.raises(ConfigError, match=rf"ds_quant.linear.{key}: got .* allowed: training with an engine"):
        module(torch.randn(6, IN))
    with torch.no_grad():
        module.eval()(torch.randn(6, IN))


def test_layers_that_were_made_directly_join_their_model():
    config = {"weight": {"bits": 4, "rounding": "stochastic"}, "forward_full_precision_from": 10, "exclude": []}
    made = [ds_quant.QuantLinear(IN, IN, config=config) for _ in range(2)]
    model = nn.Sequential(made[0], nn.Linear(IN, IN), made[1])
    for layer in (made[1], model[1]):
        layer.load_state_dict(made[0].state_dict())
    assert convert(model, config) == ["0", "1", "2"]
    assert len({layer._quant_plan.stream for layer in model}) == 3, "two layers draw the same bits"
    assert len({id(layer.step_key) for layer in model}) == 1
    # As if all had been converted.
    plain = nn.Sequential(*(nn.Linear(IN, IN) for _ in range(3)))
    plain.load_state_dict(model.state_dict())
    convert(plain, config)
    x = torch.randn(6, IN)
    step_key_of(plain).reseed(step_key_of(model).seed, 0)
    for step in (3, 4):
        step_key_of(model).set(step)
        step_key_of(plain).set(step)
        assert torch.equal(model.eval()(x), plain.eval()(x))
    with pytest.raises(ConfigError, match="forward_full_precision_from"):
        model.train()(x)
    # What drives the model drives all of its layers.
    remove_forward_counter(model)
    full = x
    for layer in model:
        full = nn.functional.linear(full, layer.weight, layer.bias)
    assert not torch.equal(model(x), full)
    step_key_of(model).reach(10)
    assert torch.equal(model(x), full)
    # A second conversion, as `initialize` makes it, changes nothing.
    streams = [layer._quant_plan.stream for layer in model]
    assert convert(model, config) == ["0", "1", "2"]
    assert [layer._quant_plan.stream for layer in model] == streams


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_draws_the_same_bits(use_reentrant, backend):
    config = {**W8A8G8, "activation": {"bits": 4, "rounding": "stochastic"}, "backend": backend}
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    config = {"weight": {"bits": 8}, "activation": {"bits": 8}, "backend": backend}
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
    with pytest.raises(ValueError, match=r"float64 for a weight of torch.float32.*fix"):
        module(torch.randn(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters_get_no_gradient(backend):
    config = {**W8A8G8, "backend": backend}
    module = ds_quant.QuantLinear(IN, OUT, config=config)
    module.weight.requires_grad_(False)
    x = torch.randn(3, IN, requires_grad=True)
    module(x).sum().backward()
    assert module.weight.grad is None
    assert x.grad is not None
    module = ds_quant.QuantLinear(IN, OUT, config=config)
    module(torch.randn(3, IN)).sum().backward()
    assert module.weight.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_pickles(backend):
    config = {**W8A8G8, "backend": backend}
    module = ds_quant.QuantLinear(IN, OUT, config=config)
    conv = ds_quant.QuantConv1D(OUT, IN, config=config)
    x = torch.randn(3, IN)
    for original in (module, conv):
        original(x)  # what it keeps of this is neither copied nor pickled
        for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert type(twin) is type(original)
            assert torch.equal(twin(x), original(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.thorough
def test_compiled_gives_the_same_bits(backend):
    torch.manual_seed(0)
    module = ds_quant.QuantLinear(16, 8, config={**W8A8G8, "backend": backend})
    assert_compiles_to_the_same_bits(module, torch.randn(4, 16))


def test_conv1d_is_still_a_conv1d():
    assert isinstance(ds_quant.QuantConv1D(OUT, IN, config=W8A8G8), Conv1D)
    assert isinstance(ds_quant.QuantLinear(IN, OUT, config=W8A8G8), nn.Linear)


@pytest.mark.parametrize("backend", ["simulated", "int8"])
def test_shapes_are_found_out_without_memory(backend):
    """On the meta device, as planners and `init_empty_weights` do it."""
    config = {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": {"bits": 8, "rounding": "stochastic"}}
    layer = ds_quant.QuantLinear(6, 4, device="meta", config={**config, "backend": backend})
    output = layer(torch.empty(2, 3, 6, device="meta"))
    output.sum().backward()
    assert (output.shape, layer.weight.grad.shape) == ((2, 3, 4), (4, 6))
