"""What the optimizer calls: a fused step of AdamW for many parameters at once."""

from collections.abc import Sequence

import torch

from ds_quant.kernels.adamw import reference
from ds_quant.kernels.adamw.work import AdamWWork, MastersWork, fault_of_masters, fault_of_work
from ds_quant.kernels.registry import Family, operation
from ds_quant.kernels.transfers import refuse_capture

FAMILY = Family(
    package=__name__.rpartition(".")[0],
    title="AdamW's steps",
    caller="a parameter",
    without_cpp="optimizer steps on the CPU take the reference instead, which is about 200 times slower and allocates "
    "several fp32 tensors of each parameter's size",
)


@operation(FAMILY, reference=reference.adamw_)
def adamw_(works: Sequence[AdamWWork]) -> None:
    """Do the works, all on one type of device, in place.

    Raises ValueError, before anything is changed, for two types, and where a tensor is not as `AdamWWork` and
    `QuantizedBlocks` have it; RuntimeError while a CUDA graph is captured, as learning rate, bias corrections and keys
    are this step's.
    """
    device = _device_of("adamw_", works)
    if device is not None:
        for number, work in enumerate(works):
            fault = fault_of_work(work)
            if fault:
                raise fault.error(f"adamw_(works[{number}]")
        adamw_.on(device)(works)


@operation(FAMILY, reference=reference.adamw_masters_, backends_only=True)
def adamw_masters_(works: Sequence[MastersWork]) -> None:
    """Do steps of masters of 24 or 16 bits: each is expanded to fp32, stepped as by `adamw_`, and rounded again.

    A backend that has it does so in one pass. Conditions and errors are those of `adamw_`.
    """
    device = _device_of("adamw_masters_", [work.step for work in works])
    if device is not None:
        for number, work in enumerate(works):
            fault = fault_of_masters(work)
            if fault:
                raise fault.error(f"adamw_masters_(works[{number}]")
        adamw_masters_.on(device)(works)


def fuses_masters(device: torch.device) -> bool:
    """Whether what serves `adamw_` on a device steps masters, too. Elsewhere the caller expands and rounds them."""
    return adamw_masters_.is_called(device) and adamw_masters_.implementation(device) == adamw_.implementation(device)


def _device_of(where: str, works: Sequence[AdamWWork]) -> torch.device | None:
    """None where there is nothing to do."""
    if not works:
        return None
    kinds = {work.param.device.type for work in works}
    if len(kinds) > 1:
        raise ValueError(
            f"{where}(works): got parameters on {' and '.join(sorted(kinds))}; allowed: one type of device; fix: call "
            "it once for each"
        )
    device = works[0].param.device
    what = "the learning rate, bias corrections and random keys of one step"
    refuse_capture(f"{where}(works)", device, what, "leave the optimizer's step out of the graph")
    return device
