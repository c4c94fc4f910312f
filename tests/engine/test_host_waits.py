"""Where a step of a live engine has the host wait for the device: on the CPU, where it reads a number of a tensor."""

import json
from pathlib import Path

import deepspeed
import pytest
import torch
from helpers.host_reads import reads
from torch import nn

import ds_quant
from ds_quant.engine.gradients import GradientCommunication

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "stage_1_and_2.py:has_overflow": "DeepSpeed asks whether gradients are finite before each step",
    "utils.py:is_invalid_grad_norm": "DeepSpeed asks whether the norm is finite",
    "ds_quant/optim/base.py:ready": "the step of a state lies on the host, on every device",
    "ds_quant/numerics/random.py:derive_key": "keys on the CPU alone: on other devices it derives them there",
    "ds_quant/kernels/int8/cpu.py:__init__": "the key that C++ is passed: kernels of the CPU alone",
}


@pytest.fixture(autouse=True)
def _job(single_rank):
    yield
    ds_quant.disable()


def engine():
    given = json.loads((ROOT / "ds_configs" / "full_int8.json").read_text())
    given.pop("scheduler")
    config = {name: value for name, value in given.items() if value != "auto"} | {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    ds_quant.enable()
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def reads_of(engine):
    """Of a second step: the first one makes what later ones keep."""
    for _ in range(2):
        with reads() as found:
            x = torch.ones(4, 32, dtype=torch.bfloat16)
            engine.backward(engine(x).float().square().mean())
            engine.step()
    return found


def test_a_step_waits_only_where_it_is_known_to():
    assert set(reads_of(engine())) == set(ALLOWED)


def test_a_wait_in_any_part_of_a_step_is_found(monkeypatch):
    live, call = engine(), GradientCommunication._call
    layer = live.module[0]

    def forward(*_):
        torch.ones(1).item()

    def backward(*_):
        torch.ones(1).tolist()

    def reduction(*arguments):
        torch.ones(1).nonzero()
        return call(*arguments)

    def step(*_, **__):
        float(torch.ones(1))

    layer.register_forward_hook(forward)
    layer.weight.register_hook(backward)
    monkeypatch.setattr(GradientCommunication, "_call", reduction)
    live.optimizer.optimizer.register_step_pre_hook(step)
    found = {name.partition(":")[2] for name in set(reads_of(live)) - set(ALLOWED)}
    assert found == {"forward", "backward", "reduction", "step"}
