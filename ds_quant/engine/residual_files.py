"""Residuals of error feedback in checkpoints: one safetensors file a rank, beside DeepSpeed's own."""

import os
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ds_quant.base.errors import fail
from ds_quant.base.log import warn
from ds_quant.base.whole_folder import whole_file
from ds_quant.comm.agreement import raise_together

FORMAT = "1"
_FIX = "copy the checkpoint again, or delete its files ds_quant_residuals_* to start from zero residuals"


def _file(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"ds_quant_residuals_rank_{rank:05d}.safetensors"


def save_residuals(engine: Any, folder: Path) -> None:
    """Write this rank's file into the folder of a checkpoint, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _file(folder, dist.get_rank())
    metadata = {"format": FORMAT, "world_size": str(dist.get_world_size()), "step": str(engine.global_steps)}
    with whole_file(path) as beside:
        save_file(engine.ds_quant_gradients.feedback.state_dict(), beside, metadata)


def read_residuals(engine: Any, load_dir: str, tag: str | None) -> dict[str, Any]:
    """The residuals of this rank; none where the checkpoint has none for this number of ranks. All ranks call it.

    Raises ConfigError on all ranks for a file that is broken, missing among others, or of another step.
    """
    if engine.load_universal_checkpoint():
        warn("universal checkpoints hold no residuals of error feedback: it starts from zero")
        return {}
    if tag is None:
        latest = Path(load_dir) / "latest"
        tag = latest.read_text().strip() if latest.is_file() else ""  # DeepSpeed's own warning says that there is none
    folder, world_size = os.path.join(load_dir, str(tag)), dist.get_world_size()
    path = _file(folder, dist.get_rank())
    residuals: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    raise_together(lambda: _read_file(path, residuals, metadata), engine.device)
    # Ranks of other nodes may have folders of their own: each looks at its own file, and all judge together.
    everywhere: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everywhere, (str(path), metadata))
    sizes = sorted({found["world_size"] for _, found in everywhere if found})
    if not sizes:
        if tag:
            warn(f"{folder} holds no residuals of error feedback: it starts from zero")
        return {}
    if sizes != [str(world_size)]:
        warn(f"{folder} is of {' and '.join(sizes)} ranks: error feedback starts from zero")
        return {}
    missing = [name for name, found in everywhere if not found]
    if missing:
        raise fail(", ".join(missing), "no such file", "one for each rank", _FIX)
    steps = {found["step"]: name for name, found in everywhere}
    if len(steps) > 1:
        got = f"residuals of the steps {', '.join(steps)}"
        raise fail(", ".join(steps.values()), got, "files of one checkpoint", _FIX)
    return residuals


def _read_file(path: Path, residuals: dict[str, Any], metadata: dict[str, str]) -> None:
    """Fill in what a file holds; nothing where there is none."""
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            metadata |= {"world_size": found.get("world_size", "unknown"), "step": found.get("step", "unknown")}
            residuals |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not iterable itself)
    except (SafetensorError, OSError) as error:
        raise fail(str(path), f"a file that cannot be read ({error})", "a whole one", _FIX) from error
