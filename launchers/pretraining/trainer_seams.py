"""Lists the methods and attributes of the Hugging Face Trainer that the launcher overrides or reads, and checks them.

They are not part of the Trainer's interface. If a release moved one, training would otherwise continue with incomplete
checkpoints or logs that miss steps.
"""

from __future__ import annotations

from types import FunctionType

import transformers
from survival.errors import LaunchError
from transformers import Trainer

OVERRIDDEN = {
    "create_optimizer": "decays matrices only",
    "get_eval_dataloader": "keeps the last batch of an evaluation",
    "get_train_dataloader": "reads shards and streams",
    "training_step": "shows every loss to the guard",
    "_get_train_sampler": "ends an epoch with its last whole global batch",
    "_run_epoch": "takes no step after the last one",
    "_save": "saves the model's own use_cache",
    "_get_output_dir": "points at the unfinished checkpoint",
    "_save_checkpoint": "makes a checkpoint whole before it has its name",
    "_save_rng_state": "saves the position in the text",
}
"""Methods, and what the launcher changes in them."""

READ = {
    "_tr_loss": "the losses since the last log",
    "_globalstep_last_logged": "the step of the last log",
}
"""Attributes that the Trainer sets during training, and what they contain."""


def check(trainer: type = Trainer) -> None:
    """Raise LaunchError if a method is missing, or an attribute that no method names."""
    functions = [value for kind in trainer.__mro__ for value in vars(kind).values() if isinstance(value, FunctionType)]
    named = {name for function in functions for name in function.__code__.co_names}
    missing = [name for name in OVERRIDDEN if not hasattr(trainer, name)]
    missing += [name for name in READ if name not in named]
    if missing:
        raise LaunchError(
            f"transformers {transformers.__version__}: the Trainer has no {', '.join(missing)} any more, which the "
            "launcher needs; allowed: the versions in pyproject.toml; fix: install one of them"
        )
