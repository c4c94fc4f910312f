"""Train a causal language model in a loop around accelerate, after its example deepspeed_with_config_support.py.

accelerate launch --config_file YAML accelerate_loop.py --model_name_or_path FOLDER --data_folder FOLDER

AdamW is the script's own, or DummyOptim and DummyScheduler where the DeepSpeed config has an optimizer.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DummyOptim, DummyScheduler, set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, get_scheduler


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--data_folder", required=True)
    parser.add_argument("--block_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path)
    size = arguments.block_size

    def blocks(rows):
        ids = [token for text in rows["text"] for token in tokenizer(text)["input_ids"]]
        rows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        return {"input_ids": rows, "labels": rows}

    with accelerator.main_process_first():
        data = load_dataset(arguments.data_folder, split="train")
        data = data.map(blocks, batched=True, remove_columns=data.column_names)
    loader = DataLoader(data, batch_size=arguments.batch_size, shuffle=True, collate_fn=default_data_collator)

    decayed = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01}
    others = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    plugin = accelerator.state.deepspeed_plugin
    in_config = plugin.deepspeed_config if plugin is not None else {}
    make = DummyOptim if "optimizer" in in_config else torch.optim.AdamW
    optimizer = make([decayed, others], lr=arguments.learning_rate)
    num_steps = arguments.steps * accelerator.num_processes
    if "scheduler" in in_config:
        scheduler = DummyScheduler(optimizer, total_num_steps=num_steps, warmup_num_steps=2)
    else:
        scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=num_steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    batches = iter(loader)
    for step in range(arguments.steps):
        loss = model(**next(batches)).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {accelerator.gather(loss.detach()).mean().item():.6f}")
    accelerator.print(f"{accelerator.num_processes} processes, {type(optimizer.optimizer).__name__}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
