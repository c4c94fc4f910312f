"""QuantAdamW goes on from what was saved, copied or pickled as if it had not stopped; and the bytes of its state."""

import copy
import pickle

import pytest
import torch
from adamw_cases import (
    FORMATS,
    NONE,
    assert_same,
    moments,
    parameters,
    run,
    set_grads,
    tensor,
    through_torch_save,
    twins,
)
from torch import nn

from ds_quant.kernels.adamw import ops
from ds_quant.optim import MOMENTS, QuantAdamW


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
