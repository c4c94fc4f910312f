"""`linear.weight.oscillation_reset` under DeepSpeed: what a reset does, held against its definition; and checkpoints.

    deepspeed oscillation_reset.py OUTPUT FOLDER

A run without the key takes the same steps up to the first reset, and shows what the other one had to watch.
"""

import gc
import itertools
import shutil
import sys
from pathlib import Path

import torch
from common import leave, say, write_report
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from transformers.pytorch_utils import Conv1D

import ds_quant
from ds_quant.numerics.format import Format, Group, Integers, named_format, quantize_to
from ds_quant.numerics.integer import dequantize

ROWS, WIDTH, HIDDEN = 4, 24, 40
EVERY, WATCHED, RATIO = 9, 4, 2.0
FOUR = {"bits": 4, "granularity": "channel"}
CASES = {
    "0": {"stage": 0, "weight": FOUR},
    "1": {"stage": 1, "weight": FOUR},
    "1 bf16": {"stage": 1, "dtype": "bf16", "weight": {"format": "nvfp4"}},
    "BF16_Optimizer": {"stage": 1, "dtype": "bf16", "grad_accum_dtype": "fp32", "weight": FOUR},
    "2 bf16": {"stage": 2, "dtype": "bf16", "accumulation": 2, "weight": {"format": "mxfp4"}},
    "2 offloaded": {"stage": 2, "weight": FOUR, "offload": True},
    "2 int8": {"stage": 2, "dtype": "bf16", "weight": FOUR, "backend": "int8", "activation": {"bits": 8}},
}


