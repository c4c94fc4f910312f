"""Which memory of tensors is there when, and what for: from the operators that a program calls.

A tensor's memory (its storage) enters the ledger when an operator returns or is given it, and leaves it when torch
frees it. What kernels allocate within one operator and free before it ends is not seen.
"""

import itertools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_quant.optim.coded_tensor import CodedTensor
from ds_quant.planning.dry_run import tensors_in
from ds_quant.planning.traffic import Collective, collective

ROLES = ("weights", "masters", "moments", "gradients", "activations", "communication", "temporaries")
"""What memory is for. `temporaries` is what has none of the other roles."""


class Peak(NamedTuple):
    """The moment of a span of time at which most is there."""

    bytes: int
    parts: dict[str, int]
    """Bytes of each role at that moment."""
    phase: str
    """The last mark before it."""


class Ledger(TorchDispatchMode):
    """Context that records the memory that this thread's operators touch. Enter it before the model is made."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}  # id of a storage that is alive to its number
        self._sizes: list[int] = []
        self._events: list[tuple[int, int]] = []  # (number, change in bytes)
        self._marks: list[tuple[int, str]] = []  # (number of events before it, name)
        self._roles: dict[int, str] = {}
        self.collectives: list[Collective] = []
        """All so far, in order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not all(kind in (Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented
        result = func(*args, **kwargs)
        for value in tensors_in((args, kwargs, result)):
            if value.device.type != "meta":
                self.note(value)
        if func.namespace == "c10d":
            found = collective(func, args, self._marks[-1][1] if self._marks else "")
            if found is not None:
                self.collectives.append(found)
                self.assign("communication", tensors_in(args))
        return result

    def note(self, tensor: Tensor) -> int:
        """The number of a tensor's memory, entered now if it is new."""
        storage = tensor.untyped_storage()
        size, number = storage.nbytes(), self._numbers.get(id(storage))
        if number is None:
            number = self._numbers[id(storage)] = len(self._sizes)
            self._sizes.append(size)
            self._events.append((number, size))
            weakref.finalize(storage, self._leave, id(storage), number).atexit = False
        elif size != self._sizes[number]:
            self._events.append((number, size - self._sizes[number]))
            self._sizes[number] = size
        return number

    def _leave(self, key: int, number: int) -> None:
        del self._numbers[key]
        self._events.append((number, -self._sizes[number]))

    def mark(self, name: str) -> None:
        """Begin the phase `name`: what happens from here on belongs to it."""
        self._marks.append((len(self._events), name))

    def assign(self, role: str, tensors: Iterable[Tensor]) -> None:
        """Say what the memory of tensors is for. What has a role of higher rank (`ROLES`) keeps it."""
        for tensor in tensors:
            for part in plain(tensor):
                number = self.note(part)
                old = self._roles.get(number, ROLES[-1])
                self._roles[number] = min(role, old, key=ROLES.index)

    def assign_born_since(self, role: str, mark: str) -> None:
        """Say what all memory is for that entered since the last `mark` and is still there."""
        since = next(at for at, name in reversed(self._marks) if name == mark)
        born = {number for number, change in itertools.islice(self._events, since, None) if change > 0}
        for number in born & set(self._numbers.values()):
            old = self._roles.get(number, ROLES[-1])
            self._roles[number] = min(role, old, key=ROLES.index)

    def phase_peaks(self, roles: Iterable[str] = ROLES) -> dict[str, int]:
        """The peak within each phase since the last mark "begin"."""
        wanted = set(roles)
        begin = max(at for at, name in self._marks if name == "begin")
        marks = [(at, name) for at, name in self._marks if at >= begin]
        totals = list(self._totals(len(self._events), wanted))
        peaks: dict[str, int] = {}
        for (start, name), (end, _) in itertools.pairwise(marks):
            peaks[name] = max(peaks.get(name, 0), *totals[start : end + 1])
        return {name: peak for name, peak in peaks.items() if name not in ("begin", "end")}

    def rest(self, mark: str, roles: Iterable[str] = ROLES) -> int:
        """What of `roles` was there at the last `mark`."""
        at = next(at for at, name in reversed(self._marks) if name == mark)
        *_, total = self._totals(at, set(roles))
        return total

    @property
    def live_bytes(self) -> int:
        """Bytes of the storages that are alive now."""
        return sum(self._sizes[number] for number in self._numbers.values())

    def peak(self, first_mark: str, last_mark: str, roles: Iterable[str] = ROLES) -> Peak:
        """The peak of the memory of `roles` between the last marks of these names."""
        wanted = set(roles)
        begin = next(at for at, name in reversed(self._marks) if name == first_mark)
        end = next(at for at, name in reversed(self._marks) if name == last_mark)
        best, best_at = -1, 0
        for at, total in enumerate(self._totals(end, wanted)):
            if at >= begin and total > best:
                best, best_at = total, at
        parts = dict.fromkeys((role for role in ROLES if role in wanted), 0)
        for number, change in self._events[:best_at]:
            role = self._role(number)
            if role in wanted:
                parts[role] += change
        return Peak(best, parts, [name for at, name in self._marks if at <= best_at][-1])

    def _role(self, number: int) -> str:
        return self._roles.get(number, ROLES[-1])

    def _totals(self, end: int, wanted: set[str]) -> Iterator[int]:
        """Before each event up to number `end`, and after it."""
        total = 0
        yield total
        for number, change in self._events[:end]:
            if self._role(number) in wanted:
                total += change
            yield total


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory of their own that a tensor is made of."""
    if isinstance(tensor, CodedTensor):
        yield from tensor.stored()
    else:
        yield tensor
