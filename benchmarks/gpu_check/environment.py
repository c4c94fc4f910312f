"""Where an acceptance runs: device, driver, versions, date, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ds_quant.base.commit import commit

PACKAGES = tuple("ds_quant torch triton transformers deepspeed accelerate torchao bitsandbytes numpy".split())


def found(*, dry_run: bool) -> dict[str, Any]:
    """All of it. `device` is empty without a GPU, and in a dry run.

    The GPU is looked at in a process of its own: this one is to start others, and holds no memory of it.
    """
    columns = {} if dry_run else _gpu()
    return {
        "dry_run": dry_run,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit() or "unknown",
        "device": columns.get("name", ""),
        "devices": int(columns.get("count", 0)),
        "driver": columns.get("driver_version", ""),
        "memory": columns.get("memory.total", ""),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **{package: _version(package) for package in PACKAGES},
        "DS_QUANT_KERNELS": os.environ.get("DS_QUANT_KERNELS", ""),
    }


def installed(package: str) -> bool:
    """Whether a package is there, by its metadata: importing some takes seconds."""
    return _version(package) != "not installed"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


_KEYS = ("name", "driver_version", "memory.total")


def _gpu() -> dict[str, str]:
    look = (
        "import torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
        "print(n, torch.cuda.get_device_name() if n else '', sep='|')"
    )
    try:
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    count, _, name = done.stdout.strip().splitlines()[-1].partition("|")
    if not int(count):
        return {}
    columns = {"name": name, "count": count}
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(_KEYS)}", "--format=csv,noheader"]
        line = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[0]
        columns |= dict(zip(_KEYS[1:], [cell.strip() for cell in line.split(",")][1:], strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        # ROCm, or a container without the tool: the driver stays unknown.
        columns |= {"driver_version": "unknown"}
    return columns
