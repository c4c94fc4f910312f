"""The folders checkpoint-N that Hugging Face's Trainer writes with DeepSpeed, and whether they are whole."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from ds_quant.base import manifest
from ds_quant.base.errors import fail

_NAME = re.compile(r"checkpoint-(\d+)")


def listed(output_dir: Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, oldest step first."""
    if not output_dir.is_dir():
        return []
    return sorted((path for path in output_dir.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name. Raises ConfigError for another name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise fail(str(checkpoint), checkpoint.name, "a folder named checkpoint-N", "name a checkpoint of the Trainer")
    return int(match[1])


def newest_whole(output_dir: Path, *, contents: bool = False, say: Callable[[str], None] = print) -> Path | None:
    """The newest valid checkpoint of this program; `say` is called for each one that is skipped."""
    for path in reversed(listed(output_dir)):
        problem = defect(path, contents=contents, ours=True)
        if problem is None:
            return path
        say(f"Passing over {path}: {problem}.")
    return None


def defect(checkpoint: Path, *, contents: bool = False, ours: bool = False) -> str | None:
    """What is wrong with a checkpoint folder; None if it is complete.

    Args:
        contents: whether to read every byte and compare it with the manifest.
        ours: whether a folder without a manifest is broken; otherwise it is checked for the Trainer's own files.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        found = manifest.read(checkpoint)
    except ValueError as error:
        return str(error)
    if found is None and ours:
        return f"it has no {manifest.NAME}, so that it was cut short or is of another program"
    if found is not None:
        problem = manifest.defect_of_sizes(checkpoint, found["files"])
        if problem is None and contents:
            problem = manifest.defect_of_contents(checkpoint, found["files"])
        if problem is not None:
            return problem
    return _defect_of_structure(checkpoint)


def _defect_of_structure(checkpoint: Path) -> str | None:
    state = checkpoint / "trainer_state.json"
    if not state.is_file() or state.stat().st_size == 0:
        # The Trainer writes it last.
        return "it has no trainer_state.json, so that it was cut short while it was written, or is no checkpoint"
    latest = checkpoint / "latest"
    if not latest.is_file():
        return "it has no file `latest`, so that it is no DeepSpeed checkpoint or was cut short"
    states = states_of(checkpoint)
    files = sorted(states.glob("*.pt")) if states.is_dir() else []
    if not any("model_states" in file.name for file in files):
        return f"its folder {states.name} with the model states is missing or empty"
    ranks = optimizer_ranks(checkpoint)
    if ranks and ranks != list(range(max(ranks) + 1)):
        missing = min(set(range(max(ranks) + 1)) - set(ranks))
        return f"the optimizer states of rank {missing} are missing in {states.name}"
    for file in [*files, *sorted(checkpoint.glob("*.pth"))]:
        # torch.save writes a zip archive, whose table of contents comes last.
        if not zipfile.is_zipfile(file):
            return f"{file.relative_to(checkpoint)} was cut short ({file.stat().st_size} bytes, no end of archive)"
    return None


def states_of(checkpoint: Path) -> Path:
    """The folder of DeepSpeed's own files in a checkpoint."""
    return checkpoint / (checkpoint / "latest").read_text().strip()


def optimizer_ranks(checkpoint: Path) -> list[int]:
    """The ranks whose optimizer states a checkpoint holds in files of their own; none at stage 0."""
    # [bf16_]zero_pp_rank_3_mp_rank_00_optim_states.pt
    names = [file.name for file in states_of(checkpoint).glob("*_optim_states.pt")]
    return sorted(int(match[1]) for name in names if (match := re.search(r"zero_pp_rank_(\d+)_", name)))
