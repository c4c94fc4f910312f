"""Master weights of 24 or 16 bits as a tensor: the bf16 weights that the model computes with, and what they lack.

`MasterTensor` stands where ZeRO keeps a partition of fp32 masters. Its dtype is bf16, so that DeepSpeed makes gradients
of bf16 for it; its values are those of the masters, in fp32: whoever computes with it, reads it or saves it sees them.
A write sets both parts. The bf16 part is memory that the caller gives: the partition of the model's own weights.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ds_quant.numerics.master import join_master, split_master
from ds_quant.optim.coded_tensor import SET_DATA, CodedTensor

aten = torch.ops.aten

PART_ELEMENTS = 1 << 22
"""Elements that are in fp32 at a time where no kernel steps masters: 16 MiB. It decides which random bits are drawn."""


class Part(NamedTuple):
    """Masters number `begin` to `end` - 1, for one step."""

    begin: int
    end: int
    weight: Tensor
    """bf16 [end - begin], where the masters have it."""
    low_bits: Tensor | None
    """int8 of the same shape, or None for masters of 16 bits; where the masters have them."""


class MasterTensor(CodedTensor):
    """The masters of bf16 weights.

    Attributes:
        weight: bf16 [numel], the weights; shared with the model and with windows.
        low_bits: int8 [numel], the remainders; None for masters of 16 bits, which are the weights themselves.
        is_stochastic: whether a step rounds the new masters stochastically.
    """

    weight: Tensor
    low_bits: Tensor | None
    is_stochastic: bool

    @staticmethod
    def __new__(
        cls,
        weight: Tensor,
        low_bits: Tensor | None,
        shape: Sequence[int] | None = None,
        window: tuple[Sequence[int], int] | None = None,
        *,
        is_stochastic: bool = False,
    ) -> Self:
        """`window` has the strides and the start of a part."""
        strides, start = window or (None, None)
        shape = tuple(weight.shape) if shape is None else tuple(shape)
        self = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, storage_offset=start, dtype=torch.bfloat16, device=weight.device
        )
        self.weight, self.low_bits, self.is_stochastic, self.start = weight, low_bits, is_stochastic, start or 0
        whole = not window or (start == 0 and self.is_contiguous() and self.numel() == weight.numel())
        self.whole = whole
        return self

    @property
    def bits(self) -> int:
        """Of a master."""
        return 16 if self.low_bits is None else 24

    @property
    def stored_bytes(self) -> int:
        """Bytes of the remainders: the weights are the model's."""
        return 0 if self.low_bits is None else self.low_bits.nbytes

    def dequantize(self) -> Tensor:
        weight = self._part(self.weight)
        if self.low_bits is None:
            return weight.float()
        return join_master(weight, self._part(self.low_bits))

    def overwrite(self, values: Tensor) -> None:
        """To nearest, as what is loaded and set is; a step rounds as it is told."""
        values = values.detach().to(self.weight.device, torch.float32)
        if self.low_bits is None:
            self._part(self.weight).copy_(values)
            return
        weight, remainder = split_master(values)
        self._part(self.weight).copy_(weight)
        self._part(self.low_bits).copy_(remainder)

    def _part(self, stored: Tensor) -> Tensor:
        return stored.as_strided(self.shape, self.stride(), int(stored.storage_offset()) + self.start)

    @property
    def num_parts(self) -> int:
        """Of PART_ELEMENTS masters each, but for the last one."""
        return -(-self.weight.numel() // PART_ELEMENTS)

    def part(self, number: int) -> Part:
        """Part `number`, from 0."""
        begin = number * PART_ELEMENTS
        end = min(begin + PART_ELEMENTS, self.weight.numel())
        low_bits = None if self.low_bits is None else self.low_bits[begin:end]
        return Part(begin, end, self.weight[begin:end], low_bits)

    def parts(self) -> Iterator[Part]:
        """All of them, in order."""
        return map(self.part, range(self.num_parts))

    def copy_stored(self, source: Tensor) -> bool:
        """Copy weights and remainders of masters of as many bits and the same shape; whether `source` has them."""
        if not isinstance(source, MasterTensor) or source.bits != self.bits or source.shape != self.shape:
            return False
        self._part(self.weight).copy_(source._part(source.weight))
        if self.low_bits is not None and source.low_bits is not None:
            self._part(self.low_bits).copy_(source._part(source.low_bits))
        return True

    def set_data(self, value: Tensor) -> None:
        """`masters.data = value`: takes over the storage of masters; writes anything else into this one's."""
        if isinstance(value, MasterTensor):
            with torch._C.DisableTorchFunctionSubclass():
                SET_DATA(self, value)
            self.weight, self.low_bits, self.start, self.whole = (
                value.weight,
                value.low_bits,
                value.start,
                value.whole,
            )
        else:
            self.overwrite(value)

    def stored_numel(self) -> int:
        return self.weight.numel()

    def window(self, view: Tensor) -> "MasterTensor":
        place = (view.stride(), int(view.storage_offset()))
        return MasterTensor(self.weight, self.low_bits, view.shape, place, is_stochastic=self.is_stochastic)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "MasterTensor":
        remainder = None if self.low_bits is None else change(self.low_bits)
        return MasterTensor(change(self.weight), remainder, self.shape, is_stochastic=self.is_stochastic)

    def stored(self) -> Sequence[Tensor]:
        return (self.weight,) if self.low_bits is None else (self.weight, self.low_bits)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"MasterTensor(shape={tuple(self.shape)}, {self.bits}-bit, device={self.weight.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As plain fp32: a run without ds_quant goes on with such a checkpoint, and every converter reads it.
        return self.dequantize().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and isinstance(args[0], MasterTensor):
            # ZeRO-3 moves the masters of a parameter to a device to gather them, in the dtype that comes out.
            return args[0].dequantize().to(*args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is aten.copy_.default and isinstance(args[1], MasterTensor) and not isinstance(args[0], CodedTensor):
            target, source = args[0], args[1]
            if target.dtype == torch.bfloat16:
                # ZeRO hands the new weights to the model: they are there already.
                weight = source._part(source.weight)
                if target.data_ptr() != weight.data_ptr() or target.stride() != weight.stride():
                    target.copy_(weight)
                return target
        if func in (aten.zeros_like.default, aten.empty_like.default):
            kwargs = {"dtype": torch.float32, **(kwargs or {})}  # ZeRO-3 reads universal checkpoints into such a tensor
        return super().__torch_dispatch__(func, types, args, kwargs)
