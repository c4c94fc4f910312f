"""An optimizer state as a tensor: it reads as fp32, and is stored as low-bit codes and scales.

DeepSpeed's checkpoints, universal checkpoints and `safe_get_full_optimizer_state` handle `state["exp_avg"]` as an fp32
tensor of the parameter's shape: they detach, narrow, copy and pickle it. `QuantizedState` answers so that no bit is
lost where the whole moment is meant, and that a write to a part reaches the codes:

    detach, view, slice, select, split, t, ...   a window on the same codes, as torch's views are on the same storage
    clone, to(device), pickle, deepcopy          of a whole moment: the same codes and scales; of a window: plain fp32
    to(dtype), zeros_like, empty_like            plain tensors
    data = value                                 takes over the codes of a QuantizedState; quantizes a plain tensor
    copy_                                        between whole moments of one format: codes and scales as they are
    copy_, fill_, every other in-place op        the blocks that the window touches are dequantized, changed, and
                                                 quantized to nearest
    everything else                              computed on the dequantized values; what comes out is plain

What is quantized to nearest, dequantized and quantized again gets the same codes and scales: a block's largest value
is coded exactly, so its scale returns. A moment that went through fp32 whole, as in a checkpoint, has therefore lost
nothing. The exceptions: the signed `dynamic` map of bitsandbytes ends at 1 but at -0.993 (4 bits: -0.8875) below, so a
block whose largest value is negative gets a smaller scale and is rounded again; stochastic rounding moves the largest
value of a block of `float` codes once in 2^16 times at most; values below 2^-126 are rounded as fp32 rounds them.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ds_quant.base.errors import fail
from ds_quant.numerics.blockwise import QuantizedBlocks, dequantize_blockwise, quantize_blockwise
from ds_quant.numerics.codes import KINDS, CodeMap
from ds_quant.numerics.packing import code_bytes

aten = torch.ops.aten
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_TO_PYTHON = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
"""Methods for which torch wants memory."""


class QuantizedState(Tensor):
    """fp32 tensor whose elements are those of `blocks` that shape, strides and `start` select.

    Attributes:
        blocks: codes and scales, shared between a moment and its windows.
        start: the storage offset of a window; 0 for a whole moment.
        whole: whether all elements are there, in order: a window is not.
        stream: the number under which the optimizer draws random bits for the parameter (see `QuantAdamW`).
    """

    # Plain attributes, since every method of a tensor subclass goes through __torch_function__.
    blocks: QuantizedBlocks
    start: int
    whole: bool
    stream: int

    @staticmethod
    def __new__(
        cls,
        blocks: QuantizedBlocks,
        shape: Sequence[int],
        stream: int = 0,
        window: tuple[Sequence[int], int] | None = None,
    ) -> Self:
        """`window` has the strides and the start of a part of `blocks`."""
        strides, start = window or (None, None)
        self = Tensor._make_wrapper_subclass(
            cls, tuple(shape), strides=strides, storage_offset=start, dtype=torch.float32, device=blocks.codes.device
        )
        self.blocks, self.start, self.stream = blocks, start or 0, stream
        self.whole = math.prod(shape) == blocks.numel and (not window or (start == 0 and self.is_contiguous()))
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    @classmethod
    def zeros(
        cls, shape: Sequence[int], code_map: CodeMap, block_size: int, device: torch.device, stream: int = 0
    ) -> Self:
        """A moment of zeros: codes of zero bytes, which stand for zeros under every map while the scale is 0."""
        numel = math.prod(shape)
        num_bytes = code_bytes(numel, block_size, code_map.bits)
        codes = torch.zeros(num_bytes, dtype=code_map.stored_dtype, device=device)
        scale = torch.zeros(-(-numel // block_size), dtype=torch.float32, device=device)
        return cls(QuantizedBlocks(codes, scale, numel, block_size, code_map), shape, stream=stream)

    @classmethod
    def quantize(
        cls, values: Tensor, code_map: CodeMap, block_size: int, device: torch.device | None = None, stream: int = 0
    ) -> Self:
        """`values` of any shape and floating dtype, quantized to nearest in row-major order."""
        flat = values.detach().to(device or values.device, torch.float32).reshape(-1)
        blocks = quantize_blockwise(flat, code_map, block_size=block_size)
        return cls(blocks, values.shape, stream=stream)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the codes and scales. `nbytes` counts the fp32 elements that the tensor stands for."""
        return self.blocks.codes.nbytes + self.blocks.scale.nbytes

    def dequantize(self) -> Tensor:
        """The values as a new plain fp32 tensor of the same shape and strides."""
        first, last = self._touched_blocks()
        values = dequantize_blockwise(self._block_range(first, last))
        return values.as_strided(self.shape, self.stride(), self.start - first * self.blocks.block_size)

    def overwrite(self, values: Tensor) -> None:
        """Put `values`, of the same shape, in place of these: only the blocks touched are quantized."""
        first, last = self._touched_blocks()
        blocks, size = self.blocks, self.blocks.block_size
        part = self._block_range(first, last)
        flat = dequantize_blockwise(part)
        flat.as_strided(self.shape, self.stride(), self.start - first * size).copy_(values.detach())
        fresh = quantize_blockwise(flat, blocks.code_map, block_size=size)
        part.codes.copy_(fresh.codes)
        part.scale.copy_(fresh.scale)

    def _touched_blocks(self) -> tuple[int, int]:
        """The first block of which an element is here, and the last one plus 1."""
        size, shape = self.blocks.block_size, self.shape
        if 0 in shape:
            return 0, 0
        end = self.start + 1 + sum((count - 1) * step for count, step in zip(shape, self.stride(), strict=True))
        return self.start // size, -(-end // size)

    def _block_range(self, first: int, last: int) -> QuantizedBlocks:
        """Blocks `first` to `last` - 1, sharing storage."""
        blocks, size = self.blocks, self.blocks.block_size
        width = code_bytes(size, size, blocks.code_map.bits)
        numel = min(last * size, blocks.numel) - min(first * size, blocks.numel)
        return blocks._replace(
            codes=blocks.codes[first * width : last * width], scale=blocks.scale[first:last], numel=numel
        )

    def _moved(self, device: torch.device | None, non_blocking: bool = False) -> "QuantizedState":
        """A copy of the codes and scales, on `device` if given."""
        codes, scale = (
            part.clone() if device is None else part.to(device, non_blocking=non_blocking, copy=True)
            for part in (self.blocks.codes, self.blocks.scale)
        )
        return QuantizedState(self.blocks._replace(codes=codes, scale=scale), self.shape, stream=self.stream)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        blocks = self.blocks
        kind = "" if self.whole else f", window from {self.start} of {blocks.numel}"
        return (
            f"QuantizedState(shape={tuple(self.shape)}, {blocks.code_map.bits}-bit {blocks.code_map.name}, "
            f"block_size={blocks.block_size}, device={blocks.codes.device}{kind})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.whole:
            return self.dequantize().clone().__reduce_ex__(protocol)
        blocks = self.blocks
        state = (blocks.codes, blocks.scale, blocks.block_size, tuple(blocks.code_map), tuple(self.shape), self.stream)
        return rebuild_moment, state

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and isinstance(args[0], QuantizedState) and _names_a_dtype(args[1:], kwargs):
            # torch returns the tensor itself where dtype and device agree already; a cast is asked for by a plain
            # optimizer that loads the state, which must own plain values.
            return args[0].dequantize().to(*args[1:], **kwargs)
        if func in _TO_PYTHON and isinstance(args[0], QuantizedState):
            args = (args[0].dequantize(), *args[1:])
        if func == _SET_DATA and isinstance(args[0], QuantizedState):
            return _set_data(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        handler = _window if func.is_view else _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], QuantizedState):
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _on_values(func, args, kwargs)


