"""What the operations on the wire refuse: ValueError, before anything is written."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds_quant.base.errors import argument_error
from ds_quant.base.number_formats import FORMATS, WIRE_FORMATS, scale_rules
from ds_quant.kernels.wire.kept import KeptOfParts
from ds_quant.numerics.integer import DTYPES
from ds_quant.numerics.wire import Parts, Residuals, WireFormat, code_bytes, scale_bytes
from ds_quant.numerics.wire_blocks import BITS, BLOCK_SIZES, ROTATIONS


def _described(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}, {layout}, on {tensor.device}"


def _is_known(fmt: WireFormat) -> bool:
    if fmt.rotation not in ROTATIONS:
        return False
    if not fmt.format:
        return fmt.bits in BITS and fmt.block_size in BLOCK_SIZES and fmt.scale_rule == "floor"
    if fmt.bits != 4 or fmt.format not in WIRE_FORMATS:
        return False
    own_size = FORMATS[fmt.format].block_size
    has_size = fmt.block_size == own_size if own_size else fmt.block_size in BLOCK_SIZES
    return has_size and fmt.scale_rule in scale_rules(fmt.format)


MAX_COLUMNS = 4
"""Of residuals that are known to fit a layout: what is owed, and what this step writes, of two feedbacks."""


class _Known(NamedTuple):
    """Of parts that are right by themselves."""

    num_elements: int
    ends: list[tuple[int, int]]
    """Numbers of tensors, from the lowest on, and elements that each must have at least."""
    num_bytes: int
    """Bytes that a message must have at least."""
    columns: dict[tuple, list[weakref.ref]]
    """Residuals that fit, by their device and addresses, while all of them are alive."""


def _end(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """begin + length, or the largest int64."""
    largest = np.iinfo(np.int64).max
    return np.where(begin > largest - length, largest, begin + length)


_known = KeptOfParts[_Known]()


class Check:
    """The arguments of one call. Pieces are checked together, and once for a layout: there may be thousands."""

    def __init__(self, where: str, parts: Parts, fmt: WireFormat) -> None:
        self.where, self.parts, self.fmt = where, parts, fmt
        self.known = _known.get(parts, fmt, self._parts)
        self.count = len(parts.numel)

    def _parts(self) -> _Known:
        where, parts, fmt = self.where, self.parts, self.fmt
        if not _is_known(fmt):
            allowed = (
                f"bits 8 or 4, block_size a power of two from 32 to 4096, rotation {' or '.join(ROTATIONS)}; or with 4 "
                f"bits a format of {', '.join(WIRE_FORMATS)}, with the blocks and scale rules that it has"
            )
            raise argument_error(f"{where}(fmt)", fmt, allowed, "set it so")
        for name, column in parts._asdict().items():
            dtype = np.uint64 if name == "stream" else np.int64
            if not isinstance(column, np.ndarray) or column.dtype != dtype or column.shape != (len(parts.numel),):
                got = f"{column.dtype} of shape {column.shape}" if isinstance(column, np.ndarray) else type(column)
                allowed = f"a numpy array, {dtype.__name__}, 1-D, as long as numel"
                raise argument_error(f"{where}(parts.{name})", got, allowed, "make all columns of Parts so")
        self._piece("numel", parts.numel <= 0, parts.numel, "more than 0", "leave out empty pieces")
        self._piece("scale_at", (parts.scale_at < 0) | (parts.scale_at % 4 != 0), parts.scale_at, "multiples of 4")
        self._piece("codes_at", parts.codes_at < 0, parts.codes_at, "0 or more")
        self._piece("source", parts.source < 0, parts.source, "0 or more", "number the tensors of the call")
        self._piece("start", parts.start < 0, parts.start, "0 or more", "cut the pieces again")
        sources, number = np.unique(parts.source, return_inverse=True)
        ends = np.zeros(len(sources), np.int64)
        np.maximum.at(ends, number, _end(parts.start, parts.numel))
        num_bytes = max(int(_end(at, needed).max(initial=0)) for _, at, needed in self._places())
        ends_of = list(zip(sources.tolist(), ends.tolist(), strict=True))
        return _Known(int(parts.numel.sum()), ends_of, num_bytes, {})

    def _places(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Where scales and codes of each piece begin, and how many bytes they take."""
        parts = self.parts
        # Both functions count for arrays as for ints.
        needed: Any = (scale_bytes(parts.numel, self.fmt), code_bytes(parts.numel, self.fmt))  # type: ignore[arg-type]
        return [("scale_at", parts.scale_at, needed[0]), ("codes_at", parts.codes_at, needed[1])]

    def _piece(self, name: str, is_wrong: np.ndarray, got: np.ndarray, allowed: str, fix: str = "") -> None:
        if is_wrong.any():
            piece = int(is_wrong.argmax())
            where = f"{self.where}(parts.{name}[{piece}])"
            raise argument_error(where, got[piece], allowed, fix or "lay out the message again")

    def tensors(self, tensors: Sequence[Tensor]) -> None:
        parts = self.parts
        self.device = tensors[0].device if tensors else torch.device("cpu")
        dtype = tensors[0].dtype if tensors else torch.float32
        for number, tensor in enumerate(tensors):
            if tensor.dtype != dtype or dtype not in DTYPES or tensor.device != self.device:
                allowed = f"float32, bfloat16 or float16, all of one dtype and device (tensors[0]: {dtype})"
                raise argument_error(
                    f"{self.where}(tensors[{number}])", _described(tensor), allowed, "make a call for each"
                )
            if tensor.dim() != 1 or not tensor.is_contiguous():
                raise argument_error(
                    f"{self.where}(tensors[{number}])", _described(tensor), "1-D, contiguous", "pass a flat view"
                )
        ends = self.known.ends
        if all(source < len(tensors) and end <= tensors[source].numel() for source, end in ends):
            return
        outside = parts.source >= len(tensors)
        self._piece("source", outside, parts.source, f"0 to {len(tensors) - 1}", "number the tensors of the call")
        lengths = np.array([tensor.numel() for tensor in tensors], dtype=np.int64)[parts.source]
        beyond = parts.start > lengths - parts.numel
        self._piece("start", beyond, parts.start, "pieces within their tensor", "cut the pieces again")

    def message(self, message: Tensor) -> None:
        if not self._is_tensor(message, torch.uint8, 1):
            raise argument_error(
                *(f"{self.where}(message)", _described(message)),
                *(f"uint8, 1-D, contiguous, on {self.device}", "make the buffer so"),
            )
        self._fits("message", message.numel())

    def received(self, received: Tensor, own_rank: int) -> None:
        if not self._is_tensor(received, torch.uint8, 2):
            raise argument_error(
                *(f"{self.where}(received)", _described(received)),
                *(f"uint8 [world_size - 1, message_bytes], contiguous, on {self.device}", "make the buffer so"),
            )
        world_size = received.shape[0] + 1
        if isinstance(own_rank, bool) or not isinstance(own_rank, int) or not 0 <= own_rank < world_size:
            raise argument_error(
                *(f"{self.where}(own_rank)", repr(own_rank), f"0 to {world_size - 1}"),
                "pass one message of each other rank",
            )
        if world_size > 1:
            self._fits("received", received.shape[1])

    def output(self, output: Tensor) -> None:
        expected = self.known.num_elements
        is_right = isinstance(output, Tensor) and output.dtype in DTYPES and output.numel() == expected
        if not is_right or not self._is_tensor(output, output.dtype, 1):
            allowed = f"float32, bfloat16 or float16 of shape ({expected},), contiguous, on {self.device}"
            raise argument_error(f"{self.where}(output)", _described(output), allowed, "make the buffer so")

    def sending(
        self, key: tuple[int, int] | None, residuals: Residuals | None, errors: np.ndarray | Tensor | None
    ) -> None:
        if key is not None and (len(key) != 2 or not all(isinstance(word, int) and 0 <= word < 2**32 for word in key)):
            raise argument_error(
                f"{self.where}(key)", repr(key), "two words from 0 to 2^32 - 1", "make it with fold_words()"
            )
        if isinstance(errors, Tensor):
            is_right = errors.dtype == torch.float64 and errors.shape == (2,) and errors.device == self.device
            if not is_right or self.device.type == "cpu":
                allowed = f"float64 of shape (2,), a tensor on {self.device} where that is no CPU, else a numpy array"
                raise argument_error(f"{self.where}(errors)", _described(errors), allowed, "make it so")
        elif errors is not None and not (
            isinstance(errors, np.ndarray) and errors.dtype == np.float64 and errors.shape == (2,)
        ):
            got = f"{errors.dtype} of shape {errors.shape}" if isinstance(errors, np.ndarray) else type(errors)
            raise argument_error(
                f"{self.where}(errors)", got, "a numpy array, float64, of shape (2,)", "pass np.zeros(2)"
            )
        if residuals is None:
            return
        self._residuals(f"{self.where}(residuals.read", residuals.read)
        if residuals.write is not residuals.read:
            self._residuals(f"{self.where}(residuals.write", residuals.write)

    def _residuals(self, where: str, column: Sequence[Tensor | None]) -> None:
        if len(column) != self.count:
            raise argument_error(
                f"{where})", f"{len(column)} entries", f"{self.count}, one a piece", "put None for none"
            )
        device, dtype = self.device, torch.bfloat16
        # Each step has the tensors of the one before the last, and looking at hundreds is most of what a call costs.
        # None of them may be given another shape or memory in place.
        columns, key = self.known.columns, (device, *map(id, column))
        if key in columns:
            return
        for number, (residual, numel) in enumerate(zip(column, self.parts.numel.tolist(), strict=True)):
            # In order of their price, without a call.
            if residual is None or (
                isinstance(residual, Tensor)
                and residual.dtype is dtype
                and residual.shape == (numel,)
                and residual.is_contiguous()
                and residual.device == device
            ):
                continue
            allowed = f"None, or bfloat16 of shape ({numel},), contiguous, on {device}"
            raise argument_error(f"{where}[{number}])", _described(residual), allowed, "make it so")
        if len(columns) >= MAX_COLUMNS:
            columns.clear()
        columns[key] = [weakref.ref(each, lambda _: columns.pop(key, None)) for each in column if each is not None]

    def _is_tensor(self, tensor: object, dtype: torch.dtype, dim: int) -> bool:
        return (
            isinstance(tensor, Tensor)
            and tensor.dtype == dtype
            and tensor.dim() == dim
            and tensor.is_contiguous()
            and tensor.device == self.device
        )

    def _fits(self, name: str, num_bytes: int) -> None:
        if self.known.num_bytes <= num_bytes:
            return
        for column, at, needed in self._places():
            self._piece(column, at > num_bytes - needed, at, f"parts within the {num_bytes} bytes of `{name}`")
