"""Quantized all_reduce and reduce_scatter of single tensors, with the signatures of torch.distributed's."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch import distributed as torch_dist

from ds_quant.comm import backend
from ds_quant.comm.agreement import check_agreement
from ds_quant.comm.exchange import Call, Exchange
from ds_quant.comm.layout import Span, cut_each
from ds_quant.comm.reducer import Reducer
from ds_quant.comm.statistics import Statistics
from ds_quant.config import GradientCommunicationConfig
from ds_quant.numerics.integer import DTYPES

ReduceOp = torch_dist.ReduceOp


class _Calls:
    """A reducer of the functions below, how often it was called, and what its ranks have agreed on."""

    def __init__(self, config: GradientCommunicationConfig, group: backend.Group) -> None:
        self.reducer = Reducer(config, group, statistics=Statistics(with_errors=False), seed=torch.initial_seed())
        self.number = 0
        self.agreed: set[tuple] = set()

    def next(self, what: str, tensor: Tensor, op: Any, group: backend.Group) -> Call:
        """The call about to be made; the ranks compare notes before the first of its kind."""
        kind = (what, tensor.numel(), str(tensor.dtype), str(op))
        if kind not in self.agreed:
            check_agreement(f"ds_quant.comm.{what}", [*kind, self.reducer.config.model_dump()], group, tensor.device)
            self.agreed.add(kind)
        factor = 1.0 / self.reducer.world_size if op == ReduceOp.AVG else 1.0
        self.number += 1
        return Call(factor, self.reducer.key(self.number, 0))


_calls: dict[Any, dict[Any, _Calls]] = {}
"""By group and settings. Reducers hold their group: those of destroyed groups are dropped by hand."""


class Handle:
    """A collective under way. `wait` on all ranks in the order in which the collectives were started."""

    def __init__(self, exchange: Exchange, finish: Any) -> None:
        self._exchange: Exchange | None = exchange
        self._finish = finish

    def wait(self) -> bool:
        """Do the rest; the result is there when it returns."""
        if self._exchange is not None:
            self._exchange.complete()
            self._finish()
            self._exchange = None
        return True

    def is_completed(self) -> bool:
        return self._exchange is None


def all_reduce(
    tensor: Tensor,
    op: Any = ReduceOp.SUM,
    group: backend.Group | None = None,
    async_op: bool = False,
    *,
    bits: int | None = None,
    format: str | None = None,
    scale_rule: str | None = None,
    block_size: int | None = None,
    rounding: str = "nearest",
    rotation: str = "none",
    hierarchical: bool | int = False,
) -> Handle | None:
    """Sum or average `tensor` over the ranks of `group`, in place, with `bits` bits an element on the wire.

    Settings are those of the JSON's `communication.gradient`; with neither `bits` nor `format` 8 bits. Each rank's
    share is quantized once, and the result once more, in blocks of `block_size` elements (None: 256 at 8 bits, 128 at
    4, or those of the format); all ranks end with the same bits. A block with an Inf or a NaN on any rank comes back
    as NaN.

    Args:
        tensor: fp32, bf16, fp16 or fp64 (which is reduced as fp32), any shape and strides.
        op: ReduceOp.SUM or ReduceOp.AVG.
        async_op: return a handle; the result is there after its `wait`, which must be called on all ranks in the order
            of the calls.

    Raises:
        ConfigError: settings out of range, or ranks that call it with another tensor or other settings (found at the
            first call of each kind; later ones meet the time-out of the group).
        ValueError: another dtype or op.
    """
    _check("all_reduce(tensor)", tensor, op)
    group = backend.resolve(group)
    calls = _calls_of(group, bits, format, scale_rule, block_size, rounding, rotation, hierarchical)
    call = calls.next("all_reduce", tensor, op, group)
    flat = _flat(tensor)
    exchange = calls.reducer.start_all_reduce([flat], [Span("", 0, 0, 0, flat.numel())], call)

    def put_back() -> None:
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view(tensor.shape))  # a leaf, maybe

    handle = Handle(exchange, put_back)
    return _waited(handle, async_op)


def reduce_scatter(
    output: Tensor,
    input: Tensor,
    op: Any = ReduceOp.SUM,
    group: backend.Group | None = None,
    async_op: bool = False,
    *,
    bits: int | None = None,
    format: str | None = None,
    scale_rule: str | None = None,
    block_size: int | None = None,
    rounding: str = "nearest",
    rotation: str = "none",
    hierarchical: bool | int = False,
) -> Handle | None:
    """Sum or average `input` over the ranks and leave each rank its part in `output`, as reduce_scatter_tensor does.

    `input` has world_size times the elements of `output`; rank r gets run number r of them. Each element is quantized
    once; the own part is not. Everything else is as in :func:`all_reduce`.
    """
    _check("reduce_scatter(input)", input, op)
    _check("reduce_scatter(output)", output, op)
    group = backend.resolve(group)
    calls = _calls_of(group, bits, format, scale_rule, block_size, rounding, rotation, hierarchical)
    world_size = calls.reducer.world_size
    if input.numel() != world_size * output.numel() or input.device != output.device:
        raise ValueError(
            f"reduce_scatter(output): got {output.numel()} elements on {output.device}; allowed: 1/{world_size} of the "
            f"{input.numel()} elements of input, on {input.device}; make it so"
        )
    call = calls.next("reduce_scatter", input, op, group)
    flat = _flat(input)
    target = output if output.is_contiguous() and output.dtype in DTYPES else output.new_empty(output.shape).float()
    pieces = cut_each([Span("", 0, 0, 0, flat.numel())], world_size)
    exchange = calls.reducer.start_reduce_scatter([flat], pieces, target.view(-1), call)

    def put_back() -> None:
        if target is not output:
            output.detach().copy_(target)

    return _waited(Handle(exchange, put_back), async_op)


def _waited(handle: Handle, async_op: bool) -> Handle | None:
    if async_op:
        return handle
    handle.wait()
    return None


def _flat(tensor: Tensor) -> Tensor:
    """1-D, contiguous, of a dtype that the kernels take: a view where that is possible."""
    wide = tensor.detach() if tensor.dtype in DTYPES else tensor.detach().float()
    return wide.contiguous().view(-1)


@functools.lru_cache(maxsize=128, typed=True)  # True is no number of ranks
def _config(
    bits: int | None,
    format: str | None,
    scale_rule: str | None,
    block_size: int | None,
    rounding: str,
    rotation: str,
    hierarchical: Any,
) -> GradientCommunicationConfig:
    asked = {"bits": bits, "format": format, "scale_rule": scale_rule, "block_size": block_size}
    settings = {key: value for key, value in asked.items() if value is not None}
    if bits is None and format is None:
        settings["bits"] = 8
    settings |= {"rounding": rounding, "rotation": rotation, "hierarchical": hierarchical}
    return GradientCommunicationConfig.parse(settings)


def _calls_of(group: backend.Group, *settings: Any) -> _Calls:
    config = _config(*settings)
    if group not in _calls:
        for gone in [other for other in _calls if backend.is_destroyed(other)]:
            del _calls[gone]
    of_group = _calls.setdefault(group, {})
    if config not in of_group:
        of_group[config] = _Calls(config, group)
    return of_group[config]


def _check(where: str, tensor: Tensor, op: Any) -> None:
    if tensor.dtype not in (*DTYPES, torch.float64) or tensor.layout != torch.strided:
        raise ValueError(
            f"ds_quant.comm.{where}: got {tensor.dtype}, {tensor.layout}; allowed: float32, bfloat16, float16, "
            "float64, dense; convert it, or use torch.distributed"
        )
    if op not in (ReduceOp.SUM, ReduceOp.AVG):
        raise ValueError(
            f"ds_quant.comm.{where.partition('(')[0]}(op): got {op}; allowed: ReduceOp.SUM, ReduceOp.AVG; use "
            "torch.distributed for others"
        )
