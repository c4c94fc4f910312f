"""One AdamW step of many small parameters in one launch: Triton. Nobody has run it on a GPU yet.

Biases and norms are most of a model's parameters and next to none of its elements: a launch for each costs more than
its bytes. Here a program reads from a table on the device whose elements it steps, and does what `triton_kernel` does.
The bits are the same.

Parameters share a launch where dtypes, formats, scalars and keys are the same, as in a group of the optimizer. Those
that have whole blocks only, at addresses for wide loads, have one of their own: it reads and writes as wide as a launch
for one tensor does, with half the registers of the other one, whose blocks end anywhere.

Their addresses and the numbers of their random streams are in the table. It is sent once and kept on the device while
they stay as they are; the scalars and keys of a step are arguments of the launch. So nothing is sent in a step.
"""

# What a Triton function is passed has no type that mypy knows.
# mypy: disallow-incomplete-defs=False

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_quant.kernels.adamw import triton_kernel
from ds_quant.kernels.adamw.triton_kernel import TILE, step_tile
from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.kernels.launching import Launch, run
from ds_quant.kernels.transfers import sent
from ds_quant.kernels.triton_random import derive_key
from ds_quant.numerics.adam import Moment
from ds_quant.numerics.codes import CodeMap

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
COLUMNS = tl.constexpr(9)
"""Of the table, int64: the addresses of param, grad, exp_avg's codes and scales and exp_avg_sq's; elements, or units
where all blocks are whole; the number of the first program; the number of exp_avg's random stream."""
WIDEST = tl.constexpr(16)
"""Bytes that a thread loads at a time, to which addresses are aligned for that."""
Tensors = tuple[Tensor, ...]
"""What `triton_kernel.storage` gives."""
MAX_KEPT = 256
"""Tables on the device. A model has a few, or a few at a time where its gradients come to lie elsewhere each step."""


def step(works: Sequence[AdamWWork]) -> list[tuple[AdamWWork, str]]:
    """Do the works that the kernel takes, small ones together; returns the others, each with the reason."""
    small, others = [], []
    for work in works:
        reason = triton_kernel.unsupported(work)
        if reason:
            others.append((work, reason))
        elif work.param.numel() > MOST_ELEMENTS:
            triton_kernel.adamw_(work)
        elif work.param.numel():
            small.append(work)
    adamw_(small)
    return others


def adamw_(works: Sequence[AdamWWork]) -> None:
    """One step of each parameter, in place. All have elements, MOST_ELEMENTS at most, and formats of the kernel's."""
    for launch in launches(works):
        run(launch, launch.arguments[0].device)


def launches(works: Sequence[AdamWWork]) -> list[Launch]:
    """One for all works that can share it."""
    groups: dict[Any, tuple[list[AdamWWork], list[Tensors]]] = {}
    for work in works:
        tensors = triton_kernel.storage(work)
        is_wide = _is_wide(work, tensors)
        shared = (
            *(tensor.dtype for tensor in tensors),
            *(work.param.device, _form(work.exp_avg), _form(work.exp_avg_sq)),
            *(work.scalars, work.exp_avg_key, work.exp_avg_sq_key, is_wide),
        )
        group, stored = groups.setdefault(shared, ([], []))
        group.append(work)
        stored.append(tensors)
    return [_launch(group, stored, _is_wide(group[0], stored[0])) for group, stored in groups.values()]


def _form(moment: Moment) -> tuple[int, CodeMap] | None:
    return None if isinstance(moment, Tensor) else (moment.block_size, moment.code_map)


def _is_wide(work: AdamWWork, tensors: Tensors) -> bool:
    """Whether all blocks are whole, and all addresses such that the widest loads are allowed."""
    _, largest = triton_kernel.block_sizes(work)
    return work.param.numel() % largest == 0 and all(tensor.data_ptr() % WIDEST.value == 0 for tensor in tensors)


