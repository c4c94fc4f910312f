"""From the JSON and the user's arguments to a QuantAdamW: what is checked, which parameters keep 32-bit moments."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.base.log import warn
from ds_quant.base.patterns import check_patterns, matches
from ds_quant.config import MomentConfig, OptimizerConfig
from ds_quant.optim.adamw import QuantAdamW
from ds_quant.optim.adopt import convert_adamw
from ds_quant.optim.group_options import DEFAULT_ROUNDING, HYPERPARAMETERS, MOMENTS
from ds_quant.optim.group_options import FIXED as FIXED_IN_GROUPS

IMPLEMENTATIONS = ("torch_adam", "fused", "foreach", "capturable")
"""Keys of DeepSpeed's and torch's AdamW that choose between implementations of one function: QuantAdamW is another."""

FIXED = {**FIXED_IN_GROUPS, "adam_w_mode": True, "fp32_optimizer_states": True}
"""Keys that change the function, and what QuantAdamW computes."""


def json_hyperparameters(raw: dict[str, Any]) -> dict[str, Any]:
    """lr, betas, eps and weight_decay of the JSON's `optimizer` section, as far as they are there.

    weight_decay is always there: its default is that of the implementation which DeepSpeed would have taken.

    Raises:
        ConfigError: no such section, a type other than Adam or AdamW, a parameter that QuantAdamW does not have.
    """
    section = raw.get("optimizer")
    if not isinstance(section, dict) or not section.get("type"):
        raise fail(
            "optimizer",
            section,
            "an optimizer of type Adam or AdamW with ds_quant.optimizer",
            'add "optimizer": {"type": "AdamW", "params": {...}}, or pass torch.optim.AdamW to initialize',
        )
    kind = section["type"]
    if str(kind).lower() not in ("adam", "adamw"):
        raise fail(
            "optimizer.type",
            kind,
            '"Adam", "AdamW" with ds_quant.optimizer (it quantizes the moments of Adam)',
            'set "AdamW", or remove ds_quant.optimizer',
        )
    found: dict[str, Any] = {}
    params = section.get("params") or {}
    for key, value in params.items():
        where = f"optimizer.params.{key}"
        if key in HYPERPARAMETERS:
            found[key] = value
        elif key == "adam_w_mode" and str(kind).lower() == "adamw":
            continue  # DeepSpeed decouples the weight decay of "AdamW" whatever this says
        elif key in FIXED:
            if bool(value) != FIXED[key]:
                raise fail(
                    where, value, f"{str(FIXED[key]).lower()} with ds_quant.optimizer", "set it so, or remove it"
                )
        elif key not in IMPLEMENTATIONS:
            allowed = ", ".join((*HYPERPARAMETERS, *FIXED, *IMPLEMENTATIONS))
            raise fail(where, value, f"{allowed} with ds_quant.optimizer", "remove it")
    if isinstance(found.get("betas"), list):
        found["betas"] = tuple(found["betas"])
    # DeepSpeed's own implementations leave the weights alone where no decay is set; torch's takes 0.01.
    found.setdefault("weight_decay", 0.01 if params.get("torch_adam") else 0.0)
    return found


def check_granularity(config: OptimizerConfig, stage: int) -> None:
    """Refuse a scale per tensor or channel where ZeRO flattens and partitions the parameters.

    Warns of a first moment rounded to nearest, which those granularities may have.

    Raises:
        ConfigError: granularity "tensor" or "channel" at a stage above 0.
    """
    for name in MOMENTS:
        moment: MomentConfig | None = getattr(config, name)
        if moment and moment.granularity != "block" and stage > 0:
            raise fail(
                f"ds_quant.optimizer.{name}.granularity",
                moment.granularity,
                f'"block" at ZeRO stage {stage}, which flattens the parameters and cuts them up',
                'set "block", or zero_optimization.stage to 0',
            )
    if config.exp_avg and config.exp_avg.rounding == "nearest":
        warn(
            "ds_quant.optimizer.exp_avg is rounded to nearest, as in the paper: small values never decay, so that "
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

    def split(self, model_parameters: Any) -> Any:
        """`model_parameters` of initialize, as groups in which the excluded parameters keep 32-bit moments.

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
                split.append({**group, "params": excluded, "exp_avg": None, "exp_avg_sq": None, **named})
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
                group["exp_avg"] = group["exp_avg_sq"] = None
            elif any(inside):
                names = [name for name, param in self.excluded.items() if any(param is p for p in group["params"])]
                raise fail(
                    "ds_quant.optimizer.exclude",
                    f"{names[0]} in parameter group {number}, beside parameters that are not excluded",
                    "groups of one kind in an optimizer that was passed in",
                    "give the excluded parameters groups of their own, or let the config's optimizer section make it",
                )


def builder(config: OptimizerConfig, hyperparameters: dict[str, Any]) -> Callable[[Any], QuantAdamW]:
    """A function from parameters or groups to a QuantAdamW."""

    def build(params: Any) -> QuantAdamW:
        return QuantAdamW(params, **hyperparameters, exp_avg=config.exp_avg, exp_avg_sq=config.exp_avg_sq)

    return build


def adopt(config: OptimizerConfig, names: ParameterNames, client: Any) -> Any:
    """The `optimizer` argument of initialize, an optimizer or a function that makes one, as a QuantAdamW or so."""
    if isinstance(client, torch.optim.Optimizer):
        return _adopt_optimizer(config, names, client)

    def call(*args: Any, **kwargs: Any) -> QuantAdamW:
        return _adopt_optimizer(config, names, client(*args, **kwargs))

    return call


def _adopt_optimizer(config: OptimizerConfig, names: ParameterNames, optimizer: Any) -> QuantAdamW:
    names.mark(optimizer)
    return convert_adamw(optimizer, exp_avg=config.exp_avg, exp_avg_sq=config.exp_avg_sq)


def describe_moments(config: OptimizerConfig) -> str:
    """The optimizer section in a line."""
    parts = []
    for name in MOMENTS:
        moment: MomentConfig | None = getattr(config, name)
        if moment is None:
            parts.append(f"{name} 32-bit")
            continue
        group = f"block of {moment.block_size}" if moment.granularity == "block" else moment.granularity
        parts.append(f"{name} {moment.bits}-bit {moment.map} per {group}, {moment.rounding or DEFAULT_ROUNDING}")
    return "; ".join(parts)


def bytes_a_parameter(config: OptimizerConfig) -> float:
    """Bytes of both moments of a quantized parameter, scales included, where a scale covers a block."""
    total = 0.0
    for name in MOMENTS:
        moment: MomentConfig | None = getattr(config, name)
        if moment is None:
            total += 4
        else:
            total += moment.bits / 8 + (4 / moment.block_size if moment.granularity == "block" else 0)
    return total


def _numel(param: Tensor) -> int:
    return int(getattr(param, "ds_numel", param.numel()))
