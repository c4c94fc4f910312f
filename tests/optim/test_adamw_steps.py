import copy
import io
import itertools
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from ds_quant.config import ConfigError, MomentConfig
from ds_quant.kernels.adamw import ops
from ds_quant.numerics import code_map, dequantize_blockwise, fold_key, quantize_blockwise
from ds_quant.numerics.adam import adamw_scalars, adamw_step
from ds_quant.numerics.random import derive_key
from ds_quant.optim import MOMENTS, QuantAdamW
from ds_quant.optim.state import QuantizedState

ULP = 2.0**-23
EIGHT, FOUR = {"bits": 8}, {"bits": 4}
NONE = {"exp_avg": None, "exp_avg_sq": None}
FORMATS = {
    "8/8": (EIGHT, EIGHT),
    "4/8": (FOUR, EIGHT),
    "4/4": (FOUR, FOUR),
    "32/8": (None, EIGHT),
    "8/32": (EIGHT, None),
    "dynamic": ({"bits": 8, "map": "dynamic"}, {"bits": 8, "map": "dynamic"}),
    "power": (
        {"bits": 8, "map": "power", "rounding": "stochastic"},
        {"bits": 8, "map": "power", "rounding": "nearest"},
    ),
    "tensor": (
        {"bits": 8, "map": "linear", "granularity": "tensor", "rounding": "nearest"},
        {"bits": 4, "map": "linear", "granularity": "tensor"},
    ),
    "channel": (
        {"bits": 4, "map": "linear", "granularity": "channel", "rounding": "stochastic"},
        {"bits": 8, "map": "linear", "granularity": "channel"},
    ),
}


def moments(name):
    return dict(zip(MOMENTS, copy.deepcopy(FORMATS[name]), strict=True))


def tensor(rng, *shape):
    return torch.from_numpy(np.asarray(rng.normal(size=shape))).float()


def parameters(rng, shapes=((7, 33), (300,), (), (4, 3, 5)), dtype=torch.float32):
    return [nn.Parameter(tensor(rng, *shape).to(dtype)) for shape in shapes]


def twins(params):
    return [nn.Parameter(param.detach().clone()) for param in params]


def set_grads(rng, *lists):
    for params in zip(*lists, strict=True):
        grad = tensor(rng, *params[0].shape).to(params[0].dtype)
        for param in params:
            param.grad = grad.clone().to(param.dtype)


def stored(optimizer):
    """Every bit that a step depends on, parameter by parameter."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            row = [param.detach(), state["step"]]
            for name in MOMENTS:
                moment = state[name]
                row += list(moment.blocks[:2]) if isinstance(moment, QuantizedState) else [moment]
            found.append(row)
    return found


def assert_same(left, right):
    for row, other in zip(stored(left), stored(right), strict=True):
        for a, b in zip(row, other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def through_torch_save(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- what a step computes


@pytest.mark.parametrize("options", [{}, {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3}])
def test_32_bit_moments_step_as_torch_does(options, rng):
    ours = parameters(rng)
    theirs = twins(ours)
    optimizer = QuantAdamW(ours, **options, **NONE)
    reference = torch.optim.AdamW(theirs, **options, foreach=False, fused=False)
    lr = options.get("lr", 1e-3)
    for step in range(1, 11):
        set_grads(rng, ours, theirs)
        optimizer.step()
        reference.step()
        for left, right in zip(ours, theirs, strict=True):
            # A parameter is rounded a few times a step; an update, of lr or so, about ten times.
            tolerance = step * (3 * ULP * right.abs() + 40 * ULP * lr)
            assert ((left - right).abs() <= tolerance).all()
            for name in MOMENTS:
                moment, expected = optimizer.state[left][name], reference.state[right][name]
                assert moment.dtype == torch.float32
                assert (moment - expected).abs().max() <= 4 * ULP * (1 + expected.abs().max())
            assert optimizer.state[left]["step"] == step


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_is_the_definition(dtype, name, rng):
    """Values, granularity, rounding, keys and streams, on the whole way from the group's options to the codes."""
    params = parameters(rng, dtype=dtype)
    seed, rank = int(rng.integers(2**63)), int(rng.integers(100))
    optimizer = QuantAdamW(params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, seed=seed, **moments(name))
    optimizer.rank = rank
    stochastic = [
        moment is not None and moment.get("rounding", "stochastic") == "stochastic" for moment in FORMATS[name]
    ]
    for step in range(1, 4):
        set_grads(rng, params)
        before = [(p.detach().clone(), copy.deepcopy(optimizer.state[p]) if step > 1 else None) for p in params]
        optimizer.step()
        for stream, (param, (old, state)) in enumerate(zip(params, before, strict=True)):
            now = [optimizer.state[param][key] for key in MOMENTS]
            blocks = [m.blocks if isinstance(m, QuantizedState) else m.reshape(-1) for m in now]
            last = []
            for key, moment in zip(MOMENTS, blocks, strict=True):
                if state is None:
                    value = torch.zeros(param.numel())
                    if not isinstance(moment, torch.Tensor):
                        value = quantize_blockwise(value, moment.code_map, block_size=moment.block_size)
                else:
                    value = state[key].blocks if isinstance(state[key], QuantizedState) else state[key].reshape(-1)
                last.append(value)
            keys = [
                derive_key(fold_key(seed, step, rank=rank), 2 * stream + i) if stochastic[i] else None for i in (0, 1)
            ]
            scalars = adamw_scalars(1e-2, (0.9, 0.99), 1e-8, 0.1, step)
            expected = adamw_step(old.reshape(-1), param.grad.reshape(-1), *last, scalars, *keys)
            # A parameter does not feed back into moments: kernels may be off by roundings there.
            ulp = torch.finfo(dtype).eps
            assert torch.allclose(param.detach().reshape(-1), expected[0], rtol=2 * ulp, atol=1e-2 * ulp)
            for got, want in zip(blocks, expected[1:], strict=True):
                if isinstance(want, torch.Tensor):
                    assert torch.equal(got, want)
                else:
                    assert torch.equal(got.codes, want.codes)
                    assert torch.equal(got.scale, want.scale)


