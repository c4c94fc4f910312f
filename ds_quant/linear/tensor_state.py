"""What a tensor is at one moment, to be recognized later, without keeping it or its memory alive."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class TensorState:
    """A tensor, its memory, where it lies in it, and its version.

    All by weak references: the address of what was freed is given to others, and an `id` as well. What is written
    through `.data` or by raw pointers moves no version and is not seen.

    Args:
        x: no inference tensor, which has no version.
        when_freed: called once the tensor is gone.
    """

    def __init__(self, x: Tensor, when_freed: Callable[["TensorState"], None] | None = None):
        self._tensor = weakref.ref(x, None if when_freed is None else lambda _: when_freed(self))
        self._storage = StorageWeakRef(x.untyped_storage())
        self._layout = _layout(x)

    def is_of(self, x: Tensor) -> bool:
        """Whether `x` is that tensor, and nothing has been written to it since."""
        return self._tensor() is x and self.is_of_alias(x)

    def is_of_alias(self, x: Tensor) -> bool:
        """Whether `x` shows the same elements in the same way, and nothing has been written to them since.

        True of what `detach` gives, or a view of all.
        """
        is_same_memory = self._storage.cdata == x.untyped_storage()._cdata and not self._storage.expired()
        return is_same_memory and self._layout == _layout(x)

    @property
    def tensor(self) -> Tensor | None:
        """The tensor, if it is alive."""
        return self._tensor()


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x._version, x.storage_offset(), x.shape, x.stride(), x.dtype
