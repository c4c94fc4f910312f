"""The options of a parameter group: checked, with all defaults written out, and as a step needs them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.config import ConfigError, MomentConfig, OptimizerConfig
from ds_quant.numerics.blockwise import group_size
from ds_quant.numerics.codes import CodeMap, code_map
from ds_quant.numerics.format import Format, Group
from ds_quant.numerics.integer import DTYPES

MOMENTS = ("exp_avg", "exp_avg_sq")

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")

FIXED = {"amsgrad": False, "bias_correction": True, "differentiable": False, "maximize": False}
"""Options of other AdamWs (and SGDs) that change the function, and what the optimizers here compute."""

DEFAULT_ROUNDING = "stochastic"
"""What `"rounding": null` means: of either moment, and whatever its bits (docs/moments.md has the measurements)."""


class GroupOptions:
    """A parameter group as a step needs it.

    Attributes:
        stochastic: (name, whether it is rounded stochastically) of each of `states`.
        step: the steps done, in groups of DeepSpeed's FusedAdam, which counts there.
    """

    def __init__(self, group: dict[str, Any], states: dict[str, bool]):
        self._objects = [(group[name], is_signed) for name, is_signed in states.items()]
        self.stochastic = [
            (name, bool(group[name]) and (group[name]["rounding"] or DEFAULT_ROUNDING) == "stochastic")
            for name in states
        ]
        self._by_shape = any(stored and stored["granularity"] != "block" for stored, _ in self._objects)
        self._formats = self._formats_of(())
        self.step = group.get("step")

    def shape(self, param: Tensor) -> torch.Size:
        """Shape of the states of `param`."""
        return param.shape

    def formats(self, param: Tensor) -> list[Format[CodeMap] | None]:
        """How the states of `param` are stored, in the order of `states`; None for 32 bits."""
        return self._formats_of(param.shape) if self._by_shape else self._formats

    def _formats_of(self, shape: Sequence[int]) -> list[Format[CodeMap] | None]:
        formats: list[Format[CodeMap] | None] = []
        for stored, is_signed in self._objects:
            if stored is None:
                formats.append(None)
            else:
                map_ = code_map(stored["map"], stored["bits"], signed=is_signed)
                # Granularities of whole parameters are blocks of the flattened tensor, too.
                size = group_size(shape, stored["granularity"], stored.get("block_size", 0))
                formats.append(Format(map_, Group("block", size)))
        return formats


def moment_options(exp_avg: Any, exp_avg_sq: Any) -> dict[str, dict[str, Any] | None]:
    """The options of a group of QuantAdamW that say how its moments are stored, with all defaults written out."""
    return {"exp_avg": state_option(exp_avg, "exp_avg"), "exp_avg_sq": state_option(exp_avg_sq, "exp_avg_sq")}


def state_option(value: Any, name: str, owner: str = "QuantAdamW") -> dict[str, Any] | None:
    """The JSON object of a state with all its defaults, or None for 32 bits."""
    if value is None:
        return None
    try:
        if name not in OptimizerConfig.model_fields:
            return MomentConfig.parse(value).model_dump()
        moment: MomentConfig = getattr(OptimizerConfig.parse({name: value}), name)
    except ConfigError as error:
        text = str(error)
        for where in (f"{OptimizerConfig.where}.{name}", MomentConfig.where):
            text = text.replace(where, f"{owner}({name})")
        raise ConfigError(text) from None
    return moment.model_dump()


def check_hyperparameters(options: dict[str, Any], where: str = "QuantAdamW") -> None:
    """Raise ConfigError where lr, betas, eps or weight_decay is out of range, or where an option is not as in FIXED."""
    check_numbers(options, where, ("lr", "eps", "weight_decay"))
    check_betas(options, where)
    check_fixed(options, where)


def check_numbers(options: dict[str, Any], where: str, names: Iterable[str]) -> None:
    """Raise ConfigError where an option is no number from 0 on, or a tensor of one."""
    for name in names:
        value = options[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise fail(f"{where}({name})", f"a tensor of {value.numel()} elements", "one element", "pass a number")
        if not _number(value) >= 0:
            raise fail(f"{where}({name})", _shown(value), "a number, 0 or more", "set it so")


def check_betas(options: dict[str, Any], where: str, count: int = 2) -> None:
    """Raise ConfigError unless `betas` are `count` numbers from 0 to below 1."""
    betas = options["betas"]
    as_many = isinstance(betas, tuple | list) and len(betas) == count
    if not as_many or not all(0 <= _number(beta) < 1 for beta in betas):
        words = {2: "two", 3: "three"}
        raise fail(f"{where}(betas)", _shown(betas), f"{words[count]} numbers from 0 to below 1", "set them so")


def check_fixed(options: dict[str, Any], where: str) -> None:
    """Raise ConfigError where an option is not as in FIXED."""
    for name, wanted in FIXED.items():
        if bool(options.get(name, wanted)) != wanted:
            raise fail(f"{where}({name})", options[name], str(wanted), "leave it out: it computes another function")


def check_parameters(params: Iterable[Tensor], where: str) -> None:
    """Raise ConfigError for a parameter that QuantAdamW cannot step."""
    for param in params:
        if param.dtype not in DTYPES:
            raise fail(
                where,
                f"a parameter of {param.dtype}",
                "torch.float32, torch.bfloat16, torch.float16",
                "cast the parameter, or leave it to another optimizer",
            )
        if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise fail(
                where,
                f"a parameter of class {type(param).__qualname__}",
                "plain tensors, whose elements lie in memory",
                "shard with DeepSpeed's ZeRO in place of DTensor, or use torch.optim.AdamW",
            )


def _number(value: Any) -> float:
    """`value` as a float; NaN, which no comparison allows, where it is no number."""
    return float(value) if isinstance(value, int | float | Tensor) else float("nan")


def _shown(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return [_shown(item) for item in value] if isinstance(value, tuple | list) else value
