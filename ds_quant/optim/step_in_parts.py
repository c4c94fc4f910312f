"""A step of masters of few bits that is done part after part, as their gradients come."""

from typing import Any

import torch
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.optim.base import QuantizedOptimizer, Step
from ds_quant.optim.items import Item, master_item
from ds_quant.optim.master import MasterTensor


class StepInParts:
    """One step of all masters of `optimizer`; in any order of the parts it has the bits of `optimizer.step()`.

    Hyperparameters are those that the groups have when it is made. A step counts when it is finished.
    """

    def __init__(self, optimizer: QuantizedOptimizer):
        self._optimizer = optimizer
        self._shared = Step(optimizer)
        self._items: dict[int, Item] = {}
        # Of all groups at once, in their order: random bits depend on the order in which states were made.
        for group in optimizer.param_groups:
            options = optimizer.group_options(group)
            for masters in group["params"]:
                # No method of the masters makes it: they would be expanded to fp32, all at once.
                no_gradient = torch.empty(0, dtype=masters.dtype, device=masters.device)
                self._items[id(masters)] = self._shared.item(
                    masters, masters, no_gradient, optimizer.state[masters], options
                )
        self._options = [_copied(group) for group in optimizer.param_groups]

    def step(self, masters: MasterTensor, number: int, grad: Tensor) -> None:
        """Step part `number` of `masters`; `grad`, contiguous, is of as many elements."""
        item = self._items[id(masters)]
        part = master_item(masters, number, item, grad, self._shared.key(item.step))
        with torch.no_grad():
            self._optimizer.do_master_steps([part])

    def check_options(self) -> None:
        """Raise ConfigError where a group's hyperparameters are no longer those that the parts were stepped with."""
        for number, (group, before) in enumerate(zip(self._optimizer.param_groups, self._options, strict=True)):
            now = _copied(group)
            for name, old in before.items():
                if now.get(name) != old:
                    raise fail(
                        f"ds_quant.optimizer.release_gradients: {name} of parameter group {number}",
                        f"{now.get(name)} after a backward that began with {old}",
                        "the same from the backward to engine.step(), since parameters are stepped in between",
                        "change it after engine.step(), as schedulers do",
                    )

    def finish(self) -> None:
        """Count the step, of all parameters. Every part must have been stepped."""
        masters = [param for group in self._optimizer.param_groups for param in group["params"]]
        counters = [self._optimizer.state[param]["step"] for param in masters]
        torch._foreach_add_(counters, torch.tensor(1.0), alpha=1.0)
        torch.autograd.graph.increment_version(masters)


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group, tensors as numbers."""
    return {
        name: value.item() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params" and (not isinstance(value, Tensor) or value.numel() == 1)
    }
