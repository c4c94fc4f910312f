"""The Hugging Face Trainer, extended for pre-training."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DummyOptim
from corpora.loading import ExactLoading
from survival.guard import Guard
from survival.saving import CheckpointSaver
from torch import nn
from torch.utils.data import RandomSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pretraining import trainer_seams

_PROGRESS = "progress_rank{}.json"


class _FirstStep(TrainerCallback):
    """Tells a trainer its first step, because older Trainers do not store it."""

    def __init__(self, trainer: PretrainTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.first_step = state.global_step


class PretrainTrainer(ExactLoading):
    """Decays only matrices, also with the optimizer of the DeepSpeed JSON; measures evaluation time; saves models that
    generate with their cache.

    If they are set, `saver` writes the checkpoints and `guard` sees every loss.
    """

    first_step = 0
    """The step at which this process started; above 0 if it resumed."""
    seconds_evaluating = 0.0
    saver: CheckpointSaver | None = None
    guard: Guard | None = None
    _part: Path | None = None

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        trainer_seams.check()
        # For training, the Trainer turns off the cache of keys and values in the model's configuration.
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(model, *args, **kwargs)
        self.add_callback(_FirstStep(self))

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """As in Trainer, with the parameters of DeepSpeed's own optimizer split into two groups."""
        optimizer = super().create_optimizer(model)
        if isinstance(optimizer, DummyOptim):
            # The Trainer gives DeepSpeed one flat list, so "weight_decay" would also apply to biases and norms.
            named = self.model if model is None else model
            optimizer.params = decay_groups(named, set(self.get_decay_parameter_names(named)))
        return optimizer

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in Trainer, without `dataloader_drop_last`, which is for training and would drop a small evaluation."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Trainer; the guard sees the loss."""
        loss = super().training_step(*args, **kwargs)
        if self.guard is not None:
            self.guard.observe(loss, self.deepspeed)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer, with the time measured."""
        begin = time.monotonic()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.seconds_evaluating += time.monotonic() - begin

    def restore_progress(self, checkpoint: Path) -> None:
        """Restore the losses since the last log, so that the next logged mean equals the uninterrupted run's."""
        found = sorted(checkpoint.glob(_PROGRESS.format("*")))
        if not found:
            return
        # From another number of ranks: take the mean, because the mean over ranks is what is logged.
        own = checkpoint / _PROGRESS.format(self.args.process_index)
        same = len(found) == self.args.world_size and own in found
        parts = [json.loads(path.read_text()) for path in ([own] if same else found)]
        self._tr_loss = torch.tensor(
            sum(part["loss_sum"] for part in parts) / len(parts), dtype=torch.float32, device=self.args.device
        )
        self._globalstep_last_logged = parts[0]["last_logged_step"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As in Trainer, but an epoch ends with its last whole global batch, the same for any number of ranks."""
        sampler = super()._get_train_sampler(train_dataset)
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        if type(sampler) is not RandomSampler or len(sampler) < size:
            return sampler
        return RandomSampler(sampler.data_source, num_samples=len(sampler) // size * size)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, which would take one step too many from a checkpoint of the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, but config.json has the model's own `use_cache`, because saved models are for generation."""
        config = getattr(self.model, "config", None)
        if self._use_cache is None or config is None:
            super()._save(*args, **kwargs)
            return
        while_training, config.use_cache = config.use_cache, self._use_cache
        try:
            super()._save(*args, **kwargs)
        finally:
            config.use_cache = while_training

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._part is None else str(self._part)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in Trainer, but into a temporary folder, which becomes the checkpoint when it is complete."""
        if self.saver is None:
            super()._save_checkpoint(model, trial)
            return
        best = self.state.best_global_step
        self.saver.save(
            self.state.global_step,
            lambda part: self._write_checkpoint(part, model, trial),
            keep=f"checkpoint-{best}" if best else None,
        )

    def _write_checkpoint(self, part: Path, model: nn.Module, trial: Any) -> None:
        # The Trainer puts `checkpoint-N` below the folder that `_get_output_dir` returns.
        self._part = part.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._part = None
        own = part / _PROGRESS.format(self.args.process_index)
        own.write_text(
            json.dumps({"loss_sum": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}) + "\n"
        )
        self._name_best(part)

    def _name_best(self, part: Path) -> None:
        """Set the best checkpoint's path, which the Trainer looked for next to the unfinished one."""
        if not self.state.best_global_step:
            return
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        there = best.name == part.name or best.is_dir()
        self.state.best_model_checkpoint = str(best) if there else None
        if self.args.should_save:
            self.state.save_to_json(str(part / "trainer_state.json"))


class RestoreProgress(TrainerCallback):
    """Calls `restore_progress` after the Trainer has reset its own counters."""

    def __init__(self, trainer: PretrainTrainer, checkpoint: Path) -> None:
        self._trainer = trainer
        self._checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.restore_progress(self._checkpoint)


def decay_groups(model: nn.Module, decayed: set[str]) -> list[dict[str, Any]]:
    """Two parameter groups: `decayed` names with the optimizer's own weight decay, the rest without weight decay."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if name in decayed]},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    # DeepSpeed makes a flat buffer of each group and fails on an empty one.
    return [group for group in groups if group["params"]]


def last_eval_loss(log_history: list[dict[str, Any]], step: int) -> float | None:
    """The validation loss at `step`, if it was measured."""
    losses = [entry["eval_loss"] for entry in log_history if entry.get("step") == step and "eval_loss" in entry]
    return float(losses[-1]) if losses else None
