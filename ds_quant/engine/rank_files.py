"""Tensors of each rank in checkpoints: one safetensors file a rank, beside DeepSpeed's own."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.base.log import warn
from ds_quant.base.whole_folder import whole_file
from ds_quant.comm.agreement import raise_together

FORMAT = "1"


class Kind(NamedTuple):
    """What the files hold."""

    stem: str
    """The part of the files' names that tells kinds apart."""
    content: str
    without: str
    """What a resumed run does without them, for messages."""

    def file(self, folder: str | Path, rank: int) -> Path:
        return Path(folder) / f"ds_quant_{self.stem}_rank_{rank:05d}.safetensors"

    @property
    def fix(self) -> str:
        return f"copy the checkpoint again, or delete its files ds_quant_{self.stem}_* to go on without"


RESIDUALS = Kind("residuals", "residuals of error feedback", "error feedback starts from zero")
REPLICAS = Kind("replicas", "replicas of the weights", "ranks begin with whole weights")


def save_tensors(engine: Any, folder: Path, kind: Kind, tensors: dict[str, Tensor]) -> None:
    """Write this rank's file into the folder of a checkpoint, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = kind.file(folder, dist.get_rank())
    metadata = {"format": FORMAT, "world_size": str(dist.get_world_size()), "step": str(engine.global_steps)}
    with whole_file(path) as beside:
        save_file(tensors, beside, metadata)


def read_tensors(engine: Any, load_dir: str, tag: str | None, kind: Kind) -> dict[str, Any]:
    """The tensors of this rank; none where the checkpoint has none for this number of ranks. All ranks call it.

    Raises ConfigError on all ranks for a file that is broken, missing among others, or of another step.
    """
    if engine.load_universal_checkpoint():
        warn(f"universal checkpoints hold no {kind.content}: {kind.without}")
        return {}
    if tag is None:
        latest = Path(load_dir) / "latest"
        tag = latest.read_text().strip() if latest.is_file() else ""  # DeepSpeed's own warning says that there is none
    folder, world_size = os.path.join(load_dir, str(tag)), dist.get_world_size()
    path = kind.file(folder, dist.get_rank())
    tensors: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    raise_together(lambda: _read_file(path, kind, tensors, metadata), engine.device)
    # Ranks of other nodes may have folders of their own: each looks at its own file, and all judge together.
    everywhere: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everywhere, (str(path), metadata))
    sizes = sorted({found["world_size"] for _, found in everywhere if found})
    if not sizes:
        if tag:
            warn(f"{folder} holds no {kind.content}: {kind.without}")
        return {}
    if sizes != [str(world_size)]:
        warn(f"{folder} is of {' and '.join(sizes)} ranks: {kind.without}")
        return {}
    missing = [name for name, found in everywhere if not found]
    if missing:
        raise fail(", ".join(missing), "no such file", "one for each rank", kind.fix)
    steps = {found["step"]: name for name, found in everywhere}
    if len(steps) > 1:
        got = f"{kind.stem} of the steps {', '.join(steps)}"
        raise fail(", ".join(steps.values()), got, "files of one checkpoint", kind.fix)
    return tensors


def _read_file(path: Path, kind: Kind, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Fill in what a file holds; nothing where there is none."""
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            metadata |= {"world_size": found.get("world_size", "unknown"), "step": found.get("step", "unknown")}
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not iterable itself)
    except (SafetensorError, OSError) as error:
        raise fail(str(path), f"a file that cannot be read ({error})", "a whole one", kind.fix) from error
