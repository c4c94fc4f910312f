"""QuantLion, QuantSGD and QuantAdEMAMix: a step is the definition, and with 32-bit states that of their peers."""

import copy
import math

import pytest
import torch
from torch import nn

from ds_quant import QuantAdEMAMix, QuantLion, QuantSGD
from ds_quant.config import ConfigError
from ds_quant.kernels.elementwise import reference
from ds_quant.numerics.elementwise import elementwise_step
from ds_quant.numerics.random import derive_key, fold_key
from ds_quant.optim.state import QuantizedState

ULP = 2.0**-23


def slow(stored):
    """The slow moment in the same format, but with 8 bits."""
    return stored and {**stored, "bits": 8}


MAKE = {
    "lion": lambda params, stored, **options: QuantLion(
        params, lr=0.01, betas=(0.9, 0.98), weight_decay=0.1, exp_avg=stored, **options
    ),
    "sgd": lambda params, stored, **options: QuantSGD(
        params, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, momentum_buffer=stored, **options
    ),
    "sgd damped": lambda params, stored, **options: QuantSGD(
        params, lr=0.1, momentum=0.8, dampening=0.5, momentum_buffer=stored, **options
    ),
    "ademamix": lambda params, stored, **options: QuantAdEMAMix(
        params,
        lr=0.01,
        betas=(0.9, 0.95, 0.99),
        t_alpha=5,
        t_beta3=4,
        exp_avg_fast=stored,
        exp_avg_slow=slow(stored),
        exp_avg_sq=stored,
        **options,
    ),
}
FORMATS = {
    "32": None,
    "8": {"bits": 8},
    "4": {"bits": 4, "block_size": 32},
    "dynamic": {"bits": 8, "map": "dynamic"},
    "tensor": {"bits": 8, "map": "linear", "granularity": "tensor", "rounding": "nearest"},
    "channel": {"bits": 4, "map": "linear", "granularity": "channel"},
}
SHAPES = ((7, 33), (600,), (), (4, 3, 5), (0,))


def parameters(rng, dtype=torch.float32):
    return [nn.Parameter(torch.from_numpy(rng.normal(size=shape)).to(dtype)) for shape in SHAPES]


def twins(params):
    return [nn.Parameter(param.detach().clone()) for param in params]


def set_grads(rng, *lists):
    for params in zip(*lists, strict=True):
        grad = torch.from_numpy(rng.normal(size=params[0].shape)).to(params[0].dtype)
        if grad.numel() > 300:
            grad[:256] = 0.0
        for param in params:
            param.grad = grad.clone()


def bits(optimizer):
    """What a step depends on, parameter by parameter."""
    rows = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            row = [param.detach()]
            for name in optimizer.STATES:
                state = optimizer.state[param][name]
                row += state.blocks[:2] if isinstance(state, QuantizedState) else [state]
            rows.append([*row, optimizer.state[param]["step"]])
    return rows


