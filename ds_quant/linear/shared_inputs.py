"""Inputs that several linear layers share (q, k and v; gate and up), quantized once and held once for the backward.

An input is known by a weak reference to the tensor and by its version, never by `id` or address alone: what was freed
or written to is not found. (Writing through `.data` between two layers that read one tensor is not seen.)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_quant.linear.recipe import Codes
from ds_quant.linear.tensor_state import TensorState

_MOST = 4
"""Inputs that are remembered: a decoder's own, and the encoder's output that all its layers share."""


class _Entry(NamedTuple):
    state: TensorState
    how: tuple[Any, ...]
    codes: Codes


class ArrivingInput:
    """Forward pre-hook that comes before all others: notes the tensor that a layer is called with.

    ZeRO-3's hooks pass each layer its own alias. The layer must know the input by the tensor that its neighbours were
    called with.
    """

    def __init__(self) -> None:
        self._seen: TensorState | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        self._seen = TensorState(args[0]) if args and isinstance(args[0], Tensor) and _has_version(args[0]) else None

    def of(self, x: Tensor) -> Tensor:
        """The tensor that arrived, if it is alive and `x` is an alias of it; else `x`."""
        if self._seen is None or not _has_version(x) or not self._seen.is_of_alias(x):
            return x
        seen = self._seen.tensor
        return x if seen is None else seen

    def __deepcopy__(self, memo: dict) -> "ArrivingInput":
        return ArrivingInput()

    def __reduce__(self) -> tuple[type, tuple]:
        return ArrivingInput, ()


class SharedInputs:
    """The last inputs of a model's layers. Codes go when their input does. Neither copied nor pickled."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def find(self, x: Tensor, how: tuple[Any, ...]) -> Codes | None:
        """The codes that `keep` was given for this tensor, in its present state, with the same `how`."""
        if not _has_version(x):
            return None
        return next((entry.codes for entry in self._entries if entry.how == how and entry.state.is_of(x)), None)

    def keep(self, x: Tensor, how: tuple[Any, ...], codes: Codes) -> None:
        """Remember the codes of `x` for as long as it lives, or until others took their place."""
        if _has_version(x):
            self._entries = [*self._entries, _Entry(TensorState(x, self._forget), how, codes)][-_MOST:]

    def _forget(self, state: TensorState) -> None:
        # By identity: entries that are compared would compare tensors.
        self._entries = [entry for entry in self._entries if entry.state is not state]

    def __deepcopy__(self, memo: dict) -> "SharedInputs":
        return SharedInputs()

    def __reduce__(self) -> tuple[type, tuple]:
        return SharedInputs, ()


def _has_version(x: Tensor) -> bool:
    """Without one nothing tells whether it was written to. In inference mode, what is kept could serve no backward."""
    return not (x.is_inference() or torch.is_inference_mode_enabled())