def test_granularities_say_how_many_scales_there_are(rng):
    shapes = ((7, 33), (300,), (), (4, 3, 5))
    for granularity, counts in (("tensor", (1, 1, 1, 1)), ("channel", (7, 1, 1, 4))):
        params = parameters(rng, shapes)
        optimizer = QuantAdamW(
            params, exp_avg={"bits": 8, "map": "linear", "granularity": granularity}, exp_avg_sq=None
        )
        set_grads(rng, params)
        optimizer.step()
        for param, count in zip(params, counts, strict=True):
            assert optimizer.state[param]["exp_avg"].blocks.scale.shape == (count,)
            assert optimizer.state[param]["exp_avg"].shape == param.shape


def regression(rng):
    inputs, true = tensor(rng, 256, 16), tensor(rng, 16, 8)
    targets = inputs @ true + 0.1 * tensor(rng, 256, 8)

    def losses(make, steps=150):
        torch.manual_seed(0)
        model = nn.Linear(16, 8)
        optimizer = make(model.parameters())
        found = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    return losses


def test_8_and_4_bits_train_as_adamw_does(rng):
    losses = regression(rng)
    betas = (0.9, 0.99)
    exact = losses(lambda params: torch.optim.AdamW(params, lr=3e-2, betas=betas))
    # The yardstick: the same problem with a learning rate 20% lower.
    slower = losses(lambda params: torch.optim.AdamW(params, lr=2.4e-2, betas=betas))
    allowed = max(abs(a - b) for a, b in zip(exact, slower, strict=True))
    for name in ("8/8", "4/8", "4/4", "dynamic", "power"):
        got = losses(lambda params, name=name: QuantAdamW(params, lr=3e-2, betas=betas, **moments(name)))
        assert 0 < max(abs(a - b) for a, b in zip(exact, got, strict=True)) < allowed, name


def test_a_second_moment_that_moves_less_than_half_a_code_a_step_is_followed_only_by_stochastic_rounding():
    """v falls from 1 towards 0.01 times its block's largest by 1% a step, where codes lie 6% to 12% apart."""
    for rounding in ("nearest", "stochastic"):
        param = nn.Parameter(torch.zeros(256))
        second = {"bits": 8, "rounding": rounding}
        optimizer = QuantAdamW([param], lr=0.0, betas=(0.9, 0.99), exp_avg=None, exp_avg_sq=second)
        target = torch.full((256,), 0.01)
        target[0] = 1.0
        param.grad = torch.ones(256)
        optimizer.step()
        optimizer.state[param]["exp_avg_sq"].fill_(1.0)
        param.grad = target.sqrt()
        for _ in range(300):
            optimizer.step()
        left = optimizer.state[param]["exp_avg_sq"].dequantize()[1:].mean()
        exact = 0.01 + 0.99 * 0.99**300
        assert left > 0.9 if rounding == "nearest" else abs(left / exact - 1) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_32_bit_moments_of_half_precision_parameters_are_fp32_and_stay_so(dtype, rng):
    params = parameters(rng, dtype=dtype)
    optimizer = QuantAdamW(params, **NONE)
    set_grads(rng, params)
    optimizer.step()
    again = QuantAdamW(twins(params), **NONE)
    again.load_state_dict(optimizer.state_dict())
    for one in (optimizer, again):
        for state in one.state.values():
            assert {state[name].dtype for name in MOMENTS} == {torch.float32}
    assert_same(optimizer, again)


# ---- parameters and groups of any kind


