"""Each way into DeepSpeed with the file that `ds_quant_report --for` writes for it, unedited; one rank, no launcher.

python -m ds_quant ways_in.py OUTPUT FOLDER
"""

import gc
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, InitProcessGroupKwargs
from common import batch, tiny_llama_config, write_report
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

ROWS = [{"input_ids": batch(index, 1)[0], "labels": batch(index, 1)[0]} for index in range(4)]


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(num_hidden_layers=1))


def native(path):
    net = model()
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=path)
    for row in ROWS[:2]:
        engine.backward(engine(**{key: value[None] for key, value in row.items()}).loss)
        engine.step()
    return engine


def accelerate(path, dummy=False):
    handlers = [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=str(path)), kwargs_handlers=handlers)
    net = model()
    optimizer = DummyOptim(net.parameters(), lr=1e-2) if dummy else torch.optim.AdamW(net.parameters(), lr=1e-2)
    prepared = [net, optimizer, DataLoader(ROWS, batch_size=2)]
    if dummy:
        prepared.append(DummyScheduler(optimizer, total_num_steps=4, warmup_num_steps=1))
    net, optimizer, data, *_ = accelerator.prepare(*prepared)
    for row in data:
        accelerator.backward(net(**row).loss)
        optimizer.step()
        optimizer.zero_grad()
    engine = accelerator.deepspeed_engine_wrapped.engine
    AcceleratorState._reset_state(reset_partial_state=False)
    return engine


def trainer(path):
    # transformers 5.17 would hand 0 warm-up steps to DeepSpeed, which wants 1 or more since 0.19.6.
    counts = {"max_steps": 2, "warmup_steps": 1}
    arguments = TrainingArguments(
        path.parent, deepspeed=str(path), use_cpu=True, report_to="none", save_strategy="no", **counts
    )
    job = Trainer(model=model(), args=arguments, train_dataset=ROWS)
    job.train()
    return job.deepspeed


def main(output, folder):
    report = {}
    ways = {
        "native": native,
        "accelerate": accelerate,
        "accelerate-dummy": lambda path: accelerate(path, dummy=True),
        "trainer": trainer,
    }
    for name, run in ways.items():
        engine = run(Path(folder) / f"{name}.json")
        report[name] = {
            "linears": sum(type(module).__name__ == "QuantLinear" for module in engine.module.modules()),
            "optimizer": type(engine.basic_optimizer).__name__,
            "steps": engine.global_steps,
            "world_size": engine.world_size,
        }
        del engine
        gc.collect()
    write_report(output, report)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