def _launch(works: Sequence[AdamWWork], stored: Sequence[Tensors], is_wide: bool) -> Launch:
    like = works[0]
    unit, largest = triton_kernel.block_sizes(like)
    tile = max(TILE, largest)
    numels = np.array([work.param.numel() for work in works])
    num_programs = -(-numels // tile)
    table = np.empty((len(works), COLUMNS.value), np.int64)
    table[:, :6] = [[tensor.data_ptr() for tensor in row] for row in stored]
    table[:, 6] = numels // unit if is_wide else numels
    table[:, 7] = np.cumsum(num_programs) - num_programs
    table[:, 8] = (np.array([work.stream for work in works], dtype=np.uint64) * np.uint64(2)).view(np.int64)
    work_of_program = np.repeat(np.arange(len(works)), num_programs)
    numbers = _on_device(np.concatenate((table.reshape(-1), work_of_program)), like.param.device)
    kinds = [_DTYPES[stored[0][number].dtype] for number in (0, 1, 2, 4)]
    keys = (*_signed(like.exp_avg_key), *_signed(like.exp_avg_sq_key))
    constants = (*triton_kernel.formats(like), unit, tile // unit, is_wide, *kinds)
    arguments = (numbers, table.size, *triton_kernel.numbers_of(like), *keys, *constants)
    return Launch(kernel, (len(work_of_program),), arguments, triton_kernel.options_for(tile))


def _on_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    # Kept for each stream: another one could read what is not written yet.
    stream = None if device.type in ("cpu", "meta") else torch.accelerator.current_stream(device).stream_id
    return _kept(numbers.tobytes(), device, stream)


@functools.lru_cache(MAX_KEPT)
def _kept(numbers: bytes, device: torch.device, stream: int | None) -> Tensor:
    """int64. Nobody writes to it: what is kept under these numbers is these numbers."""
    return sent(np.frombuffer(bytearray(numbers), np.int64), device)


def _signed(key: tuple[int, int] | None) -> tuple[int, int]:
    return (0, 0) if key is None else triton_kernel.signed_words(key)


@triton.jit
def _subkey(first, second, stream):
    """`numerics.random.derive_key`, of int32 words that stand for uint32 and an int64."""
    low, high = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    return derive_key(first.to(tl.uint32, bitcast=True), second.to(tl.uint32, bitcast=True), low, high)


@triton.jit
def _pointer(row, TYPE: tl.constexpr, IS_WIDE: tl.constexpr):
    pointer = tl.load(row).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, WIDEST) if IS_WIDE else pointer


@triton.jit(do_not_specialize=["table_size", *(f"{name}_{i}" for name in ("first_key", "second_key") for i in (0, 1))])
def kernel(
    table, table_size,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, correction,
    first_key_0, first_key_1, second_key_0, second_key_1,
    FIRST: tl.constexpr, SECOND: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, IS_WIDE: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, FIRST_CODES: tl.constexpr, SECOND_CODES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = table + tl.load(table + table_size + program) * COLUMNS
    start_unit = (program - tl.load(row + 7)) * UNITS
    length = tl.load(row + 6)
    if not IS_WIDE:
        length -= start_unit * UNIT
    stream = tl.load(row + 8)
    scalars = (beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, correction)
    step_tile(
        _pointer(row, PARAM, IS_WIDE),
        _pointer(row + 1, GRAD, IS_WIDE),
        _pointer(row + 2, FIRST_CODES, IS_WIDE),
        _pointer(row + 3, tl.float32, IS_WIDE),
        _pointer(row + 4, SECOND_CODES, IS_WIDE),
        _pointer(row + 5, tl.float32, IS_WIDE),
        scalars,
        _subkey(first_key_0, first_key_1, stream),
        _subkey(second_key_0, second_key_1, stream + 1),
        start_unit,
        length.to(tl.int32),
        FIRST, SECOND, UNIT, UNITS, not IS_WIDE,
    )  # fmt: skip
