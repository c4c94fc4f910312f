"""From the JSON and the user's arguments to an optimizer: what is checked, which parameters keep 32-bit states."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.base.log import warn
from ds_quant.base.patterns import check_patterns, matches
from ds_quant.config import MomentConfig, OptimizerConfig
from ds_quant.numerics.codes import KINDS
from ds_quant.optim.adopt import check_agreement, convert_adamw
from ds_quant.optim.base import QuantizedOptimizer
from ds_quant.optim.group_options import DEFAULT_ROUNDING, MOMENTS
from ds_quant.optim.kinds import ADAM, SGD, TYPES, Kind, check_states, kind_named
from ds_quant.optim.muon import MOMENTUM, QuantMuon


def json_hyperparameters(raw: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the JSON's `optimizer` section, as far as they are there: of AdamW lr, betas, eps, weight_decay.

    Those whose default is another one in what DeepSpeed would have taken, as AdamW's weight_decay, are always there.

    Raises:
        ConfigError: no such section, a type that is not in TYPES, a parameter that the optimizer does not have.
    """
    section = raw.get("optimizer")
    if not isinstance(section, dict) or not section.get("type"):
        raise fail(
            "optimizer",
            section,
            f"an optimizer of type {', '.join(TYPES[:-1])} or {TYPES[-1]} with ds_quant.optimizer",
            'add "optimizer": {"type": "AdamW", "params": {...}}, or pass torch.optim.AdamW to initialize',
        )
    kind = kind_named(section["type"])
    if kind is None:
        raise fail(
            "optimizer.type",
            section["type"],
            ", ".join(json.dumps(name) for name in TYPES) + " with ds_quant.optimizer",
            'set "AdamW", or remove ds_quant.optimizer',
        )
    found: dict[str, Any] = {}
    params = section.get("params") or {}
    for key, value in params.items():
        where = f"optimizer.params.{key}"
        if key in kind.hyperparameters:
            found[key] = value
        elif key == "adam_w_mode" and str(section["type"]).lower() == "adamw":
            continue  # DeepSpeed decouples the weight decay of "AdamW" whatever this says
        elif key in kind.fixed:
            if bool(value) != kind.fixed[key]:
                allowed = f"{str(kind.fixed[key]).lower()} with ds_quant.optimizer"
                raise fail(where, value, allowed, "set it so, or remove it")
        elif key not in kind.implementations:
            keys = ", ".join((*kind.hyperparameters, *kind.fixed, *kind.implementations))
            raise fail(where, value, f"{keys} with ds_quant.optimizer", "remove it")
    if isinstance(found.get("betas"), list):
        found["betas"] = tuple(found["betas"])
    found = kind.defaults(params) | found
    if kind is SGD and not found["momentum"]:
        where, reason = "optimizer.params.momentum", "without momentum SGD has no state to quantize"
        raise fail(where, found["momentum"], "above 0 with ds_quant.optimizer", f"set it: {reason}")
    return found


def check_granularity(config: OptimizerConfig, stage: int) -> None:
    """Refuse a scale per tensor or channel where ZeRO flattens and partitions the parameters.

    Warns of a first moment rounded to nearest, which those granularities may have.

    Raises:
        ConfigError: granularity "tensor" or "channel" at a stage above 0.
    """
    for name, moment in config.states().items():
        if moment.granularity != "block" and stage > 0:
            raise fail(
                f"ds_quant.optimizer.{name}.granularity",
                moment.granularity,
                f'"block" at ZeRO stage {stage}, which flattens the parameters and cuts them up',
                'set "block", or zero_optimization.stage to 0',
            )
        if moment.rounding == "nearest" and name != "exp_avg_sq":
            warn(
                f"ds_quant.optimizer.{name} is rounded to nearest, as in the paper: small values never decay, so that "
                "parameters whose gradients end move on for ever"
            )


