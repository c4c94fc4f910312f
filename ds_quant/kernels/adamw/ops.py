"""Chooses who does a fused step: C++ on the CPU, `ds_quant.kernels.cuda` on CUDA devices, else the reference.

`kernels.choice` has what the environment may say about it.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from ds_quant.kernels import build
from ds_quant.kernels.adamw import reference
from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.kernels.choice import chosen

Step = Callable[[Sequence[AdamWWork]], None]


def adamw_(works: Sequence[AdamWWork]) -> None:
    """Do the works, all on one type of device, in place. Raises ValueError for two types, and as the kernels do."""
    if not works:
        return
    kinds = {work.param.device.type for work in works}
    if len(kinds) > 1:
        raise ValueError(
            f"adamw_(works): got parameters on {' and '.join(sorted(kinds))}; allowed: one type of device; call it "
            "once for each"
        )
    _serving(kinds.pop())[0](works)


def implementation(device: torch.device | str) -> str:
    """Who does the steps of a device, for reports. Builds the C++ kernels if that has not been done."""
    return _serving(torch.device(device).type)[1]


def _serving(kind: str) -> tuple[Step, str]:
    if chosen() == "reference":
        return reference.adamw_, "reference"
    return _kernel(kind)


@functools.cache
def _kernel(kind: str) -> tuple[Step, str]:
    if kind == "cpu" and build.is_usable(
        "optimizer steps on the CPU take the reference instead, which is about 200 times slower and allocates several "
        "fp32 tensors of each parameter's size"
    ):
        from ds_quant.kernels.adamw import cpu

        return cpu.adamw_, f"cpu: C++ {cpu.isa()}"
    if kind == "cuda":
        from ds_quant.kernels.adamw import compiled as cuda

        return cuda.adamw_, "cuda: ds_quant.kernels.cuda"
    return reference.adamw_, "reference"
