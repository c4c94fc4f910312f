import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from ds_quant.config import ConfigError
from ds_quant.optim import MOMENTS, QuantAdamW
from ds_quant.optim.adopt import convert_adamw
from ds_quant.optim.state import QuantizedState

EIGHT = {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}}
FULL = {"bits": 8, "map": "float", "granularity": "block", "block_size": 256, "rounding": None}


def parameters(rng, dtype=torch.float32):
    shapes = ((7, 33), (300,))
    return [nn.Parameter(torch.from_numpy(rng.normal(size=shape)).to(dtype)) for shape in shapes]


def set_grads(rng, *lists):
    for params in zip(*lists, strict=True):
        grad = torch.from_numpy(rng.normal(size=params[0].shape)).float()
        for param in params:
            param.grad = grad.clone()


def test_it_stays_the_same_object_with_the_same_groups(rng):
    a, b = parameters(rng)
    optimizer = torch.optim.AdamW([{"params": [a], "lr": 0.5}, {"params": [b], "name": "rest"}], betas=(0.8, 0.9))
    groups = optimizer.param_groups
    dicts = list(groups)
    before = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in groups])
    converted = convert_adamw(optimizer, **EIGHT, seed=5)
    assert converted is optimizer
    assert type(converted) is QuantAdamW
    assert converted.param_groups is groups
    assert all(left is right for left, right in zip(groups, dicts, strict=True))
    for group, old in zip(groups, before, strict=True):
        assert group["exp_avg"] == group["exp_avg_sq"] == FULL
        assert {key: group[key] for key in old} == old
    assert groups[0]["exp_avg"] is not groups[1]["exp_avg"]
    assert (converted.seed, converted.rank) == (5, 0)
    assert converted.defaults["exp_avg"] == FULL
    assert "QuantAdamW" in repr(converted)


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, lambda p, **o: torch.optim.Adam(p, decoupled_weight_decay=True, **o)]
)
def test_it_steps_as_one_that_was_made_so(make, rng):
    ours = parameters(rng)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    converted = convert_adamw(make(ours, **options), **EIGHT, seed=3)
    made = QuantAdamW(theirs, **options, **EIGHT, seed=3)
    for _ in range(3):
        set_grads(rng, ours, theirs)
        converted.step()
        made.step()
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)
        for name in MOMENTS:
            assert torch.equal(converted.state[left][name].blocks.codes, made.state[right][name].blocks.codes)


def test_adam_without_weight_decay_is_an_adamw(rng):
    optimizer = convert_adamw(torch.optim.Adam(parameters(rng)), **EIGHT)
    assert optimizer.param_groups[0]["weight_decay"] == 0


SCHEDULERS = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8),
    "two": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.5)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_stay_in_charge(kind, when, rng):
    ours = parameters(rng)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer, reference = torch.optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    with warnings.catch_warnings():
        if kind == "two":
            warnings.simplefilter("ignore")  # SequentialLR's own, in plain torch too
        expected = SCHEDULERS[kind](reference)
        if when == "before":
            scheduler = SCHEDULERS[kind](optimizer)
            convert_adamw(optimizer, exp_avg=None, exp_avg_sq=None)
        else:
            convert_adamw(optimizer, exp_avg=None, exp_avg_sq=None)
            scheduler = SCHEDULERS[kind](optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if kind != "two" else "ignore")
        for _ in range(6):
            set_grads(rng, ours, theirs)
            optimizer.step()
            reference.step()
            scheduler.step()
            expected.step()
            assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
            assert scheduler.get_last_lr() == expected.get_last_lr()
    for left, right in zip(ours, theirs, strict=True):
        assert torch.allclose(left, right, rtol=1e-5, atol=1e-6)
        assert optimizer.state[left]["exp_avg"].dtype == torch.float32


def test_a_scheduler_still_warns_where_the_optimizer_was_not_stepped(rng):
    optimizer = torch.optim.AdamW(parameters(rng))
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    convert_adamw(optimizer, **EIGHT)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()


def test_the_wrapped_step_is_the_new_one(rng, monkeypatch):
    # As in a process that has made no QuantAdamW: making one has torch wrap the step of the class with its hooks.
    if getattr(QuantAdamW.step, "hooked", False):
        monkeypatch.setattr(QuantAdamW, "step", QuantAdamW.step.__wrapped__)
    params = parameters(rng)
    optimizer = torch.optim.AdamW(params)
    lr_scheduler.StepLR(optimizer, 1)
    convert_adamw(optimizer, **EIGHT)
    set_grads(rng, params)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append("hook"))
    assert optimizer.step(lambda: 7.5) == 7.5
    assert called == ["hook"]
    assert type(optimizer.state[params[0]]["exp_avg"]) is QuantizedState
    again = copy.deepcopy(optimizer)
    assert type(again) is QuantAdamW
    again.step()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_the_state_that_is_there_is_gone_on_with(options, rng):
    ours = parameters(rng)
    optimizer = torch.optim.AdamW(ours, lr=0.01, **options)
    for _ in range(3):
        set_grads(rng, ours)
        optimizer.step()
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    loaded = QuantAdamW(theirs, **EIGHT)
    loaded.load_state_dict(optimizer.state_dict())
    convert_adamw(optimizer, **EIGHT)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    set_grads(rng, ours, theirs)
    optimizer.step()
    loaded.step()
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)
        assert optimizer.state[left]["step"] == 4
        for name in MOMENTS:
            assert torch.equal(optimizer.state[left][name].blocks.codes, loaded.state[right][name].blocks.codes)


