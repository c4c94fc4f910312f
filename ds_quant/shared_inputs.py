"""Inputs that several linear layers share (q, k and v; gate and up), quantized once and held once for the backward.

An input is known by a weak reference to the tensor and by its version, never by `id` or address alone: what was freed
or written to is not found. (Writing through `.data` between two layers that read one tensor is not seen.)
"""

import weakref
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_quant.plan import Codes

_MOST = 4
"""Inputs that are remembered: a decoder's own, and the encoder's output that all its layers share."""


class _Entry(NamedTuple):
    source: "weakref.ref[Tensor]"
    state: tuple[Any, ...]
    codes: Codes


class ArrivingInput:
    """Forward pre-hook that comes before all others: notes the tensor that a layer is called with.

    ZeRO-3's hooks hand each layer an alias of its own. What the layer is to know the input by is the one that its
    neighbours were called with.
    """

    def __init__(self) -> None:
        self._seen: weakref.ref[Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and not torch.compiler.is_compiling():
            self._seen = weakref.ref(args[0])

    def of(self, x: Tensor) -> Tensor:
        """The tensor that arrived, if it is alive and `x` is an alias of it; else `x`."""
        seen = self._seen() if self._seen is not None else None
        return (
            x if seen is None or seen.is_inference() or _state(seen, (seen.dtype,)) != _state(x, (x.dtype,)) else seen
        )

    def __deepcopy__(self, memo: dict) -> "ArrivingInput":
        return ArrivingInput()

    def __reduce__(self) -> tuple[type, tuple]:
        return ArrivingInput, ()


class SharedInputs:
    """The last inputs of a model's layers. Codes go when their input does. Neither copied nor pickled."""

    def __init__(self) -> None:
        self._entries: deque[_Entry] = deque(maxlen=_MOST)

    def find(self, x: Tensor, how: tuple[Any, ...]) -> Codes | None:
        """The codes that `keep` was given for this tensor, in its present state, with the same `how`."""
        if x.is_inference() or torch.is_inference_mode_enabled():
            return None  # has no version; or what is kept could not serve a backward
        state = _state(x, how)
        return next((entry.codes for entry in self._entries if entry.source() is x and entry.state == state), None)

    def keep(self, x: Tensor, how: tuple[Any, ...], codes: Codes) -> None:
        """Remember the codes of `x` for as long as it lives, or until others took their place."""
        if not (x.is_inference() or torch.is_inference_mode_enabled()):
            self._entries.append(_Entry(weakref.ref(x, self._forget), _state(x, how), codes))

    def _forget(self, source: "weakref.ref[Tensor]") -> None:
        # By identity: entries that are compared would compare tensors.
        self._entries = deque((entry for entry in self._entries if entry.source is not source), maxlen=_MOST)

    def __deepcopy__(self, memo: dict) -> "SharedInputs":
        return SharedInputs()

    def __reduce__(self) -> tuple[type, tuple]:
        return SharedInputs, ()


def _state(x: Tensor, how: tuple[Any, ...]) -> tuple[Any, ...]:
    return (x._version, x.data_ptr(), x.shape, x.stride(), *how)
