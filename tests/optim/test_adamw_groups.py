"""QuantAdamW's parameters of any layout, groups, learning rates, closures and gradients."""

import pytest
import torch
from adamw_cases import EIGHT, NONE, assert_same, moments, parameters, set_grads, stored, tensor, twins
from torch import nn

from ds_quant.config import ConfigError, MomentConfig
from ds_quant.optim import QuantAdamW

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
