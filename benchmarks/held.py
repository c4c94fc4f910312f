"""What a forward leaves in memory for its backward."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Held(NamedTuple):
    """Bytes of storages, each counted once, parameters and buffers left out."""

    saved: int
    """What the graph has saved for the backward."""
    saved_within: int
    """Those among them that were saved within the forward of a module that was asked for."""
    kept: int
    """What the modules keep beside that, from step to step: codes of weights."""


class _Saved:
    """A tensor that a graph has saved: alive as long as the graph needs it."""

    def __init__(self, tensor: Tensor, within: bool):
        self.tensor, self.within = tensor, within


def held_bytes(model: nn.Module, forward: Callable[[], object], within: Iterable[nn.Module] = ()) -> Held:
    """What is held between forward and backward, as long as the result of `forward`, which calls `model`, is alive.

    A view counts with its whole storage, which it keeps alive; an input counts if it is saved, since in a model nothing
    else would keep it. Copies of parameters (autocast makes some) count.
    """
    own = _storages([*model.parameters(), *model.buffers()])
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()
    depth = 0

    def pack(tensor: Tensor) -> _Saved:
        # Detached: an operator that saves its own result would be held by it in a circle that nothing breaks.
        item = _Saved(tensor.detach(), depth > 0)
        saved.add(item)
        return item

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1

    with _hooks(within, enter, leave), torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
        result = forward()
    total = _storages(item.tensor for item in saved)
    parts = _storages(item.tensor for item in saved if item.within)
    kept = _storages(_attributes(model))
    del result
    return Held(_sum(total, own), _sum(parts, own), _sum(kept, own | total))


@contextmanager
def _hooks(modules: Iterable[nn.Module], enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    handles: list[Any] = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attributes(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that the attributes of modules, or theirs in turn, lead to."""
    seen: set[int] = set()
    todo: list[Any] = [model]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, (type, str, FunctionType, ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (list, tuple, set, deque)):
            todo += value
        else:
            todo += getattr(value, "__dict__", {}).values()


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes of each storage."""
    plain = (part for tensor in tensors for part in _plain(tensor))
    return {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in plain}


def _sum(storages: dict[int, int], without: dict[int, int]) -> int:
    return sum(size for address, size in storages.items() if address not in without)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with storages of their own that a tensor, of a subclass perhaps, is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor
