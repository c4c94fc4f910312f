"""Adam's moments in a checkpoint of DeepSpeed, one whole parameter after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_quant.base import trainer_checkpoints
from ds_quant.base.checkpoint_files import read_checkpoint_file, to_universal
from ds_quant.base.errors import ConfigError
from ds_quant.cli.shared.errors import CommandError

_ALLOWED = "a checkpoint-N of the Trainer, or a run that has one"


def checkpoint_of(given: str) -> Path:
    """The checkpoint-N that is meant: `given` itself, or the newest whole one of a run.

    Raises:
        CommandError: there is none, it is broken, or it has no optimizer states.
    """
    folder = Path(given)
    if trainer_checkpoints.listed(folder):
        newest = trainer_checkpoints.newest_whole(folder)
        folder = trainer_checkpoints.listed(folder)[-1] if newest is None else newest
    if folder.is_dir() and not (folder / "latest").is_file():
        raise CommandError(
            f"{given}: got a folder without optimizer states; allowed: {_ALLOWED}; the final model has none, name a "
            "checkpoint of its training"
        )
    if problem := trainer_checkpoints.defect(folder):
        raise CommandError(f"{folder}: got a broken checkpoint: {problem}; allowed: {_ALLOWED}; name another")
    try:
        trainer_checkpoints.step_of(folder)
    except ValueError as error:
        raise CommandError(f"{given}: got another name; allowed: {_ALLOWED}; rename it so") from error
    return folder


def stored_moments(checkpoint: Path, moment: str) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, fp32 moment of its shape) for each parameter. Files of ZeRO are converted by DeepSpeed itself.

    moment: "exp_avg" or "exp_avg_sq".

    Raises:
        CommandError: the checkpoint has no such moments, or DeepSpeed cannot read them, or a file would run code.
    """
    states = trainer_checkpoints.states_of(checkpoint)
    for path in sorted(states.rglob("*.pt")):
        _read(path)  # DeepSpeed's conversion would run the code in them
    if not trainer_checkpoints.optimizer_ranks(checkpoint):
        yield from _replicated(checkpoint, states, moment)
        return
    with tempfile.TemporaryDirectory(prefix="ds_quant_moments_") as scratch:
        universal = Path(scratch) / "universal"
        said = to_universal(states, universal)
        if said is not None:
            raise CommandError(
                f"{states}: got states that DeepSpeed cannot put together ({said}); allowed: those of all ranks of one "
                "save; copy the checkpoint again, or name another"
            )
        found = sorted((universal / "zero").glob(f"*/{moment}.pt"))
        if not found:
            _refuse(states, moment)
        for path in found:
            saved = _read(path)
            yield path.parent.name, (saved["param"] if isinstance(saved, dict) else saved).float()


def _replicated(checkpoint: Path, states: Path, moment: str) -> Iterator[tuple[str, Tensor]]:
    """Of stage 0, where each rank has all: the states stand beside the weights, by number."""
    saved: Any = {}
    if files := sorted(states.glob("*model_states.pt")):
        saved = _read(files[0]).get("optimizer") or {}
        saved = saved.get("optimizer_state_dict", saved)
    there = False
    for number, state in sorted(saved.get("state", {}).items()):
        if moment in state:
            there = True
            yield f"parameter {number}", state[moment].float()
    if not there:
        _refuse(states, moment)


def _read(path: Path) -> Any:
    try:
        return read_checkpoint_file(str(path), mmap=True)
    except ConfigError as error:
        raise CommandError(str(error)) from error


def _refuse(states: Path, moment: str) -> None:
    raise CommandError(
        f"{states}: got no {moment}; allowed: a checkpoint of Adam, AdamW or QuantAdamW with its optimizer states; "
        "name another"
    )
