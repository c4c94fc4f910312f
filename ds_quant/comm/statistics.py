"""Bytes sent over the wire, and the quantization error of what was sent."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Traffic(NamedTuple):
    """Bytes sent and quantization error of one rank since the last `take`."""

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

    def summary(self, num_steps: int, prefix: str = "") -> dict[str, Any]:
        """Figures for a report of so many steps; None where nothing crossed a wire. `prefix` begins their names."""
        return {
            f"{prefix}wire_bytes_per_step": round(self.sent_bytes / num_steps) if self.sent_bytes else None,
            f"{prefix}compression_ratio": self.compression if self.sent_bytes else None,
            f"{prefix}quantization_error": self.relative_error if self.squared_norm else None,
        }


class Statistics:
    """Counts of one rank. Kernels add to `errors`, or to what `errors_on` gives them on a device."""

    def __init__(self, *, with_errors: bool = True) -> None:
        self.errors: np.ndarray | None = np.zeros(2) if with_errors else None
        self._on_devices: dict[tuple, Tensor] = {}
        self._sent = self._unquantized = 0

    def count(self, sent_bytes: int, numel: int, itemsize: int) -> None:
        """Add an exchange that sent `sent_bytes` for `numel` elements of `itemsize` bytes."""
        self._sent += sent_bytes
        self._unquantized += numel * itemsize

    def errors_on(self, device: torch.device) -> np.ndarray | Tensor | None:
        """What kernels on `device` add their errors to: float64 of shape (2,); None: they are not counted.

        On an accelerator it is a tensor of the current stream, and the host waits for it in `take` alone.
        """
        if self.errors is None or device.type == "cpu":
            return self.errors
        stream = None if device.type == "meta" else torch.accelerator.current_stream(device).stream_id
        if (device, stream) not in self._on_devices:
            self._on_devices[device, stream] = torch.zeros(2, dtype=torch.float64, device=device)
        return self._on_devices[device, stream]

    def take(self) -> Traffic:
        """Return the counts and reset them. Waits for devices on which errors were counted."""
        if self.errors is not None:
            for counted in self._on_devices.values():
                self.errors += counted.cpu().numpy()
            self._on_devices.clear()
        squared_error, squared_norm = (0.0, 0.0) if self.errors is None else map(float, self.errors)
        found = Traffic(self._sent, self._unquantized, squared_error, squared_norm)
        self._sent = self._unquantized = 0
        if self.errors is not None:
            self.errors[:] = 0.0
        return found
