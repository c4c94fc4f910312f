"""Memory of messages, allocated once and used again.

Fresh memory costs more than the arithmetic on it: a CPU clears each page on first touch.
"""

from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64


class Buffers:
    """A pool of flat uint8 tensors for one group. Not for several threads at once.

    On an accelerator a buffer is used again by the stream that gave it back, after what that stream was told before.
    """

    def __init__(self) -> None:
        self._free: dict[Any, list[Tensor]] = {}

    def take(self, num_bytes: int, device: torch.device) -> Tensor:
        """A uint8 tensor of num_bytes elements with any content. Hand that very tensor to `give_back`."""
        free = self._free.setdefault(_place(device), [])
        fitting = [buffer for buffer in free if buffer.numel() >= num_bytes]
        if fitting:
            # By identity: == of tensors compares elements.
            chosen = min(fitting, key=Tensor.numel)
            free[:] = [buffer for buffer in free if buffer is not chosen]
        else:
            if free:
                free.pop(max(range(len(free)), key=lambda i: free[i].numel()))  # a larger one takes its place
            # Made under inference mode it could not be written to afterwards, and its views would know no base.
            with torch.inference_mode(False):
                chosen = torch.empty(-(-num_bytes // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8, device=device)
        return chosen[:num_bytes]

    def give_back(self, buffer: Tensor) -> None:
        """Let the memory of a taken buffer be used again."""
        whole = buffer._base if buffer._base is not None else buffer
        self._free.setdefault(_place(buffer.device), []).append(whole)

    @property
    def num_bytes(self) -> int:
        """What lies unused now: between steps, all of it."""
        return sum(buffer.numel() for buffers in self._free.values() for buffer in buffers)


def _place(device: torch.device) -> Any:
    """A device and its current stream, where it has streams."""
    if device.type in ("cpu", "meta"):
        return device
    return device, torch.get_device_module(device).current_stream(device).stream_id
