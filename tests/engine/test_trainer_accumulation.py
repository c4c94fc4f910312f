"""Hugging Face's Trainer draws the random bits of a native loop over the same micro batches, whose DeepSpeed counts
other micro steps, and resumes in the middle bit for bit."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import ds_quant

STEPS, MIDDLE, ACCUMULATION, ROWS, SIZE = 4, 2, 3, 4, 8
CONFIG = {
    "train_micro_batch_size_per_gpu": ROWS,
    "gradient_accumulation_steps": ACCUMULATION,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0, "torch_adam": True}},
    "zero_optimization": {"stage": 1, "ds_quant_required": True},
    "ds_quant": {
        "linear": {"weight": {"bits": 8}, "gradient": {"bits": 4, "rounding": "stochastic"}, "exclude": []},
        "optimizer": {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}},
    },
}


@pytest.fixture(autouse=True)
def _job(single_rank):
    yield
    ds_quant.disable()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(SIZE, 16), nn.GELU(), nn.Linear(16, SIZE))
        self.micro_steps = []

    def forward(self, x):
        if self.training:
            self.micro_steps.append(self.layers[0].step_key.micro_step)
        return {"loss": (self.layers(x) - x).square().mean()}


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def rows():
    return torch.randn(STEPS * ACCUMULATION * ROWS, SIZE, generator=torch.Generator().manual_seed(1))


def native():
    model = Model()
    engine, *_ = ds_quant.initialize(model=model, model_parameters=model.parameters(), config=copy.deepcopy(CONFIG))
    for x in rows().split(ROWS):
        engine.backward(engine(x)["loss"])
        engine.step()
    return model


def by_trainer(folder, resume=None):
    model = Model()
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=copy.deepcopy(CONFIG),
        use_cpu=True,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        seed=0,  # of the native loop
        max_steps=STEPS,
        save_steps=MIDDLE,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=[{"x": x} for x in rows()])
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_the_trainer_draws_the_bits_of_a_native_loop_and_resumes(tmp_path):
    want = native()
    ds_quant.enable()
    whole = by_trainer(tmp_path / "whole")
    resumed = by_trainer(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{MIDDLE}"))
    assert whole.micro_steps == want.micro_steps == list(range(ACCUMULATION)) * STEPS
    for other in (whole, resumed):
        for a, b in zip(other.parameters(), want.parameters(), strict=True):
            assert torch.equal(a, b)
