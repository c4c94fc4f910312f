"""Quantized pre-training of transformers in the DeepSpeed engine, from one section of its JSON.

Importing this package imports neither deepspeed nor transformers and touches no accelerator: what needs them is loaded
on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ds_quant.config import ConfigError, QuantConfig
    from ds_quant.conv1d import QuantConv1D
    from ds_quant.conversion import convert
    from ds_quant.deepspeed_json import resolve_auto
    from ds_quant.engine import disable, enable, initialize
    from ds_quant.linear import QuantizedModule, QuantLinear
    from ds_quant.linear_classes import register_module
    from ds_quant.model_coverage import coverage
    from ds_quant.optim import QuantAdamW
    from ds_quant.weight_codes import weights_changed

_HOMES = {
    "ConfigError": "config",
    "QuantAdamW": "optim",
    "QuantConfig": "config",
    "QuantConv1D": "conv1d",
    "QuantLinear": "linear",
    "QuantizedModule": "linear",
    "convert": "conversion",
    "coverage": "model_coverage",
    "disable": "engine",
    "enable": "engine",
    "initialize": "engine",
    "register_module": "linear_classes",
    "resolve_auto": "deepspeed_json",
    "weights_changed": "weight_codes",
}

__all__ = [
    "ConfigError",
    "QuantAdamW",
    "QuantConfig",
    "QuantConv1D",
    "QuantLinear",
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
