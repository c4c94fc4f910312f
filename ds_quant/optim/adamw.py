"""QuantAdamW: AdamW whose moments are stored in 8 or 4 bits.

A step is one fused pass over param, grad and moments (`ds_quant.kernels`); what it computes stands in
`ds_quant.numerics.adam`. `base` has all that is not AdamW's own: a moment is a `QuantizedState` in `optimizer.state`,
and where it should be quantized but is a plain tensor, as after loading a checkpoint of another AdamW or a universal
one, it is quantized before it is used.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ds_quant.kernels.adamw import ops
from ds_quant.kernels.adamw.work import AdamWWork, MastersWork
from ds_quant.numerics.adam import AdamWScalars, adamw_scalars
from ds_quant.optim.base import QuantizedOptimizer
from ds_quant.optim.group_options import GroupOptions, check_hyperparameters
from ds_quant.optim.items import Item, MasterItem


class QuantAdamW(QuantizedOptimizer):
    """AdamW (arXiv 1711.05101) with `exp_avg` and `exp_avg_sq` in few bits.

    Args:
        params: parameters or parameter groups, fp32, bf16 or fp16, of any shape. A group may have its own
            `exp_avg` and `exp_avg_sq`; None keeps that group's moment in 32 bits.
        lr: as in torch.optim.AdamW; may be a tensor of one element.
        betas: as in torch.optim.AdamW.
        eps: as in torch.optim.AdamW.
        weight_decay: as in torch.optim.AdamW.
        exp_avg: the object of the JSON's `ds_quant.optimizer.exp_avg` (or a `MomentConfig`), or None for 32 bits.
        exp_avg_sq: the same of `exp_avg_sq`.
        seed: of stochastic rounding. Replicas must have the same one.

    32-bit moments are fp32 whatever the parameter's dtype.

    Raises:
        ConfigError: arguments out of range, parameters of another dtype or without plain storage (DTensor), amsgrad
            and the like in a group; in `step`, sparse gradients.
    """

    STATES: ClassVar[dict[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        exp_avg: Any,
        exp_avg_sq: Any,
        seed: int = 0,
    ):
        hyperparameters = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**hyperparameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, seed=seed)

    def check_group(self, group: dict[str, Any], where: str) -> None:
        """Raise ConfigError for hyperparameters out of range, and for options that make another function of it."""
        check_hyperparameters(group, where)

    def group_options(self, group: dict[str, Any]) -> "AdamWOptions":
        """A parameter group as a step needs it."""
        return AdamWOptions(group, self.STATES)

    def do_steps(self, items: Sequence[Item]) -> None:
        """One call of the fused kernel."""
        adamw_steps(items)

    def do_master_steps(self, items: Sequence[MasterItem]) -> None:
        """One call of the fused kernel, where it takes masters."""
        if ops.fuses_masters(items[0].item.param.device):
            ops.adamw_masters_([MastersWork(_work(item), low_bits, key) for item, low_bits, key in items])
        else:
            super().do_master_steps(items)


def adamw_steps(items: Sequence[Item]) -> None:
    """AdamW's steps of `items`, whose options are AdamWOptions, by one call of the fused kernel."""
    ops.adamw_([_work(item) for item in items])


def _work(item: Item) -> AdamWWork:
    param, grad, (exp_avg, exp_avg_sq), keys, stream, step, options = item
    return AdamWWork(param, grad, exp_avg, exp_avg_sq, options.scalars(step), keys[0], keys[1], stream)


class AdamWOptions(GroupOptions):
    """A parameter group of AdamW, with the scalars of its steps."""

    def __init__(self, group: dict[str, Any], states: dict[str, bool]):
        super().__init__(group, states)
        first, second = group["betas"]
        betas = (float(first), float(second))
        self._hyperparameters = float(group["lr"]), betas, float(group["eps"]), float(group["weight_decay"])
        self._scalars: dict[int, AdamWScalars] = {}

    def scalars(self, step: int) -> AdamWScalars:
        """Those of step number `step`, from 1."""
        found = self._scalars.get(step)
        if found is None:
            found = self._scalars[step] = adamw_scalars(*self._hyperparameters, step)
        return found
