"""The definition of a step in pieces of a parameter, so that no temporary is of its size."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_quant.kernels.elementwise.work import ElementwiseWork
from ds_quant.numerics.blockwise import QuantizedBlocks
from ds_quant.numerics.elementwise import elementwise_step
from ds_quant.numerics.random import derive_key
from ds_quant.numerics.stored_states import State, overwrite, part

PIECE = {"cpu": 2**15, "cuda": 2**22}
"""Elements at a time, more where a block is longer: temporaries that stay in a core's cache, or keep a GPU busy."""


@torch.no_grad()
def elementwise_(works: Sequence[ElementwiseWork]) -> None:
    """Do the works in place, one after the other. The pieces have the bits that the whole would have."""
    for work in works:
        keys = subkeys(work)
        for piece in pieces(work, PIECE.get(work.param.device.type, PIECE["cuda"])):
            step_piece(work, *piece, keys)


def step_piece(
    work: ElementwiseWork,
    offset: int,
    param: Tensor,
    grad: Tensor,
    states: Sequence[State],
    keys: Sequence[Tensor | None],
) -> None:
    """Step one of `pieces` in place."""
    updated, fresh = elementwise_step(work.rule, param, grad, states, work.scalars, keys, offset)
    param.copy_(updated)
    for old, new in zip(states, fresh, strict=True):
        overwrite(old, new)


def pieces(work: ElementwiseWork, length: int) -> Iterator[tuple[int, Tensor, Tensor, list[State]]]:
    """(number of the first element, param, grad, states) of runs of whole blocks, views of the work's tensors.

    They have `length` elements, or a block where one is longer; the last one has what is left.
    """
    numel = work.param.numel()
    sizes = [state.block_size for state in work.states if isinstance(state, QuantizedBlocks)]
    least = math.lcm(*sizes)
    size = least * max(1, length // least)
    param, grad = work.param.view(-1), work.grad.view(-1)
    for start in range(0, numel, size):
        end = min(start + size, numel)
        yield start, param[start:end], grad[start:end], [part(state, start, end) for state in work.states]


def subkeys(work: ElementwiseWork) -> tuple[Tensor | None, ...]:
    """The keys of the states."""
    number, device = len(work.states) * work.stream, work.param.device
    return tuple(
        None if key is None else derive_key(torch.tensor(key, dtype=torch.int64, device=device), number + i)
        for i, key in enumerate(work.keys)
    )