def test_parameters_of_any_layout_step_like_contiguous_ones(rng):
    shapes = ((8, 6), (2, 3, 4, 5), (10,), (6, 6))
    plain = parameters(rng, shapes)
    layouts = [
        lambda x: x.t().contiguous().t(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: x[:, :],
    ]
    strided = [nn.Parameter(layout(p.detach().clone())) for layout, p in zip(layouts, plain, strict=True)]
    assert [p.is_contiguous() for p in strided] == [False, False, False, True]
    ours, theirs = QuantAdamW(plain, lr=0.1, **moments("4/8")), QuantAdamW(strided, lr=0.1, **moments("4/8"))
    for _ in range(3):
        set_grads(rng, plain, strided)
        for param, layout in zip(strided, layouts, strict=True):
            param.grad = layout(param.grad)
        plain[3].grad = plain[3].grad.t().contiguous().t()  # only the gradient
        ours.step()
        theirs.step()
    assert_same(ours, theirs)
    assert [p.is_contiguous() for p in strided] == [False, False, False, True]


def test_shapes_without_elements_or_dimensions(rng):
    params = parameters(rng, ((), (0,), (3, 0), (1,), (0, 4)))
    for name in ("8/8", "4/4", "channel", "tensor"):
        optimizer = QuantAdamW(params, **moments(name))
        set_grads(rng, params)
        before = params[0].item()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert params[0].item() != before
    set_grads(rng, params[1:3])
    only_empty = QuantAdamW(params[1:3], **moments("8/8"))
    only_empty.step()
    assert only_empty.state_bytes() == 0


def test_groups_have_moments_and_hyperparameters_of_their_own(rng):
    a, b, c, d = params = parameters(rng, ((5, 64),) * 4)
    third = {"bits": 8, "map": "power", "rounding": "nearest"}
    eight, four = ({"bits": bits, "map": "linear", "granularity": "tensor", "rounding": "nearest"} for bits in (8, 4))
    groups = [
        {"params": [a]},
        {"params": [b], "exp_avg": None, "exp_avg_sq": None, "weight_decay": 0.0, "name": "norms", "tag": [1, 2]},
        {"params": c, "exp_avg": four, "lr": 0.5},
        {"params": iter([d]), "exp_avg_sq": third, "betas": (0.5, 0.6), "eps": 1.0},
    ]
    optimizer = QuantAdamW(groups, lr=0.1, exp_avg=eight, exp_avg_sq={"bits": 8, "rounding": "nearest"})
    # Each alone, with the group's options as arguments; without stochastic rounding streams do not count.
    twin = twins(params)
    nearest = {"bits": 8, "rounding": "nearest"}
    alone = [
        QuantAdamW(twin[0:1], lr=0.1, exp_avg=eight, exp_avg_sq=nearest),
        QuantAdamW(twin[1:2], lr=0.1, weight_decay=0.0, **NONE),
        QuantAdamW(twin[2:3], lr=0.5, exp_avg=four, exp_avg_sq=nearest),
        QuantAdamW(twin[3:4], lr=0.1, betas=(0.5, 0.6), eps=1.0, exp_avg=eight, exp_avg_sq=third),
    ]
    assert groups[2]["exp_avg"] == four  # the caller's dicts are left alone
    assert optimizer.param_groups[1]["name"] == "norms"
    assert optimizer.param_groups[1]["tag"] == [1, 2]
    for _ in range(3):
        set_grads(rng, params, twin)
        optimizer.step()
        for one in alone:
            one.step()
    for got, expected in zip(stored(optimizer), [row for one in alone for row in stored(one)], strict=True):
        for left, right in zip(got, expected, strict=True):
            assert torch.equal(left, right)
    assert [optimizer.state[p]["exp_avg_sq"].stream for p in (a, c, d)] == [0, 1, 2]


def test_moment_objects_may_be_dicts_or_configs(rng):
    for value in (EIGHT, MomentConfig.parse(EIGHT), MomentConfig.parse(EIGHT).model_dump()):
        optimizer = QuantAdamW(parameters(rng), exp_avg=value, exp_avg_sq=None)
        expected = {"bits": 8, "map": "float", "granularity": "block", "block_size": 256, "rounding": None}
        assert optimizer.param_groups[0]["exp_avg"] == optimizer.defaults["exp_avg"] == expected
    for name in ("tensor", "channel"):
        groups = QuantAdamW(parameters(rng), **moments(name)).param_groups
        QuantAdamW(groups, **NONE)  # what a group holds may be passed in again


def test_named_parameters_are_taken(rng):
    model = nn.Linear(3, 2)
    optimizer = QuantAdamW(model.named_parameters(), **moments("8/8"))
    set_grads(rng, list(model.parameters()))
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


# ---- learning rates, closures, gradients


def test_lr_may_be_a_tensor(rng):
    results = []
    start = parameters(rng)
    grads = [tensor(rng, *p.shape) for p in start]
    for lr in (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64)):
        params = twins(start)
        optimizer = QuantAdamW(params, lr=lr, **moments("8/8"))
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        if isinstance(lr, torch.Tensor):
            lr.fill_(0.25)
        else:
            optimizer.param_groups[0]["lr"] = 0.25
        optimizer.step()
        results.append(torch.cat([p.detach().reshape(-1) for p in params]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_torch_schedulers_drive_it(rng):
    ours = parameters(rng)
    theirs = twins(ours)
    optimizer, reference = QuantAdamW(ours, lr=0.1, **NONE), torch.optim.AdamW(theirs, lr=0.1)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6) for o in (optimizer, reference)]
    for _ in range(5):
        set_grads(rng, ours, theirs)
        for one, scheduler in zip((optimizer, reference), schedulers, strict=True):
            one.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["betas"] == reference.param_groups[0]["betas"]
    for left, right in zip(ours, theirs, strict=True):
        assert torch.allclose(left, right, rtol=1e-5, atol=1e-6)


