"""The options of a parameter group of QuantAdamW: checked, with all defaults written out, and as a step needs them."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.config import ConfigError, MomentConfig, OptimizerConfig
from ds_quant.numerics.adam import AdamWScalars, adamw_scalars
from ds_quant.numerics.blockwise import group_size
from ds_quant.numerics.codes import CodeMap, code_map
from ds_quant.numerics.integer import DTYPES

MOMENTS = ("exp_avg", "exp_avg_sq")

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")

FIXED = {"amsgrad": False, "bias_correction": True, "differentiable": False, "maximize": False}
"""Options of other AdamWs that change the function, and what QuantAdamW computes."""

DEFAULT_ROUNDING = "stochastic"
"""What `"rounding": null` means: of either moment, and whatever its bits (docs/moments.md has the measurements)."""


Format = tuple[CodeMap, int]
"""Code map and block size of a quantized moment."""


class GroupOptions:
    """A parameter group as a step needs it.

    Attributes:
        stochastic: whether each moment is rounded stochastically, in the order of MOMENTS.
        step: the steps done, in groups of DeepSpeed's FusedAdam, which counts there.
    """

    def __init__(self, group: dict[str, Any]):
        first, second = group["betas"]
        betas = (float(first), float(second))
        self._hyperparameters = float(group["lr"]), betas, float(group["eps"]), float(group["weight_decay"])
        self._scalars: dict[int, AdamWScalars] = {}
        self._objects = [group[name] for name in MOMENTS]
        self.stochastic = tuple(
            bool(moment) and (moment["rounding"] or DEFAULT_ROUNDING) == "stochastic" for moment in self._objects
        )
        self._by_shape = any(moment and moment["granularity"] != "block" for moment in self._objects)
        self._formats = self._formats_of(())
        self.step = group.get("step")

    def scalars(self, step: int) -> AdamWScalars:
        """Those of step number `step`, from 1."""
        found = self._scalars.get(step)
        if found is None:
            found = self._scalars[step] = adamw_scalars(*self._hyperparameters, step)
        return found

    def formats(self, param: Tensor) -> list[Format | None]:
        """How the moments of `param` are stored, in the order of MOMENTS; None for 32 bits."""
        return self._formats_of(param.shape) if self._by_shape else self._formats

    def _formats_of(self, shape: Sequence[int]) -> list[Format | None]:
        formats: list[Format | None] = []
        for name, moment in zip(MOMENTS, self._objects, strict=True):
            if moment is None:
                formats.append(None)
            else:
                map_ = code_map(moment["map"], moment["bits"], signed=name == "exp_avg")
                formats.append((map_, group_size(shape, moment["granularity"], moment.get("block_size", 0))))
        return formats


def moment_options(exp_avg: Any, exp_avg_sq: Any) -> dict[str, dict[str, Any] | None]:
    """The options of a parameter group that say how its moments are stored, with all defaults written out."""
    return {"exp_avg": moment_option(exp_avg, "exp_avg"), "exp_avg_sq": moment_option(exp_avg_sq, "exp_avg_sq")}


def moment_option(value: Any, name: str) -> dict[str, Any] | None:
    """The JSON object of a moment with all its defaults, or None for 32 bits."""
    if value is None:
        return None
    try:
        parsed = OptimizerConfig.parse({name: value})
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{OptimizerConfig.where}.{name}", f"QuantAdamW({name})")) from None
    moment: MomentConfig = getattr(parsed, name)
    return moment.model_dump()


def check_hyperparameters(options: dict[str, Any], where: str = "QuantAdamW") -> None:
    """Raise ConfigError where lr, betas, eps or weight_decay is out of range, or where an option is not as in FIXED."""
    for name in ("lr", "eps", "weight_decay"):
        value = options[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise fail(f"{where}({name})", f"a tensor of {value.numel()} elements", "one element", "pass a number")
        if not _number(value) >= 0:
            raise fail(f"{where}({name})", _shown(value), "a number, 0 or more", "set it so")
    betas = options["betas"]
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not pair or not all(0 <= _number(beta) < 1 for beta in betas):
        raise fail(f"{where}(betas)", _shown(betas), "two numbers from 0 to below 1", "set them so")
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
