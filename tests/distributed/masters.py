"""Train with masters of 24 and 16 bits, save, and go on: from a checkpoint, from and to fp32 masters.

masters.py OUTPUT FOLDER
"""

import sys

import torch
from common import batch, leave, say, tiny_llama_config, to_universal, write_reports
from deepspeed import comm as dist
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

import ds_quant
from ds_quant.config import ConfigError
from ds_quant.engine.memory_parts import memory_parts
from ds_quant.planning.job import Job, run_job
from ds_quant.planning.ledger import ROLES, Ledger, plain

CASES = {f"{stage} {bits}": (stage, bits) for stage in (1, 2, 3) for bits in (24, 16)}
STEPS = 3
MOMENTS = (8, 4)
"""Bits of the moments in jobs whose memory is measured."""
BUCKET = 4096
NAME = "model.layers.0.mlp.up_proj.weight"


def start(stage, bits, folder=None, universal=False):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config())
    optimizer = {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}}
    if bits != 32:
        optimizer["master"] = {"bits": bits}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage, "ds_quant_required": True},
        "checkpoint": {"load_universal": universal},
        "ds_quant": {"optimizer": optimizer},
    }
    engine = ds_quant.initialize(model=model, config=config)[0]
    if folder:
        engine.load_checkpoint(folder, **({"tag": "universal"} if universal else {}))
    return engine


def train(engine, first, last):
    losses = []
    for index in range(2 * first, 2 * last):
        ids = batch(2 * index + dist.get_rank(), 2)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def masters(engine):
    return {name: safe_get_full_fp32_param(param) for name, param in engine.module.named_parameters()}


def largest_error(first, second):
    """Against the larger of a number and 2^-126: of one that has been cut to some bits."""
    return max(
        ((first[name] - second[name]).abs() / first[name].abs().clamp(min=2.0**-126)).max().item() for name in first
    )


def own_bytes(engine):
    """Bytes of the masters of this rank, weights apart; and whether those are the model's."""
    parts = memory_parts(engine)
    weights = {tensor.untyped_storage().data_ptr() for tensor in parts["weights"]}
    stored = [part for master in parts["masters"] for part in plain(master)]
    beside = [part for part in stored if part.untyped_storage().data_ptr() not in weights]
    numel = sum(master.numel() for master in parts["masters"])
    return sum(part.nbytes for part in beside) / numel, len(stored) - len(beside) == len(parts["masters"])


def set_and_get(engine):
    """What comes back of a value that has 24 bits, and of its neighbours."""
    params = dict(engine.module.named_parameters())
    before = masters(engine)
    value = torch.full_like(before[NAME], 1 + 2.0**-15)
    safe_set_full_fp32_param(params[NAME], value)
    after = masters(engine)
    others = all(torch.equal(before[name], after[name]) for name in before if name != NAME)
    return (after[NAME] - 1).abs().max().item(), others


def run(case, folder):
    stage, bits = CASES[case]
    engine = start(stage, bits)
    report = {"losses": train(engine, 0, STEPS)}
    engine.save_checkpoint(folder)
    saved = masters(engine)
    report["bytes"], report["shares"] = own_bytes(engine)
    report["dtypes"] = sorted({str(value.dtype) for value in saved.values()})
    report["low bits"] = any(not torch.equal(value, value.bfloat16().float()) for value in saved.values())
    report["more"] = train(engine, STEPS, 2 * STEPS)
    after = masters(engine)
    refused = ""
    try:
        engine.offload_states(include=[OffloadStateTypeEnum.hp_params])
    except ConfigError as error:
        refused = str(error)
    report["offloading"] = refused
    dist.barrier()
    if dist.get_rank() == 0:
        fp32 = get_fp32_state_dict_from_zero_checkpoint(folder, lazy_mode=False)
        report["zero_to_fp32"] = all(torch.equal(fp32[name], saved[name]) for name in saved)
        to_universal(folder, STEPS, stage)
    dist.barrier()

    engine = start(stage, bits, folder)
    report["loaded"] = all(torch.equal(value, saved[name]) for name, value in masters(engine).items())
    report["resumed"] = train(engine, STEPS, 2 * STEPS)
    report["equal"] = all(torch.equal(value, after[name]) for name, value in masters(engine).items())
    report["set"], report["others"] = set_and_get(engine)

    engine = start(stage, bits, folder, universal=True)
    report["universal"] = all(torch.equal(value, saved[name]) for name, value in masters(engine).items())
    report["universal more"] = train(engine, STEPS, 2 * STEPS)

    engine = start(stage, 32, folder)
    report["to fp32"] = all(torch.equal(value, saved[name]) for name, value in masters(engine).items())
    engine = start(stage, 32)
    report["fp32 losses"] = train(engine, 0, STEPS)
    engine.save_checkpoint(f"{folder}-fp32")
    of_fp32 = masters(engine)
    engine = start(stage, bits, f"{folder}-fp32")
    report["from fp32"] = largest_error(of_fp32, masters(engine))
    return report


def memory_job(moment_bits, world_size, rank):
    """Of many weights, so that no single one is much of the model."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 2, "ds_quant_required": True, "reduce_bucket_size": BUCKET},
        "ds_quant": {
            "optimizer": {
                "master": {"bits": 24},
                "exp_avg": {"bits": moment_bits},
                "exp_avg_sq": {"bits": moment_bits},
            }
        },
    }
    model = {**tiny_llama_config(num_hidden_layers=8).to_dict(), "model_type": "llama"}
    return Job(config, model, 1, 8, world_size, rank)


def measured(moment_bits):
    """Bytes at the peak of a whole step, of all but activations; and the largest weight's elements."""
    job = memory_job(moment_bits, dist.get_world_size(), dist.get_rank())
    ledger = Ledger()
    with ledger:
        outcome = run_job(job, ledger)
    peak = ledger.peak("begin", "end", [role for role in ROLES if role != "activations"])
    return {
        "parameters": outcome.num_parameters,
        "bytes": peak.bytes,
        "parts": peak.parts,
        "phase": peak.phase,
        "all bytes": outcome.peak_bytes,
    }


def main(output, folder):
    reports = {}
    for case in CASES:
        say(f"rank {dist.get_rank() if dist.is_initialized() else '?'}: {case}")
        reports[case] = run(case, f"{folder}/{case.replace(' ', '-')}")
    reports["memory"] = {str(bits): measured(bits) for bits in MOMENTS}
    write_reports(output, reports)
    leave()


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
