"""Hugging Face's Trainer with weights gathered as codes: what it saves, and how it goes on.

    weights_trainer.py OUTPUT CONFIG CONFIG ...

Reported are of each CONFIG the losses, digests of the models that were saved, and whether rank 0 alone was refused.
"""

import gc
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch
from accelerate.state import AcceleratorState
from common import leave, tiny_llama_config, write_report
from hf_trainer import Tokens
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import ds_quant


class Saving(TrainerCallback):
    """Rank 0 saves the model by itself after the first step."""

    def __init__(self, folder):
        self.folder, self.error = folder, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1 and torch.distributed.get_rank() == 0:
            try:
                getattr(model, "module", model).save_pretrained(self.folder)
            except RuntimeError as error:
                self.error = str(error)


def trainer_of(config, folder):
    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=config,
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        warmup_steps=1,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        use_cpu=True,
        bf16=True,
        seed=1,
        disable_tqdm=True,
        ddp_timeout=400,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_llama_config())
    return Trainer(model=model, args=arguments, train_dataset=Tokens())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def forget():
    AcceleratorState._reset_state(reset_partial_state=False)
    gc.collect()


def run(path):
    config = json.loads(Path(path).read_text())
    folders = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(folders)
    folder = Path(folders[0])
    trainer = trainer_of(config, str(folder))
    saving = Saving(folder / "refused")
    trainer.add_callback(saving)
    trainer.train()
    trainer.save_model(str(folder / "end"))
    trained = losses(trainer)
    forget()
    again = trainer_of(config, str(folder))
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    resumed = losses(again)
    forget()
    torch.distributed.barrier()
    saved = {
        name: hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest()
        for name in ("checkpoint-2", "checkpoint-4", "end")
    }
    return {"losses": trained, "resumed": resumed, "saved": saved, "refused": saving.error}


def main():
    output, *paths = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    ds_quant.enable()
    deepspeed.init_distributed()
    write_report(output, {Path(path).stem: run(path) for path in paths})
    leave()


if __name__ == "__main__":
    main()
