"""Error feedback under DeepSpeed: train with 4 bits and save; then, started again, load and go on.

    deepspeed residuals.py OUTPUT FOLDER save|resume|others|broken|rest

`others` loads with another number of ranks, `broken` loads files that are damaged; `rest` meets a batch that overflows,
reads the monitor, measures memory, combines sections and has ranks disagree.
"""

import gc
import os
import shutil
import sys
from pathlib import Path

import deepspeed
import torch
from common import leave, say, write_report
from deepspeed import comm as dist
from deepspeed.comm.comm import comms_logger
from torch import nn

import ds_quant
from ds_quant.base.errors import ConfigError
from ds_quant.comm.statistics import Statistics

ROWS, WIDTH, HIDDEN = 4, 24, 96
TRAINED, MORE = 3, 3
CASES = {
    "0": {"stage": 0},
    "0 bf16": {"stage": 0, "dtype": "bf16", "gradient": {"format": "mxfp4", "scale_rule": "up"}},
    "1": {"stage": 1},
    "BF16_Optimizer": {"stage": 1, "dtype": "bf16", "grad_accum_dtype": "fp32", "gradient": {"format": "fp4_e2m1"}},
    "2": {"stage": 2, "accumulation": 2, "gradient": {"format": "nvfp4", "scale_rule": "four_six"}},
    "3": {"stage": 3, "accumulation": 2, "gradient": {"format": "nvint4"}},
}
LARGE = 512


class Net(nn.Module):
    def __init__(self, width=WIDTH, hidden=HIDDEN):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x, factor=1.0):
        return (self.outer(torch.tanh(self.inner(x))) * factor - x).float().square().mean()


def start(stage=1, dtype="fp32", accumulation=1, grad_accum_dtype=None, model=Net, section=None, **overrides):
    gradient = {"bits": 4, "block_size": 32, "rounding": "stochastic", "error_feedback": True}
    gradient |= overrides.pop("gradient", {})
    if "format" in gradient:
        del gradient["bits"], gradient["block_size"]
    bf16 = {"enabled": dtype == "bf16"} | overrides.pop("bf16", {})
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "ds_quant_required": True,
        },
        "bf16": bf16,
        "ds_quant": {"communication": {"gradient": gradient}, **(section or {})},
        **overrides,
    }
    if grad_accum_dtype:
        config["data_types"] = {"grad_accum_dtype": grad_accum_dtype}
    torch.manual_seed(0)
    net = model()
    engine, *_ = ds_quant.initialize(model=net, model_parameters=net.parameters(), config=config)
    return engine


