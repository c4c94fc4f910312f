"""Codes of a weight, made once for each state of the weight instead of once for each micro-batch.

A state ends with the *weights epoch*: one count in the process, which goes on after every step of every optimizer, and
wherever the engine writes weights (see `zero.weights`). `_version` alone would not do: DeepSpeed, bitsandbytes and more
write through `.data` and raw pointers, where it stands still. It counts as well, for edits under `torch.no_grad()`.

Codes may also come from outside, where weights cross the wire as codes: these are true for as long as the values beside
which they came, and the backward looks them up once more, since ZeRO-3 may have fetched the weight anew.

What neither shows is an edit through `weight.data` in between two training forwards of one step, or after codes came.
`weights_changed` says so. Evaluation (`module.eval()`) never reads or keeps codes, so that weights may be swapped for
an average meanwhile.
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
        self.wanted = False
        """The layer multiplies with what is kept or received here."""

    @staticmethod
    def may_keep(weight: Tensor) -> bool:
        """Whether `weight` is a Parameter that is whole in memory: ZeRO-3 gathers one for its layer alone, and its
        codes must not outlive that. Codes made in inference mode could not serve a later backward."""
        kept_whole = isinstance(weight, nn.Parameter) and not hasattr(weight, "ds_id")
        return kept_whole and not torch.is_inference_mode_enabled()

    def get(self, weight: Tensor, quantize: Callable[[Tensor], Codes]) -> Codes:
        """Those of `weight`, from `quantize` where the last ones are not true any more."""
        found = self.find(weight)
        if found is None:
            self.drop()  # before the new ones are made: never two
            found = quantize(weight)
            self.receive(weight, found)
        return found

    def find(self, weight: Tensor) -> Codes | None:
        """Those of `weight`, where they are there and true."""
        self.wanted = True
        if self._state is None or self._epoch != _epoch or not self._state.is_of(weight):
            return None
        return self._codes

    def receive(self, weight: Tensor, codes: Codes) -> None:
        """Keep `codes`, which are those of `weight` as it is now."""
        self._epoch, self._state, self._codes = _epoch, TensorState(weight), codes

    def renew(self) -> None:
        """They have outlived the epoch: its end was told of the very step that they were received in."""
        self._epoch = _epoch

    def drop(self) -> None:
        """Free them."""
        self._codes = self._state = None

    def forget(self) -> None:
        """Free them, and want no others: the layer does not quantize its weight any more."""
        self.drop()
        self.wanted = False

    def __deepcopy__(self, memo: dict) -> "WeightCodes":
        return WeightCodes()

    def __reduce__(self) -> tuple[type, tuple]:
        return WeightCodes, ()
