"""Numbers of the host on a device, without waiting for it."""

import numpy as np
import torch
from torch import Tensor


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of them on the device. Work that is queued there later sees them; the host goes on at once."""
    on_host = torch.from_numpy(numbers)
    return on_host if device.type == "cpu" else on_host.pin_memory().to(device, non_blocking=True)
