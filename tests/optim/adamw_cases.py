"""What the tests of QuantAdamW share: formats of moments, parameters, and every bit of a state."""

import copy
import io

import numpy as np
import torch
from torch import nn

from ds_quant.optim import MOMENTS
from ds_quant.optim.state import QuantizedState

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


def run(optimizer, params, grads):
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()
