"""The way into DeepSpeed: `initialize` in place of deepspeed.initialize, or `enable` to have it called everywhere.

The order of things: the section of the JSON is validated and everything that cannot be done is refused; the model's
linear layers are converted, in place, before the engine exists; DeepSpeed's own initialize runs untouched; what was
promised is counted on the finished engine.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT

from ds_quant.base.log import say, warn
from ds_quant.config import (
    ConfigError,
    OptimizerConfig,
    QuantConfig,
    has_tripwire,
    near_miss_keys,
    read_deepspeed_config,
    strip_tripwire,
    unresolved_auto,
)
from ds_quant.config.batch_sizes import check_ranks, num_ranks
from ds_quant.config.deepspeed_json import TRIPWIRE_VALUE
from ds_quant.config.refusals import check_refusals
from ds_quant.diagnostics.choice import choose
from ds_quant.diagnostics.collector import TrainingDiagnostics
from ds_quant.engine.communication import Communication
from ds_quant.engine.diagnostics import Diagnostics, second_moments
from ds_quant.engine.extension_locks import check_extension_locks
from ds_quant.engine.masters import Masters, in_json
from ds_quant.engine.micro_steps import MicroSteps
from ds_quant.engine.moments import Moments
from ds_quant.engine.parts import Part
from ds_quant.engine.patches import (
    accelerator,
    check_model,
    no_step_at_start,
    op_names,
    optimizer_built_by,
    own_initialize,
    strip_tripwire_in_zero_init,
    wrap_initialize,
)
from ds_quant.engine.quant_engine import extend
from ds_quant.engine.steps import Steps
from ds_quant.engine.weight_communication import WeightCommunication
from ds_quant.engine.weight_guards import check_whole
from ds_quant.engine.weights import Weights
from ds_quant.engine.whole_weights import gather_elsewhere
from ds_quant.kernels.integer_units import integer_units
from ds_quant.linear.convert import check_still_converted, convert, coverage, step_key_of, write_to_model_config
from ds_quant.linear.modules import QuantizedModule
from ds_quant.optim import setup
from ds_quant.optim.base import QuantizedOptimizer
from ds_quant.optim.kinds import MUON, check_states, check_universal, check_zero, kind_of, kind_of_client
from ds_quant.optim.muon import QuantMuon

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

    raw = read_deepspeed_config(source)
    quant = QuantConfig.load(raw)
    for warning in near_miss_keys(raw):
        warn(warning)
    check_extension_locks(op_names(), say)

    if has_tripwire(raw):
        _replace_config(forwarded, strip_tripwire(raw))
    elif quant.enabled:
        warn(
            f'the config has no tripwire; add "ds_quant_required": "{TRIPWIRE_VALUE}" to "zero_optimization", so that '
            "a script that forgets to enable ds_quant fails instead of training in full precision"
        )
    if not quant.enabled:
        why = "is switched off" if "ds_quant" in raw else "is missing"
        say(f"{type(model).__name__}: {_plain(model, why)}")
        return deepspeed_initialize(**forwarded)

    check_refusals(raw, quant)
    left = unresolved_auto(raw)
    if left:
        raise ConfigError(
            f'{", ".join(left)}: got "auto"; allowed: values, since only Hugging Face\'s Trainer fills them in; '
            "fix: config = ds_quant.resolve_auto(config, "
            + ", ".join(f"{path.rpartition('.')[2]}=..." for path in left)
            + ")"
        )
    if mpu is None and mesh_param is None and not {"sequence_parallel_size", "data_parallel_size"} & raw.keys():
        check_ranks(raw, num_ranks(), on_cpu=accelerator()[0] == "cpu")
    check_model(model)
    check_whole(model)
    if not _is_trained(raw, optimizer):
        quant = _for_evaluation(quant, model)
    choice = choose(quant.diagnostics, quant) if quant.diagnostics else None

    master = quant.optimizer.master if quant.optimizer else None
    moments = _prepare_moments(raw, quant.optimizer, forwarded) if quant.optimizer else None
    if master:
        _replace_config(forwarded, in_json(strip_tripwire(raw)))
    names = convert(model, quant.linear) if quant.linear else []
    # Diagnostics are of this run, and no part of the model.
    if quant.linear or quant.optimizer or quant.communication:
        write_to_model_config(model, {key: part for key, part in raw["ds_quant"].items() if key != "diagnostics"})
    with optimizer_built_by(moments.build if moments else None), no_step_at_start():
        result = deepspeed_initialize(**forwarded)
    engine = result[0]
    parts: list[Part] = [micro_steps := MicroSteps(engine)]
    if master:
        parts.append(Masters(engine, master))
    if moments:
        if isinstance(engine.basic_optimizer, QuantMuon):
            from ds_quant.engine.muon import keep_momentum  # not above: it brings torch's compiler with it

            keep_momentum(engine)
        parts.append(Moments(engine))
        for line in moments.lines:
            say(line)
    if quant.linear:
        check_still_converted(engine.module, names)
        step_key = step_key_of(engine.module)
        if step_key is not None:
            parts.append(Steps(engine, step_key, micro_steps))
        if quant.linear.backend == "int8":
            parts.append(Weights(engine))
            units = integer_units(torch.device(engine.device))  # warns by itself where it is slow
            if units.is_fast:
                say(units.line())
        for line in coverage(engine.module).lines():
            say(line)
    if quant.communication and quant.communication.gradient:
        parts.append(Communication(engine, quant.communication.gradient))
    if quant.communication and quant.communication.weight:
        parts.append(WeightCommunication(engine, quant.communication.weight))
        gather_elsewhere()
    if quant.diagnostics and choice:
        collector = TrainingDiagnostics(engine, quant.diagnostics, choice, second_moments)
        parts.append(Diagnostics(engine, collector))
    extend(engine, parts)
    return result


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


def _is_trained(raw: dict[str, Any], optimizer: Any) -> bool:
    """Whether the engine is to have an optimizer. At stages 1 and 2 DeepSpeed makes no engine without one."""
    section = raw.get("optimizer")
    in_config = isinstance(section, dict) and bool(section.get("type"))
    stage = (raw.get("zero_optimization") or {}).get("stage", 0)
    return optimizer is not None or in_config or stage in (1, 2)


def _for_evaluation(quant: QuantConfig, model: Any) -> QuantConfig:
    """The section without what only training needs: an engine without an optimizer evaluates, or is a reference."""
    idle = [part for part in ("optimizer", "communication", "diagnostics") if getattr(quant, part) is not None]
    name = type(model).__name__
    if idle:
        listed = ", ".join(f"ds_quant.{part}" for part in idle)
        say(f"no optimizer was configured or passed, so that {name} is only evaluated: nothing to do for {listed}")
    if quant.linear:
        say(
            f"{name} is evaluated with the quantized linears of ds_quant.linear; without that part, or with "
            '"enabled": false in the section, it would be in full precision'
        )
    return quant.model_copy(update=dict.fromkeys(idle))


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


@dataclass
class _Moments:
    build: Callable[[Any], QuantizedOptimizer] | None
    """What makes the optimizer from the JSON's section; None where one was passed in."""
    lines: list[str]


