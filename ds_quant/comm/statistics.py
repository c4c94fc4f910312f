"""What crossed the wire, and what that cost in accuracy."""

import math
from typing import NamedTuple

import numpy as np


class Traffic(NamedTuple):
    """What one rank sent, and what that cost, since the last `take`."""

    sent_bytes: int
    """What this rank put on the wire for the exchanges of gradients, scales included; of two levels, between nodes."""
    unquantized_bytes: int
    """What the same exchanges would have sent in the gradients' own dtype."""
    squared_error: float
    """Sum over all elements that this rank quantized, in units of the gradient, of (value - original)^2."""
    squared_norm: float
    """Sum of original^2 over the same elements."""

    def plus(self, other: "Traffic") -> "Traffic":
        """The sum of two."""
        return Traffic(
            self.sent_bytes + other.sent_bytes,
            self.unquantized_bytes + other.unquantized_bytes,
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
        )

    @property
    def compression(self) -> float:
        """How many times fewer bytes were sent; NaN where none were."""
        return self.unquantized_bytes / self.sent_bytes if self.sent_bytes else math.nan

    @property
    def relative_error(self) -> float:
        """Root of the mean squared error over that of the mean square; NaN where nothing was quantized."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm > 0 else math.nan


class Statistics:
    """Counts of one rank. `errors` goes to the kernels as it is."""

    def __init__(self, *, with_errors: bool = True) -> None:
        self.errors: np.ndarray | None = np.zeros(2) if with_errors else None
        self._sent = self._unquantized = 0

    def count(self, sent_bytes: int, numel: int, itemsize: int) -> None:
        """Add an exchange that sent `sent_bytes` for `numel` elements of `itemsize` bytes."""
        self._sent += sent_bytes
        self._unquantized += numel * itemsize

    def take(self) -> Traffic:
        """What was counted, and start anew."""
        squared_error, squared_norm = (0.0, 0.0) if self.errors is None else map(float, self.errors)
        found = Traffic(self._sent, self._unquantized, squared_error, squared_norm)
        self._sent = self._unquantized = 0
        if self.errors is not None:
            self.errors[:] = 0.0
        return found
