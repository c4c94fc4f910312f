"""What the optimizer calls: a fused step of AdamW for many parameters at once."""

from collections.abc import Sequence

from ds_quant.kernels.adamw import reference
from ds_quant.kernels.adamw.work import AdamWWork
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
    """Do the works, all on one type of device, in place. Raises ValueError for two types, and as the kernels do.

    Raises RuntimeError while a CUDA graph is captured: learning rate, bias corrections and keys are this step's.

    The tensors of a work are checked by the kernel: most of them read them for that only once.
    """
    if not works:
        return
    kinds = {work.param.device.type for work in works}
    if len(kinds) > 1:
        raise ValueError(
            f"adamw_(works): got parameters on {' and '.join(sorted(kinds))}; allowed: one type of device; call it "
            "once for each"
        )
    device = works[0].param.device
    what = "the learning rate, bias corrections and random keys of one step"
    refuse_capture("adamw_(works)", device, what, "leave the optimizer's step out of the graph")
    adamw_.on(device)(works)
