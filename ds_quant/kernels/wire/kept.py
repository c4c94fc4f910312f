"""What is made once of the layout of a message, and is needed in every step.

It is kept for `Parts` that nobody can write to, as those of a layout, until these are gone.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import numpy as np

from ds_quant.numerics.wire import Parts

MAX_KEPT = 1024
T = TypeVar("T")


class KeptOfParts(Generic[T]):
    """What `make` gives for the parts of a call, the last MAX_KEPT of them."""

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple, tuple[tuple[weakref.ref, ...], T]] = OrderedDict()
        # A column may be collected while the lock is held, and its callback takes it again.
        self._lock = threading.RLock()

    def get(self, parts: Parts, more: Hashable, make: Callable[[], T]) -> T:
        """Of these parts and what else it depends on; made where it is not kept."""
        if any(
            type(column) is not np.ndarray or column.flags.writeable or not column.flags.owndata for column in parts
        ):
            return make()
        key = (*map(id, parts), more)
        with self._lock:
            entry = self.entries.get(key)
            if entry is not None and all(ref() is column for ref, column in zip(entry[0], parts, strict=True)):
                self.entries.move_to_end(key)
                return entry[1]
        made = make()
        refs = tuple(weakref.ref(column, lambda _: self._forget(key)) for column in parts)
        with self._lock:
            self.entries[key] = refs, made
            while len(self.entries) > MAX_KEPT:
                self.entries.popitem(last=False)
        return made

    def _forget(self, key: tuple) -> None:
        with self._lock:
            entry = self.entries.get(key)
            # Another layout may have got the same addresses since.
            if entry is not None and any(ref() is None for ref in entry[0]):
                del self.entries[key]
