"""The way into DeepSpeed: `initialize` in place of deepspeed.initialize, or `enable` to have it called everywhere.

The order of things: the section of the JSON is validated and everything that cannot be done is refused; the model's
linear layers are converted, in place, before the engine exists (`preparation`); DeepSpeed's own initialize runs
untouched; the finished engine gets its parts, and what was promised is counted on it (`attachment`).
"""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT

from ds_quant.base.log import say, warn
from ds_quant.config import (
    ConfigError,
    QuantConfig,
    has_tripwire,
    near_miss_keys,
    read_deepspeed_config,
    strip_tripwire,
)
from ds_quant.config.deepspeed_json import TRIPWIRE_VALUE
from ds_quant.engine.attachment import attach
from ds_quant.engine.extension_locks import check_extension_locks
from ds_quant.engine.patches import (
    no_step_at_start,
    op_names,
    optimizer_built_by,
    own_initialize,
    strip_tripwire_in_zero_init,
    wrap_initialize,
)
from ds_quant.engine.preparation import check, prepare, replace_config
from ds_quant.linear.modules import QuantizedModule

_undo_enable: list[Callable[[], None]] = []
_models: list[str] = []


def was_called() -> bool:
    """Whether this process has come to :func:`initialize`."""
    return bool(_models)


def enable() -> None:
    """Wrap `deepspeed.initialize`, once, so that Hugging Face's Trainer, accelerate and unchanged scripts apply the
    `ds_quant` section. Call it before the Trainer or its TrainingArguments exist.

    Raises:
        ConfigError: an unsupported DeepSpeed, or a lock left by a killed build of one of its ops.
    """
    if _undo_enable:
        return
    check_extension_locks(op_names(), say)
    _undo_enable.extend((wrap_initialize(initialize), strip_tripwire_in_zero_init()))


def disable() -> None:
    """Take back :func:`enable`. Engines that exist stay as they are."""
    while _undo_enable:
        _undo_enable.pop()()


def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """deepspeed.initialize that applies the `ds_quant` section of the config. Same arguments, same 4-tuple.

    Without the section, or with `"enabled": false`, it is deepspeed.initialize.

    Raises:
        ConfigError: the section, the config around it or the model asks for what cannot be done; the message says
            where, what was got, what is allowed and the fix.
    """
    forwarded = {
        "args": args,
        "model": model,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "distributed_port": distributed_port,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "config": config,
        "mesh_param": mesh_param,
        "config_params": config_params,
    }
    _models.append(type(model).__name__)
    if len(_models) > 1:
        say(f"engine {len(_models)} of this process, for {_models[-1]}:")
    deepspeed_initialize = own_initialize()
    source = _config_source(args, config, config_params)
    if source is None or model is None:
        return deepspeed_initialize(**forwarded)  # DeepSpeed's own message says what is missing

    raw, quant = _read(source, forwarded)
    if not quant.enabled:
        why = "is switched off" if "ds_quant" in raw else "is missing"
        say(f"{type(model).__name__}: {_plain(model, why)}")
        return deepspeed_initialize(**forwarded)
    prepared = prepare(check(raw, quant, forwarded), forwarded)
    with optimizer_built_by(prepared.build_optimizer), no_step_at_start():
        result = deepspeed_initialize(**forwarded)
    attach(result[0], prepared)
    return result


def _read(source: Any, forwarded: dict[str, Any]) -> tuple[dict[str, Any], QuantConfig]:
    """The config as it was written, and its section. `forwarded` then carries it without what only ds_quant reads.

    Raises ConfigError: it is invalid, or a lock was left by a killed build of one of DeepSpeed's ops.
    """
    raw = read_deepspeed_config(source)
    quant = QuantConfig.load(raw)
    for warning in near_miss_keys(raw):
        warn(warning)
    check_extension_locks(op_names(), say)
    if has_tripwire(raw):
        replace_config(forwarded, strip_tripwire(raw))
    elif quant.enabled:
        warn(
            f'the config has no tripwire; add "ds_quant_required": "{TRIPWIRE_VALUE}" to "zero_optimization", so that '
            "a script that forgets to enable ds_quant fails instead of training in full precision"
        )
    return raw, quant


def _plain(model: Any, why: str) -> str:
    """What a run without the section is: the model may have been converted before."""
    modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
    names = [name for name, module in modules if isinstance(module, QuantizedModule)]
    if not names:
        return f"the ds_quant section {why}: a plain DeepSpeed run in full precision"
    return (
        f"the ds_quant section {why}: a plain DeepSpeed run, but {len(names)} of its linear modules are quantized "
        f"already ({names[0]}, ...) and stay so"
    )


def _config_source(args: Any, config: Any, config_params: Any) -> Any:
    """The config that DeepSpeed would take."""
    in_args = getattr(args, "deepspeed_config", None)
    explicit = config if config is not None else config_params
    if in_args is not None and explicit is not None:
        raise ConfigError(
            "deepspeed.initialize: got a config in args.deepspeed_config and another as an argument; allowed: one of "
            "them; fix: remove one"
        )
    return explicit if explicit is not None else in_args
