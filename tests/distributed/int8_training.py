"""Engines whose layers multiply in int8, and the steps that they train."""

import deepspeed
import torch
from common import digest, forward, tiny_llama_config
from deepspeed import comm as dist
from transformers import LlamaForCausalLM

import ds_quant
from ds_quant.linear import QuantizedModule

STAGE3 = ["3:fp32", "3:bf16"]
ROWS, ACCUMULATION, LR = 5, 2, 1e-2
"""ROWS of 16 tokens: 80 of them, so that no activation has the shape or the size of a weight."""
STEPS, EARLY = 4, 2
"""Steps without an edit; those before the checkpoint."""


def config_of(path, stage, dtype):
    config = ds_quant.resolve_auto(
        path,
        world_size=dist.get_world_size(),
        train_micro_batch_size_per_gpu=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
        gradient_clipping=1.0,
        bf16=dtype in ("bf16", "bf16_fp32"),
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        warmup_num_steps=2,
        total_num_steps=100,
    )
    del config["scheduler"]  # its first steps would leave the weights as they are
    config["ds_quant"]["linear"]["backend"] = "int8"
    # At stage 3, no layer's weights but its own: none is small enough to stay, or gathered before its turn.
    config["zero_optimization"] |= {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    }
    if dtype == "bf16_fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype == "offload":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def build(path, case, reentrant=None):
    """A new engine. `reentrant`: that of gradient checkpointing, or None for none of it."""
    stage, dtype = case.split(":")
    config = config_of(path, int(stage), dtype)
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config())
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if int(stage) == 3:
        model = model.bfloat16() if dtype == "bf16" else model
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    engine, *_ = ds_quant.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def quantized_layers(engine):
    return [module for module in engine.module.modules() if isinstance(module, QuantizedModule)]


def weights_digest(engine):
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        return digest(parameters)


def micro_batch(engine, index, factor=1.0):
    loss = forward(engine, index, ROWS)
    engine.backward(loss * factor)
    engine.step()
    return loss.item()


def train(engine, first, last):
    """The loss of every micro batch and the weights after every step."""
    losses, weights = [], []
    for step in range(first, last):
        losses += [micro_batch(engine, step * ACCUMULATION + micro) for micro in range(ACCUMULATION)]
        weights.append(weights_digest(engine))
    return {"losses": losses, "weights": weights}
