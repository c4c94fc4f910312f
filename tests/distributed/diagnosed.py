"""A native DeepSpeed loop with and without diagnostics, for each ZeRO stage given.

    deepspeed diagnosed.py OUTPUT FOLDER STAGE:DTYPE ...

What must be alike is written down bit for bit: the losses of every micro step of this rank, its generator, and digests
of the weights after every step. DTYPE is fp32 or bf16. Dropout is on, gradients and moments are rounded
stochastically, there are two parameter groups, and an evaluation comes before each step. Then a run goes
on from a checkpoint between two looks. At last it is tried what goes wrong.
"""

import gc
import hashlib
import shutil
import sys
from pathlib import Path

import deepspeed
import torch
from common import VOCABULARY, batch, leave, say, write_report
from deepspeed import comm as dist
from transformers import GPT2Config, GPT2LMHeadModel

import ds_quant

STEPS, EVERY, ROWS, ACCUMULATION = 6, 2, 2, 2
SAVED_AT = 3
SECTION = {
    "linear": {
        "weight": {"bits": 8},
        "activation": {"bits": 8},
        "gradient": {"bits": 8, "rounding": "stochastic"},
    },
    "optimizer": {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}},
}


def build(stage, dtype, diagnostics, **overrides):
    section = {**SECTION, **({"diagnostics": diagnostics} if diagnostics else {})}
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "ds_quant_required": True},
        "ds_quant": section,
    }
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1))
    if stage == 3:
        model = model.bfloat16() if dtype == "bf16" else model
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    torch.manual_seed(100 + dist.get_rank())
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.0}]
    engine, *_ = ds_quant.initialize(model=model, model_parameters=groups, config={**config, **overrides})
    return engine


def digest(engine):
    """Of what this rank holds of all parameters."""
    found = hashlib.sha256()
    for parameter in engine.module.parameters():
        held = getattr(parameter, "ds_tensor", parameter).detach()
        found.update(held.float().cpu().numpy().tobytes())
    return found.hexdigest()


def train(engine, first, last):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses, weights = [], []
    for step in range(first, last):
        torch.manual_seed(1000 * step + rank)  # a native loop's checkpoints hold no generators
        for micro in range(ACCUMULATION):
            data = batch(step * ACCUMULATION + micro, ROWS * world_size)[rank::world_size]
            if micro == 0:
                engine.eval()
                with torch.no_grad():
                    losses.append(engine(input_ids=data, labels=data).loss.item().hex())
                engine.train()
            loss = engine(input_ids=data, labels=data).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item().hex())
        losses.append(torch.rand(()).item().hex())  # the generator's state
        weights.append(digest(engine))
    return losses, weights


def hooks(engine):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in engine.module.modules())


def looked_at(place):
    return {"every": EVERY, "output_dir": str(place), "report": False}


def bitwise(stage, dtype, place):
    plain = build(stage, dtype, None)
    off = hasattr(plain, "ds_quant_diagnostics"), hooks(plain)
    without = train(plain, 0, STEPS)
    del plain
    monitor = {"enabled": True, "output_path": str(place / "monitor"), "job_name": "run"}
    engine = build(stage, dtype, looked_at(place / "looks"), csv_monitor=monitor)
    before = hooks(engine)
    losses, weights = train(engine, 0, SAVED_AT)
    engine.save_checkpoint(str(place / "checkpoint"))
    rest = train(engine, SAVED_AT, STEPS)
    after, seconds = hooks(engine), engine.ds_quant_diagnostics.seconds
    del engine
    # What a run leaves that is killed at its end: looks of steps that the resumed one takes again.
    if dist.get_rank() == 0:
        shutil.copytree(place / "looks", place / "resumed")
    dist.barrier()
    engine = build(stage, dtype, looked_at(place / "resumed"))
    engine.load_checkpoint(str(place / "checkpoint"))
    resumed = train(engine, SAVED_AT, STEPS)
    return {
        "without": without,
        "with": (losses + rest[0], weights + rest[1]),
        "resumed": resumed,
        "off": off,
        "hooks": [before, after],
        "seconds": seconds,
    }


def refused(place, **overrides):
    """What initialize says, on this rank."""
    diagnostics = {**looked_at(place), **overrides.pop("diagnostics", {})}
    try:
        engine = build(1, "bf16", diagnostics, **overrides)
        engine.compile()
    except ds_quant.ConfigError as error:
        return str(error)
    return None


def what_goes_wrong(place):
    """Refusals at start-up; failures in the midst of training, after which it goes on."""
    rank = dist.get_rank()
    place.mkdir(parents=True, exist_ok=True)
    (place / "file").write_text("")
    found = {
        "compile": refused(place / "looks"),
        "folder": refused(place / "file" / "below"),
        "optimizer": refused(
            place / "looks",
            optimizer={"type": "SGD", "params": {"lr": 0.1}},
            zero_allow_untested_optimizer=True,
            ds_quant={"diagnostics": {**looked_at(place / "looks"), "kinds": ["moments"]}},
        ),
        "granularity": refused(
            place / "looks", diagnostics={"exp_avg_sq": {"bits": 8, "map": "linear", "granularity": "channel"}}
        ),
        "ranks": refused(place / "looks", diagnostics={"every": 2 + rank}),
    }
    engine = build(1, "bf16", looked_at(place / "failing"))
    if rank == 1:
        engine.ds_quant_diagnostics._recorders["outliers"].recorder.observe_input = None  # not callable
    train(engine, 0, EVERY)
    if rank == 0:
        shutil.rmtree(place / "failing")
        (place / "failing").write_text("a file where the folder was")
    losses, weights = train(engine, EVERY, 2 * EVERY)
    return {**found, "losses": losses, "weights": weights}


def main(output, folder, *cases):
    ds_quant.enable()  # for deepspeed.zero.Init, which parses the config too
    deepspeed.init_distributed()
    report = {}
    for case in cases:
        stage, _, dtype = case.partition(":")
        say(f"rank {dist.get_rank()}: {case}")
        place = Path(folder) / case.replace(":", "-")
        own = what_goes_wrong(place) if case == "wrong" else bitwise(int(stage), dtype, place)
        gc.collect()
        report[case] = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(report[case], own)
    write_report(output, report)
    leave()


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
