"""How Triton kernels are launched. Importing this module needs no triton."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST_STRIDE = 2**22
"""Of what is read or written in place: offsets within a tile are 32 bits."""


class Launch(NamedTuple):
    """What to call a kernel with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def run(launch: Launch, device: torch.device) -> None:
    """Triton launches on the current device."""
    with _current(device):
        launch.kernel[launch.grid](*launch.arguments, **launch.options)


def _current(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def flat(vector: Tensor | None) -> Tensor | None:
    """One dimension, contiguous, and no view that autograd knows."""
    return None if vector is None else vector.detach().reshape(-1).contiguous()


def is_one(vector: Tensor | None) -> bool:
    return vector is not None and vector.numel() == 1


def ceil_div(size: int, part: int) -> int:
    return -(-size // part)
