"""The way that layers and optimizers take on a GPU, taken by tensors on the CPU: all of it up to the launches.

Triton's kernels compute nothing on a CPU. What is left is what the host does, and what would be launched.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks import internals
from ds_quant.kernels import registry
from ds_quant.kernels.adamw.ops import adamw_
from ds_quant.kernels.int8 import ops
from ds_quant.kernels.launching import Launch

INTERNALS = {"triton.backends.compiler": ["GPUTarget"], "triton.runtime": ["driver._active"]}
"""Of triton: what `driver` replaces, or asks for."""
INT8 = (ops.quantize_operand, ops.quantize_gradient, ops.padded_matmul)
"""What an int8 layer calls on a GPU."""
_NAME = "as on a GPU"


@contextmanager
def on_cpu(adamw: Callable[..., Any]) -> Iterator[None]:
    """Within it int8 layers and the fused AdamW on the CPU call what they call on a GPU: `adamw`, and Triton."""
    import ds_quant.kernels.int8.triton  # noqa: F401  registers its kernels

    with ExitStack() as stack:
        stack.callback(registry._serving.cache_clear)
        backends = [registry.Backend(_NAME, ("cpu",)), *registry.BACKENDS]
        stack.enter_context(mock.patch.object(registry, "BACKENDS", backends))
        for operation in INT8:
            ours = {_NAME: operation.implementations["triton"]}
            stack.enter_context(mock.patch.dict(operation.implementations, ours))
        stack.enter_context(mock.patch.dict(adamw_.implementations, {_NAME: adamw}))
        registry._serving.cache_clear()
        yield


@contextmanager
def launching(run: Callable[[Launch, torch.device], None]) -> Iterator[None]:
    """Within it `run` gets what would be launched."""
    from ds_quant.kernels.adamw import triton_batches, triton_kernel
    from ds_quant.kernels.int8 import triton, triton_quantize

    with ExitStack() as stack:
        for module in (triton, triton_quantize, triton_batches, triton_kernel):
            stack.enter_context(mock.patch.object(module, "run", run))
        yield


@contextmanager
def driver(capability: int) -> Iterator[None]:
    """Within it Triton compiles as for a GPU of that compute capability. Raises CommandError on a triton without it."""
    internals.require("compiling for a GPU that is not there", INTERNALS)
    import triton
    from triton.backends.compiler import GPUTarget

    found = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    with mock.patch.object(triton.runtime.driver, "_active", found):
        yield


def bind(launch: Launch, device: torch.device) -> None:
    """All that Triton does in Python for a launch: finds the kernel for its arguments, compiled at its first call."""
    launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
