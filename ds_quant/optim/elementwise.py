"""The base of optimizers whose step treats each element by itself: a rule of `ds_quant.numerics`, and its scalars.

`lion` and `sgd` show how one is written; how the step is done is the business of `ds_quant.kernels.elementwise`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ds_quant.kernels.elementwise import ops
from ds_quant.kernels.elementwise.work import ElementwiseWork
from ds_quant.optim.base import QuantizedOptimizer
from ds_quant.optim.group_options import GroupOptions
from ds_quant.optim.items import Item


class ElementwiseOptimizer(QuantizedOptimizer):
    """A `QuantizedOptimizer` that needs no `do_steps` of its own."""

    @staticmethod
    def rule(param: Tensor, grad: Tensor, states: Sequence[Tensor], scalars: Any) -> tuple[Tensor, list[Tensor]]:
        """What a step computes, as `ds_quant.numerics.elementwise.Rule` has it."""
        raise NotImplementedError

    def scalars(self, group: dict[str, Any], step: int) -> Any:
        """What `rule` takes as `scalars` in step number `step`, from 1, of a parameter group."""
        raise NotImplementedError

    def group_options(self, group: dict[str, Any]) -> GroupOptions:
        """A parameter group as a step needs it."""
        return _Options(self, group)

    def do_steps(self, items: Sequence[Item]) -> None:
        """One call of the kernel."""
        ops.elementwise_(
            [
                ElementwiseWork(
                    self.rule,
                    item.param,
                    item.grad,
                    item.states,
                    item.options.scalars(item.step),
                    item.keys,
                    item.stream,
                )
                for item in items
            ]
        )


class _Options(GroupOptions):
    """A parameter group with the scalars of its steps."""

    def __init__(self, optimizer: ElementwiseOptimizer, group: dict[str, Any]):
        super().__init__(group, optimizer.STATES)
        self._optimizer, self._group = optimizer, group
        self._scalars: dict[int, Any] = {}

    def scalars(self, step: int) -> Any:
        """Those of step number `step`, from 1."""
        if step not in self._scalars:
            self._scalars[step] = self._optimizer.scalars(self._group, step)
        return self._scalars[step]
