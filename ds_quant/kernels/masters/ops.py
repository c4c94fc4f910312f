"""Masters to fp32 before a step, and back after it."""

import torch
from torch import Tensor

from ds_quant.base.errors import ConfigError, problem
from ds_quant.kernels.masters import reference
from ds_quant.kernels.registry import Family, operation

FAMILY = Family(
    package=__name__.rpartition(".")[0],
    title="master weights",
    caller="a master weight",
    without_cpp="master weights of few bits are rounded by the reference, which is about 60 times slower",
)


@operation(FAMILY, reference=reference.join)
def join(weight: Tensor, low_bits: Tensor | None, values: Tensor) -> None:
    """Write the fp32 masters of a bf16 `weight` and its int8 `low_bits`, or of the weight alone, into `values`.

    All are of shape [numel], contiguous and on one device.
    """
    _check("join", weight, low_bits, values)
    join.on(weight.device)(weight, low_bits, values)


@operation(FAMILY, reference=reference.split)
def split(values: Tensor, weight: Tensor, low_bits: Tensor | None, *, key: tuple[int, int] | None = None) -> None:
    """Round fp32 `values` to masters, stochastically with a `key` of two words, and write them.

    Shapes and devices are those of `join`; element i draws number i of the key, i below 2^32.
    """
    _check("split", weight, low_bits, values)
    split.on(weight.device)(values, weight, low_bits, key=key)


def _check(where: str, weight: Tensor, low_bits: Tensor | None, values: Tensor) -> None:
    wanted = ((weight, torch.bfloat16), (values, torch.float32), (low_bits, torch.int8))
    for tensor, dtype in wanted:
        if tensor is None or (
            tensor.dtype == dtype
            and tensor.shape == (weight.numel(),)
            and tensor.device == weight.device
            and tensor.is_contiguous()
        ):
            continue
        got = f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        allowed = f"{dtype} of shape ({weight.numel()},) on {weight.device}, contiguous"
        raise ConfigError(problem(f"masters.{where}", got, allowed, "make it so"))
