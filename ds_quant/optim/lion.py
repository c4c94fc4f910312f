"""QuantLion: Lion whose moment is stored in 8 or 4 bits. `ds_quant.numerics.lion` says what a step computes."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from ds_quant.numerics.lion import LionScalars, lion_rule, lion_scalars
from ds_quant.optim.elementwise import ElementwiseOptimizer
from ds_quant.optim.group_options import check_betas, check_fixed, check_numbers


class QuantLion(ElementwiseOptimizer):
    """Lion (arXiv 2302.06675) with `exp_avg` in few bits.

    Args:
        params: parameters or parameter groups, fp32, bf16 or fp16, of any shape. A group may have its own `exp_avg`;
            None keeps that group's moment in 32 bits.
        lr: the length of each element's move; a third to a tenth of AdamW's. May be a tensor of one element.
        betas: shares of the old moment in the direction, and in the new moment.
        weight_decay: decoupled, as in AdamW; three to ten times AdamW's.
        exp_avg: the object of the JSON's `ds_quant.optimizer.exp_avg` (or a `MomentConfig`), or None for 32 bits.
        seed: of stochastic rounding. Replicas must have the same one.

    A 32-bit moment is fp32 whatever the parameter's dtype.

    Raises:
        ConfigError: arguments out of range, parameters of another dtype or without plain storage (DTensor); in `step`,
            sparse gradients.
    """

    STATES: ClassVar[dict[str, bool]] = {"exp_avg": True}
    rule = staticmethod(lion_rule)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        exp_avg: Any,
        seed: int = 0,
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "exp_avg": exp_avg}, seed=seed
        )

    def check_group(self, group: dict[str, Any], where: str) -> None:
        """Raise ConfigError for hyperparameters out of range."""
        check_numbers(group, where, ("lr", "weight_decay"))
        check_betas(group, where)
        check_fixed(group, where)

    def scalars(self, group: dict[str, Any], step: int) -> LionScalars:
        """Those of any step."""
        return lion_scalars(float(group["lr"]), [float(beta) for beta in group["betas"]], float(group["weight_decay"]))
