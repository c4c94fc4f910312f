"""QuantSGD: SGD whose momentum is stored in 8 or 4 bits. `ds_quant.numerics.sgd` says what a step computes."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.numerics.sgd import SGDScalars, sgd_rule, sgd_scalars
from ds_quant.optim.elementwise import ElementwiseOptimizer
from ds_quant.optim.group_options import GroupOptions, check_fixed, check_numbers


class QuantSGD(ElementwiseOptimizer):
    """SGD with momentum, as torch.optim.SGD has it, with `momentum_buffer` in few bits.

    Args:
        params: parameters or parameter groups, fp32, bf16 or fp16, of any shape. A group may have its own
            `momentum_buffer`; None keeps that group's buffer in 32 bits.
        lr: as in torch.optim.SGD; may be a tensor of one element.
        momentum: as there, but above 0: without it there is no state to quantize.
        dampening: as there.
        weight_decay: as there: added to the gradient, not decoupled.
        nesterov: as there.
        momentum_buffer: the object of the JSON's `ds_quant.optimizer.momentum_buffer` (or a `MomentConfig`), or None
            for 32 bits.
        seed: of stochastic rounding. Replicas must have the same one.

    A 32-bit buffer is fp32 whatever the parameter's dtype.

    Raises:
        ConfigError: arguments out of range, parameters of another dtype or without plain storage (DTensor); in `step`,
            sparse gradients.
    """

    STATES: ClassVar[dict[str, bool]] = {"momentum_buffer": True}
    rule = staticmethod(sgd_rule)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        momentum_buffer: Any,
        seed: int = 0,
    ):
        hyperparameters = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, {**hyperparameters, "momentum_buffer": momentum_buffer}, seed=seed)

    def check_group(self, group: dict[str, Any], where: str) -> None:
        """Raise ConfigError for hyperparameters out of range."""
        check_numbers(group, where, ("lr", "momentum", "weight_decay"))
        check_fixed(group, where)
        if not group["momentum"]:
            raise fail(f"{where}(momentum)", group["momentum"], "above 0", "without it there is no state to quantize")
        if group["nesterov"] and group["dampening"]:
            raise fail(f"{where}(dampening)", group["dampening"], "0 with nesterov, as in torch", "set it to 0")

    def group_options(self, group: dict[str, Any]) -> GroupOptions:
        """A parameter group as a step needs it."""
        options = super().group_options(group)
        # torch counts no steps: where there is a buffer without a count, the first step is done.
        options.step = 1 if options.step is None else options.step
        return options

    def scalars(self, group: dict[str, Any], step: int) -> SGDScalars:
        """Those of step number `step`, from 1."""
        lr, momentum, dampening, weight_decay = (
            float(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay")
        )
        return sgd_scalars(lr, momentum, dampening, weight_decay, bool(group["nesterov"]), step)