def test_closures_run_with_gradients_and_their_loss_is_returned(rng):
    param = nn.Parameter(tensor(rng, 5))
    optimizer = QuantAdamW([param], **moments("8/8"))

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    expected = param.detach().square().sum()
    assert optimizer.step(closure) == expected
    assert optimizer.state[param]["step"] == 1
    assert optimizer.step() is None


def test_parameters_without_gradient_are_left_alone(rng):
    params = parameters(rng)
    optimizer = QuantAdamW(params, **moments("8/8"))
    optimizer.step()
    assert not optimizer.state
    params[1].grad = tensor(rng, 300)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [True, False, True, True]
    assert list(optimizer.state) == [params[1]]


def test_gradients_are_left_alone(rng):
    params = parameters(rng)
    optimizer = QuantAdamW(params, **moments("4/4"))
    set_grads(rng, params)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))


def test_a_sparse_gradient_is_refused_before_anything_is_changed(rng):
    embedding = nn.Embedding(10, 4, sparse=True)
    first = nn.Parameter(tensor(rng, 7))
    optimizer = QuantAdamW([first, embedding.weight], **moments("8/8"))
    first.grad = tensor(rng, 7)
    before = first.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    message = r"QuantAdamW.step\(grad\): got .*sparse.*; allowed: dense gradients; fix: .*sparse=False"
    with pytest.raises(ConfigError, match=message):
        optimizer.step()
    assert torch.equal(first, before)
    assert not optimizer.state


def test_steps_are_seen_by_version_counters_and_hooks(rng):
    params = [*parameters(rng), nn.Parameter(tensor(rng, 4, 6).t())]
    optimizer = QuantAdamW(params, **moments("8/8"))
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    set_grads(rng, params[1:])
    versions = [p._version for p in params]
    optimizer.step()
    assert called == ["before", "after"]
    assert [p._version > v for p, v in zip(params, versions, strict=True)] == [False, True, True, True, True]


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"QuantAdamW\(lr\): got -1.0; allowed: a number, 0 or more; fix: set it so"),
        ({"lr": float("nan")}, r"QuantAdamW\(lr\): got NaN"),
        ({"lr": "auto"}, r'QuantAdamW\(lr\): got "auto"'),
        ({"lr": torch.ones(2)}, r"QuantAdamW\(lr\): got .*2 elements.*; allowed: one element; fix: pass a number"),
        ({"lr": torch.tensor(-0.5)}, r"QuantAdamW\(lr\): got -0.5; "),
        ({"eps": -1e-8}, r"QuantAdamW\(eps\): got -1e-08; "),
        ({"weight_decay": -0.1}, r"QuantAdamW\(weight_decay\): got -0.1; "),
        ({"betas": (1.0, 0.9)}, r"QuantAdamW\(betas\): got \[1.0, 0.9\]; allowed: two numbers from 0 to below 1; "),
        ({"betas": (0.9, -0.1)}, r"QuantAdamW\(betas\): got \[0.9, -0.1\]; "),
        ({"betas": 0.9}, r"QuantAdamW\(betas\): got 0.9; "),
        ({"betas": (0.9,)}, r"QuantAdamW\(betas\): got \[0.9\]; "),
        ({"betas": ("auto", 0.9)}, r"QuantAdamW\(betas\): got "),
        ({"exp_avg": {"bits": 5}}, r"QuantAdamW\(exp_avg\).bits: got 5; allowed: 4 or 8; fix: "),
        ({"exp_avg": {"bits": "auto"}}, r"QuantAdamW\(exp_avg\).bits: got "),
        ({"exp_avg_sq": {}}, r"QuantAdamW\(exp_avg_sq\).bits: got nothing; "),
        (
            {"exp_avg_sq": {"bits": 8, "blocksize": 64}},
            r"QuantAdamW\(exp_avg_sq\).blocksize: .*did you mean \"block_size\"",
        ),
        ({"exp_avg": 8}, r"QuantAdamW\(exp_avg\): got 8; "),
    ],
)
def test_wrong_arguments_are_refused(options, message, rng):
    with pytest.raises(ConfigError, match=message):
        QuantAdamW(parameters(rng), **{**moments("8/8"), **options})
    # The same in a group, which leaves the optimizer as it was.
    optimizer = QuantAdamW(parameters(rng), **moments("8/8"))
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": parameters(rng), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_groups_that_ask_for_another_function_are_refused(option, rng):
    with pytest.raises(ConfigError, match=rf"QuantAdamW\({option}\): got true; allowed: False; fix: "):
        QuantAdamW([{"params": parameters(rng), option: True}], **NONE)
    QuantAdamW([{"params": parameters(rng), option: False, "bias_correction": True, "fused": True}], **NONE)
    with pytest.raises(ConfigError, match=r"QuantAdamW\(bias_correction\): got false; allowed: True; "):
        QuantAdamW([{"params": parameters(rng), "bias_correction": False}], **NONE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32, torch.float8_e4m3fn])
