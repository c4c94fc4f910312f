"""Which checkpoint to resume from, and whether it is whole: said before training, not after minutes of loading."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from pretraining.errors import LaunchError

_NAME = re.compile(r"checkpoint-(\d+)")


def resolve(argument: str | None, output_dir: str, *, world_size: int, config: dict[str, Any]) -> str | None:
    """The folder to resume from, checked; None for a fresh start. `last` is the newest whole checkpoint."""
    if argument is None or argument.lower() == "false":
        return None
    if argument.lower() not in ("last", "true"):
        problem = defect(Path(argument))
        if problem is not None:
            other = newest_whole(Path(argument).parent)
            remedy = f"The newest whole one is {other}." if other else "Start afresh, without --resume_from_checkpoint."
            raise LaunchError(f"Cannot resume from {argument}: {problem}. {remedy}")
        chosen = Path(argument)
    else:
        found = newest_whole(Path(output_dir))
        if found is None:
            seen = listed(Path(output_dir))
            why = f"{seen[-1]}: {defect(seen[-1])}" if seen else "there is none"
            raise LaunchError(
                f"--resume_from_checkpoint {argument}: {output_dir} holds no whole checkpoint ({why}). "
                "Check --output_dir, name the checkpoint's folder, or start afresh without this flag."
            )
        chosen = found
    _check_world_size(chosen, world_size, config)
    return str(chosen)


def listed(output_dir: Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, oldest step first."""
    if not output_dir.is_dir():
        return []
    numbered = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint that nothing is missing from: one cut short by a kill is passed over."""
    return next((path for path in reversed(listed(output_dir)) if defect(path) is None), None)


def defect(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None if it is whole."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    state = checkpoint / "trainer_state.json"
    if not state.is_file() or state.stat().st_size == 0:
        # The Trainer writes it last.
        return "it has no trainer_state.json, so that it was cut short while it was written, or is no checkpoint"
    latest = checkpoint / "latest"
    if not latest.is_file():
        return "it has no file `latest`, so that it is no DeepSpeed checkpoint or was cut short"
    states = checkpoint / latest.read_text().strip()
    files = sorted(states.glob("*.pt")) if states.is_dir() else []
    if not any("model_states" in file.name for file in files):
        return f"its folder {states.name} with the model states is missing or empty"
    ranks = _optimizer_ranks(states)
    if ranks and ranks != list(range(max(ranks) + 1)):
        missing = min(set(range(max(ranks) + 1)) - set(ranks))
        return f"the optimizer states of rank {missing} are missing in {states.name}"
    for file in [*files, *sorted(checkpoint.glob("*.pth"))]:
        # torch.save writes a zip archive, whose table of contents comes last.
        if not zipfile.is_zipfile(file):
            return f"{file.relative_to(checkpoint)} was cut short ({file.stat().st_size} bytes, no end of archive)"
    return None


def refuse_mixing(output_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise where a fresh start would run into the checkpoints of an earlier run."""
    old = listed(output_dir)
    if old and not resume and not overwrite:
        raise LaunchError(
            f"{output_dir} holds checkpoints of an earlier run (the last: {old[-1].name}). "
            "Go on with --resume_from_checkpoint last, start over with --overwrite_output_dir, or give another "
            "--output_dir."
        )


def clear(output_dir: Path) -> None:
    """Remove what an earlier run left, and nothing else. For one process only."""
    for folder in [*listed(output_dir), output_dir / "model"]:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("metrics.csv", "summary.json", "curves.png"):
        (output_dir / name).unlink(missing_ok=True)


def _optimizer_ranks(states: Path) -> list[int]:
    # [bf16_]zero_pp_rank_3_mp_rank_00_optim_states.pt; at stage 0 there are none.
    matches = [re.search(r"zero_pp_rank_(\d+)_", file.name) for file in states.glob("*_optim_states.pt")]
    return sorted(int(match[1]) for match in matches if match)


def _check_world_size(checkpoint: Path, world_size: int, config: dict[str, Any]) -> None:
    if config.get("checkpoint", {}).get("load_universal") or config.get("zero_optimization", {}).get(
        "elastic_checkpoint"
    ):
        return
    states = checkpoint / (checkpoint / "latest").read_text().strip()
    saved = len(_optimizer_ranks(states))
    if not saved:
        return
    if saved != world_size:
        raise LaunchError(
            f"The checkpoint {checkpoint} was saved by {saved} processes, this run has {world_size}; DeepSpeed cannot "
            f"share its optimizer states out again. Resume with {saved} processes, or convert it with "
            "`python -m deepspeed.checkpoint.ds_to_universal` and set "
            '"checkpoint": {"load_universal": true} in the JSON.'
        )
