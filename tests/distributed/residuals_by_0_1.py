"""Two ranks with error feedback, whose checkpoint in fixtures/residuals-0.1 was written by version 0.1 (355188d).

`residuals_by_0_1.py OUTPUT write` wrote it in a checkout of that time with the common.py of today, and the losses of
the steps after it as OUTPUT; `residuals_by_0_1.py OUTPUT resume` goes on from it.
"""

import sys
from pathlib import Path

import torch
from common import leave, write_reports
from deepspeed import comm as dist
from safetensors.torch import load_file
from torch import nn

import ds_quant

FOLDER = Path(__file__).parent / "fixtures" / "residuals-0.1"
STEPS = 3
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1, "ds_quant_required": True},
    "ds_quant": {"communication": {"gradient": {"bits": 4, "block_size": 32, "error_feedback": True}}},
}


def losses(engine, first):
    """Those of this rank in STEPS steps from step number `first`, which the batches depend on."""
    found = []
    for step in range(first, first + STEPS):
        batch = torch.randn(2, 8, generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
        loss = engine(batch).square().mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


def resumed(engine):
    """Whether this rank owes just what its file says, in how many elements, and how the job goes on."""
    engine.load_checkpoint(FOLDER)
    told = load_file(FOLDER / "saved" / f"ds_quant_residuals_rank_{dist.get_rank():05d}.safetensors")
    owed = engine.ds_quant_gradients.feedback.state_dict()
    same = owed.keys() == told.keys() and all(torch.equal(owed[name], told[name]) for name in told)
    return {"same": same, "owed": sum(int(part.count_nonzero()) for part in owed.values())}


def main(output, verb):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    engine = ds_quant.initialize(model=model, config=CONFIG, model_parameters=list(model.parameters()))[0]
    report = {}
    if verb == "write":
        losses(engine, 0)
        engine.save_checkpoint(FOLDER, tag="saved")
    else:
        report = resumed(engine)
    write_reports(output, {**report, "losses": losses(engine, STEPS)})
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
