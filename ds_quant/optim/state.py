"""An optimizer state as a tensor: it reads as fp32, and is stored as low-bit codes and scales.

What DeepSpeed and torch do with it is `coded_tensor`'s. Beside that:

    to(dtype)          a plain tensor
    data = value       takes over the codes of a QuantizedState; quantizes a plain tensor
    copy_              between whole moments of one format: codes and scales as they are
    other writes       quantize the blocks that they touch, to nearest

What is quantized to nearest, dequantized and quantized again gets the same codes and scales: a block's largest value
is coded exactly, so its scale returns. A moment that went through fp32 whole, as in a checkpoint, has therefore lost
nothing. The exceptions: the signed `dynamic` map of bitsandbytes ends at 1 but at -0.993 (4 bits: -0.8875) below, so a
block whose largest value is negative gets a smaller scale and is rounded again; stochastic rounding moves the largest
value of a block of `float` codes once in 2^16 times at most; values below 2^-126 are rounded as fp32 rounds them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.numerics.blockwise import QuantizedBlocks, dequantize_blockwise, quantize_blockwise
from ds_quant.numerics.codes import KINDS, CodeMap
from ds_quant.numerics.packing import code_bytes
from ds_quant.optim.coded_tensor import SET_DATA, CodedTensor


class QuantizedState(CodedTensor):
    """fp32 tensor whose elements are those of `blocks` that shape, strides and `start` select.

    Attributes:
        blocks: codes and scales, shared between a moment and its windows.
        start: the storage offset of a window; 0 for a whole moment.
        whole: whether all elements are there, in order: a window is not.
        stream: the number under which the optimizer draws random bits for the parameter (see `QuantAdamW`).
    """

    blocks: QuantizedBlocks
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

    @classmethod
    def zeros(
        cls, shape: Sequence[int], code_map: CodeMap, block_size: int, device: torch.device, stream: int = 0
    ) -> Self:
        """A moment of zeros: codes of zero bytes, which stand for zeros under every map while the scale is 0."""
        numel = math.prod(shape)
        num_bytes = code_bytes(numel, block_size, code_map.bits)
        codes = torch.zeros(num_bytes, dtype=code_map.stored_dtype, device=device)
        scale = torch.zeros(-(-numel // block_size) * code_map.scales, dtype=torch.float32, device=device)
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
        values = dequantize_blockwise(self.blocks.block_range(first, last))
        return values.as_strided(self.shape, self.stride(), self.start - first * self.blocks.block_size)

    def overwrite(self, values: Tensor) -> None:
        """Put `values`, of the same shape, in place of these: only the blocks touched are quantized."""
        first, last = self._touched_blocks()
        blocks, size = self.blocks, self.blocks.block_size
        part = self.blocks.block_range(first, last)
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

    def copy_stored(self, source: Tensor) -> bool:
        """Take over the codes and scales of a whole moment of the same shape and format; whether it is one."""
        if not (isinstance(source, QuantizedState) and source.whole and self.whole and source.shape == self.shape):
            return False
        old, new = self.blocks, source.blocks
        if new.code_map != old.code_map or new.block_size != old.block_size:
            return False
        old.codes.copy_(new.codes)
        old.scale.copy_(new.scale)
        return True

    def set_data(self, value: Tensor) -> None:
        """`moment.data = value`: torch would replace what the tensor looks like and leave the codes."""
        if self.shape != value.shape:
            raise ValueError(
                f"QuantizedState.data: got shape {tuple(value.shape)}; allowed: {tuple(self.shape)}; fix: make a new "
                "moment with QuantizedState.quantize"
            )
        source = value
        if not isinstance(source, QuantizedState):
            source = QuantizedState.quantize(value, self.blocks.code_map, self.blocks.block_size, stream=self.stream)
        with torch._C.DisableTorchFunctionSubclass():
            # Device and the rest of what is seen from outside.
            SET_DATA(self, source)
        self.blocks, self.start, self.whole, self.stream = source.blocks, source.start, source.whole, source.stream

    def stored_numel(self) -> int:
        return self.blocks.numel

    def window(self, view: Tensor) -> "QuantizedState":
        return QuantizedState(self.blocks, view.shape, self.stream, (view.stride(), int(view.storage_offset())))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "QuantizedState":
        blocks = self.blocks._replace(codes=change(self.blocks.codes), scale=change(self.blocks.scale))
        return QuantizedState(blocks, self.shape, stream=self.stream)

    def stored(self) -> Sequence[Tensor]:
        return self.blocks.codes, self.blocks.scale

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
