"""Gradients on the wire: what the collectives call, and what `numerics.wire` defines.

What is asked for is checked here, before anything is written: ValueError. Autograd sees nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_quant.base.errors import argument_error
from ds_quant.kernels.registry import Family, Operation, operation
from ds_quant.kernels.wire.checks import Check
from ds_quant.numerics import wire as reference
from ds_quant.numerics.wire import Parts, Residuals, WireFormat

FAMILY = Family(
    package=__name__.rpartition(".")[0],
    title="gradients on the wire",
    caller="a gradient",
    without_cpp="gradients are quantized by the reference instead, which is many times slower and allocates several "
    "fp32 tensors of their size",
)


@operation(FAMILY, reference=reference.quantize)
def quantize(
    tensors: Sequence[Tensor],
    parts: Parts,
    message: Tensor,
    fmt: WireFormat,
    *,
    key: tuple[int, int] | None = None,
    residuals: Residuals | None = None,
    errors: np.ndarray | Tensor | None = None,
) -> None:
    """Write the parts of the pieces of `tensors` into `message`, as `numerics.wire.quantize` does.

    tensors: 1-D, contiguous, all fp32, bf16 or fp16. message: uint8, 1-D, contiguous. key: two words for stochastic
    rounding (see `fold_words`), None for nearest. errors: float64 of shape (2,), added to: numpy's, or on an
    accelerator a tensor there, which nothing waits for. Autograd sees nothing.

    Raises ValueError for what is not as this and the types of the arguments have it.
    """
    check = Check("quantize", parts, fmt)
    check.tensors(tensors)
    check.message(message)
    check.sending(key, residuals, errors)
    if check.count:
        options: dict[str, Any] = {"key": key, "residuals": residuals, "errors": errors}
        _serving(quantize, fmt, check.device)(tensors, parts, message, fmt, **options)


@operation(FAMILY, reference=reference.reduce)
def reduce(
    tensors: Sequence[Tensor],
    parts: Parts,
    received: Tensor,
    own_rank: int,
    fmt: WireFormat,
    *,
    factor: float = 1.0,
    output: Tensor | None = None,
    message: Tensor | None = None,
    key: tuple[int, int] | None = None,
    residuals: Residuals | None = None,
    errors: np.ndarray | Tensor | None = None,
) -> None:
    """Sum the own pieces and those of the other ranks, times `factor`, as `numerics.wire.reduce` does.

    received: uint8 [world_size - 1, message_bytes], contiguous, the other ranks' messages in order. One of `output`
    (1-D, contiguous, fp32, bf16 or fp16, of the pieces' elements one after the other; `residuals.write`, `key` and
    `errors` then stay unused) and `message` (uint8, 1-D, contiguous, at the offsets of `parts`). Else as `quantize`.

    Raises ValueError for what is not as this and the types of the arguments have it.
    """
    check = Check("reduce", parts, fmt)
    check.tensors(tensors)
    check.received(received, own_rank)
    if (output is None) == (message is None):
        got = "neither" if output is None else "both"
        raise argument_error("reduce(output, message)", got, "one of them", "pass the one that the sum goes to")
    if message is not None:
        check.message(message)
    if output is not None:
        check.output(output)
    check.sending(key, residuals, errors)
    if check.count:
        _serving(reduce, fmt, check.device)(
            *(tensors, parts, received, own_rank, fmt),
            factor=factor,
            output=output,
            message=message,
            key=key,
            residuals=residuals,
            errors=errors,
        )


@operation(FAMILY, reference=reference.dequantize)
def dequantize(message: Tensor, parts: Parts, tensors: Sequence[Tensor], fmt: WireFormat) -> None:
    """Overwrite the pieces of `tensors` with what `message` holds for them, as `numerics.wire.dequantize` does.

    Tensors and message as for `quantize`. Raises ValueError for what is not so.
    """
    check = Check("dequantize", parts, fmt)
    check.tensors(tensors)
    check.message(message)
    if check.count:
        _serving(dequantize, fmt, check.device)(message, parts, tensors, fmt)


def _serving(asked: Operation, fmt: WireFormat, device: torch.device) -> Callable[..., None]:
    """Formats with a name have kernels on CPUs alone: elsewhere they go by the definition, piece by piece."""
    return asked.reference if fmt.format and device.type != "cpu" else asked.on(device)
