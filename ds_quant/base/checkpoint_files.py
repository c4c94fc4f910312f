"""Check that the files of a checkpoint exist and are complete, and read them, before anything is loaded."""

import importlib
import os
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ds_quant.base.errors import ConfigError, fail, problem

TRUSTED = (
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "ds_quant.moment.rebuild_moment",
    "ds_quant.optim.state.rebuild_moment",
)
"""Classes in DeepSpeed's files, besides those that torch trusts, that only hold values and run no code when made."""


def check_files(paths: Iterable[str]) -> None:
    """Raise ConfigError naming each file, as torch.save writes them, that is missing or cut short.

    Only the directory at a file's end is read: a file that was cut lacks it.
    """
    lines = []
    for path in paths:
        if not os.path.isfile(path):
            fix = f"load another tag; if the number of ranks has changed, {universal_fix(path)}"
            lines.append(problem(path, "no such file", "the moments of this rank", fix))
        elif not zipfile.is_zipfile(path):
            got = f"a file of {os.path.getsize(path)} bytes that is truncated or was not written by torch.save"
            lines.append(problem(path, got, "a whole file", "load another tag, or copy the checkpoint again"))
    if lines:
        raise ConfigError("\n".join(lines))


def universal_command(path: str) -> str:
    """The shell line that makes a universal checkpoint of the one that DeepSpeed's file `path` is part of, beside it.

    load_checkpoint without a tag, as Hugging Face's Trainer calls it, finds it by the file latest_universal.
    """
    states = os.path.dirname(os.path.abspath(path))
    universal = f"{states}_universal"
    pointer = os.path.join(os.path.dirname(states), "latest_universal")
    command = ["python", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", states, "--output_folder", universal]
    return f"{shlex.join(command)} && echo {shlex.quote(os.path.basename(universal))} > {shlex.quote(pointer)}"


def universal_fix(path: str) -> str:
    return f'run `{universal_command(path)}` and load that with "checkpoint": {{"load_universal": true}}'


def to_universal(states: Path, out: Path) -> str | None:
    """Convert a folder of DeepSpeed's files to its universal format. Returns the error in one line, or None."""
    command = [
        *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
        *("--input_folder", str(states), "--output_folder", str(out)),
        *("--num_extract_workers", "1", "--num_merge_workers", "1"),
    ]
    # A process of its own must not take itself for a rank of this job.
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in ranks}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0 and (out / "zero").is_dir():
        return None
    return (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]


def read_checkpoint_file(path: str, *, mmap: bool = False) -> Any:
    """Load a file of torch.save to the CPU without running code that it names (weights_only).

    mmap: leave the tensors on the disk.

    Raises:
        ConfigError: the file is broken, or names anything besides tensors, plain values and TRUSTED.
    """
    import torch  # not needed to look for files

    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        unknown = sorted(set(named) - set(TRUSTED) - _trusted_by_user())
        if not unknown:
            trusted: list[Any] = [(_find(name), name) for name in named if name in TRUSTED]
            with torch.serialization.safe_globals(trusted):
                return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:
        raise fail(path, f"a file that torch cannot load ({error})", "a whole file", "copy it again") from error
    got = f"a pickle that names {', '.join(unknown)}"
    allowed = f"tensors, plain values, and {', '.join(TRUSTED)}: anything else could run code"
    fix = (
        "load a checkpoint from a source that you trust; where you trust this one, call "
        "torch.serialization.add_safe_globals with these names first"
    )
    raise ConfigError(f"{path}: got {got}; allowed: {allowed}; fix: {fix}")


def _trusted_by_user() -> set[str]:
    import torch

    trusted = (item[0] if isinstance(item, tuple) else item for item in torch.serialization.get_safe_globals())
    return {f"{item.__module__}.{item.__qualname__}" for item in trusted if hasattr(item, "__qualname__")}


def _find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
