"""Numbers of the host on a device, without waiting for it; and why a CUDA graph cannot hold them."""

import numpy as np
import torch
from torch import Tensor


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of them on the device. Work that is queued there later sees them; the host goes on at once.

    Raises RuntimeError while a CUDA graph is captured.
    """
    refuse_capture("sent(numbers)", device, "numbers of the host", "call this once before the graph is captured")
    on_host = torch.from_numpy(numbers)
    return on_host if device.type == "cpu" else on_host.pin_memory().to(device, non_blocking=True)


def refuse_capture(where: str, device: torch.device, what: str, fix: str) -> None:
    """Raises RuntimeError while a CUDA graph is captured on this device: `what` would be in it as it is now."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{where}: got {what} while a CUDA graph is captured, which its replays would read again as they are now, "
            f"or from host memory that holds others by then; allowed: calls outside of a capture; {fix}"
        )
