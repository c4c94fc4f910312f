"""Weights after a step whose gradients crossed the wire stochastically rounded, for two seeds and one of them again.

wire_seed.py OUTPUT
"""

import sys

import torch
from common import batch, leave, tiny_llama_config, write_reports
from deepspeed import comm as dist

import ds_quant

SEEDS = (1, 2, 1)


def weights(seed):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config())
    torch.manual_seed(seed)  # of the run: the model is the same for all
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},  # shows the gradients
        "zero_optimization": {"stage": 1, "ds_quant_required": True},
        "zero_allow_untested_optimizer": True,
        "ds_quant": {"communication": {"gradient": {"bits": 4, "rounding": "stochastic"}}},
    }
    engine = ds_quant.initialize(model=model, config=config)[0]
    ids = batch(dist.get_rank(), 2)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return [parameter.detach().double().sum().item() for parameter in engine.module.parameters()]


if __name__ == "__main__":
    (output,) = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    write_reports(output, [weights(seed) for seed in SEEDS])
    leave()
