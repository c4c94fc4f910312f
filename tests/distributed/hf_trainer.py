"""A plain Hugging Face Trainer job that knows nothing of ds_quant, for each (stage, dtype) given.

    deepspeed --module ds_quant hf_trainer.py OUTPUT CONFIG STAGE:DTYPE ...
    accelerate launch --config_file YAML -m ds_quant hf_trainer.py OUTPUT CONFIG STAGE:DTYPE ...

Several cases in one process, to import everything once; the state of accelerate is reset between them. Under accelerate
launch the config comes through the environment variable that its YAML sets, else through the Trainer's own argument.
"""

import json
import os
import sys
import tempfile

import torch
from common import batch, run_cases, tiny_llama_config
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


class Tokens(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        row = batch(index, 1)[0]
        return {"input_ids": row, "labels": row}


def run(path, stage, dtype):
    with open(path) as file:
        config = json.load(file)
    config["zero_optimization"]["stage"] = stage
    folder = tempfile.mkdtemp()
    by_accelerate = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if by_accelerate:
        chosen = os.path.join(folder, "ds.json")
        with open(chosen, "w") as file:
            json.dump(config, file)
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = chosen
    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=None if by_accelerate else config,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        warmup_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=dtype == "bf16",
        seed=1,
        disable_tqdm=True,
        ddp_timeout=400,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_llama_config())
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
    trainer.train()
    engine = trainer.deepspeed
    quantized = [n for n, m in engine.module.named_modules() if type(m).__name__ == "QuantLinear"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    section = getattr(trainer.model.config, "ds_quant", None)
    return {
        "losses": losses,
        "converted": quantized,
        "stage": engine.zero_optimization_stage(),
        "dtype": str(next(engine.module.parameters()).dtype),
        "section": section,
        "world_size": arguments.world_size,
    }


if __name__ == "__main__":
    run_cases(run, sys.argv[1:])