def assert_same_bits(first, second):
    for row, other in zip(first, second, strict=True):
        for one, two in zip(row, other, strict=True):
            assert one.dtype == two.dtype
            assert torch.equal(one.nan_to_num(), two.nan_to_num())
            assert torch.equal(one.isnan(), two.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("name", MAKE)
def test_a_step_is_the_definition(name, stored, dtype, rng, monkeypatch):
    """In pieces of 64 elements or of a block, whichever is longer, as if it were whole."""
    monkeypatch.setitem(reference.PIECE, "cpu", 64)
    params = parameters(rng, dtype)
    optimizer = MAKE[name](params, copy.deepcopy(FORMATS[stored]), seed=5)
    optimizer.rank = 3
    names = list(optimizer.STATES)
    set_grads(rng, params)
    optimizer.step()  # makes the states
    for step in (2, 3):
        set_grads(rng, params)
        if step == 3:
            params[0].grad[2, 5], params[1].grad[3], params[1].grad[500] = math.inf, math.nan, 3e38
        wanted = []
        for param in params:
            states = [optimizer.state[param][name] for name in names]
            old, keys = [], []
            for number, state in enumerate(states):
                is_quantized = isinstance(state, QuantizedState)
                old.append(state.blocks if is_quantized else state.reshape(-1))
                if is_quantized and stored != "tensor":
                    keys.append(derive_key(fold_key(5, step, rank=3), len(names) * state.stream + number))
                else:
                    keys.append(None)
            scalars = optimizer.scalars(optimizer.param_groups[0], step)
            flat = param.detach().reshape(-1), param.grad.reshape(-1)
            new, fresh = elementwise_step(optimizer.rule, *flat, old, scalars, keys)
            blocks = []
            for value in fresh:
                blocks += [value.view(param.shape)] if isinstance(value, torch.Tensor) else value[:2]
            wanted.append([new.view(param.shape), *blocks, torch.tensor(float(step))])
        optimizer.step()
        assert_same_bits(bits(optimizer), wanted)


def test_streams_differ_between_parameters(rng):
    params = [nn.Parameter(torch.zeros(512)) for _ in range(2)]
    optimizer = QuantLion(params, exp_avg={"bits": 4})
    for param in params:
        param.grad = torch.linspace(-1, 1, 512)
    optimizer.step()
    first, second = (optimizer.state[param]["exp_avg"].blocks.codes for param in params)
    assert not torch.equal(first, second)


SGDS = {
    "plain": {"momentum": 0.9},
    "decay": {"momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.95, "nesterov": True, "weight_decay": 0.01},
    "dampening": {"momentum": 0.7, "dampening": 0.3},
}


@pytest.mark.parametrize("options", SGDS.values(), ids=SGDS)
def test_sgd_with_a_32_bit_buffer_is_torchs(options, rng):
    """torch fuses some products into sums: an ulp of the largest term in each of four sums, each step."""
    ours = parameters(rng)
    theirs = twins(ours)
    optimizers = QuantSGD(ours, lr=0.05, **options, momentum_buffer=None), torch.optim.SGD(theirs, lr=0.05, **options)
    for _ in range(20):
        set_grads(rng, ours, theirs)
        for optimizer in optimizers:
            optimizer.step()
    for param, other in zip(ours, theirs, strict=True):
        buffer, wanted = optimizers[0].state[param]["momentum_buffer"], optimizers[1].state[other]["momentum_buffer"]
        # The buffer adds up to at most 1 / (1 - momentum) gradients, all below 5 here, and its errors likewise.
        largest = 5 / (1 - options["momentum"])
        assert ((buffer - wanted).abs() <= 4 * ULP * largest / (1 - options["momentum"])).all()
        torch.testing.assert_close(param, other, rtol=0, atol=20 * 4 * ULP * (0.05 * largest * 2 + 5))


def test_sgd_goes_on_from_torchs_checkpoint(rng):
    """torch counts no steps; dampening must not spare the first gradient again."""
    theirs = parameters(rng)
    options = {"lr": 0.05, "momentum": 0.7, "dampening": 0.3}
    torchs = torch.optim.SGD(theirs, **options)
    for _ in range(3):
        set_grads(rng, theirs)
        torchs.step()
    params = twins(theirs)
    optimizer = QuantSGD(params, **options, momentum_buffer=None)
    optimizer.load_state_dict(torchs.state_dict())
    for _ in range(3):
        set_grads(rng, theirs, params)
        torchs.step()
        optimizer.step()
    for param, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=1e-5)


def test_lion_with_a_32_bit_moment_is_the_papers(rng):
    """Algorithm 2 in double; a sign may differ where the direction is within rounding of 0."""
    params = parameters(rng)
    optimizer = MAKE["lion"](params, None)
    exact = [param.detach().double() for param in params]
    moments = [torch.zeros_like(param) for param in exact]
    unsure = [torch.zeros_like(param, dtype=torch.bool) for param in exact]
    for _ in range(20):
        set_grads(rng, params)
        for number, param in enumerate(params):
            grad, old = param.grad.double(), moments[number]
            direction = 0.9 * old + 0.1 * grad
            unsure[number] |= (direction.abs() < 8 * ULP * 5) & (direction != 0)
            exact[number] = exact[number] * (1 - 0.01 * 0.1) - 0.01 * direction.sign()
            moments[number] = 0.98 * old + 0.02 * grad
        optimizer.step()
    for param, wanted, moment, doubt in zip(params, exact, moments, unsure, strict=True):
        assert doubt.sum() <= 2
        # A rounding of the decayed parameter, one of lr, one of their difference: below 5 in size.
        assert ((param - wanted).abs() * ~doubt <= 20 * 3 * ULP * 5).all()
        # Three roundings a step of values below 5, which fade by 0.98.
        assert ((optimizer.state[param]["exp_avg"] - moment).abs() <= 3 * ULP * 5 / 0.02).all()


@pytest.mark.parametrize("warm_up", [None, 7])
def test_ademamix_with_32_bit_moments_is_that_of_bitsandbytes(warm_up, rng):
    """Its definition in torch. Square roots and quotients are exact to an ulp or two, an update is 6 at most here."""
    reference_class = pytest.importorskip("bitsandbytes.optim.ademamix")._ReferenceAdEMAMix
    ours = parameters(rng)
    theirs = twins(ours)
    options = {"lr": 0.01, "betas": (0.9, 0.99, 0.999), "alpha": 4.0, "weight_decay": 0.1}
    options |= {"t_alpha": warm_up, "t_beta3": warm_up}
    exact = dict.fromkeys(QuantAdEMAMix.STATES)
    # Within a group it warms up once more for each parameter: give each a group.
    groups = [{"params": [param]} for param in theirs]
    optimizers = QuantAdEMAMix(ours, **options, **exact), reference_class(groups, **options)
    for _ in range(20):
        set_grads(rng, ours, theirs)
        for optimizer in optimizers:
            optimizer.step()
    for param, other in zip(ours, theirs, strict=True):
        state, wanted = optimizers[0].state[param], optimizers[1].state[other]
        # Gradients are below 5: three roundings a step, of which the slowest moment forgets nothing in 20 steps.
        for name, value, size in (
            ("exp_avg_fast", wanted["m1_m2"][0], 5),
            ("exp_avg_slow", wanted["m1_m2"][1], 5),
            ("exp_avg_sq", wanted["nu"], 25),
        ):
            torch.testing.assert_close(state[name], value, rtol=0, atol=20 * 3 * ULP * size)
        torch.testing.assert_close(param, other, rtol=0, atol=20 * (0.01 * 6 * 60 * ULP + 3 * ULP * 5))


@pytest.mark.parametrize("name", ["lion", "sgd"])
@pytest.mark.parametrize("stored", ["8", "4", "dynamic"])
def test_the_moment_is_right_on_average(name, stored, rng):
    """Columns with the same gradients: what each rounds differently has the exact moment as its mean.

    The bound is five standard errors of the mean, which is missed once in two million times a row.
    """
    columns = 1024
    few, exact = (nn.Parameter(torch.zeros(6, columns)) for _ in range(2))
    optimizers = MAKE[name]([few], copy.deepcopy(FORMATS[stored])), MAKE[name]([exact], None)
    size = torch.logspace(-3, 0, 6)
    for _ in range(150):
        few.grad = (size * torch.from_numpy(rng.normal(size=6)).float())[:, None].expand(6, columns).clone()
        # A column of 1 in each block, so that the rest are rounded within it.
        few.grad[:, ::16] = 1.0
        exact.grad = few.grad.clone()
        if name == "sgd":
            # The buffer depends on the parameter through weight decay: hold it.
            few.data.zero_(), exact.data.zero_()
        for optimizer in optimizers:
            optimizer.step()
    (state,) = optimizers[0].STATES
    got, want = (optimizer.state[param][state] for optimizer, param in zip(optimizers, (few, exact), strict=True))
    got = got.dequantize().view(6, -1, 16)[:, :, 1:].flatten(1)
    want = want.view(6, -1, 16)[:, :, 1:].flatten(1)[:, 0]
    error = got.std(dim=1) / math.sqrt(got.shape[1])
    assert (error > 0).all()
    assert ((got.mean(dim=1) - want).abs() <= 5 * error).all()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("stored", ["32", "8", "4"])
def test_checkpoints_go_on_bit_for_bit(name, stored, rng):
    params = parameters(rng)
    optimizer = MAKE[name](params, copy.deepcopy(FORMATS[stored]))
    set_grads(rng, params)
    optimizer.step()
    others = twins(params)
    again = MAKE[name](others, copy.deepcopy(FORMATS[stored]))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        set_grads(rng, params, others)
        optimizer.step()
        again.step()
    assert_same_bits(bits(optimizer), bits(again))


def mix(params, **options):
    return QuantAdEMAMix(params, **{**dict.fromkeys(QuantAdEMAMix.STATES), **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: QuantLion(p, betas=(0.9, 1.0), exp_avg=None), r"QuantLion\(betas\): got \[0.9, 1.0\]; allowed: two"),
        (lambda p: QuantLion(p, lr=-1, exp_avg=None), r"QuantLion\(lr\): got -1; "),
        (lambda p: QuantLion(p, exp_avg={"bits": 3}), r"QuantLion\(exp_avg\).bits: got 3; allowed: 4 or 8"),
        (lambda p: QuantLion(p, exp_avg={"bits": 8, "rounding": "nearest"}), r"QuantLion\(exp_avg\).rounding: got"),
        (lambda p: QuantSGD(p, momentum=0, momentum_buffer=None), r"QuantSGD\(momentum\): got 0; allowed: above 0"),
        (lambda p: mix(p, betas=(0.9, 0.99)), r"QuantAdEMAMix\(betas\): got \[0.9, 0.99\]; allowed: three"),
        (lambda p: mix(p, t_alpha=0), r"QuantAdEMAMix\(t_alpha\): got 0; allowed: a number of steps, 1 or more"),
        (
            lambda p: mix(p, exp_avg_slow={"bits": 4}),
            r"QuantAdEMAMix\(exp_avg_slow\).bits: got 4; allowed: 8: .*; fix: set 8, or remove",
        ),
        (
            lambda p: QuantSGD(p, momentum=0.9, nesterov=True, dampening=0.1, momentum_buffer=None),
            r"QuantSGD\(dampening\): got 0.1; allowed: 0 with nesterov",
        ),
        (
            lambda p: QuantSGD(p, momentum_buffer={"bits": 8, "rounding": "nearest"}),
            r"QuantSGD\(momentum_buffer\).rounding: got \"nearest\"; allowed: \"stochastic\"",
        ),
        (
            lambda p: QuantSGD([{"params": p, "maximize": True}], momentum_buffer=None),
            r"QuantSGD\(maximize\): got true",
        ),
    ],
)
def test_arguments_out_of_range(make, message, rng):
    with pytest.raises(ConfigError, match=message):
        make(parameters(rng))