def rebuild_moment(
    codes: Tensor,
    scale: Tensor,
    block_size: int,
    code_map: tuple[str, int, bool, int, int, int],
    shape: tuple[int, ...],
    stream: int,
) -> QuantizedState:
    """A whole moment from what checkpoints hold of it.

    Raises:
        ConfigError: a map that nothing has registered.
    """
    if code_map[0] not in KINDS:
        got = f"a state with the map {code_map[0]}"
        raise fail("checkpoint", got, ", ".join(KINDS), "import what calls register_map for it")
    blocks = QuantizedBlocks(codes, scale, math.prod(shape), block_size, CodeMap(*code_map))
    return QuantizedState(blocks, shape, stream=stream)


torch.serialization.add_safe_globals([rebuild_moment])

QuantizedMoment = QuantizedState
"""The name that it had in version 0.1."""


def _names_a_dtype(args: tuple, kwargs: dict) -> bool:
    return any(isinstance(value, torch.dtype | Tensor) for value in (*args, *kwargs.values()))


def _set_data(moment: QuantizedState, value: Tensor) -> None:
    """`moment.data = value`: torch would replace what the tensor looks like and leave the codes."""
    if moment.shape != value.shape:
        raise ValueError(
            f"QuantizedState.data: got shape {tuple(value.shape)}; allowed: {tuple(moment.shape)}; fix: make a new "
            "moment with QuantizedState.quantize"
        )
    if isinstance(value, QuantizedState):
        source = value
    else:
        blocks = moment.blocks
        source = QuantizedState.quantize(value, blocks.code_map, blocks.block_size, stream=moment.stream)
    with torch._C.DisableTorchFunctionSubclass():
        # Device and the rest of what is seen from outside.
        _SET_DATA(moment, source)
    moment.blocks, moment.start, moment.whole, moment.stream = source.blocks, source.start, source.whole, source.stream


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on dequantized values, and put back what it wrote."""
    plain: dict[int, tuple[QuantizedState, Tensor]] = {}

    def values_of(moment: QuantizedState) -> Tensor:
        if id(moment) not in plain:
            plain[id(moment)] = (moment, moment.dequantize())
        return plain[id(moment)][1]

    result = func(*tree_map_only(QuantizedState, values_of, args), **tree_map_only(QuantizedState, values_of, kwargs))
    written: set[int] = set()
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for item in given if isinstance(given, list | tuple) else [given]:
                if isinstance(item, QuantizedState):
                    written.add(id(item))
    changed = [plain[number] for number in written]
    for moment, values in changed:
        if values.shape != moment.shape or values.stride() != moment.stride():
            raise NotImplementedError(
                f"QuantizedState: got {func}, which changes the shape in place; allowed: other operations; fix: "
                "take the operation without underscore"
            )
    for moment, values in changed:
        moment.overwrite(values)
    if not written:
        return result
    back = {id(values): moment for moment, values in plain.values()}
    return tree_map_only(Tensor, lambda out: back.get(id(out), out), result)


def _window(func: Any, args: Any, kwargs: Any) -> Any:
    """A view, or several: torch works its geometry out on a tensor without data."""
    moment = args[0]
    blocks, stream = moment.blocks, moment.stream
    blank = torch.empty(blocks.numel, device="meta").as_strided(moment.shape, moment.stride(), moment.start)
    views = func(blank, *args[1:], **kwargs)
    if isinstance(views, Tensor) and views.dtype != torch.float32:
        return NotImplemented

    def window(view: Tensor) -> QuantizedState:
        return QuantizedState(blocks, view.shape, stream, (view.stride(), view.storage_offset()))

    return tree_map_only(Tensor, window, views)


def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._moved(None) if args[0].whole else NotImplemented


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    moment, dtype = args[0], kwargs.get("dtype")
    if not moment.whole or dtype not in (None, torch.float32):
        return NotImplemented
    return moment._moved(kwargs.get("device"), kwargs.get("non_blocking", False))


def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if (
        isinstance(source, QuantizedState)
        and (source.whole and target.whole and source.shape == target.shape)
        and source.blocks.code_map == target.blocks.code_map
        and source.blocks.block_size == target.blocks.block_size
    ):
        target.blocks.codes.copy_(source.blocks.codes)
        target.blocks.scale.copy_(source.blocks.scale)
    else:
        target.overwrite(source.dequantize() if isinstance(source, QuantizedState) else source)
    return target


def _zeros_like(func: Any, args: Any, kwargs: Any) -> Any:
    options = {"dtype": torch.float32, "device": args[0].device, **{k: v for k, v in kwargs.items() if v is not None}}
    options.pop("memory_format", None)
    return (torch.zeros if func is aten.zeros_like.default else torch.empty)(args[0].shape, **options)


def _is_pinned(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].blocks.codes.is_pinned()


def _pin(func: Any, args: Any, kwargs: Any) -> Any:
    blocks = args[0].blocks
    if not args[0].whole:
        return NotImplemented
    pinned = blocks._replace(codes=blocks.codes.pin_memory(), scale=blocks.scale.pin_memory())
    return QuantizedState(pinned, args[0].shape, stream=args[0].stream)


_HANDLERS = {
    aten._unsafe_view.default: _window,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.zeros_like.default: _zeros_like,
    aten.empty_like.default: _zeros_like,
    aten.is_pinned.default: _is_pinned,
    aten._pin_memory.default: _pin,
}
