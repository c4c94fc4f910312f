"""The way into DeepSpeed: `initialize` in place of deepspeed.initialize, or `enable` to have it called everywhere.

The order of things: the section of the JSON is validated and everything that cannot be done is refused; the model's
linear layers are converted, in place, before the engine exists; DeepSpeed's own initialize runs untouched; what was
promised is counted on the finished engine.
"""

import copy
from collections.abc import Callable
from typing import Any

from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT

from ds_quant import zero
from ds_quant.config import (
    ConfigError,
    QuantConfig,
    has_tripwire,
    near_miss_keys,
    read_deepspeed_config,
    strip_tripwire,
    unresolved_auto,
)
from ds_quant.conversion import check_still_converted, convert, coverage, step_key_of, write_to_model_config
from ds_quant.extension_locks import check_extension_locks
from ds_quant.linear import describe
from ds_quant.log import say, warn
from ds_quant.refusals import check_refusals

_undo_enable: list[Callable[[], None]] = []


def enable() -> None:
    """Wrap `deepspeed.initialize`, once, so that Hugging Face's Trainer, accelerate and unchanged scripts obey the
    `ds_quant` section. Call it before the Trainer or its TrainingArguments exist.

    Raises:
        ConfigError: an unsupported DeepSpeed, or a lock left by a killed build of one of its ops.
    """
    if _undo_enable:
        return
    check_extension_locks(zero.op_names(), say)
    _undo_enable.extend((zero.wrap_initialize(initialize), zero.strip_tripwire_in_zero_init()))


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
    """deepspeed.initialize that obeys the `ds_quant` section of the config. Same arguments, same 4-tuple.

    Without the section, or with `"enabled": false`, it is deepspeed.initialize.

    Raises:
        ConfigError: the section, the config around it or the model asks for what cannot be done; the message says
            where, what was got, what is allowed and what mends it.
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
    deepspeed_initialize = zero.own_initialize()
    source, in_args = _config_source(args, config, config_params)
    if source is None or model is None:
        return deepspeed_initialize(**forwarded)  # DeepSpeed's own message says what is missing

    raw = read_deepspeed_config(source)
    quant = QuantConfig.load(raw)
    for warning in near_miss_keys(raw):
        warn(warning)
    check_extension_locks(zero.op_names(), say)

    if has_tripwire(raw):
        forwarded["config"], forwarded["config_params"] = strip_tripwire(raw), None
        if in_args:
            # DeepSpeed refuses two configs, and the path in args leads to the one with the tripwire.
            forwarded["args"] = copy.copy(args)
            forwarded["args"].deepspeed_config = None
    elif quant.enabled:
        warn(
            'the config has no tripwire; add "ds_quant_required": true to "zero_optimization", so that a '
            "script that forgets to enable ds_quant fails instead of training in full precision"
        )
    if not quant.enabled:
        why = "is switched off" if "ds_quant" in raw else "is missing"
        say(f"the ds_quant section {why}: a plain DeepSpeed run in full precision")
        return deepspeed_initialize(**forwarded)

    refuse_unavailable(quant)
    check_refusals(raw, quant)
    left = unresolved_auto(raw)
    if left:
        raise ConfigError(
            f'{", ".join(left)}: got "auto"; allowed: values, since only Hugging Face\'s Trainer fills them in; '
            "remedy: config = ds_quant.resolve_auto(config, "
            + ", ".join(f"{path.rpartition('.')[2]}=..." for path in left)
            + ")"
        )
    zero.check_model(model)

    names = convert(model, quant.linear) if quant.linear else []
    write_to_model_config(model, raw["ds_quant"])
    result = deepspeed_initialize(**forwarded)
    engine = result[0]
    if quant.linear:
        check_still_converted(engine.module, names)
        step_key = step_key_of(engine.module)
        if step_key is not None:
            zero.attach(engine, step_key)
        for line in coverage(engine.module).lines():
            say(line)
    return result


def _config_source(args: Any, config: Any, config_params: Any) -> tuple[Any, bool]:
    """The config that DeepSpeed would take, and whether it comes from `args`."""
    in_args = getattr(args, "deepspeed_config", None)
    explicit = config if config is not None else config_params
    if in_args is not None and explicit is not None:
        raise ConfigError(
            "deepspeed.initialize: got a config in args.deepspeed_config and another as an argument; allowed: one of "
            "them; remedy: remove one"
        )
    return (explicit, False) if explicit is not None else (in_args, in_args is not None)


def refuse_unavailable(quant: QuantConfig) -> None:
    """What the section may say but this release does not do yet."""
    later = []
    if quant.optimizer:
        later.append(("ds_quant.optimizer", "quantized Adam moments", "the optimizer section"))
    if quant.communication:
        later.append(("ds_quant.communication", "quantized gradient communication", "the communication section"))
    if quant.linear and quant.linear.backend == "int8":
        later.append(("ds_quant.linear.backend", describe(quant.linear), '"backend": "simulated" in its place'))
    if later:
        raise ConfigError(
            "\n".join(
                f"{where}: got {got}, which is not available yet in this release; allowed: the linear section with the "
                f"simulated backend; remedy: {'use' if 'in its place' in remedy else 'remove'} {remedy}"
                for where, got, remedy in later
            )
        )
