"""Codes of a weight, made once for each state of the weight instead of once for each micro-batch.

A state ends with the *weights epoch*: one count in the process, which goes on after every step of every optimizer, and
wherever the engine writes weights (see `zero.weights`). `_version` alone would not do: DeepSpeed, bitsandbytes and more
write through `.data` and raw pointers, where it stands still. It counts as well, for edits under `torch.no_grad()`.

What neither shows is an edit through `weight.data` in between two training forwards of one step. `weights_changed` says
so. Evaluation (`module.eval()`) never reads or keeps codes, so that weights may be swapped for an average meanwhile.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ds_quant.linear.recipe import Codes
from ds_quant.linear.tensor_state import TensorState

_epoch = 0


def weights_changed() -> None:
    """Make all quantized layers of this process requantize their weights.

    Needed after weights were written through `.data` between two training forwards without an optimizer's step.
    """
    global _epoch
    _epoch += 1


# Once for the process: of an optimizer of whatever library, `step` ends here.
register_optimizer_step_post_hook(torch.compiler.disable(lambda optimizer, args, kwargs: weights_changed()))


class WeightCodes:
    """The codes of one layer's weight, while they are true. Neither copied nor pickled with the layer."""

    def __init__(self) -> None:
        self._epoch = -1
        self._state: TensorState | None = None
        self._codes: Codes | None = None

    @staticmethod
    def may_keep(weight: Tensor) -> bool:
        """Whether `weight` is a Parameter that is whole in memory: ZeRO-3 gathers one for its layer alone, and its
        codes must not outlive that. Codes made in inference mode could not serve a later backward."""
        kept_whole = isinstance(weight, nn.Parameter) and not hasattr(weight, "ds_id")
        return kept_whole and not torch.is_inference_mode_enabled()

    def get(self, weight: Tensor, quantize: Callable[[Tensor], Codes]) -> Codes:
        """Those of `weight`, from `quantize` where the last ones are not true any more."""
        if self._codes is None or self._state is None or self._epoch != _epoch or not self._state.is_of(weight):
            self._codes = None  # before the new ones are made: never two
            self._codes = quantize(weight)
            self._epoch, self._state = _epoch, TensorState(weight)
        return self._codes

    def forget(self) -> None:
        """Free them: the layer does not quantize its weight any more."""
        self._codes = self._state = None

    def __deepcopy__(self, memo: dict) -> "WeightCodes":
        return WeightCodes()

    def __reduce__(self) -> tuple[type, tuple]:
        return WeightCodes, ()
