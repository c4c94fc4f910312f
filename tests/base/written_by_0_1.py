"""A tiny job whose checkpoint in tests/base/fixtures/checkpoint-0.1 was written when modules had other names.

`python tests/base/written_by_0_1.py FOLDER` in a checkout of that time (355188d) wrote it, and what the job did next.
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn

import ds_quant

FOLDER = Path(__file__).parent / "fixtures" / "checkpoint-0.1"
STEPS = 3
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1, "ds_quant_required": True},
    "ds_quant": {
        "linear": {"weight": {"bits": 8}, "activation": {"bits": 8}, "exclude": []},
        "optimizer": {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 4}},
    },
}


def start():
    """The engine, with seeded weights."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    return ds_quant.initialize(model=model, config=CONFIG, model_parameters=list(model.parameters()))[0]


def losses(engine, first):
    """Of STEPS steps from step number `first`, which the batches depend on."""
    found = []
    for step in range(first, first + STEPS):
        batch = torch.randn(4, 32, generator=torch.Generator().manual_seed(step))
        loss = engine(batch).square().mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


def moments(engine):
    """Values of both moments, flat."""
    (state,) = engine.basic_optimizer.state.values()
    return {name: state[name].dequantize().flatten() for name in ("exp_avg", "exp_avg_sq")}


def main():
    folder = Path(sys.argv[1])
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ[name] = str(value)
    engine = start()
    losses(engine, 0)
    engine.save_checkpoint(folder, tag="saved")
    told = {"moments": moments(engine), "weights": {k: v.clone() for k, v in engine.module.state_dict().items()}}
    torch.save({**told, "losses": losses(engine, STEPS)}, folder / "told.pt")


if __name__ == "__main__":
    main()
