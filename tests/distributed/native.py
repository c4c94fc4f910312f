"""A native DeepSpeed loop through ds_quant.initialize, for each (stage, dtype) given.

    deepspeed native.py OUTPUT CONFIG STAGE:DTYPE ...

The model has LAYERS of the environment, or 2. DTYPE is fp32, bf16, autocast (fp32 parameters, bf16 products) or offload
(fp32, moments on the CPU). For each: train STEPS steps of two micro batches, save, train on; then load what was saved
into a fresh engine and train those last steps again.
"""

import gc
import os
import sys
import tempfile

import deepspeed
import torch
from common import batch, leave, say, tiny_llama_config, write_report
from deepspeed import comm as dist
from transformers import LlamaForCausalLM

import ds_quant
from ds_quant.linear.convert import coverage, step_key_of

STEPS, ROWS, ACCUMULATION, LR = 3, 2, 2, 1e-2


def build(path, stage, dtype, world_size):
    config = ds_quant.resolve_auto(
        path,
        world_size=world_size,
        train_micro_batch_size_per_gpu=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
        gradient_clipping=1.0,
        bf16=dtype == "bf16",
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        warmup_num_steps=2,
        total_num_steps=100,
    )
    config["zero_optimization"]["stage"] = stage
    if dtype == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if dtype == "offload":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(num_hidden_layers=int(os.environ.get("LAYERS", 2))))
    if stage == 3:
        # Partition a model whose weights are those of the other stages, in the dtype that DeepSpeed then keeps.
        model = model.bfloat16() if dtype == "bf16" else model
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    torch.manual_seed(100 + dist.get_rank())  # as many scripts do, for dropout
    engine, *_ = ds_quant.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def train(engine, first, last, rank, world_size):
    losses = []
    for step in range(first, last):
        for micro in range(ACCUMULATION):
            data = batch(step * ACCUMULATION + micro, ROWS * world_size)[rank::world_size]
            loss = engine(input_ids=data, labels=data).loss
            engine.backward(loss)
            engine.step()
            total = loss.detach().float().clone()
            dist.all_reduce(total)
            losses.append(total.item() / world_size)
    return losses


def main(output, path, *cases):
    ds_quant.enable()  # for deepspeed.zero.Init, which parses the config too
    deepspeed.init_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    report = {}
    for case in cases:
        stage, dtype = case.split(":")
        say(f"rank {rank}: {case}")
        engine = build(path, int(stage), dtype, world_size)
        losses = train(engine, 0, STEPS, rank, world_size)
        folders = [tempfile.mkdtemp() if rank == 0 else None]
        torch.distributed.broadcast_object_list(folders)
        engine.save_checkpoint(folders[0])
        undisturbed = train(engine, STEPS, STEPS + 2, rank, world_size)
        found = coverage(engine.module)
        key = step_key_of(engine.module)
        keys = [None] * world_size
        torch.distributed.all_gather_object(keys, key and [key.seed, key.rank])
        resumed_engine = build(path, int(stage), dtype, world_size)
        resumed_engine.load_checkpoint(folders[0])
        resumed = train(resumed_engine, STEPS, STEPS + 2, rank, world_size)
        report[case] = {
            "losses": losses,
            "undisturbed": undisturbed,
            "resumed": resumed,
            "converted": found.converted,
            "share": found.share,
            "optimizer": type(engine.optimizer).__name__,
            "key": key and [key.step, key.micro_step],
            "keys": keys,
        }
        del engine, resumed_engine
        gc.collect()
    write_report(output, report)
    leave()


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
