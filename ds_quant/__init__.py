"""Quantized pre-training of transformers in the DeepSpeed engine, from one section of its JSON.

Importing this package imports neither deepspeed nor transformers and touches no accelerator: what needs them is loaded
on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ds_quant.base import old_paths

__version__ = "0.1.0"

old_paths.keep()

if TYPE_CHECKING:
    from ds_quant.config import ConfigError, QuantConfig
    from ds_quant.config.deepspeed_json import resolve_auto
    from ds_quant.engine.entry import disable, enable, initialize
    from ds_quant.linear.conv1d import QuantConv1D
    from ds_quant.linear.convert import convert
    from ds_quant.linear.coverage import coverage
    from ds_quant.linear.linear_classes import register_module
    from ds_quant.linear.modules import QuantizedModule, QuantLinear
    from ds_quant.linear.weight_codes import weights_changed
    from ds_quant.optim.adamw import QuantAdamW
    from ds_quant.optim.ademamix import QuantAdEMAMix
    from ds_quant.optim.lion import QuantLion
    from ds_quant.optim.sgd import QuantSGD

_HOMES = {
    "ConfigError": "config",
    "QuantAdEMAMix": "optim",
    "QuantAdamW": "optim",
    "QuantConfig": "config",
    "QuantConv1D": "linear.conv1d",
    "QuantLinear": "linear",
    "QuantLion": "optim",
    "QuantSGD": "optim",
    "QuantizedModule": "linear",
    "convert": "linear.convert",
    "coverage": "linear.coverage",
    "disable": "engine",
    "enable": "engine",
    "initialize": "engine",
    "register_module": "linear.linear_classes",
    "resolve_auto": "config",
    "weights_changed": "linear.weight_codes",
}

__all__ = [
    "ConfigError",
    "QuantAdEMAMix",
    "QuantAdamW",
    "QuantConfig",
    "QuantConv1D",
    "QuantLinear",
    "QuantLion",
    "QuantSGD",
    "QuantizedModule",
    "convert",
    "coverage",
    "disable",
    "enable",
    "initialize",
    "register_module",
    "resolve_auto",
    "weights_changed",
]


_SUBPACKAGES = ("comm", "numerics")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
