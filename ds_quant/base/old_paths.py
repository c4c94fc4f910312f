"""Modules under the names that they had in version 0.1: pickles, and so checkpoints, name them.

An old name gives the current module itself, so classes are the same under both names.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TODAY = {
    "adamw_conversion": "optim.adopt",
    "checkpoint_files": "base.checkpoint_files",
    "conv1d": "linear.conv1d",
    "conversion": "linear.convert",
    "deepspeed_json": "config.deepspeed_json",
    "errors": "base.errors",
    "experts": "linear.experts",
    "extension_locks": "engine.extension_locks",
    "group_options": "optim.group_options",
    "heads": "linear.heads",
    "hf_checkpoint": "export.hf_checkpoint",
    "int8": "linear.int8",
    "kernels.cpu": "kernels.adamw.cpu",
    "kernels.cuda": "kernels.adamw.compiled",
    "kernels.dispatch": "kernels.adamw.ops",
    "kernels.int8_matmul": "kernels.int8.matmul",
    "kernels.ops": "kernels.int8.ops",
    "kernels.products": "kernels.int8.ops",
    "kernels.products_cpu": "kernels.int8.cpu",
    "kernels.products_cuda": "kernels.int8.compiled",
    "kernels.reference": "kernels.adamw.reference",
    "kernels.triton": "kernels.adamw.triton_kernel",
    "kernels.triton_int8": "kernels.int8.triton",
    "kernels.wire_cpu": "kernels.wire.cpu",
    "kernels.wire_cuda": "kernels.wire.compiled",
    "kernels.wire_rows": "kernels.wire.rows",
    "kernels.work": "kernels.adamw.work",
    "linear_classes": "linear.linear_classes",
    "log": "base.log",
    "model_coverage": "linear.coverage",
    "moment": "optim.state",
    "one_rank": "base.process_group",
    "optimizer_setup": "optim.setup",
    "patterns": "base.patterns",
    "plan": "linear.recipe",
    "recomputation": "linear.recomputation",
    "refusals": "config.refusals",
    "report": "cli.report",
    "section": "config.section",
    "serving_format": "export.serving_format",
    "shared_inputs": "linear.shared_inputs",
    "simulated": "linear.simulated",
    "stepkey": "linear.step_key",
    "tensor_state": "linear.tensor_state",
    "ways_in": "config.ways_in",
    "weight_codes": "linear.weight_codes",
    "whole_folder": "base.whole_folder",
}
"""By old name, both within ds_quant. Modules that became packages (`linear`, `optim`, ...) keep their names there."""


class _Alias(Loader):
    def __init__(self, today: str):
        self._today = today
        self._spec: Any = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._today)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has set that of the old name


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "ds_quant" or name not in TODAY:
            return None
        return ModuleSpec(fullname, _Alias(f"ds_quant.{TODAY[name]}"))


def keep() -> None:
    """Make the old names importable in this process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before those of editable installs
