"""One AdamW step of many small parameters in one launch: Triton. Nobody has run it on a GPU yet.

Biases and norms are most of a model's parameters and next to none of its elements: a launch for each costs more than
its bytes. Here a program reads from a table on the device whose elements it steps, and does what `triton_kernel` does
for the last block of a tensor, whose length is not known at compile time either. The bits are the same.

Parameters share a launch where dtypes, formats, scalars and keys are the same, as in a group of the optimizer. Their
addresses and subkeys are in the table. It is sent with each step, since subkeys are new in each, and the host does not
wait for it.
"""

# What a Triton function is passed has no type that mypy knows.
# mypy: disallow-incomplete-defs=False

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ds_quant.kernels.adamw import triton_kernel
from ds_quant.kernels.adamw.triton_kernel import TILE, step_tile
from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.kernels.launching import Launch, ceil_div, run
from ds_quant.kernels.transfers import sent
from ds_quant.numerics.random import derive_many

MOST_ELEMENTS = 2**16
"""Of a parameter that is batched. Its step moves at most some 16 bytes an element, 1 MiB: a third of a microsecond at
3 TB/s, where a launch takes the host five or more."""

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
}
COLUMNS = tl.constexpr(12)
"""Of the table, int64: the addresses of param, grad, exp_avg's codes and scales and exp_avg_sq's; elements; the number
of the first program; two words of each moment's subkey."""


def is_small(work: AdamWWork) -> bool:
    """Whether a work is one for `adamw_`."""
    return 0 < work.param.numel() <= MOST_ELEMENTS and triton_kernel.unsupported(work) is None


def adamw_(works: Sequence[AdamWWork]) -> None:
    """One step of each parameter, in place. All are small, as `is_small` has it."""
    for launch in launches(works):
        run(launch, launch.arguments[0].device)


def launches(works: Sequence[AdamWWork]) -> list[Launch]:
    """One for all works that can share it."""
    groups: dict[Any, list[AdamWWork]] = {}
    for work in works:
        tensors = triton_kernel.storage(work)
        shared = (
            *(tensor.dtype for tensor in tensors),
            *(work.param.device, triton_kernel.block_sizes(work), triton_kernel.formats(work)),
            *(work.scalars, work.exp_avg_key, work.exp_avg_sq_key),
        )
        groups.setdefault(shared, []).append(work)
    return [_launch(group) for group in groups.values()]


def _launch(works: Sequence[AdamWWork]) -> Launch:
    like = works[0]
    unit, largest = triton_kernel.block_sizes(like)
    tile = max(TILE, largest)
    tensors = [triton_kernel.storage(work) for work in works]
    num_programs = np.array([ceil_div(work.param.numel(), tile) for work in works])
    streams = np.array([work.stream for work in works], dtype=np.uint64) * np.uint64(2)
    table = np.empty((len(works), COLUMNS.value), np.int64)
    table[:, :6] = [[tensor.data_ptr() for tensor in row] for row in tensors]
    table[:, 6] = [work.param.numel() for work in works]
    table[:, 7] = np.cumsum(num_programs) - num_programs
    for column, key, stream in ((8, like.exp_avg_key, streams), (10, like.exp_avg_sq_key, streams + np.uint64(1))):
        table[:, column : column + 2] = 0 if key is None else derive_many(key, stream).T
    work_of_program = np.repeat(np.arange(len(works)), num_programs)
    numbers = sent(np.concatenate((table.reshape(-1), work_of_program)), like.param.device)
    kinds = [_DTYPES[tensor.dtype] for tensor in (tensors[0][number] for number in (0, 1, 2, 4))]
    constants = (*triton_kernel.formats(like), unit, tile // unit, *kinds)
    arguments = (numbers, table.size, *triton_kernel.numbers_of(like), *constants)
    return Launch(kernel, (len(work_of_program),), arguments, triton_kernel.options_for(tile))


@triton.jit(do_not_specialize=["table_size"])
def kernel(
    table, table_size,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, correction,
    FIRST: tl.constexpr, SECOND: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, FIRST_CODES: tl.constexpr, SECOND_CODES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = table + tl.load(table + table_size + program) * COLUMNS
    start_unit = (program - tl.load(row + 7)) * UNITS
    scalars = (beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, correction)
    step_tile(
        tl.load(row).to(tl.pointer_type(PARAM)),
        tl.load(row + 1).to(tl.pointer_type(GRAD)),
        tl.load(row + 2).to(tl.pointer_type(FIRST_CODES)),
        tl.load(row + 3).to(tl.pointer_type(tl.float32)),
        tl.load(row + 4).to(tl.pointer_type(SECOND_CODES)),
        tl.load(row + 5).to(tl.pointer_type(tl.float32)),
        scalars,
        (tl.load(row + 8).to(tl.uint32), tl.load(row + 9).to(tl.uint32)),
        (tl.load(row + 10).to(tl.uint32), tl.load(row + 11).to(tl.uint32)),
        start_unit,
        (tl.load(row + 6) - start_unit * UNIT).to(tl.int32),
        FIRST, SECOND, UNIT, UNITS, True,
    )  # fmt: skip
