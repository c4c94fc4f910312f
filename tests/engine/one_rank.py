"""What the tests of engines on one rank share: a config, a model, and a few steps."""

import copy

import deepspeed
import torch
from torch import nn

import ds_quant

SECTION = {"linear": {"weight": {"bits": 8}, "activation": {"bits": 8}, "exclude": []}}
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"ds_quant_required": True, "stage": 1},
    "ds_quant": SECTION,
}
STOCK_INITIALIZE = deepspeed.initialize


def config(section=SECTION, tripwire=True, **overrides):
    made = {**copy.deepcopy(CONFIG), **overrides}
    if section is None:
        del made["ds_quant"]
    else:
        made["ds_quant"] = copy.deepcopy(section)
    if not tripwire:
        del made["zero_optimization"]["ds_quant_required"]
    return made


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def losses(engine, steps=4):
    results = []
    for step in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
        results.append(loss.item())
    return results


def start(initialize=None, **arguments):
    net = arguments.pop("model", None) or model()
    return (initialize or ds_quant.initialize)(model=net, model_parameters=net.parameters(), **arguments)


def kinds(engine):
    return [type(m).__name__ for m in engine.module.modules() if isinstance(m, nn.Linear)]
