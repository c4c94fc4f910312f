"""QuantAdEMAMix: AdEMAMix with moments in 8 or 4 bits. `ds_quant.numerics.ademamix` says what a step computes."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.numerics.ademamix import AdEMAMixScalars, ademamix_rule, ademamix_scalars
from ds_quant.optim.elementwise import ElementwiseOptimizer
from ds_quant.optim.group_options import check_betas, check_fixed, check_numbers


class QuantAdEMAMix(ElementwiseOptimizer):
    """AdEMAMix (arXiv 2409.03137) with `exp_avg_fast`, `exp_avg_slow` and `exp_avg_sq` in few bits.

    Args:
        params: parameters or parameter groups, fp32, bf16 or fp16, of any shape. A group may have its own states; None
            keeps that group's state in 32 bits.
        lr: as in AdamW; may be a tensor of one element.
        betas: of the fast moment, of the second moment, and of the slow moment.
        alpha: weight of the slow moment in the update.
        eps: as in AdamW.
        weight_decay: decoupled, as in AdamW.
        t_alpha: steps over which alpha grows to its value; None: it has it from the start.
        t_beta3: the same of the slow moment's beta.
        exp_avg_fast: the object of the JSON's `ds_quant.optimizer.exp_avg_fast` (or a `MomentConfig`), or None for 32
            bits.
        exp_avg_slow: the same of `exp_avg_slow`.
        exp_avg_sq: the same of `exp_avg_sq`.
        seed: of stochastic rounding. Replicas must have the same one.

    32-bit moments are fp32 whatever the parameter's dtype.

    Raises:
        ConfigError: arguments out of range, parameters of another dtype or without plain storage (DTensor); in `step`,
            sparse gradients.
    """

    STATES: ClassVar[dict[str, bool]] = {"exp_avg_fast": True, "exp_avg_slow": True, "exp_avg_sq": False}
    rule = staticmethod(ademamix_rule)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        *,
        exp_avg_fast: Any,
        exp_avg_slow: Any,
        exp_avg_sq: Any,
        seed: int = 0,
    ):
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
        }
        states = {"exp_avg_fast": exp_avg_fast, "exp_avg_slow": exp_avg_slow, "exp_avg_sq": exp_avg_sq}
        super().__init__(params, hyperparameters | states, seed=seed)

    def check_group(self, group: dict[str, Any], where: str) -> None:
        """Raise ConfigError for hyperparameters out of range."""
        check_numbers(group, where, ("lr", "alpha", "eps", "weight_decay"))
        check_betas(group, where, count=3)
        check_fixed(group, where)
        for name in ("t_alpha", "t_beta3"):
            steps = group[name]
            if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
                raise fail(f"{where}({name})", steps, "a number of steps, 1 or more, or null", "set it so")

    def scalars(self, group: dict[str, Any], step: int) -> AdEMAMixScalars:
        """Those of step number `step`, from 1."""
        betas = [float(beta) for beta in group["betas"]]
        return ademamix_scalars(
            float(group["lr"]),
            betas,
            float(group["alpha"]),
            group["t_alpha"],
            group["t_beta3"],
            float(group["eps"]),
            float(group["weight_decay"]),
            step,
        )
