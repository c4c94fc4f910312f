"""Names of what the kernels do, for torch.profiler: what is called through ctypes is no operator of its own."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """Shown as ``ds_quant::name`` while a profiler runs; else nothing."""
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"ds_quant::{name}")
    return _NOTHING
