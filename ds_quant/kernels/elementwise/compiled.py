"""Steps on CUDA devices: the definition under torch.compile, a few kernels for each parameter.

Nobody has run it on a GPU yet. It is close to the reference, not equal, and has the price that `adamw.compiled` tells:
some ten seconds of compilation for each rule, format of the states and kind of length.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_quant.kernels.compiled_states import Layout, assembled, flat, layout, storage, unbind
from ds_quant.kernels.compiling import compile_whole
from ds_quant.kernels.elementwise import ops
from ds_quant.kernels.elementwise.work import ElementwiseWork
from ds_quant.kernels.transfers import sent
from ds_quant.numerics.elementwise import Rule, elementwise_step
from ds_quant.numerics.random import derive_words
from ds_quant.numerics.stored_states import overwrite


@ops.elementwise_.by("compiled")
@torch.no_grad()
def elementwise_(works: Sequence[ElementwiseWork]) -> None:
    """Do the works in place, those of one rule at a time. Tensors are written behind autograd's back: their versions
    stay.
    """
    groups: dict[tuple[Rule, torch.device], list[ElementwiseWork]] = {}
    for work in works:
        if work.param.numel():
            groups.setdefault((work.rule, work.param.device), []).append(work)
    for (_, device), group in groups.items():
        # All to the device together, and to the compiled function as tensors [].
        scalars = sent(np.array([work.scalars for work in group], np.float64), device)
        words = sent(np.array([_subkeys(work) for work in group], np.int64), device)
        for number, work in enumerate(group):
            step = _compiled(work.rule, tuple(map(layout, work.states)), work.scalars.__class__)
            keys = tuple(
                None if key is None else unbind(row) for key, row in zip(work.keys, words[number], strict=True)
            )
            states = tuple(map(storage, work.states))
            step(flat(work.param), flat(work.grad), states, unbind(scalars[number]), keys)


def _subkeys(work: ElementwiseWork) -> list[tuple[int, int]]:
    number = len(work.keys) * work.stream
    return [(0, 0) if key is None else derive_words(key, number + i) for i, key in enumerate(work.keys)]


@functools.cache
def _compiled(
    rule: Rule, layouts: tuple[Layout, ...], scalars_type: Callable[..., Any], backend: str | Callable = "inductor"
) -> Callable[..., None]:
    """A step in place, for states of these layouts."""

    # Called once, while compiling: what it returns is constant, whereas integers of a closure may become symbols.
    @torch.compiler.assume_constant_result
    def constant_layouts() -> tuple[Layout, ...]:
        return layouts

    def step(
        param: Tensor,
        grad: Tensor,
        stored: tuple[tuple[Tensor, Tensor | None], ...],
        scalars: tuple[Tensor, ...],
        keys: tuple[tuple[Tensor, ...] | None, ...],
    ) -> None:
        states = [
            assembled(codes, scale, how, param.numel())
            for (codes, scale), how in zip(stored, constant_layouts(), strict=True)
        ]
        subkeys = [None if key is None else torch.stack(key) for key in keys]
        # fp64 tensors, like the floats that they stand for.
        updated, fresh = elementwise_step(rule, param, grad, states, scalars_type(*scalars), subkeys)
        param.copy_(updated)
        for old, new in zip(states, fresh, strict=True):
            overwrite(old, new)

    return compile_whole(step, 64, backend)
