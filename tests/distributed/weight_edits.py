"""Edits of weights whose codes layers multiply as they came, and the same where layers quantize them anew each time.

    deepspeed weight_edits.py OUTPUT CASE ...

A CASE is STAGE:KEPT:REENTRANT: whether ranks keep weights from step to step (stage 3), and the kind of gradient
checkpointing, or `none`.
"""

import gc
import sys
from unittest import mock

import deepspeed
import torch
from common import batch, digest, leave, remove, say, shared_folder, tiny_llama_config, write_reports
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from int8_edits import EDITS, probe
from int8_training import ACCUMULATION, EARLY, ROWS, micro_batch
from transformers import LlamaForCausalLM

import ds_quant
from ds_quant.engine.multiplied_weights import MultipliedWeights

PARTED = ("load_checkpoint", "safe_set_full_fp32_param", "GatheredParameters")
"""Edits of weights that are not there, but in partitions."""


def build(case):
    stage, kept, reentrant = case.split(":")
    quantized = {
        "linear": {"weight": {"bits": 8}, "activation": {"bits": 8}, "backend": "int8"},
        "communication": {"weight": {"mode": "codes"}},
    }
    quantized["linear"]["gradient"] = {"bits": 8, "rounding": "stochastic"}
    zero = {"stage": int(stage)}
    if kept == "parted":
        names = ("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_max_reuse_distance")
        zero |= dict.fromkeys(names, 0)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": zero,
        "ds_quant": quantized,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config())
    if reentrant != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant == "true"})
    engine, *_ = ds_quant.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def train(engine, first, last):
    """Losses of micro batches, gradients and masters of steps."""
    found = []
    for step in range(first, last):
        for micro in range(ACCUMULATION):
            if micro == ACCUMULATION - 1:
                data = batch(step, ROWS)
                loss = engine(input_ids=data, labels=data).loss
                engine.backward(loss)
                found.append([loss.item(), digest(safe_get_full_grad(p) for p in engine.module.parameters())])
                engine.step()
            else:
                found.append(micro_batch(engine, step * ACCUMULATION + micro))
        found.append(digest(safe_get_full_fp32_param(parameter) for parameter in engine.module.parameters()))
    return found


def run(case):
    engine = build(case)
    parted = "parted" in case
    start = {"folder": shared_folder()}
    report = {"early": train(engine, 0, EARLY)}
    engine.save_checkpoint(start["folder"])
    if not parted:
        engine.gather_weights()
        start["module"] = {name: value.clone() for name, value in engine.module.state_dict().items()}
    for number, name in enumerate(PARTED if parted else EDITS):
        index = 100 + 10 * number
        found = train(engine, index, index + 1)
        if name != "load_checkpoint":  # all else comes between two micro batches of a step
            found.append(micro_batch(engine, 2 * index))
        found += [EDITS[name](engine, start), probe(engine)]
        if name != "load_checkpoint":
            found.append(micro_batch(engine, 2 * index + 1))
        report[name] = found
    report["last"] = train(engine, EARLY, EARLY + 1)
    remove(start["folder"])
    layers = [module for module in engine.module.modules() if isinstance(module, ds_quant.linear.QuantizedModule)]
    report["held"] = sum(layer._weight_codes._codes is not None for layer in layers)
    engine.destroy()
    return report


def main():
    output, *cases = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    deepspeed.init_distributed()
    report = {}
    for case in cases:
        say(f"rank {dist.get_rank()}: {case}")
        handed = []
        hand_over = MultipliedWeights.hand_over

        def counted(self, parameter, *codes, handed=handed, hand_over=hand_over):
            handed.append(id(parameter))
            hand_over(self, parameter, *codes)

        with mock.patch.object(MultipliedWeights, "hand_over", counted):
            report[case] = {"reused": run(case), "handed over": len(handed)}
        with mock.patch.object(MultipliedWeights, "is_wanted", return_value=False):
            report[case]["quantized"] = run(case)
        gc.collect()
    write_reports(output, report)
    leave()


if __name__ == "__main__":
    main()
