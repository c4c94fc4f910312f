"""A loop of one's own around accelerate, for each (stage, dtype) given.

accelerate launch --config_file YAML raw_accelerate.py OUTPUT CONFIG STAGE:DTYPE ...
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, InitProcessGroupKwargs
from common import batch, run_cases, tiny_llama_config
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import ds_quant

ds_quant.enable()


def run(path, stage, dtype):
    # What accelerate does not know how to fill is resolved first.
    config = ds_quant.resolve_auto(path, betas=(0.9, 0.95), gradient_clipping=1.0, bf16=dtype == "bf16")
    config["zero_optimization"]["stage"] = stage
    # Without an accelerator, accelerate 1.15 takes each rank for the only one unless it is told the backend.
    handlers = [] if torch.accelerator.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=handlers)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_llama_config())
    data = DataLoader([batch(index, 1)[0] for index in range(16)], batch_size=2)
    optimizer = DummyOptim(model.parameters(), lr=1e-2, weight_decay=0.0)
    # accelerate divides the number of steps by the number of processes.
    scheduler = DummyScheduler(optimizer, total_num_steps=8, warmup_num_steps=2)
    model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
    losses = []
    for rows in data:
        with accelerator.accumulate(model):
            loss = model(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().float()[None]).mean().item())
    engine = accelerator.deepspeed_engine_wrapped.engine
    return {
        "losses": losses,
        "converted": list(ds_quant.coverage(engine.module).converted),
        "stage": engine.zero_optimization_stage(),
        "dtype": str(next(engine.module.parameters()).dtype),
        "world_size": accelerator.num_processes,
    }


if __name__ == "__main__":
    run_cases(run, sys.argv[1:])