def test_parameters_of_other_dtypes_are_refused(dtype, rng):
    param = nn.Parameter(torch.zeros(4).to(dtype), requires_grad=False)
    message = rf"QuantAdamW\(params\): got .*{dtype}.*; allowed: torch.float32, .*; fix: cast the parameter"
    with pytest.raises(ConfigError, match=message):
        QuantAdamW([param], **NONE)
    optimizer = QuantAdamW(parameters(rng), **NONE)
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_parameters_without_plain_memory_are_refused(rng):
    param = QuantizedState.quantize(tensor(rng, 64), code_map("power", 8, signed=True), 32)
    with pytest.raises(
        ConfigError, match=r"QuantAdamW\(params\): got .*class QuantizedState.*; allowed: plain tensors"
    ):
        QuantAdamW([param], **NONE)


# ---- saving, loading, copying


def run(optimizer, params, grads):
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


def by_state_dict(optimizer, params, name):
    other = QuantAdamW(params, **moments(name))
    other.load_state_dict(optimizer.state_dict())
    return other, params


def by_torch_save(optimizer, params, name):
    other = QuantAdamW(params, **moments(name))
    other.load_state_dict(through_torch_save(optimizer.state_dict()))
    return other, params


def by_deepcopy(optimizer, params, name):
    other = copy.deepcopy(optimizer)
    return other, other.param_groups[0]["params"]


def by_pickle(optimizer, params, name):
    other = pickle.loads(pickle.dumps(optimizer))
    return other, other.param_groups[0]["params"]


def by_fp32(optimizer, params, name):
    """As a universal checkpoint does: the moments go through plain fp32."""
    state = copy.deepcopy(optimizer.state_dict())
    for one in state["state"].values():
        one.update({key: torch.zeros_like(one[key]).copy_(one[key]) for key in MOMENTS})
    other = QuantAdamW(params, **moments(name))
    other.load_state_dict(state)
    return other, params


WAYS = {
    "state_dict": by_state_dict,
    "torch.save": by_torch_save,
    "deepcopy": by_deepcopy,
    "pickle": by_pickle,
    "fp32": by_fp32,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMATS)
def test_going_on_is_as_if_it_had_not_stopped(name, way, rng):
    if way == "fp32" and name == "dynamic":
        name = "32/8"  # see moment.py on the signed dynamic map
    params = parameters(rng, dtype=torch.bfloat16 if name == "4/4" else torch.float32)
    grads = [[tensor(rng, *p.shape) for p in params] for _ in range(6)]
    optimizer = QuantAdamW(params, lr=3e-2, **moments(name))
    run(optimizer, params, grads[:3])
    copies = twins(params)
    other, others = WAYS[way](optimizer, copies, name)
    assert_same(optimizer, other)
    run(other, others, grads[3:])
    run(optimizer, params, grads[3:])
    assert_same(optimizer, other)
    assert other.param_groups[0]["lr"] == 3e-2


def test_a_copy_draws_with_the_same_seed_and_rank(rng):
    params = parameters(rng)
    optimizer = QuantAdamW(params, seed=77, **moments("8/8"))
    optimizer.rank = 5
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.seed, other.rank) == (77, 5)


def test_stepping_does_not_write_into_the_dict_that_was_loaded(rng):
    for name in ("8/8", "32/8"):
        params = parameters(rng)
        optimizer = QuantAdamW(params, **moments(name))
        set_grads(rng, params)
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        before = copy.deepcopy(state)
        optimizer.load_state_dict(state)
        optimizer.step()
        for one, other in zip(state["state"].values(), before["state"].values(), strict=True):
            assert one["step"] == 1
            assert all(torch.equal(one[key], other[key]) for key in MOMENTS)


def adamw_with_state(rng, params, steps=3, **options):
    optimizer = torch.optim.AdamW(params, lr=1e-2, **options)
    for _ in range(steps):
        set_grads(rng, params)
        optimizer.step()
    return optimizer


def fused_adam_state(state):
    """As DeepSpeed's FusedAdam has it: the steps are counted in the group."""
    state = copy.deepcopy(state)
    for one in state["state"].values():
        state["param_groups"][0]["step"] = int(one.pop("step"))
    state["param_groups"][0]["bias_correction"] = True
    return state


def int_steps(state):
    state = copy.deepcopy(state)
    for one in state["state"].values():
        one["step"] = int(one["step"])
    return state


