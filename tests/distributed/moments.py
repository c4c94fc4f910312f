"""Train with quantized moments in every mode of DeepSpeed and save; then, started again, load and go on.

deepspeed moments.py OUTPUT FOLDER save|resume
"""

import sys

import deepspeed
import torch
from common import to_universal
from deepspeed import comm as dist
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from moment_jobs import (
    EXCLUDED,
    MORE,
    TRAINED,
    Job,
    digest,
    each,
    finish,
    gathered,
    observe,
    refusal,
    safe_get,
    train,
    whole_moments,
    wider,
    write_json,
)

from ds_quant.optim import MOMENTS

CASES = {
    "0 fp32": Job(0),
    "0 fp32 exclude": Job(0, exclude=EXCLUDED),
    "0 bf16": Job(0, "bf16", "m4v8"),
    "1 fp32": Job(1),
    "1 bf16 exclude": Job(1, "bf16", exclude=EXCLUDED),
    "1 fp32 adam4 exclude": Job(1, recipe="adam4", exclude=EXCLUDED),
    "1 bf16 with fp32 accumulation": Job(1, "bf16", fp32_accumulation=True),
    "1 bf16 with fp32 accumulation exclude": Job(1, "bf16", "m4v8", fp32_accumulation=True, exclude=EXCLUDED),
    "1 fp32 offload": Job(1, recipe="m4v8", offload=True),
    "2 fp32": Job(2),
    "2 bf16": Job(2, "bf16", "adam4"),
    "2 bf16 offload": Job(2, "bf16", offload=True, exclude=EXCLUDED),
    "3 fp32": Job(3),
    "3 fp32 exclude": Job(3, recipe="m4v8", exclude=EXCLUDED),
    "3 bf16": Job(3, "bf16", "adam4"),
    "3 bf16 offload": Job(3, "bf16", offload=True),
}
PLAIN = {f"{stage} plain": Job(stage, recipe="plain") for stage in (0, 1, 3)}
OTHER = {"1 wider": Job(1, model=wider), "3 wider": Job(3, model=wider)}
UNIVERSAL = ("1 fp32", "3 fp32", "1 plain", "3 plain")
"""Converted within the program; "2 fp32" is converted by the command."""
OFFLOADED = ("1 fp32", "1 bf16 exclude", "2 fp32", "2 bf16")
"""Cases whose states are offloaded and reloaded before they go on."""


def safe_set(engine):
    """{parameter: how far its moment is from what was set, against the largest value}, and for its neighbours."""
    errors = {}
    for name in MOMENTS:
        for key, param in engine.module.named_parameters():
            if key not in ("inner.weight", "embedding.weight"):
                continue
            others = whole_moments(engine, name)
            generator = torch.Generator().manual_seed(len(key))
            value = torch.rand(others[key].shape, generator=generator) + 0.1
            safe_set_full_optimizer_state(param, value, name)
            now = whole_moments(engine, name)
            got = safe_get_full_optimizer_state(param, name)
            elsewhere = max((now[other] - others[other]).abs().max().item() for other in others if other != key)
            errors[f"{key} {name}"] = [(got - value).abs().max().item(), elsewhere]
    return errors


def partitioned(job):
    return job.stage > 0


def save(folder):
    def run(name, job):
        engine = job.start()
        report = {"losses": train(engine, 0, TRAINED)}
        if name in CASES:
            report |= observe(engine)
            report["state_bytes"] = gathered(engine.basic_optimizer.state_bytes())
            report["safe_get"] = safe_get(engine) if partitioned(job) else None
        engine.save_checkpoint(f"{folder}/{name}")
        report["more"] = train(engine, TRAINED, TRAINED + MORE)
        report["digest_after"] = digest(engine)
        engine.save_checkpoint(f"{folder}/{name}", tag="later", save_latest=False)
        if name in CASES and partitioned(job):
            report["safe_set"] = safe_set(engine)
        dist.barrier()
        if dist.get_rank() == 0 and name in UNIVERSAL:
            to_universal(f"{folder}/{name}", TRAINED, job.stage)
        dist.barrier()
        engine.destroy()
        return report

    return each(CASES | PLAIN | OTHER, run)


def resume(folder):
    def run(name, job):
        engine = job.start()
        engine.load_checkpoint(f"{folder}/{name}")
        report = observe(engine)
        if partitioned(job):
            report["safe_get"] = safe_get(engine)
        if partitioned(job) and not job.fp32_accumulation:  # DeepSpeed's tool takes no file of BF16_Optimizer
            saved = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/{name}", lazy_mode=False)
            weights = {key: safe_get_full_fp32_param(param) for key, param in engine.module.named_parameters()}
            report["zero_to_fp32"] = [key for key in weights if torch.equal(weights[key], saved[key])]
        if name in OFFLOADED:
            engine.offload_states()
            engine.reload_states()
            report["safe_get after reload"] = safe_get(engine)
        if job.stage == 3 and not job.offload:
            report["refusal"] = refusal(lambda: engine.offload_states())
            engine.offload_states(include=[OffloadStateTypeEnum.lp_params])
            engine.reload_states()
        report["more"] = train(engine, TRAINED, TRAINED + MORE)
        report["digest_after"] = digest(engine)
        engine.destroy()
        return report

    return each(CASES, run)


if __name__ == "__main__":
    output, folder, verb = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    deepspeed.init_distributed()
    write_json(output, {"save": save, "resume": resume}[verb](folder))
    finish()
