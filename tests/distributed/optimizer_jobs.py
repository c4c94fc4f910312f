"""Train with optimizers other than AdamW in every stage of DeepSpeed and save; then, started again, load and go on.

deepspeed optimizer_jobs.py OUTPUT FOLDER save|resume
"""

import sys
from dataclasses import dataclass, field

import deepspeed
from common import to_universal
from deepspeed import comm as dist
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from moment_jobs import (
    EXCLUDED,
    MORE,
    TRAINED,
    Job,
    digest,
    each,
    finish,
    observe,
    refusal,
    safe_get,
    train,
    write_json,
)

LION = {"type": "Lion", "params": {"lr": 2e-3, "betas": [0.9, 0.98], "weight_decay": 0.1}}
SGD = {"type": "SGD", "params": {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}}

MIX = {
    "type": "AdEMAMix",
    "params": {"lr": 2e-2, "betas": [0.9, 0.95, 0.99], "alpha": 2.0, "weight_decay": 0.1, "t_alpha": 4, "t_beta3": 4},
}


@dataclass
class OptimizerJob(Job):
    """A job with this `optimizer` in the JSON, and its states stored so."""

    optimizer: dict = field(default_factory=dict)
    states: dict = field(default_factory=dict)

    def config(self, world_size):
        config = super().config(world_size)
        lr = self.optimizer["params"].get("lr", 1e-3)
        config |= {"optimizer": self.optimizer, "ds_quant": {"optimizer": {**self.states}}}
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": lr, "warmup_num_steps": 2}}
        if self.exclude:
            config["ds_quant"]["optimizer"]["exclude"] = self.exclude
        return config


EIGHT, FOUR = {"bits": 8}, {"bits": 4}
MIXED = {"exp_avg_fast": FOUR, "exp_avg_slow": EIGHT, "exp_avg_sq": EIGHT}


def job(optimizer, states, stage, dtype="fp32", **options):
    return OptimizerJob(stage, dtype, optimizer=optimizer, states=states, **options)


CASES = {
    "0 Lion": job(LION, {"exp_avg": EIGHT}, 0),
    "1 Lion bf16 exclude": job(LION, {"exp_avg": EIGHT}, 1, "bf16", exclude=EXCLUDED),
    "2 Lion 4 bits offload": job(LION, {"exp_avg": FOUR}, 2, offload=True),
    "3 Lion": job(LION, {"exp_avg": EIGHT}, 3),
    "0 SGD bf16 4 bits": job(SGD, {"momentum_buffer": FOUR}, 0, "bf16"),
    "1 SGD": job(SGD, {"momentum_buffer": EIGHT}, 1),
    "2 SGD bf16 exclude": job(SGD, {"momentum_buffer": EIGHT}, 2, "bf16", exclude=EXCLUDED),
    "3 SGD 4 bits offload": job(SGD, {"momentum_buffer": FOUR}, 3, offload=True),
    "0 AdEMAMix": job(MIX, {"exp_avg_fast": EIGHT, "exp_avg_slow": EIGHT, "exp_avg_sq": EIGHT}, 0),
    "1 AdEMAMix bf16": job(MIX, MIXED, 1, "bf16"),
    "2 AdEMAMix offload exclude": job(MIX, MIXED, 2, offload=True, exclude=EXCLUDED),
    "3 AdEMAMix": job(MIX, MIXED, 3),
}
CONVERTED = {"1 SGD": FOUR, "3 Lion": FOUR, "0 SGD bf16 4 bits": EIGHT}
"""Checkpoints that go on with other bits."""


def save(folder):
    def run(name, job):
        engine = job.start()
        report = {"losses": train(engine, 0, TRAINED)} | observe(engine)
        report["safe_get"] = safe_get(engine) if job.stage else None
        engine.save_checkpoint(f"{folder}/{name}")
        report["more"] = train(engine, TRAINED, TRAINED + MORE)
        report["digest_after"] = digest(engine)
        dist.barrier()
        if name in ("1 Lion bf16 exclude", "1 SGD", "1 AdEMAMix bf16") and dist.get_rank() == 0:
            report["converter"] = stock_converter(f"{folder}/{name}", job.stage)
        dist.barrier()
        engine.destroy()
        return report

    return each(CASES, run)


def stock_converter(folder, stage):
    """How DeepSpeed's converter to universal checkpoints fails."""
    try:
        to_universal(folder, TRAINED, stage)
    except KeyError as error:
        return str(error)
    return None


def resume(folder):
    def run(name, job):
        engine = job.start()
        engine.load_checkpoint(f"{folder}/{name}")
        report = observe(engine)
        if job.stage:
            report["safe_get"] = safe_get(engine)
            saved = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/{name}", lazy_mode=False)
            report["zero_to_fp32"] = sorted(saved)
        if not job.offload and job.stage in (1, 2):
            report["offloading"] = refusal(lambda: engine.offload_states(include=[OffloadStateTypeEnum.optim_states]))
            engine.reload_states()
        report["more"] = train(engine, TRAINED, TRAINED + MORE)
        report["digest_after"] = digest(engine)
        engine.destroy()
        return report

    found = each(CASES, run)
    for name, stored in CONVERTED.items():
        was = CASES[name]
        engine = job(was.optimizer, dict.fromkeys(was.states, stored), was.stage, was.dtype).start()
        engine.load_checkpoint(f"{folder}/{name}")
        found[f"{name} converted"] = observe(engine) | {"more": train(engine, TRAINED, TRAINED + MORE)}
        engine.destroy()
    universal = job(LION, {"exp_avg": EIGHT}, 1, universal=True)
    found["universal"] = refusal(universal.start)
    found["stock"] = stock_refusal()
    return found


def stock_refusal():
    """What DeepSpeed says by itself of an optimizer that only ds_quant has."""
    plain = Job(1, recipe="plain")
    try:
        plain.start(config=plain.config(dist.get_world_size()) | {"optimizer": MIX})
    except AssertionError as error:
        return str(error)
    return None


if __name__ == "__main__":
    output, folder, verb = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    deepspeed.init_distributed()
    write_json(output, {"save": save, "resume": resume}[verb](folder))
    finish()
