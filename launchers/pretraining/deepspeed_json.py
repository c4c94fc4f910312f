"""Finds and reads the DeepSpeed JSON, and checks it against the command line."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from survival.errors import mistake

from ds_quant.config import QuantConfig
from ds_quant.config.deepspeed_json import parse_deepspeed_config, read_deepspeed_config

_FLAGS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_num_steps": "warmup_steps",
}
"""JSON values that are also flags of the Trainer."""


@dataclass(frozen=True)
class DeepSpeedJson:
    """A DeepSpeed configuration and its source."""

    content: dict[str, Any]
    path: str | None
    """None: given inline, or created by `accelerate config` without a file."""
    from_accelerate: bool = False

    @classmethod
    def find(cls, argument: str | None) -> DeepSpeedJson:
        """The configuration of `--deepspeed`, or the one that `accelerate launch` announces.

        Raises LaunchError if there is none, ConfigError if it cannot be read.
        """
        if argument is not None:
            if argument.lstrip().startswith("{"):
                return cls(parse_deepspeed_config(argument, "--deepspeed"), None)
            return cls(read_deepspeed_config(argument), argument)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes", "on", "y", "t"):
            path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
            if path.lower() == "none":
                return cls({}, None, from_accelerate=True)
            return cls(read_deepspeed_config(path), path, from_accelerate=True)
        raise mistake(
            "--deepspeed",
            "no DeepSpeed configuration",
            "the path of a JSON file",
            "add --deepspeed ds_configs/w8a8.json (ds_configs/baseline.json trains without quantization)",
        )

    @cached_property
    def quant(self) -> QuantConfig:
        """The `ds_quant` section. Raises ConfigError."""
        return QuantConfig.load(self.content)

    def filled(self) -> dict[str, Any]:
        """The JSON, with settings added that it leaves out and the launcher needs."""
        content = copy.deepcopy(self.content)
        fill_gaps(content)
        return content

    def fixed_flags(self) -> dict[str, Any]:
        """Flags whose value the JSON fixes with a number instead of "auto"."""
        fixed = {flag: _look_up(self.content, key) for key, flag in _FLAGS.items()}
        betas = _look_up(self.content, "optimizer.params.betas")
        if isinstance(betas, list) and len(betas) == 2:
            fixed["adam_beta1"], fixed["adam_beta2"] = betas
        return {flag: value for flag, value in fixed.items() if value is not None and value != "auto"}

    def leaves_open(self, dotted: str) -> bool:
        """Whether the JSON has "auto" for this key."""
        return _look_up(self.content, dotted) == "auto"

    def refuse_ignored_flags(self, explicit: frozenset[str]) -> None:
        """Raise for flags that the Trainer would silently ignore because the JSON has its own section."""
        for section, flags in {
            "scheduler": ("lr_scheduler_type", "lr_scheduler_kwargs"),
            "optimizer": ("optim", "optim_args"),
        }.items():
            ignored = [f"--{flag}" for flag in flags if flag in explicit]
            if section in self.content and ignored:
                raise mistake(
                    " and ".join(ignored),
                    f'what would be ignored, since the DeepSpeed JSON {self.path or ""} has a section "{section}"',
                    "one of the two",
                    f'drop the flag, or remove "{section}" from the JSON',
                )


def fill_gaps(content: dict[str, Any]) -> None:
    """Add to a DeepSpeed configuration, in place, what the Trainer would otherwise silently lack."""
    # accelerate reads zero_optimization.stage when it saves, and fails if it is absent.
    zero = content.setdefault("zero_optimization", {})
    zero.setdefault("stage", 0)
    if zero["stage"] == 3:
        # Without it a stage 3 checkpoint has no weights that from_pretrained could read.
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    # Absent values are not filled from the flags: --max_grad_norm and accumulation would be ignored.
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        content.setdefault(key, "auto")


def _look_up(content: Mapping[str, Any], dotted: str) -> Any:
    node: Any = content
    for key in dotted.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node
