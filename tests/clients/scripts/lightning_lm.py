"""Train a causal language model with Lightning's Trainer and DeepSpeedStrategy.

lightning_lm.py --model FOLDER --data_folder FOLDER --deepspeed_config FILE --output FOLDER

Lightning lets DeepSpeed run on CUDA accelerators alone. Without one, the script calls the CPU by that name.
"""

import argparse
import json
import os

import lightning
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


class CPUByThatName(CUDAAccelerator):
    def setup_device(self, device):
        pass

    def setup(self, trainer):
        pass

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("cpu", index) for index in range(devices)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    def get_device_stats(self, device):
        return {}


class LanguageModel(lightning.LightningModule):
    def __init__(self, path):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(path)

    def training_step(self, rows, index):
        loss = self.model(input_ids=rows, labels=rows).loss
        self.print(f"step {index}: loss {loss.item():.6f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_folder", required=True)
    parser.add_argument("--deepspeed_config", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ranks", type=int, default=1)
    arguments = parser.parse_args()
    lightning.seed_everything(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with open(os.path.join(arguments.data_folder, "train.jsonl")) as file:
        ids = [token for line in file for token in tokenizer(json.loads(line)["text"])["input_ids"]]
    rows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    on_cuda = torch.cuda.is_available()
    trainer = lightning.Trainer(
        accelerator="cuda" if on_cuda else CPUByThatName(),
        devices=arguments.ranks,
        strategy=DeepSpeedStrategy(
            config=arguments.deepspeed_config, process_group_backend=None if on_cuda else "gloo"
        ),
        max_steps=arguments.steps,
        default_root_dir=arguments.output,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(LanguageModel(arguments.model), DataLoader(rows, batch_size=8, shuffle=True))
    trainer.save_checkpoint(os.path.join(arguments.output, "last"))


if __name__ == "__main__":
    main()