def _prepare_moments(raw: dict[str, Any], config: OptimizerConfig, forwarded: dict[str, Any]) -> _Moments:
    """Check what the optimizer section needs, and have `forwarded` carry an optimizer or the groups for one."""
    zero_section = raw.get("zero_optimization") or {}
    setup.check_granularity(config, zero_section.get("stage", 0))
    client = forwarded["optimizer"]
    hyperparameters = setup.json_hyperparameters(raw) if client is None else {}
    kind = kind_of(raw) if client is None else kind_of_client(client)
    if client is None:
        check_states(config, kind.optimizer, kind.name)
    check_universal(raw, kind)
    check_zero(raw, kind)
    if kind is MUON:
        from ds_quant.engine.muon import ZeroMuon

        kind = kind._replace(optimizer=ZeroMuon)
    names = setup.ParameterNames(forwarded["model"], config.exclude)
    build = None
    if client is None:
        forwarded["model_parameters"] = names.split(forwarded["model_parameters"], kind.optimizer.STATES)
        build = setup.builder(config, hyperparameters, kind)
    else:
        forwarded["optimizer"] = setup.adopt(config, names, client)
        offload = zero_section.get("offload_optimizer") or {}
        if offload.get("device", "none") != "none" and "zero_force_ds_cpu_optimizer" not in raw:
            # DeepSpeed refuses optimizers that are passed in for being slow on a CPU; this one is not.
            _replace_config(forwarded, {**strip_tripwire(raw), "zero_force_ds_cpu_optimizer": False})
    lines = [f"{kind.label}: {setup.describe_moments(config, kind)}"]
    share = 100 * (1 - names.num_excluded / names.num_elements) if names.num_elements else 0.0
    size = setup.describe_size(config, kind)
    lines.append(f"they take {size}, for {share:.1f}% of the trainable parameters")
    if config.master:
        kept = "1 byte beside a bf16 weight" if config.master.bits == 24 else "nothing beside a bf16 weight"
        lines.append(f"{config.master.bits}-bit masters, rounded {config.master.rounding}: {kept}, instead of 4 bytes")
    if names.excluded:
        lines.append(f"32-bit moments by ds_quant.optimizer.exclude: {', '.join(names.excluded)}")
    return _Moments(build, lines)


def _replace_config(forwarded: dict[str, Any], config: dict[str, Any]) -> None:
    """Have DeepSpeed read `config`, wherever the user's came from."""
    forwarded["config"], forwarded["config_params"] = config, None
    if getattr(forwarded["args"], "deepspeed_config", None) is not None:
        # DeepSpeed refuses two configs.
        forwarded["args"] = copy.copy(forwarded["args"])
        forwarded["args"].deepspeed_config = None