def train(engine, first, last, bad=()):
    """The mean loss over all ranks of each micro batch; steps in `bad` see an infinite loss."""
    rank, world_size, losses = dist.get_rank(), dist.get_world_size(), []
    dtype, accumulation = next(engine.module.parameters()).dtype, engine.gradient_accumulation_steps()
    for micro in range(first * accumulation, last * accumulation):
        generator = torch.Generator().manual_seed(micro)
        x = torch.randn(ROWS * world_size, engine.module.inner.in_features, generator=generator)[rank::world_size]
        loss = engine(x.to(dtype), float("inf") if micro // accumulation in bad else 1.0)
        engine.backward(loss)
        engine.step()
        total = loss.detach().float().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return losses


def weights(engine):
    """Sums that differ where any bit does, for each rank."""
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        return {name: parameter.detach().double().sum().item().hex() for name, parameter in parameters.items()}


def residuals(engine):
    """Elements and largest magnitude of what this rank owes."""
    state = engine.ds_quant_gradients.feedback.state_dict()
    return [sum(owed.numel() for owed in state.values()), max(owed.abs().max().item() for owed in state.values())]


def everywhere(value):
    found = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def end(engine):
    engine.destroy()
    gc.collect()


def save(folder):
    report = {}
    for name, case in CASES.items():
        say(f"rank {dist.get_rank()}: {name}")
        engine = start(**case)
        got = {"losses": train(engine, 0, TRAINED), "residuals": everywhere(residuals(engine))}
        got["wrapper"] = type(engine.optimizer).__name__
        engine.save_checkpoint(f"{folder}/{name}")
        got |= {"more": train(engine, TRAINED, TRAINED + MORE), "weights": everywhere(weights(engine))}
        if name == "1":
            engine.save_checkpoint(f"{folder}/{name}", tag="later", save_latest=False)
        end(engine)
        without = start(**{**case, "gradient": {**case.get("gradient", {}), "error_feedback": False}})
        got["without"] = train(without, 0, TRAINED + MORE)
        if name == "1":
            without.save_checkpoint(f"{folder}/absent")
        end(without)
        report[name] = got
    return report


def resume(folder):
    report = {}
    for name, case in CASES.items():
        say(f"rank {dist.get_rank()}: {name}")
        engine = start(**case)
        engine.load_checkpoint(f"{folder}/{name}")
        got = {"residuals": everywhere(residuals(engine))}
        got |= {"more": train(engine, TRAINED, TRAINED + MORE), "weights": everywhere(weights(engine))}
        end(engine)
        report[name] = got
    return report


def load(path, case, **options):
    """What becomes of loading a folder: the error of each rank, or the elements of its residuals."""
    engine = start(**case)
    try:
        engine.load_checkpoint(path, **options)
        got = {"errors": [None], "numel": everywhere(sum(owed.numel() for owed in owed_by(engine)))}
    except ConfigError as error:
        got = {"errors": everywhere(str(error))}
    got["step"] = everywhere(engine.global_steps)
    end(engine)
    return got


def owed_by(engine):
    return engine.ds_quant_gradients.feedback.state_dict().values()


def others(folder):
    """At another number of ranks. DeepSpeed itself loads such a checkpoint at stage 0 alone."""
    return {"stage 0": load(f"{folder}/0", CASES["0"])}


def broken(folder):
    def damaged(name, change):
        path = Path(f"{folder}/broken {name}")
        if dist.get_rank() == 0:
            shutil.copytree(f"{folder}/1", path)
            change(path / f"global_step{TRAINED}")
        dist.barrier()
        return load(str(path), CASES["1"])

    def file(folder, rank):
        return folder / f"ds_quant_residuals_rank_{rank:05d}.safetensors"

    report = {
        f"missing on rank {rank}": damaged(f"missing {rank}", lambda found, rank=rank: file(found, rank).unlink())
        for rank in range(dist.get_world_size())
    }
    for rank in range(dist.get_world_size()):
        report[f"truncated on rank {rank}"] = damaged(
            f"truncated {rank}", lambda found, rank=rank: os.truncate(file(found, rank), 200)
        )
    report["of another step on rank 1"] = damaged(
        "other step", lambda found: shutil.copy(file(found.parent / "later", 1), file(found, 1))
    )
    report["absent"] = load(f"{folder}/absent", CASES["1"])
    report["weights only"] = load(f"{folder}/1", CASES["1"], load_module_only=True)
    report["no checkpoint"] = load(f"{folder}/nowhere", CASES["1"])
    return report


def skipped(folder):
    """Losses with a batch that overflows, and without it. Nearest rounding: random bits are those of the step."""
    report = {}
    for name, case in {
        "1 bf16": {"stage": 1, "dtype": "bf16", "bf16": {"check_grad_overflow": True}},
        "1": {"stage": 1},
        "3": {"stage": 3},
        "3 bf16": {"stage": 3, "dtype": "bf16"},
        "2 bf16": {"stage": 2, "dtype": "bf16", "accumulation": 2, "bf16": {"check_grad_overflow": True}},
        "0 bf16": {"stage": 0, "dtype": "bf16", "gradient": {"format": "mxfp4", "scale_rule": "up"}},
    }.items():
        case |= {"gradient": {"rounding": "nearest"}}
        engine = start(**case)
        before = train(engine, 0, 2)
        owed = [tensor.clone() for tensor in owed_by(engine)]
        train(engine, 100, 101, bad=(100,))
        same = all(torch.equal(a, b) for a, b in zip(owed, owed_by(engine), strict=True))
        got = {"skipped": engine.skipped_steps, "kept": everywhere(same), "with": before + train(engine, 2, 5)}
        end(engine)
        engine = start(**case)
        got["without"] = train(engine, 0, 5)
        end(engine)
        report[name] = got
    return report


def monitored(folder):
    """What DeepSpeed's monitor is told, and what was counted."""
    seen, original = [], Statistics.take

    def take(statistics):
        traffic = original(statistics)
        seen.append([traffic.sent_bytes, traffic.compression, traffic.relative_error])
        return traffic

    Statistics.take = take
    engine = start(
        csv_monitor={"enabled": True, "output_path": f"{folder}/monitor", "job_name": "job"},
        comms_logger={"enabled": True, "verbose": False},
    )
    train(engine, 0, 3)
    Statistics.take = original
    logged = sorted(comms_logger.comms_dict)
    end(engine)
    comms_logger.enabled = False
    return {"seen": seen, "logged": logged}


def memory(folder):
    """What residuals take."""
    report = {}
    cases = {"0": {"stage": 0}, "1": {"stage": 1}, "2": {"stage": 2, "reduce_scatter": False}, "3": {"stage": 3}}
    cases["1 bf16"] = {"stage": 1, "dtype": "bf16"}
    for name, case in cases.items():
        if dist.get_rank() == 0:  # whose announcements are read between these lines
            say(f"MEMORY {name}")
        reduce_scatter = case.pop("reduce_scatter", True)
        zero = {
            "stage": case["stage"],
            "reduce_scatter": reduce_scatter,
            "ds_quant_required": True,
            "stage3_param_persistence_threshold": 0,
        }
        engine = start(**case, model=lambda: Net(LARGE, LARGE), zero_optimization=zero)
        train(engine, 0, 2)
        report[name] = everywhere(engine.ds_quant_gradients.feedback.num_bytes)
        end(engine)
    return report


def combined(folder):
    """All sections at once, saved and loaded."""
    report = {}
    section = {
        "linear": {"weight": {"bits": 8}, "activation": {"bits": 8}, "exclude": []},
        "optimizer": {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}},
    }
    for stage in range(4):
        engine = start(stage, section=section)
        got = {"losses": train(engine, 0, TRAINED)}
        engine.save_checkpoint(f"{folder}/combined {stage}")
        got["more"] = train(engine, TRAINED, TRAINED + MORE)
        got["optimizer"] = type(engine.basic_optimizer).__name__
        got["linears"] = [type(module).__name__ for module in (engine.module.inner, engine.module.outer)]
        got["bytes"] = engine.ds_quant_gradients.last_step.sent_bytes
        end(engine)
        engine = start(stage, section=section)
        engine.load_checkpoint(f"{folder}/combined {stage}")
        got["resumed"] = train(engine, TRAINED, TRAINED + MORE)
        end(engine)
        report[str(stage)] = got
    return report


def disagreeing(folder):
    """What each rank is told where they were given different settings or models."""
    rank = dist.get_rank()
    cases = {
        "bits": {"gradient": {"bits": (4, 8)[rank]}},
        "block_size": {"gradient": {"block_size": (32, 64)[rank]}},
        "model": {"stage": 0, "model": lambda: Net(hidden=HIDDEN + rank)},
        "hierarchical": {"gradient": {"hierarchical": 3}},
        "weights": {"section": {"communication": {"weight": {"mode": "difference", "bits": 8, "hierarchical": 3}}}},
    }
    report = {}
    for name, case in cases.items():
        try:
            start(**case)
            said = None
        except ConfigError as error:
            said = str(error)
        report[name] = everywhere(said)
    return report


def rest(folder):
    parts = (skipped, monitored, memory, combined, disagreeing)
    return {part.__name__: part(folder) for part in parts}


def main(output, folder, verb):
    deepspeed.init_distributed()
    verbs = {"save": save, "resume": resume, "others": others, "broken": broken, "rest": rest}
    write_report(output, verbs[verb](folder))
    leave()


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
