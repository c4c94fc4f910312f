"""The fused AdamW step on CUDA devices. Nobody has run it on a GPU yet.

Each work goes one of two ways, by its format:

    triton         with DS_QUANT_KERNELS=triton in the environment: `kernels.triton`, where it takes the format
    compiled       all others: `numerics.adam.adamw_step` under torch.compile

*compiled* is close to the reference, not equal: Inductor fuses products into sums and divides approximately, and may
then round to the next code. Its price: each format, and each pair of dtypes in it, compiles at the first step, once for
each kind of length (whole blocks only, with a tail, one block, less, one element), some ten seconds each; for the
granularities "tensor" and "channel" once for each block size. Then each parameter is a call of its own with several
kernels, which is slow for small ones, and temporaries of its size. New values of lr, betas and step compile nothing.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ds_quant.base.log import warn
from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.kernels.choice import chosen
from ds_quant.kernels.compiling import compile_whole
from ds_quant.numerics.adam import AdamWScalars, Moment, adamw_step
from ds_quant.numerics.blockwise import QuantizedBlocks, packed_bytes
from ds_quant.numerics.codes import CodeMap
from ds_quant.numerics.integer import DTYPES
from ds_quant.numerics.random import derive_words

Layout = tuple[CodeMap, int] | None
"""Code map and block size of a moment; None for 32 bits."""


@torch.no_grad()
def adamw_(works: Sequence[AdamWWork]) -> None:
    """Do the works in place. The module docstring has how close the result is to the reference.

    Tensors are written behind autograd's back: their versions stay.

    Raises ValueError, before anything is changed, where a tensor is not as `AdamWWork` and `QuantizedBlocks` have it.
    """
    for number, work in enumerate(works):
        _check(number, work)
    compiled: dict[torch.device, list[AdamWWork]] = {}
    for work in works:
        chosen = path(work)
        if work.param.numel() == 0:
            continue
        if chosen == "triton":
            from ds_quant.kernels.adamw import triton

            with _current(work.param.device):
                triton.adamw_(work)
        else:
            compiled.setdefault(work.param.device, []).append(work)
    for device, group in compiled.items():
        _compiled_steps(group, device)


def path(work: AdamWWork) -> str:
    """Which way a work goes: "triton" or "compiled". Warns once of each reason for another way."""
    if chosen() == "triton":
        reason = _not_for_triton(work)
        if not reason:
            return "triton"
        _warn_once(f"DS_QUANT_KERNELS=triton: a parameter takes another kernel, because {reason}")
    return "compiled"


@functools.cache
def _warn_once(text: str) -> None:
    warn(text)


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _not_for_triton(work: AdamWWork) -> str | None:
    if not _is_installed("triton"):
        return "triton is not installed"
    from ds_quant.kernels.adamw import triton

    return triton.unsupported(work)


def _compiled_steps(works: Sequence[AdamWWork], device: torch.device) -> None:
    """Scalars and subkeys of all works go to the device together, and to the compiled function as tensors [].

    As vectors they would have lengths, which torch.compile takes to be those of other tensors that happen to have them.
    """
    scalars = _send([work.scalars for work in works], torch.float64, device)
    first_keys = _send([_subkey(work.exp_avg_key, 2 * work.stream) for work in works], torch.int64, device)
    second_keys = _send([_subkey(work.exp_avg_sq_key, 2 * work.stream + 1) for work in works], torch.int64, device)
    for number, work in enumerate(works):
        _compiled(_layout(work.exp_avg), _layout(work.exp_avg_sq))(
            _flat(work.param),
            _flat(work.grad),
            *_storage(work.exp_avg),
            *_storage(work.exp_avg_sq),
            _unbind(scalars[number]),
            None if work.exp_avg_key is None else _unbind(first_keys[number]),
            None if work.exp_avg_sq_key is None else _unbind(second_keys[number]),
        )


def _flat(tensor: Tensor) -> Tensor:
    """Not a view, for torch.compile would guard the sizes of what a view is of. Versions are the caller's business."""
    return tensor.view(-1).data


def _unbind(row: Tensor) -> tuple[Tensor, ...]:
    return tuple(element.data for element in row.unbind())


def _subkey(key: tuple[int, int] | None, stream: int) -> tuple[int, int]:
    return (0, 0) if key is None else derive_words(key, stream)


def _send(rows: Sequence[tuple], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


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
        first = _moment(exp_avg_codes, exp_avg_scale, first_layout, param.numel())
        second = _moment(exp_avg_sq_codes, exp_avg_sq_scale, second_layout, param.numel())
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
        _overwrite(first, new_first)
        _overwrite(second, new_second)

    return compile_whole(step, 64, backend)


def _moment(codes: Tensor, scale: Tensor | None, layout: Layout, numel: int) -> Moment:
    if layout is None:
        return codes
    assert scale is not None
    return QuantizedBlocks(codes, scale, numel, layout[1], layout[0])


def _overwrite(old: Moment, new: Moment) -> None:
    if isinstance(old, Tensor):
        assert isinstance(new, Tensor)
        old.copy_(new)
    else:
        assert isinstance(new, QuantizedBlocks)
        old.codes.copy_(new.codes)
        old.scale.copy_(new.scale)


def _layout(moment: Moment) -> Layout:
    return None if isinstance(moment, Tensor) else (moment.code_map, moment.block_size)


def _storage(moment: Moment) -> tuple[Tensor, Tensor | None]:
    return (_flat(moment), None) if isinstance(moment, Tensor) else (_flat(moment.codes), _flat(moment.scale))


def _check(number: int, work: AdamWWork) -> None:
    numel = work.param.numel()

    def check(name: str, tensor: Tensor, count: int, dtypes: Sequence[torch.dtype]) -> None:
        same = tensor.numel() == count and tensor.dtype in dtypes and tensor.device == work.param.device
        if not same or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise ValueError(
                f"adamw_(works[{number}].{name}): got {tensor.numel()} elements, {tensor.dtype}, {tensor.device}, "
                f"{layout}; allowed: {count} elements, {' or '.join(map(str, dtypes))}, {work.param.device}, "
                "contiguous; make it so"
            )

    check("param", work.param, numel, DTYPES)
    check("grad", work.grad, numel, DTYPES)
    for name, moment in (("exp_avg", work.exp_avg), ("exp_avg_sq", work.exp_avg_sq)):
        if isinstance(moment, Tensor):
            check(name, moment, numel, (torch.float32,))
            continue
        size = moment.block_size
        if moment.numel != numel or size < 1 or (size & (size - 1) and numel % size):
            raise ValueError(
                f"adamw_(works[{number}].{name}): got {moment.numel} elements in blocks of {size}; allowed: {numel} "
                "elements, in blocks of a power of two or a divisor of that; quantize it so"
            )
        if moment.code_map.bits == 4:
            check(f"{name}.codes", moment.codes, packed_bytes(numel, size), (torch.uint8,))
        else:
            check(f"{name}.codes", moment.codes, numel, (moment.code_map.dtype,))
        check(f"{name}.scale", moment.scale, -(-numel // size), (torch.float32,))