ORIGINS = {
    "plain": ({"fused": False}, lambda state: state),
    "fused": ({"fused": True}, lambda state: state),
    "saved": ({}, through_torch_save),
    "python steps": ({}, int_steps),
    "FusedAdam": ({}, fused_adam_state),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_state_of_a_plain_adamw_is_gone_on_with(origin, rng):
    options, change = ORIGINS[origin]
    theirs = parameters(rng)
    reference = adamw_with_state(rng, theirs, **options)
    ours, quantized = twins(theirs), twins(theirs)
    exact = QuantAdamW(ours, **NONE)
    exact.load_state_dict(change(reference.state_dict()))
    eight = QuantAdamW(quantized, **moments("8/8"))
    eight.load_state_dict(change(reference.state_dict()))
    for param, own in zip(theirs, quantized, strict=True):
        state = eight.state[own]
        assert state["step"].dtype == torch.float32
        assert state["step"] == 3
        for key in MOMENTS:
            moment = state[key]
            expected = quantize_blockwise(
                reference.state[param][key].reshape(-1), moment.blocks.code_map, block_size=256
            )
            assert torch.equal(moment.blocks.codes, expected.codes)
    assert [eight.state[p]["exp_avg"].stream for p in quantized] == list(range(len(quantized)))
    assert eight.param_groups[0]["lr"] == 1e-2
    assert eight.param_groups[0]["exp_avg"]["bits"] == 8
    for step in range(1, 4):
        before = [p.detach().clone() for p in theirs]
        set_grads(rng, theirs, ours, quantized)
        for optimizer in (reference, exact, eight):
            optimizer.step()
        for param, old, left, right in zip(theirs, before, ours, quantized, strict=True):
            assert torch.allclose(param, left, rtol=1e-5, atol=1e-6)
            # A float code of three bits of mantissa is off by 6% at most: a moment's share of the update as well.
            update = (param - old).abs().max()
            assert (param - right).abs().max() < 0.5 * step * update + 1e-6


def test_bf16_moments_of_a_plain_adamw_become_fp32(rng):
    theirs = parameters(rng, dtype=torch.bfloat16)
    reference = adamw_with_state(rng, theirs)
    assert reference.state[theirs[0]]["exp_avg"].dtype == torch.bfloat16
    optimizer = QuantAdamW(twins(theirs), **NONE)
    optimizer.load_state_dict(reference.state_dict())
    for state, expected in zip(optimizer.state.values(), reference.state.values(), strict=True):
        for key in MOMENTS:
            assert state[key].dtype == torch.float32
            assert torch.equal(state[key], expected[key].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["8/8", "4/4"])
def test_a_plain_adamw_goes_on_with_our_state(name, dtype, rng):
    params = parameters(rng, dtype=dtype)
    optimizer = QuantAdamW(params, lr=1e-2, **moments(name))
    set_grads(rng, params)
    optimizer.step()
    plain = twins(params)
    other = torch.optim.AdamW(plain)
    other.load_state_dict(through_torch_save(optimizer.state_dict()))
    for ours, theirs in zip(params, plain, strict=True):
        for key in MOMENTS:
            moment = other.state[theirs][key]
            assert type(moment) is torch.Tensor
            assert moment.dtype == dtype
            assert torch.equal(moment, optimizer.state[ours][key].dequantize().to(dtype))
    set_grads(rng, plain)
    before = [p.detach().clone() for p in plain]
    other.step()
    assert not any(torch.equal(p, b) for p, b in zip(plain[:2], before, strict=False))
    assert other.state[plain[0]]["step"] == 2


def test_another_format_is_requantized_and_said_once(rng, caplog):
    params = parameters(rng)
    optimizer = QuantAdamW(params, lr=1e-2, **moments("8/8"))
    set_grads(rng, params)
    optimizer.step()
    other = QuantAdamW(twins(params), exp_avg=FOUR, exp_avg_sq={"bits": 8, "block_size": 64})
    with caplog.at_level(logging.INFO, logger="ds_quant"):
        other.load_state_dict(optimizer.state_dict())
    assert [r.message for r in caplog.records if "go on" in r.message] == [
        "exp_avg: the loaded moments (8-bit float) go on as 4-bit power"
    ]
    for state, old in zip(other.state.values(), optimizer.state.values(), strict=True):
        for key, size in zip(MOMENTS, (128, 64), strict=True):
            moment = state[key]
            expected = quantize_blockwise(
                dequantize_blockwise(old[key].blocks), moment.blocks.code_map, block_size=size
            )
            assert torch.equal(moment.blocks.codes, expected.codes)
            assert moment.stream == old[key].stream
    # With the same bits and blocks only the map tells.
    power = QuantAdamW(twins(params), **moments("power"))
    power.load_state_dict(optimizer.state_dict())
    assert {state[key].blocks.code_map.name for state in power.state.values() for key in MOMENTS} == {"power"}
    caplog.clear()
    plain = QuantAdamW(twins(params), **NONE)
    with caplog.at_level(logging.INFO, logger="ds_quant"):
        plain.load_state_dict(optimizer.state_dict())
    assert len([r for r in caplog.records if "go on as 32-bit" in r.message]) == 2
    assert all(type(state[key]) is torch.Tensor for state in plain.state.values() for key in MOMENTS)


def test_moments_of_a_plain_adamw_are_quantized_and_said_once(rng, caplog):
    theirs = parameters(rng)
    saved = adamw_with_state(rng, theirs).state_dict()
    optimizer = QuantAdamW(twins(theirs), exp_avg=FOUR, exp_avg_sq=None)
    with caplog.at_level(logging.INFO, logger="ds_quant"):
        for _ in range(2):
            optimizer.load_state_dict(saved)
        optimizer.load_state_dict(optimizer.state_dict())
    assert [r.message for r in caplog.records if "go on" in r.message] == [
        "exp_avg: the loaded 32-bit moments go on as 4-bit power"
    ]


def test_own_options_of_groups_stay_in_force(rng):
    a, b = parameters(rng, ((64,), (64,)))
    optimizer = QuantAdamW([{"params": [a]}, {"params": [b], **NONE}], **moments("8/8"))
    other = QuantAdamW([{"params": twins([a])}, {"params": twins([b]), "exp_avg": FOUR}], **moments("4/4"))
    set_grads(rng, [a, b])
    optimizer.step()
    own = [{name: group[name] for name in MOMENTS} for group in other.param_groups]
    other.load_state_dict(optimizer.state_dict())
    assert [{name: group[name] for name in MOMENTS} for group in other.param_groups] == own
    assert [state["exp_avg"].blocks.code_map.bits for state in other.state.values()] == [4, 4]


def test_streams_stay_apart_where_quantized_and_plain_states_are_loaded_together(rng):
    params = parameters(rng, ((64,),) * 4)
    optimizer = QuantAdamW(params, **moments("8/8"))
    set_grads(rng, params)
    optimizer.step()
    state = optimizer.state_dict()
    for number in (0, 2):
        state["state"][number] = {
            key: value.dequantize() if key in MOMENTS else value for key, value in state["state"][number].items()
        }
    other = QuantAdamW(twins(params), **moments("8/8"))
    other.load_state_dict(state)
    streams = [[one[key].stream for key in MOMENTS] for one in other.state.values()]
    assert streams == [[4, 4], [1, 1], [5, 5], [3, 3]]
    other.add_param_group({"params": parameters(rng, ((64,),))})
    for group in other.param_groups:
        set_grads(rng, group["params"])
    other.step()
    assert [one["exp_avg"].stream for one in other.state.values()] == [4, 1, 5, 3, 6]


def test_what_does_not_fit_is_refused_and_leaves_the_optimizer_as_it_was(rng):
    params = parameters(rng)
    optimizer = QuantAdamW(params, **moments("8/8"))
    set_grads(rng, params)
    optimizer.step()
    before = copy.deepcopy(optimizer)
    wrong = QuantAdamW(parameters(rng, ((7, 33), (299,), (), (4, 3, 5))), lr=0.7, **moments("8/8"))
    set_grads(rng, wrong.param_groups[0]["params"])
    wrong.step()
    broken = optimizer.state_dict()
    broken["state"][1] = {**broken["state"][1], "exp_avg": [1.0]}
    amsgrad = optimizer.state_dict()
    amsgrad["param_groups"][0]["amsgrad"] = True
    message = r"QuantAdamW.state\[exp_avg\]: got {}; allowed: a tensor of the parameter's 300 elements; fix: load "
    for state, got in ((wrong.state_dict(), message.format('"299 elements"')), (broken, message.format('"a list"'))):
        with pytest.raises(ConfigError, match=got):
            optimizer.load_state_dict(state)
        assert_same(optimizer, before)
        assert optimizer.param_groups[0]["lr"] == 1e-3
    with pytest.raises(ConfigError, match=r"QuantAdamW.load_state_dict\(amsgrad\): got true; "):
        optimizer.load_state_dict(amsgrad)
    assert_same(optimizer, before)
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(QuantAdamW(params[:2], **NONE).state_dict())
    assert_same(optimizer, before)


def test_a_moment_that_is_found_plain_is_quantized_before_the_step(rng):
    """Universal checkpoints and safe_set_full_optimizer_state leave plain tensors, on any device, of any shape."""
    params = parameters(rng, ((7, 33),))
    optimizer = QuantAdamW(params, **moments("8/8"))
    twin = copy.deepcopy(optimizer)
    set_grads(rng, params, twin.param_groups[0]["params"])
    optimizer.step()
    twin.step()
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].dequantize().reshape(-1)
    state["exp_avg_sq"] = state["exp_avg_sq"].dequantize().t().contiguous().t()
    state["step"] = 1
    optimizer.step()
    twin.step()
    assert_same(optimizer, twin)


