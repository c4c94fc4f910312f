"""Resumes with another number of ranks: same global batch, optimizer states through the universal format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ds_quant.base import manifest, trainer_checkpoints
from ds_quant.base.checkpoint_files import to_universal
from ds_quant.base.whole_folder import replace_folder, sync_tree, write_whole
from survival import batches
from survival.errors import LaunchError
from survival.lease import Lease


def needs_universal(checkpoint: Path, world_size: int, config: dict[str, Any]) -> bool:
    """Whether DeepSpeed can load this checkpoint's optimizer states only in its universal format."""
    if config.get("checkpoint", {}).get("load_universal") or config.get("zero_optimization", {}).get(
        "elastic_checkpoint"
    ):
        return False
    # At stage 0 there are no per-rank states: every rank holds all.
    saved = len(trainer_checkpoints.optimizer_ranks(checkpoint))
    return saved not in (0, world_size)


def keep_global_batch(
    values: dict[str, Any], checkpoint: Path, *, explicit: frozenset[str], fixed: frozenset[str], world_size: int
) -> str | None:
    """Divide the checkpoint's global batch over this number of ranks, in place.

    Returns a line for the user; None if nothing changes.

    Args:
        values: the flags, with `global_batch_size` as it would be without the checkpoint.
        checkpoint: the checkpoint that the run resumes from.
        explicit: names of the flags that the user gave.
        fixed: names of the flags whose value the DeepSpeed JSON fixes.
        world_size: of this run.

    Raises LaunchError if the user asked for another global batch, or it cannot be divided.
    """
    found = manifest.read(checkpoint) or {}
    total = found.get("global_batch_size")
    if total is None or total == values["global_batch_size"]:
        return None
    if "global_batch_size" in explicit | fixed:
        raise LaunchError(
            f"The checkpoint {checkpoint} was trained with a global batch of {total} sequences, this run has "
            f"{values['global_batch_size']}. Its schedule and its data order belong to that size: give "
            f"--global_batch_size {total}, or start afresh in another --output_dir."
        )
    per_device = "per_device_train_batch_size"
    values["global_batch_size"] = total
    # The requested size per device is an upper limit here, because memory is limited; accumulation is adjusted.
    kept = fixed & {per_device, "gradient_accumulation_steps"}
    batches.resolve(values, explicit=kept | {"global_batch_size"}, world_size=world_size)
    return (
        f"The global batch stays {total} sequences, as {checkpoint.name} was trained: {world_size} ranks times "
        f"{values[per_device]} times {values['gradient_accumulation_steps']} accumulation steps."
    )


def make_universal(checkpoint: Path, lease: Lease) -> None:
    """Add the optimizer states in DeepSpeed's universal format to a checkpoint. Call it in one process; may be slow.

    Raises LaunchError if DeepSpeed cannot convert it.
    """
    states = trainer_checkpoints.states_of(checkpoint)
    universal = states.with_name(f"{states.name}_universal")
    pointer = checkpoint / "latest_universal"
    if pointer.is_file() and pointer.read_text().strip() == universal.name and universal.is_dir():
        return
    part = lease.writing / universal.name
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(exist_ok=True)
    if (said := to_universal(states, part)) is not None:
        shutil.rmtree(part, ignore_errors=True)
        ranks = len(trainer_checkpoints.optimizer_ranks(checkpoint))
        raise LaunchError(
            f"{checkpoint} was saved by {ranks} ranks, and DeepSpeed could not "
            f"convert it for another number: {said}. Resume with as many ranks as saved it."
        )
    sync_tree(part)  # takes long, and the lease may be lost meanwhile
    lease.check()
    replace_folder(part, universal)
    write_whole(pointer, universal.name)
