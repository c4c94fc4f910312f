"""What DeepSpeed does at its start that a dry run goes without."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ds_quant.engine.patches import optimizer_built_by


def preload() -> None:
    """Import what engines import when they start: it takes seconds, of each process that comes without it."""
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # which has torch's whole compiler imported


@contextmanager
def dry_start(config: dict[str, Any]) -> Iterator[None]:
    """Context in which engines start without compiling anything, and without shared memory of their own.

    The optimizer of the JSON is torch's AdamW, which has the state of DeepSpeed's fused and CPU ones.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # where the package's own `torch` is torch
    original = backend.build_shm_op
    backend.build_shm_op = lambda: None
    options = (config.get("optimizer") or {}).get("params") or {}
    known = {name: options[name] for name in ("lr", "betas", "eps", "weight_decay") if name in options}
    build = None if "optimizer" not in config else lambda parameters: torch.optim.AdamW(parameters, **known, fused=True)
    try:
        with optimizer_built_by(build):
            yield
    finally:
        backend.build_shm_op = original
