"""The `ds_quant` section of the DeepSpeed JSON, and what is read from the JSON around it.

Begin with `quant_config` and its parts `linear`, `optimizer`, `communication`, `diagnostics`: what may be written and
what it means. `refusals` lists what of DeepSpeed cannot be combined with it, `deepspeed_json` reads whole configs, and
`ways_in` writes them for the Trainer, accelerate and native scripts.
"""

from ds_quant.base.errors import ConfigError, problem
from ds_quant.config.communication import CommunicationConfig, GradientCommunicationConfig, WeightCommunicationConfig
from ds_quant.config.deepspeed_json import (
    SECTION,
    TRIPWIRE,
    has_tripwire,
    near_miss_keys,
    read_deepspeed_config,
    resolve_auto,
    strip_tripwire,
    unresolved_auto,
)
from ds_quant.config.diagnostics import DiagnosticsConfig
from ds_quant.config.linear import ExcludeBlocksConfig, LinearConfig, RotationConfig
from ds_quant.config.operands import ActivationConfig, GradientConfig, OscillationResetConfig, WeightConfig
from ds_quant.config.optimizer import MasterConfig, MomentConfig, OptimizerConfig
from ds_quant.config.quant_config import QuantConfig, json_schema

__all__ = [
    "SECTION",
    "TRIPWIRE",
    "ActivationConfig",
    "CommunicationConfig",
    "ConfigError",
    "DiagnosticsConfig",
    "ExcludeBlocksConfig",
    "GradientCommunicationConfig",
    "GradientConfig",
    "LinearConfig",
    "MasterConfig",
    "MomentConfig",
    "OptimizerConfig",
    "OscillationResetConfig",
    "QuantConfig",
    "RotationConfig",
    "WeightCommunicationConfig",
    "WeightConfig",
    "has_tripwire",
    "json_schema",
    "near_miss_keys",
    "problem",
    "read_deepspeed_config",
    "resolve_auto",
    "strip_tripwire",
    "unresolved_auto",
]