class ParameterNames:
    """Which parameters of a model keep 32-bit moments by `optimizer.exclude`.

    Raises:
        ConfigError: a pattern that matches no trainable parameter, or all of them.
    """

    def __init__(self, model: nn.Module, exclude: Iterable[str]):
        trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
        exclude = tuple(exclude)
        check_patterns("ds_quant.optimizer.exclude", "trainable parameter", exclude, list(trainable))
        self.excluded = {name: param for name, param in trainable.items() if matches(name, exclude)}
        self._ids = {id(param) for param in self.excluded.values()}
        self.num_elements = sum(map(_numel, trainable.values()))
        self.num_excluded = sum(map(_numel, self.excluded.values()))
        if trainable and len(self.excluded) == len(trainable):
            raise fail(
                "ds_quant.optimizer.exclude",
                list(exclude),
                "patterns that leave a parameter to quantize",
                "correct them, or remove ds_quant.optimizer",
            )
        self._trainable: list[Any] = list(trainable.values())

    def split(self, model_parameters: Any, states: Iterable[str] = MOMENTS) -> Any:
        """`model_parameters` of initialize, as groups in which the excluded parameters keep 32-bit `states`.

        Without excluded parameters it is returned as it is.
        """
        if not self.excluded:
            return model_parameters
        given: list[Any] = self._trainable if model_parameters is None else list(model_parameters)
        groups: list[dict[str, Any]] = (
            given if given and isinstance(given[0], dict) else [{"params": given, "name": "params"}]
        )
        split = []
        for group in groups:
            params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            quantized = [param for param in params if not self._excludes(param)]
            excluded = [param for param in params if self._excludes(param)]
            if quantized:
                split.append({**group, "params": quantized})
            if excluded:
                # DeepSpeed keys the groups of a mixture of experts by their names.
                named = {"name": f"{group['name']}-32-bit-moments"} if "name" in group else {}
                split.append({**group, "params": excluded, **dict.fromkeys(states), **named})
        return split

    def _excludes(self, param: Any) -> bool:
        """`param` as torch's optimizers take it: a tensor, or a pair of name and tensor."""
        return id(param[1] if isinstance(param, tuple) else param) in self._ids

    def mark(self, optimizer: torch.optim.Optimizer) -> None:
        """Have groups of a live optimizer whose parameters are all excluded keep 32-bit moments.

        Raises:
            ConfigError: a group of both kinds. Its schedulers count on the number of groups: it cannot be split.
        """
        for number, group in enumerate(optimizer.param_groups):
            inside = [id(param) in self._ids for param in group["params"]]
            if all(inside) and inside:
                group.update(dict.fromkeys(optimizer.STATES if isinstance(optimizer, QuantizedOptimizer) else MOMENTS))
            elif any(inside):
                names = [name for name, param in self.excluded.items() if any(param is p for p in group["params"])]
                raise fail(
                    "ds_quant.optimizer.exclude",
                    f"{names[0]} in parameter group {number}, beside parameters that are not excluded",
                    "groups of one kind in an optimizer that was passed in",
                    "give the excluded parameters groups of their own, or let the config's optimizer section make it",
                )


def builder(
    config: OptimizerConfig, hyperparameters: dict[str, Any], kind: Kind = ADAM
) -> Callable[[Any], QuantizedOptimizer]:
    """A function from parameters or groups to the optimizer of the JSON."""

    def build(params: Any) -> QuantizedOptimizer:
        states = {name: getattr(config, name) for name in kind.optimizer.STATES}
        made: Callable[..., QuantizedOptimizer] = kind.optimizer
        return made(params, **hyperparameters, **states)

    return build


def adopt(config: OptimizerConfig, names: ParameterNames, client: Any) -> Any:
    """The `optimizer` argument of initialize, an optimizer or a function that makes one, with quantized states."""
    if isinstance(client, torch.optim.Optimizer):
        return _adopt_optimizer(config, names, client)

    def call(*args: Any, **kwargs: Any) -> QuantizedOptimizer:
        return _adopt_optimizer(config, names, client(*args, **kwargs))

    return call


def _adopt_optimizer(config: OptimizerConfig, names: ParameterNames, optimizer: Any) -> QuantizedOptimizer:
    names.mark(optimizer)
    if isinstance(optimizer, QuantizedOptimizer):
        check_states(config, type(optimizer), type(optimizer).__name__)
        check_agreement(optimizer, {name: getattr(config, name, None) for name in optimizer.STATES})
        return optimizer
    check_states(config, ADAM.optimizer, ADAM.name)
    return convert_adamw(optimizer, exp_avg=config.exp_avg, exp_avg_sq=config.exp_avg_sq)


def describe_moments(config: OptimizerConfig, kind: Kind = ADAM) -> str:
    """The optimizer section in a line."""
    parts = []
    for name in kind.optimizer.STATES:
        moment: MomentConfig | None = getattr(config, name)
        if moment is None:
            of_muon = name == MOMENTUM and issubclass(kind.optimizer, QuantMuon)
            parts.append(f"{name} {'in the dtype of gradients' if of_muon else '32-bit'}")
            continue
        group = f"block of {moment.block_size}" if moment.granularity == "block" else moment.granularity
        parts.append(f"{name} {moment.bits}-bit {moment.map} per {group}, {moment.rounding or DEFAULT_ROUNDING}")
    return "; ".join(parts)


def describe_size(config: OptimizerConfig, kind: Kind = ADAM) -> str:
    """Bytes a parameter of the states, and of those that the optimizer would have without the section."""
    if not issubclass(kind.optimizer, QuantMuon):
        return f"{bytes_a_parameter(config, kind):.2f} bytes a parameter instead of {4 * len(kind.optimizer.STATES)}"
    adamw = f"{bytes_a_parameter(config, kind, MOMENTS):.2f} bytes a parameter of AdamW's instead of 8"
    if config.momentum_buffer is None:
        return f"{adamw}, and those of two gradients for Muon's"
    momentum = bytes_a_parameter(config, kind, [MOMENTUM])
    return f"{momentum:.2f} bytes a parameter of Muon's instead of those of two gradients, {adamw}"


def bytes_a_parameter(config: OptimizerConfig, kind: Kind = ADAM, names: Iterable[str] | None = None) -> float:
    """Bytes of all states of a quantized parameter, or of `names`, scales included, where a scale covers a block."""
    total = 0.0
    for name in kind.optimizer.STATES if names is None else names:
        moment: MomentConfig | None = getattr(config, name)
        if moment is None:
            total += 4
        else:
            scales = 4 * KINDS[moment.map].scales
            total += moment.bits / 8 + (scales / moment.block_size if moment.granularity == "block" else 0)
    return total


def _numel(param: Tensor) -> int:
    return int(getattr(param, "ds_numel", param.numel()))
