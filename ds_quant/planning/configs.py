"""A DeepSpeed config as a job of a given size has it, and what of it cannot be predicted."""

import copy
from typing import Any

from ds_quant.base.errors import fail
from ds_quant.config import QuantConfig, read_deepspeed_config, resolve_auto, unresolved_auto
from ds_quant.config.refusals import check_refusals
from ds_quant.optim.kinds import TYPES, kind_named

_FILLINGS: dict[str, Any] = {
    "gradient_clipping": 1.0,
    "bf16.enabled": True,
    "fp16.enabled": False,
    "optimizer.params.lr": 1e-4,
    "optimizer.params.betas": [0.9, 0.999],
    "optimizer.params.eps": 1e-8,
    "optimizer.params.weight_decay": 0.1,
    "scheduler.params.total_num_steps": 1000,
    "scheduler.params.warmup_num_steps": 10,
    "scheduler.params.warmup_max_lr": 1e-4,
    "scheduler.params.warmup_min_lr": 0.0,
}
"""What replaces "auto", by key: the defaults of the Trainer's flags in pre-training. Of these numbers only the clipping
changes memory or traffic, by being above zero."""


def job_config(
    source: Any, *, world_size: int, rows: int, accumulation: int = 1, stage: int | None = None
) -> dict[str, Any]:
    """The config of a job: "auto"s filled, the ZeRO stage replaced where one is given.

    Raises:
        ConfigError: the config contradicts the numbers, or asks for what cannot be predicted.
    """
    raw = copy.deepcopy(read_deepspeed_config(source))
    if stage is not None:
        raw.setdefault("zero_optimization", {})["stage"] = stage
    raw.setdefault("train_micro_batch_size_per_gpu", "auto")
    raw.setdefault("gradient_accumulation_steps", "auto")
    raw.setdefault("train_batch_size", "auto")
    raw["steps_per_print"] = 10**9
    values: dict[str, Any] = {"train_micro_batch_size_per_gpu": rows, "gradient_accumulation_steps": accumulation}
    values |= {path: _FILLINGS[path] for path in unresolved_auto(raw) if path in _FILLINGS}
    resolved = resolve_auto(raw, world_size=world_size, **{k.replace(".", "__"): v for k, v in values.items()})
    if left := unresolved_auto(resolved):
        raise fail(left[0], "auto", "a value", "write one into the config: planning has none to fill in")
    _check(resolved)
    return resolved


def offloaded_roles(config: dict[str, Any]) -> tuple[str, ...]:
    """What the config has DeepSpeed keep in the host's memory."""
    zero = config.get("zero_optimization") or {}
    roles: list[str] = []
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        roles += ["masters", "moments"]
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        roles.append("weights")
    return tuple(roles)


def _check(config: dict[str, Any]) -> None:
    zero = config.get("zero_optimization") or {}
    quant = QuantConfig.load(config)
    if quant.enabled:
        check_refusals(config, quant)
    wanted = {
        "fp16": (config.get("fp16") or {}).get("enabled"),
        "tensor_parallel.autotp_size": (config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1,
        "pipeline": "pipeline" in config,
        "hybrid_engine": (config.get("hybrid_engine") or {}).get("enabled"),
        "compile.deepcompile": (config.get("compile") or {}).get("deepcompile"),
        "zero_optimization.zenflow": "zenflow" in zero,
        "zero_optimization.zero_quantized_weights": zero.get("zero_quantized_weights"),
        "zero_optimization.zero_quantized_gradients": zero.get("zero_quantized_gradients"),
    }
    for where in ("offload_optimizer", "offload_param"):
        wanted[f"zero_optimization.{where}"] = (zero.get(where) or {}).get("device") == "nvme"
    for where, on in wanted.items():
        if on:
            fix = "plan with bf16, of the same size" if where == "fp16" else "plan without it"
            raise fail(where, "switched on", "what a dry run on a CPU can do", fix)
    kind = (config.get("optimizer") or {}).get("type")
    if kind is not None and kind_named(kind) is None:
        raise fail("optimizer.type", kind, ", ".join(TYPES), "plan with AdamW, which has two moments")
    if kind == "AdEMAMix" and not (quant.enabled and quant.optimizer):
        raise fail("optimizer.type", kind, "others without ds_quant.optimizer", "store a state of it in few bits")