def test_a_window_that_is_found_is_made_whole_before_the_step(rng):
    params = parameters(rng, ((8, 8),))
    optimizer = QuantAdamW(params, **moments("8/8"))
    set_grads(rng, params)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = params[0].grad.clone()
    for one, turn in ((optimizer, lambda m: m.t()), (twin, lambda m: m.dequantize().t())):
        state = next(iter(one.state.values()))
        state["exp_avg"] = turn(state["exp_avg"])
        one.step()
        assert state["exp_avg"].whole
    assert_same(optimizer, twin)


def test_a_32_bit_moment_of_another_layout_is_laid_out_as_the_parameter(rng):
    """A plain AdamW keeps the moments of channels_last parameters in that layout."""
    params = parameters(rng, ((6, 8),))
    optimizer = QuantAdamW(params, **NONE)
    set_grads(rng, params)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = params[0].grad.clone()
    state = optimizer.state[params[0]]
    state.update({key: state[key].t().contiguous().t() for key in MOMENTS})
    optimizer.step()
    twin.step()
    assert_same(optimizer, twin)


# ---- random bits


def test_replicas_draw_the_same_bits_and_partitions_do_not(rng):
    start = parameters(rng)
    grads = [[tensor(rng, *p.shape) for p in start] for _ in range(3)]
    optimizers = {}
    for name, seed, rank in (("one", 0, 0), ("replica", 0, 0), ("partition", 0, 1), ("seed", 1, 0)):
        params = twins(start)
        optimizers[name] = QuantAdamW(params, seed=seed, **moments("8/8"))
        optimizers[name].rank = rank
        run(optimizers[name], params, grads)
    assert_same(optimizers["one"], optimizers["replica"])
    for name in ("partition", "seed"):
        pairs = zip(stored(optimizers["one"]), stored(optimizers[name]), strict=True)
        # The 0-d parameter is its block's largest value, which is exact.
        assert [torch.equal(a[4], b[4]) for a, b in pairs] == [False, False, True, False]


