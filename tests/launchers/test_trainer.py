"""What the trainer does beyond Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corpora.loading import ExactLoading
from pretraining import trainer_seams
from pretraining.trainer import PretrainTrainer
from survival.errors import LaunchError
from torch.utils.data import Dataset
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class Numbers(Dataset[dict[str, torch.Tensor]]):
    """Nineteen sequences, each of its own number."""

    def __len__(self) -> int:
        return 19

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([index])}


def epochs(tmp_path: Path, per_device: int, accumulation: int) -> list[list[int]]:
    """The sequences of two epochs, in the order of training."""
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        report_to="none",
        data_seed=42,
    )
    trainer = PretrainTrainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=Numbers())
    loader = trainer.get_train_dataloader()
    found = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found.append([int(number) for batch in loader for number in batch["input_ids"]])
    return found


@pytest.mark.usefixtures("single_rank")
def test_epochs_are_the_same_however_the_global_batch_is_cut(tmp_path: Path) -> None:
    whole = epochs(tmp_path, 4, 1)
    assert [len(set(epoch)) for epoch in whole] == [16, 16], "four whole batches of four"
    assert whole[0] != whole[1]
    assert epochs(tmp_path, 2, 2) == whole
    assert epochs(tmp_path, 1, 4) == whole


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_saved_has_the_models_own_cache(tmp_path: Path, use_cache: bool) -> None:
    """Hugging Face's Trainer writes `"use_cache": false` into every checkpoint."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8, use_cache=use_cache))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = PretrainTrainer(model=model, args=args, train_dataset=Numbers())
    trainer.save_model(str(tmp_path / "model"))
    assert AutoConfig.from_pretrained(tmp_path / "model").use_cache is use_cache
    assert model.config.use_cache is False, "training needs none"


@pytest.mark.usefixtures("single_rank")
def test_the_trainer_knows_the_step_that_it_began_at(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = PretrainTrainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=Numbers())
    assert trainer.first_step == 0
    trainer.state.global_step = 7
    trainer.callback_handler.on_train_begin(args, trainer.state, trainer.control)
    assert trainer.first_step == 7


def test_every_method_that_is_overridden_is_in_the_table() -> None:
    own = {name for kind in (PretrainTrainer, ExactLoading) for name, value in vars(kind).items() if callable(value)}
    overridden = {name for name in own if hasattr(Trainer, name)} - {"__init__", "train", "evaluate"}
    assert overridden == set(trainer_seams.OVERRIDDEN)


def test_a_trainer_that_has_moved_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer_seams.check()
    monkeypatch.delattr(Trainer, "_run_epoch")
    with pytest.raises(LaunchError, match=r"the Trainer has no _run_epoch any more.*; fix: install one of them"):
        PretrainTrainer(model=torch.nn.Linear(1, 1))
    monkeypatch.undo()
    monkeypatch.setitem(trainer_seams.READ, "_running_loss", "a name that no method has")
    with pytest.raises(LaunchError, match="the Trainer has no _running_loss any more"):
        trainer_seams.check()