class Net(nn.Module):
    """Both layouts, and a layer that is not quantized."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(WIDTH, HIDDEN), Conv1D(WIDTH, HIDDEN), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return (self.head(self.down(torch.tanh(self.up(x)))) - x.roll(1, 0)).float().square().mean()


def start(
    stage,
    weight,
    dtype="fp32",
    accumulation=1,
    grad_accum_dtype=None,
    reset=True,
    first_step=0,
    offload=False,
    **linear,
):
    weight = dict(weight)
    if reset:
        keys = {"every": EVERY, "watched_steps": WATCHED, "ratio": RATIO, "first_step": first_step}
        weight["oscillation_reset"] = keys
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "ds_quant_required": True},
        "bf16": {"enabled": dtype == "bf16"},
        "ds_quant": {"linear": {"weight": weight, "exclude": ["head"], **linear}},
    }
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    if grad_accum_dtype:
        config["data_types"] = {"grad_accum_dtype": grad_accum_dtype}
    torch.manual_seed(0)
    net = Net()
    return ds_quant.initialize(model=net, model_parameters=net.parameters(), config=config)[0]


def train(engine, first, last):
    """The masters of every weight after each step, beside what the model has."""
    rank, world_size, found = dist.get_rank(), dist.get_world_size(), []
    dtype, accumulation = next(engine.module.parameters()).dtype, engine.gradient_accumulation_steps()
    for micro in range(first * accumulation, last * accumulation):
        generator = torch.Generator().manual_seed(micro)
        x = torch.randn(ROWS * world_size, WIDTH, generator=generator)[rank::world_size]
        engine.backward(engine(x.to(dtype)))
        engine.step()
        if (micro + 1) % accumulation == 0:
            found.append(weights(engine))
    return found


def weights(engine):
    found = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if hasattr(parameter, "_hp_mapping") else parameter
        found[name] = master.detach().clone(), parameter.detach().clone()
    return found


def quantized(stored, weight, transposed):
    """Q(w) [as stored], by the slow quantizers."""
    matrix = stored.t() if transposed else stored
    to = named_format(weight["format"], "block", 32, block_rows=1, scale_rule="floor") if "format" in weight else None
    to = to or Format(Integers(weight["bits"], True, False), Group("row", 128))
    values = dequantize(quantize_to(matrix, to, rounding="nearest", key=None))
    return values.t() if transposed else values


def expected(steps, weight):
    """The masters after the reset, by the definition; steps: the last WATCHED + 1 of a run without one."""
    found, count, total = {}, 0, 0
    for name in steps[0]:
        master = steps[-1][name][0]
        if name not in ("up.weight", "down.weight"):
            found[name] = master
            continue
        values = [quantized(step[name][1], weight, name.startswith("down")) for step in steps]
        distance = sum((after[name][0] - before[name][0]).abs() for before, after in itertools.pairwise(steps))
        jumped = sum((after - before).abs() for before, after in itertools.pairwise(values))
        swings = (jumped >= RATIO * distance) & (distance > 0)
        found[name] = torch.where(swings, values[-1], master)
        count, total = count + int(swings.sum()), total + swings.numel()
    return found, count / total


def part_of(engine):
    return next(part for part in engine.ds_quant_parts if type(part).__name__ == "OscillationReset")


def same(got, want):
    return all(torch.equal(a, b) for name in want for a, b in zip(got[name], want[name], strict=True))


def everywhere(value):
    found = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def reset(case):
    plain = start(**case, reset=False)
    steps = train(plain, 0, EVERY)
    want, share = expected(steps[-WATCHED - 1 :], case["weight"])
    engine = start(**case)
    before = train(engine, 0, EVERY - 1)
    found = train(engine, EVERY - 1, EVERY)[0]
    stored = {name: values.to(found[name][1].dtype) for name, values in want.items()}
    return {
        "wrapper": type(engine.optimizer).__name__,
        "before": everywhere(all(same(a, b) for a, b in zip(before, steps, strict=False))),
        "masters": everywhere({name: torch.equal(found[name][0], want[name]) for name in want}),
        "weights": everywhere({name: torch.equal(found[name][1], stored[name]) for name in want}),
        "share": [share, part_of(engine).last_share],
        "later": everywhere(same(train(engine, EVERY, EVERY + 1)[0], train(plain, EVERY, EVERY + 1)[0])),
    }


def resume(case, folder):
    """From the middle of a watch, from before it, and from the middle by other layers and without the rank's file."""
    report, last = {}, 2 * EVERY
    engine = start(**case)
    train(engine, 0, EVERY + 1)
    engine.save_checkpoint(folder, "between")
    train(engine, EVERY + 1, last - 2)
    engine.save_checkpoint(folder, "watching")
    want = train(engine, last - 2, last + 1)
    for tag, first in (("between", EVERY + 1), ("watching", last - 2)):
        fresh = start(**case)
        fresh.load_checkpoint(folder, tag)
        found = train(fresh, first, last + 1)[-3:]
        report[tag] = everywhere([same(a, b) for a, b in zip(found, want, strict=True)])
    # A second load by an engine that is under way.
    fresh.load_checkpoint(folder, "between")
    found = train(fresh, EVERY + 1, last + 1)[-3:]
    report["again"] = everywhere([same(a, b) for a, b in zip(found, want, strict=True)])
    other = start(**case, exclude=["head", "down"])
    other.load_checkpoint(folder, "watching")
    train(other, last - 2, last + 1)
    report["other layers share"] = part_of(other).last_share
    dist.barrier()
    if dist.get_rank() == 0:
        for file in Path(folder, "watching").glob("ds_quant_oscillation_*"):
            file.unlink()
    dist.barrier()
    fresh = start(**case)
    fresh.load_checkpoint(folder, "watching")
    found = train(fresh, last - 2, last + 1)
    report["without"] = everywhere([same(a, b) for a, b in zip(found, want, strict=True)])
    report["without share"] = part_of(fresh).last_share
    later = start(**case, first_step=EVERY + 1)
    train(later, 0, EVERY)
    report["too early"] = part_of(later).last_share
    train(later, EVERY, last)
    report["late"] = part_of(later).last_share
    return report


def main(output, folder):
    report = {}
    for name, case in CASES.items():
        say(f"rank {dist.get_rank() if dist.is_initialized() else '?'}: {name}")
        report[name] = reset(case)
        gc.collect()
    for name in ("0", "2 bf16"):
        place = Path(folder, name)
        shutil.rmtree(place, ignore_errors=True)
        report[name]["resumed"] = resume(CASES[name], place)
    write_report(output, report)
    leave()


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
