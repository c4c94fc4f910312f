"""Steps on the CPU: the definition as C++ that Inductor writes, with its result bit for bit, where that pays.

Compiling takes half a minute to a minute for each rule, format of the states and dtype, once on a machine (Inductor
keeps it on the disk). So steps of fewer than LEAST elements take the definition as it stands. The last piece of each
parameter does too: what is compiled has one length.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_quant.kernels.compiling import compile_whole
from ds_quant.kernels.elementwise import ops, reference
from ds_quant.kernels.elementwise.work import ElementwiseWork
from ds_quant.numerics.blockwise import QuantizedBlocks
from ds_quant.numerics.codes import CodeMap
from ds_quant.numerics.elementwise import Rule, elementwise_step
from ds_quant.numerics.stored_states import State, overwrite

LEAST = 2**22
"""Elements of a step's works together: 150 ns an element are saved, so a minute is won back in some hundred steps."""

PIECE = 2**16
"""Elements at a time for each thread."""

LARGEST_BLOCK = 4096
"""Longer blocks, those of the granularities "tensor" and "channel", are left to the definition."""

Layout = tuple[CodeMap, int] | None
"""Code map and block size of a state; None for 32 bits."""


@ops.elementwise_.by("cpu")
@torch.no_grad()
def elementwise_(works: Sequence[ElementwiseWork]) -> None:
    """Do the works in place, with torch.get_num_threads() threads; the result does not depend on their number."""
    if sum(work.param.numel() for work in works) < LEAST:
        reference.elementwise_(works)
        return
    size = PIECE * torch.get_num_threads()
    for work in works:
        layouts = tuple(map(_layout, work.states))
        if any(layout and layout[1] > LARGEST_BLOCK for layout in layouts):
            reference.elementwise_([work])
            continue
        keys = reference.subkeys(work)
        step = _compiled(work.rule, layouts, work.scalars.__class__)
        scalars = tuple(torch.tensor(value, dtype=torch.float64) for value in work.scalars)
        for offset, param, grad, states in reference.pieces(work, size):
            if param.numel() == size:
                tensors = tuple(part.data for state in states for part in _tensors(state))
                step(param.data, grad.data, tensors, scalars, keys, torch.tensor(offset))
            else:
                reference.step_piece(work, offset, param, grad, states, keys)


def _layout(state: State) -> Layout:
    return None if isinstance(state, Tensor) else (state.code_map, state.block_size)


def _tensors(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else (state.codes, state.scale)


@functools.cache
def _compiled(rule: Rule, layouts: tuple[Layout, ...], scalars_type: type) -> Callable[..., None]:
    """A step of one piece in place, for states of these layouts."""

    def step(
        param: Tensor,
        grad: Tensor,
        tensors: tuple[Tensor, ...],
        scalars: tuple[Tensor, ...],
        keys: tuple[Tensor | None, ...],
        offset: Tensor,
    ) -> None:
        rest = iter(tensors)
        states: list[State] = []
        for layout in layouts:
            if layout is None:
                states.append(next(rest))
            else:
                states.append(QuantizedBlocks(next(rest), next(rest), param.numel(), layout[1], layout[0]))
        updated, fresh = elementwise_step(rule, param, grad, states, scalars_type(*scalars), keys, offset)
        param.copy_(updated)
        for old, new in zip(states, fresh, strict=True):
            overwrite(old, new)

    # A length for each number of threads, in each of the dtypes of parameters and gradients.
    return compile_whole(step, recompile_limit=64, dynamic=False)