def test_groups_keep_moments_of_their_own(rng):
    a, b = parameters(rng)
    optimizer = torch.optim.AdamW([{"params": [a], "exp_avg": None}, {"params": [b], "exp_avg_sq": {"bits": 4}}])
    convert_adamw(optimizer, **EIGHT)
    assert optimizer.param_groups[0]["exp_avg"] is None
    assert optimizer.param_groups[0]["exp_avg_sq"] == optimizer.param_groups[1]["exp_avg"] == FULL
    assert optimizer.param_groups[1]["exp_avg_sq"]["map"] == "power"
    set_grads(rng, [a, b])
    optimizer.step()
    assert type(optimizer.state[a]["exp_avg"]) is torch.Tensor


def test_a_quantadamw_is_taken_where_it_agrees(rng):
    a, b = parameters(rng)
    optimizer = QuantAdamW([{"params": [a]}, {"params": [b], "exp_avg": None, "exp_avg_sq": None}], **EIGHT)
    assert convert_adamw(optimizer, **EIGHT) is optimizer
    message = r"ds_quant.optimizer.exp_avg: got .*a QuantAdamW with .*; allowed: the moments of the optimizer that was "
    for moments in ({"exp_avg": {"bits": 4}, "exp_avg_sq": {"bits": 8}}, {"exp_avg": None, "exp_avg_sq": {"bits": 8}}):
        with pytest.raises(ConfigError, match=message):
            convert_adamw(optimizer, **moments)
    # 32 bits everywhere are not what the section promises.
    with pytest.raises(ConfigError, match=message):
        convert_adamw(QuantAdamW(parameters(rng), exp_avg=None, exp_avg_sq=None), **EIGHT)


class DeepSpeedCPUAdam(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})


class MyAdamW(torch.optim.AdamW):
    pass


def replaced(params):
    optimizer = torch.optim.AdamW(params)
    optimizer.step = lambda closure=None: None
    return optimizer


REFUSED = {
    "SGD": (
        lambda p: torch.optim.SGD(p),
        r"ds_quant.optimizer: got .*type torch.optim.sgd.SGD.*; allowed: torch.optim.Ad",
    ),
    "foreign": (
        DeepSpeedCPUAdam,
        r"got .*type test_adamw_conversion.DeepSpeedCPUAdam.*; fix: pass torch.optim.AdamW",
    ),
    "subclass": (MyAdamW, r"got .*type test_adamw_conversion.MyAdamW"),
    "NAdam": (lambda p: torch.optim.NAdam(p), r"got .*type torch.optim.nadam.NAdam"),
    "L2": (
        lambda p: torch.optim.Adam(p, weight_decay=0.1),
        r"got .*weight_decay, which is added.*; allowed: decoupled",
    ),
    "amsgrad": (
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        r"ds_quant.optimizer\(amsgrad\): got true; allowed: False; ",
    ),
    "maximize": (lambda p: torch.optim.AdamW(p, maximize=True), r"ds_quant.optimizer\(maximize\): got true; "),
    "differentiable": (lambda p: torch.optim.AdamW(p, differentiable=True), r"\(differentiable\): got true; "),
    "step": (replaced, r"got .*step method was replaced.*; fix: create the wrapper after initialize"),
    "lr": (lambda p: torch.optim.AdamW([{"params": p, "lr": float("nan")}]), r"ds_quant.optimizer\(lr\): got NaN; "),
    "moment": (lambda p: torch.optim.AdamW([{"params": p, "exp_avg": {"bits": 7}}]), r"exp_avg\).bits: got 7; "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_adamw_is_refused_and_left_as_it_was(name, rng):
    make, message = REFUSED[name]
    optimizer = make(parameters(rng))
    kind, keys = type(optimizer), [set(group) for group in optimizer.param_groups]
    with pytest.raises(ConfigError, match=message):
        convert_adamw(optimizer, **EIGHT)
    assert type(optimizer) is kind
    assert [set(group) for group in optimizer.param_groups] == keys
    assert not hasattr(optimizer, "seed")


def test_parameters_of_other_dtypes_are_refused(rng):
    optimizer = torch.optim.AdamW(parameters(rng, torch.float64))
    with pytest.raises(ConfigError, match=r"ds_quant.optimizer: got .*torch.float64.*; allowed: torch.float32"):
        convert_adamw(optimizer, **EIGHT)
    assert type(optimizer) is torch.optim.AdamW
    with pytest.raises(ConfigError, match=r"QuantAdamW\(exp_avg\).bits: got 3"):
        convert_adamw(torch.optim.AdamW(parameters(rng)), exp_avg={"bits": 3}, exp_avg_sq=None)
