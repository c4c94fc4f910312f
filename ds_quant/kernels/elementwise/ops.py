"""What optimizers call: a step of many parameters at once, each by its rule."""

from collections.abc import Sequence

from ds_quant.kernels.elementwise import reference
from ds_quant.kernels.elementwise.work import ElementwiseWork
from ds_quant.kernels.registry import Family, operation

FAMILY = Family(
    package=__name__.rpartition(".")[0],
    title="steps of Lion, SGD and AdEMAMix",
    caller="a parameter",
    without_cpp="optimizer steps on the CPU take the reference instead, which is some ten times slower",
)


@operation(FAMILY, reference=reference.elementwise_)
def elementwise_(works: Sequence[ElementwiseWork]) -> None:
    """Do the works, all on one type of device, in place. Raises ValueError as `quantize_blockwise` does."""
    if works:
        elementwise_.on(works[0].param.device)(works)
