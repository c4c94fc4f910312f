"""What is done before DeepSpeed makes an engine: `check` refuses what cannot be done, `prepare` converts the model.

`entry` calls both, and then `attachment`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds_quant.base.log import say
from ds_quant.config import ConfigError, OptimizerConfig, QuantConfig, strip_tripwire, unresolved_auto
from ds_quant.config.batch_sizes import check_ranks, num_ranks
from ds_quant.config.refusals import check_refusals
from ds_quant.diagnostics.choice import Choice, choose
from ds_quant.engine.masters import in_json
from ds_quant.engine.patches import accelerator, check_model
from ds_quant.engine.weight_guards import check_whole
from ds_quant.linear.convert import convert, write_to_model_config
from ds_quant.optim import setup
from ds_quant.optim.base import QuantizedOptimizer
from ds_quant.optim.kinds import MUON, check_states, check_universal, check_zero, kind_of, kind_of_client


@dataclass
class Checked:
    """A config and a model that go together."""

    raw: dict[str, Any]
    """The whole config as it was written."""
    quant: QuantConfig
    """The section, without what only training needs where the engine is to have no optimizer."""
    choice: Choice | None
    """What diagnostics record; None without them."""


@dataclass
class Prepared:
    """What was made of a model and an optimizer, for the engine that is made next."""

    quant: QuantConfig
    choice: Choice | None
    converted: list[str]
    """Names of the quantized layers."""
    build_optimizer: Callable[[Any], QuantizedOptimizer] | None
    """Makes the optimizer from the JSON's section; None: DeepSpeed makes it, or it was passed in."""
    moment_lines: list[str]
    """How moments are stored, for the user."""


def check(raw: dict[str, Any], quant: QuantConfig, forwarded: dict[str, Any]) -> Checked:
    """Hold the config against DeepSpeed's settings, the ranks and the model. `forwarded`: arguments of initialize.

    Raises ConfigError.
    """
    model = forwarded["model"]
    check_refusals(raw, quant)
    left = unresolved_auto(raw)
    if left:
        raise ConfigError(
            f'{", ".join(left)}: got "auto"; allowed: values, since only Hugging Face\'s Trainer fills them in; '
            "fix: config = ds_quant.resolve_auto(config, "
            + ", ".join(f"{path.rpartition('.')[2]}=..." for path in left)
            + ")"
        )
    own_groups = forwarded["mpu"] is not None or forwarded["mesh_param"] is not None
    if not own_groups and not {"sequence_parallel_size", "data_parallel_size"} & raw.keys():
        check_ranks(raw, num_ranks(), on_cpu=accelerator()[0] == "cpu")
    check_model(model)
    check_whole(model)
    if not _is_trained(raw, forwarded["optimizer"]):
        quant = _for_evaluation(quant, model)
    return Checked(raw, quant, choose(quant.diagnostics, quant) if quant.diagnostics else None)


def prepare(job: Checked, forwarded: dict[str, Any]) -> Prepared:
    """Convert the model in place, and have `forwarded` carry the optimizer and the config that DeepSpeed is to take.

    Raises ConfigError.
    """
    raw, quant, model = job.raw, job.quant, forwarded["model"]
    build, lines = _prepare_moments(raw, quant.optimizer, forwarded) if quant.optimizer else (None, [])
    if quant.optimizer and quant.optimizer.master:
        replace_config(forwarded, in_json(strip_tripwire(raw)))
    names = convert(model, quant.linear) if quant.linear else []
    # Diagnostics are of this run, and no part of the model.
    if quant.linear or quant.optimizer or quant.communication:
        write_to_model_config(model, {key: part for key, part in raw["ds_quant"].items() if key != "diagnostics"})
    return Prepared(quant, job.choice, names, build, lines)


def replace_config(forwarded: dict[str, Any], config: dict[str, Any]) -> None:
    """Have DeepSpeed read `config`, wherever the user's came from."""
    forwarded["config"], forwarded["config_params"] = config, None
    if getattr(forwarded["args"], "deepspeed_config", None) is not None:
        # DeepSpeed refuses two configs.
        forwarded["args"] = copy.copy(forwarded["args"])
        forwarded["args"].deepspeed_config = None


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


def _prepare_moments(
    raw: dict[str, Any], config: OptimizerConfig, forwarded: dict[str, Any]
) -> tuple[Callable[[Any], QuantizedOptimizer] | None, list[str]]:
    """Check what the optimizer section needs, and have `forwarded` carry an optimizer or the groups for one.

    Returns what makes the optimizer (None where one was passed in), and lines for the user.
    """
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
        from ds_quant.engine.muon import ZeroMuon  # not above: it brings torch's compiler with it

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
            replace_config(forwarded, {**strip_tripwire(raw), "zero_force_ds_cpu_optimizer": False})
    lines = [f"{kind.label}: {setup.describe_moments(config, kind)}"]
    share = 100 * (1 - names.num_excluded / names.num_elements) if names.num_elements else 0.0
    size = setup.describe_size(config, kind)
    lines.append(f"they take {size}, for {share:.1f}% of the trainable parameters")
    if config.master:
        kept = "1 byte beside a bf16 weight" if config.master.bits == 24 else "nothing beside a bf16 weight"
        lines.append(f"{config.master.bits}-bit masters, rounded {config.master.rounding}: {kept}, instead of 4 bytes")
    if names.excluded:
        lines.append(f"32-bit moments by ds_quant.optimizer.exclude: {', '.join(names.excluded)}")
    return build, lines