def test_equal_parameters_draw_different_bits_and_each_step_others(rng):
    value, grad = tensor(rng, 300), tensor(rng, 300)
    params = [nn.Parameter(value.clone()) for _ in range(3)]
    stochastic = {"bits": 8, "rounding": "stochastic"}
    optimizer = QuantAdamW(params, exp_avg=stochastic, exp_avg_sq=stochastic)
    for param in params:
        param.grad = grad
    optimizer.step()
    first = [optimizer.state[p] for p in params]
    for a, b in itertools.combinations(first, 2):
        for key in MOMENTS:
            assert not torch.equal(a[key].blocks.codes, b[key].blocks.codes)
            assert torch.equal(a[key].blocks.scale, b[key].blocks.scale)


def test_thousands_of_small_parameters_equal_each_stepped_alone(rng):
    numel, count = 64, 2000
    values, grads = tensor(rng, count, numel), tensor(rng, 2, count, numel)
    params = [nn.Parameter(row.clone()) for row in values]
    optimizer = QuantAdamW(params, lr=1e-2, **moments("4/8"))
    alone = [nn.Parameter(row.clone()) for row in values]
    single = QuantAdamW(alone, lr=1e-2, **moments("4/8"))
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad
        optimizer.step()
    # Stepped one by one in the same order, the streams are the same.
    for step in grads:
        for param, grad in zip(alone[:40], step, strict=False):
            param.grad = grad
            single.step()
            param.grad = None
    for left, right in zip(params[:40], alone, strict=False):
        assert torch.equal(left, right)
        for key in MOMENTS:
            a, b = optimizer.state[left][key], single.state[right][key]
            assert a.stream == b.stream
            assert torch.equal(a.blocks.codes, b.blocks.codes)
            assert torch.equal(a.blocks.scale, b.blocks.scale)


# ---- bytes


@pytest.mark.parametrize(("name", "limit"), [("8/8", 2.04), ("4/8", 1.55), ("4/4", 1.08)])
def test_bytes_of_a_parameter_at_a_billion(name, limit, monkeypatch):
    param = nn.Parameter(torch.empty(10**9, device="meta"))
    param.grad = torch.empty_like(param)
    optimizer = QuantAdamW([param], **moments(name))
    monkeypatch.setattr(ops, "adamw_", lambda works: None)  # no kernel computes on this device
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].device.type == "meta"
    assert 0.98 * limit < optimizer.state_bytes() / 10**9 <= limit


def test_state_bytes_are_those_of_the_storages(rng):
    params = parameters(rng)
    optimizer = QuantAdamW([{"params": params[:2]}, {"params": params[2:], **NONE}], **moments("4/8"))
    assert optimizer.state_bytes() == 0
    set_grads(rng, params)
    optimizer.step()
    # 7 * 33 = 231 and 300 elements in blocks of 128 and 256; 1 and 60 elements in fp32.
    codes = 116 + 150 + 231 + 300
    scales = 4 * (2 + 3 + 1 + 2)
    assert optimizer.state_bytes() == codes + scales + 8 * 61
