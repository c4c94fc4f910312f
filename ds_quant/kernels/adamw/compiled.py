"""The fused AdamW step on CUDA devices: `numerics.adam.adamw_step` under torch.compile. Nobody has run it on a GPU yet.

It is close to the reference, not equal: Inductor fuses products into sums and divides approximately, and may then round
to the next code. Its price: each format, and each pair of dtypes in it, compiles at the first step, once for each kind
of length (whole blocks only, with a tail, one block, less, one element), some ten seconds each; for the granularities
"tensor" and "channel" once for each block size. Then each parameter is a call of its own with several kernels, which is
slow for small ones, and temporaries of its size: 50 bytes a parameter pass through memory with moments of 8 bits, 100
with 4. New values of lr, betas and step compile nothing.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ds_quant.kernels.adamw import ops
from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.kernels.compiled_states import Layout, assembled, flat, layout, storage, unbind
from ds_quant.kernels.compiling import compile_whole
from ds_quant.kernels.transfers import sent
from ds_quant.numerics.adam import AdamWScalars, adamw_step
from ds_quant.numerics.random import derive_words
from ds_quant.numerics.stored_states import overwrite


@ops.adamw_.by("compiled")
@torch.no_grad()
def adamw_(works: Sequence[AdamWWork]) -> None:
    """Do the works in place. The module docstring has how close the result is to the reference.

    Tensors are written behind autograd's back: their versions stay.
    """
    by_device: dict[torch.device, list[AdamWWork]] = {}
    for work in works:
        if work.param.numel():
            by_device.setdefault(work.param.device, []).append(work)
    for device, group in by_device.items():
        _compiled_steps(group, device)


def _compiled_steps(works: Sequence[AdamWWork], device: torch.device) -> None:
    """Scalars and subkeys of all works go to the device together, and to the compiled function as tensors []."""
    scalars = sent(np.array([work.scalars for work in works], np.float64), device)
    first_keys = sent(np.array([_subkey(work.exp_avg_key, 2 * work.stream) for work in works], np.int64), device)
    second_keys = sent(
        np.array([_subkey(work.exp_avg_sq_key, 2 * work.stream + 1) for work in works], np.int64), device
    )
    for number, work in enumerate(works):
        _compiled(layout(work.exp_avg), layout(work.exp_avg_sq))(
            flat(work.param),
            flat(work.grad),
            *storage(work.exp_avg),
            *storage(work.exp_avg_sq),
            unbind(scalars[number]),
            None if work.exp_avg_key is None else unbind(first_keys[number]),
            None if work.exp_avg_sq_key is None else unbind(second_keys[number]),
        )


def _subkey(key: tuple[int, int] | None, stream: int) -> tuple[int, int]:
    return (0, 0) if key is None else derive_words(key, stream)


@functools.cache
def _compiled(exp_avg: Layout, exp_avg_sq: Layout, backend: str | Callable = "inductor") -> Callable[..., None]:
    """The reference's step in place, for moments of these layouts."""

    # Called once, while compiling: what it returns is constant, whereas integers of a closure may become symbols.
    @torch.compiler.assume_constant_result
    def layouts() -> tuple[Layout, Layout]:
        return exp_avg, exp_avg_sq

    def step(
        param: Tensor,
        grad: Tensor,
        exp_avg_codes: Tensor,
        exp_avg_scale: Tensor | None,
        exp_avg_sq_codes: Tensor,
        exp_avg_sq_scale: Tensor | None,
        scalars: tuple[Tensor, ...],
        exp_avg_key: tuple[Tensor, ...] | None,
        exp_avg_sq_key: tuple[Tensor, ...] | None,
    ) -> None:
        first_layout, second_layout = layouts()
        first = assembled(exp_avg_codes, exp_avg_scale, first_layout, param.numel())
        second = assembled(exp_avg_sq_codes, exp_avg_sq_scale, second_layout, param.numel())
        new_param, new_first, new_second = adamw_step(
            param,
            grad,
            first,
            second,
            AdamWScalars(*scalars),  # type: ignore[arg-type]  # fp64 like the floats they stand for
            None if exp_avg_key is None else torch.stack(exp_avg_key),
            None if exp_avg_sq_key is None else torch.stack(exp_avg_sq_key),
        )
        param.copy_(new_param)
        overwrite(first, new_first)
        overwrite(second, new_second)

    return compile_whole(step, 64, backend)
