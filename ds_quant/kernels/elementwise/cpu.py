"""Steps on the CPU in C++, with the reference's result bit for bit."""

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ds_quant.kernels import native
from ds_quant.kernels.elementwise import ops
from ds_quant.kernels.elementwise.work import ElementwiseWork
from ds_quant.kernels.moment_formats import FORMAT_SIZE, TILE, has_map, in_memory, pack_format
from ds_quant.numerics.ademamix import AdEMAMixScalars, ademamix_rule
from ds_quant.numerics.codes import CodeMap
from ds_quant.numerics.elementwise import Rule
from ds_quant.numerics.lion import LionScalars, lion_rule
from ds_quant.numerics.sgd import SGDScalars, sgd_rule

_MAX_STATES, _MAX_SCALARS = 3, 12
_ENTRY = struct.Struct(f"@8Q4qQ{_MAX_SCALARS}f{2 * _MAX_STATES}I3i4i0Q")
"""The structure ElementwiseEntry of elementwise.h."""
_NO_KEY = (0, 0)


def _lion(s: LionScalars) -> tuple[float, ...]:
    return s.beta1, 1 - s.beta1, s.beta2, 1 - s.beta2, s.decay, s.lr


def _sgd(s: SGDScalars) -> tuple[float, ...]:
    return s.momentum, s.kept, s.weight_decay, s.lr, s.from_grad, s.from_buffer


def _ademamix(s: AdEMAMixScalars) -> tuple[float, ...]:
    shares = (share for beta in (s.beta1, s.beta2, s.beta3) for share in (beta, 1 - beta))
    return *shares, s.alpha, s.eps, s.decay, s.lr, s.fast, s.correction


RULES: dict[Rule, tuple[int, Callable[[Any], tuple[float, ...]]]] = {
    lion_rule: (0, _lion),
    sgd_rule: (1, _sgd),
    ademamix_rule: (2, _ademamix),
}
"""The rules that C++ has: their numbers in elementwise_stages.cpp, and its scalars in order."""


@ops.elementwise_.by("cpu")
def elementwise_(works: Sequence[ElementwiseWork], *, isa: str | None = None) -> None:
    """Do the works in place, with torch.get_num_threads() threads; the result does not depend on their number.

    Works with a rule, a map (`register_map`) or blocks that the kernel does not have go on to the next backend. `isa`
    asks for a narrower instruction set. Raises ValueError, before anything is changed, for keys and maps that there are
    not.
    """
    formats: dict[CodeMap | None, int] = {}
    rows, others = [], []
    for work in works:
        if not _is_served(work):
            others.append(work)
        elif work.param.numel():
            rows.append(_entry(work, formats))
    chosen = native.isa_number("elementwise_", isa)
    packed = b"".join(pack_format(code_map, "elementwise_(states)") for code_map in formats)
    _function()(b"".join(rows), len(rows), packed, isa=chosen)
    if others:
        ops.elementwise_.after("cpu", others[0].param.device)(others)


def _is_served(work: ElementwiseWork) -> bool:
    if work.rule not in RULES:
        return False
    quantized = [state for state in work.states if not isinstance(state, Tensor)]
    # Blocks of all states must fit into a tile together; those of "tensor" and "channel" are left to the next backend.
    has_maps = all(has_map("Lion, SGD and AdEMAMix", state.code_map) for state in quantized)
    return has_maps and math.lcm(*(state.block_size for state in quantized)) <= TILE


def _entry(work: ElementwiseWork, formats: dict[CodeMap | None, int]) -> bytes:
    """The structure of a work; `formats` gets the number of each new one."""
    number, scalars_of = RULES[work.rule]
    states = [in_memory(state) for state in work.states]
    count = len(states)
    empty = [0] * (_MAX_STATES - count)
    scalars = scalars_of(work.scalars)
    words = [word for key in work.keys for word in key or _NO_KEY]
    try:
        return _ENTRY.pack(
            *(work.param.data_ptr(), work.grad.data_ptr()),
            *(*(codes for _, codes, _, _ in states), *empty),
            *(*(scale for _, _, scale, _ in states), *empty),
            work.param.numel(),
            *(*(block_size for *_, block_size in states), *empty),
            count * work.stream,
            *(*scalars, *[0.0] * (_MAX_SCALARS - len(scalars))),
            *(*words, *[0] * (2 * len(empty))),
            *(*(formats.setdefault(code_map, len(formats)) for code_map, *_ in states), *empty),
            *(number, native.DTYPES[work.param.dtype], native.DTYPES[work.grad.dtype]),
            sum((key is not None) << i for i, key in enumerate(work.keys)),
        )
    except struct.error as error:
        raise ValueError(
            f"elementwise_(works): got keys {work.keys} and stream {work.stream} ({error}); allowed: keys of two words "
            "below 2^32, a stream below 2^62; make them with fold_key()"
        ) from None


@functools.cache
def _function() -> Callable[..., Any]:
    sizes = {"ds_quant_elementwise_entry_size": _ENTRY.size, "ds_quant_format_size": 8 + 2 * FORMAT_SIZE}
    own = ctypes.c_char_p, ctypes.c_int64, ctypes.c_char_p
    return native.function("ds_quant_elementwise", *own, sizes=sizes)
