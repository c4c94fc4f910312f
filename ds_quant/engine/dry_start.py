"""What DeepSpeed does at its start that a dry run goes without."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ds_quant.config import OptimizerConfig
from ds_quant.engine.patches import optimizer_built_by
from ds_quant.optim.kinds import ADAM, MUON, SGD, kind_of
from ds_quant.optim.setup import builder


def preload() -> None:
    """Import what engines import when they start: it takes seconds, of each process that comes without it."""
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # which has torch's whole compiler imported


@contextmanager
def dry_start(config: dict[str, Any]) -> Iterator[None]:
    """Context in which engines start without compiling anything, and without shared memory of their own.

    An optimizer of the JSON that has no section for its states is one that has the same states in 32 bits and is not
    compiled.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # where the package's own `torch` is torch
    original = backend.build_shm_op
    backend.build_shm_op = lambda: None
    build = _plain_optimizer(config) if "optimizer" in config else None
    # DeepSpeed compiles Muon's updates.
    eager = torch.compiler.set_stance("force_eager") if kind_of(config) is MUON else nullcontext()
    try:
        with eager, optimizer_built_by(build):
            yield
    finally:
        backend.build_shm_op = original


def _plain_optimizer(config: dict[str, Any]) -> Callable[[Any], torch.optim.Optimizer]:
    """What makes an optimizer with the states of the JSON's."""
    kind = kind_of(config)
    options = (config.get("optimizer") or {}).get("params") or {}
    known = {name: options[name] for name in kind.hyperparameters if name in options}
    if kind is ADAM:
        return lambda parameters: torch.optim.AdamW(parameters, **known, fused=True)
    if kind is SGD:
        return lambda parameters: torch.optim.SGD(parameters, **known, fused=True)
    if kind is MUON:
        from ds_quant.engine.muon import ZeroMuon

        kind = kind._replace(optimizer=ZeroMuon)
    return builder(OptimizerConfig.model_construct(), known, kind)
