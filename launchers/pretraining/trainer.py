"""The Hugging Face Trainer with what pre-training needs and it does not do by itself."""

from __future__ import annotations

import time
from typing import Any

from accelerate.utils import DummyOptim
from torch import nn
from transformers import Trainer


class PretrainTrainer(Trainer):
    """Decays matrices only, also with the optimizer of the DeepSpeed JSON; knows how long evaluation took."""

    seconds_evaluating = 0.0

    @property
    def first_step(self) -> int:
        """The step that this process began at: above 0 where it resumed."""
        return int(getattr(self, "_initial_global_step", 0))

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """As in Trainer; the parameters of DeepSpeed's own optimizer are split in two groups."""
        optimizer = super().create_optimizer(model)
        if isinstance(optimizer, DummyOptim):
            # The Trainer hands DeepSpeed one flat list, so that its "weight_decay" would fall on biases and norms.
            named = self.model if model is None else model
            optimizer.params = decay_groups(named, set(self.get_decay_parameter_names(named)))
        return optimizer

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in Trainer, without `dataloader_drop_last`: that is for training, and would drop a small evaluation."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer, with the time added up."""
        begin = time.monotonic()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.seconds_evaluating += time.monotonic() - begin


def decay_groups(model: nn.Module, decayed: set[str]) -> list[dict[str, Any]]:
    """Two parameter groups: `decayed` names with the optimizer's own weight decay, the rest without any."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if name in decayed]},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    # DeepSpeed makes a flat buffer of each group and stumbles over an empty one.
    return [group for group in groups if group["params"]]


def last_eval_loss(log_history: list[dict[str, Any]], step: int) -> float | None:
    """The validation loss at `step`, if it was measured."""
    losses = [entry["eval_loss"] for entry in log_history if entry.get("step") == step and "eval_loss" in entry]
    return float(losses[-1]) if losses else None
