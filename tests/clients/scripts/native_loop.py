"""Train a causal language model in a loop of DeepSpeed's own, after its getting-started page.

deepspeed native_loop.py --deepspeed --deepspeed_config FILE --model FOLDER --data_folder FOLDER --checkpoints FOLDER

Half of the steps, a checkpoint, the other half; then the checkpoint is loaded and the other half done again.
"""

import argparse
import json
import os

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_folder", required=True)
    parser.add_argument("--checkpoints", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser = deepspeed.add_config_arguments(parser)
    arguments = parser.parse_args()

    deepspeed.init_distributed()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with open(os.path.join(arguments.data_folder, "train.jsonl")) as file:
        ids = [token for line in file for token in tokenizer(json.loads(line)["text"])["input_ids"]]
    rows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())

    def step(number):
        size = engine.train_micro_batch_size_per_gpu()
        for _ in range(engine.gradient_accumulation_steps()):
            first = (number * engine.dp_world_size + engine.global_rank) * size
            batch = rows[torch.arange(first, first + size) % len(rows)]
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            engine.step()
        total = loss.detach().clone()
        deepspeed.comm.all_reduce(total)
        return total.item() / engine.dp_world_size

    def say(text):
        if engine.global_rank == 0:
            print(text, flush=True)

    middle = arguments.steps // 2
    for number in range(middle):
        say(f"step {number}: loss {step(number):.6f}")
    engine.save_checkpoint(arguments.checkpoints)
    for number in range(middle, arguments.steps):
        say(f"step {number}: loss {step(number):.6f}")
    engine.load_checkpoint(arguments.checkpoints)
    for number in range(middle, arguments.steps):
        say(f"again {number}: loss {step(number):.6f}")
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
