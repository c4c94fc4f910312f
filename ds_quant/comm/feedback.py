"""Error feedback: what quantization took from a gradient is added to the next one (Seide et al. 2014; 1901.09847).

The *residual* of an element is what this rank still owes to the sum. Who sends a piece owes what its codes lost. The
owner, whose own share never crosses the wire, owes what the codes of the result lost (all-reduce only), as many
times as the result was divided. Both are in units of the sum, so a piece may change its owner. Residuals are bf16, in
units without loss scale, and 0 where they were not finite.

They are kept by parameter name and offset, never by bucket: DDP rebuilds its buckets after the first step, and a
resumed run may cut otherwise. A piece that was not there before collects what older pieces of its parameter owe.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.comm.layout import Piece

DTYPE = torch.bfloat16


class _Segment:
    """The residuals of consecutive elements of a parameter."""

    def __init__(self, committed: Tensor) -> None:
        self.committed = committed
        self.pending: Tensor | None = None
        self.is_pending = False
        """Whether this step has written `pending`."""
        self.in_use = False
        """Whether this step has a piece of just these elements."""

    @property
    def latest(self) -> Tensor:
        """What is owed, this step included."""
        return self.pending if self.is_pending and self.pending is not None else self.committed


Key = tuple[int, int]
"""Offset and number of elements."""


class Slots(NamedTuple):
    """Tensors of each piece; None for a piece without."""

    read: list[Tensor | None]
    write: list[Tensor | None]


class ErrorFeedback:
    """The residuals of one rank.

    Args:
        transactional: whether steps may be skipped. Then what a step writes counts from `commit` on only, which takes
            4 bytes an element instead of 2.
    """

    def __init__(self, *, transactional: bool = True) -> None:
        self.transactional = transactional
        self._segments: dict[str, dict[Key, _Segment]] = {}
        self._older: dict[str, list[Key]] = {}
        """Segments of parameters that this step has cut differently, as they were before: in order."""
        self._found: dict[int, tuple[tuple[Piece, ...], list[_Segment]]] = {}
        """The segments of a layout's pieces, by the address of these; empty once segments have gone."""

    def slots(self, sent: Iterable[Piece], device: torch.device) -> Slots:
        """Residuals to add to pieces, and where to write what is owed next."""
        segments = self._claim_all(sent, device)
        committed: list[Tensor | None] = [segment.committed for segment in segments]
        if not self.transactional:
            return Slots(committed, committed)
        for segment in segments:
            if segment.pending is None:
                segment.pending = torch.empty_like(segment.committed)
        write = [segment.pending for segment in segments]
        read = [segment.pending if segment.is_pending else segment.committed for segment in segments]
        for segment in segments:
            segment.is_pending = True
        return Slots(read, write)

    def settle(self, owned: Iterable[Piece]) -> list[Tensor | None]:
        """Residuals to add to pieces that this rank sums up itself and owes nothing of afterwards; None: none."""
        found: list[Tensor | None] = []
        for piece in owned:
            segments = self._segments.get(piece.name)
            if not segments or not any(_overlap(key, piece) for key in segments):
                found.append(None)
                continue
            slots = self.slots([piece], next(iter(segments.values())).committed.device)
            read, write = slots.read[0], slots.write[0]
            assert read is not None
            assert write is not None
            found.append(read.clone())
            write.zero_()
        return found

    def commit(self) -> None:
        """The step was taken: what its gradients lost is owed."""
        for name in list(self._segments):
            segments = self._segments[name]
            for segment in segments.values():
                if segment.is_pending and segment.pending is not None:
                    segment.committed, segment.pending = segment.pending, segment.committed
                    segment.is_pending = False
            # Older segments of recut elements have passed on their residuals.
            for key in [key for key in self._older.get(name, ()) if not segments[key].in_use]:
                if any(_overlap(key, other) for other, segment in segments.items() if segment.in_use):
                    del segments[key]
                    self._found.clear()
            for segment in segments.values():
                segment.in_use = False
        self._older.clear()

    def rollback(self) -> None:
        """The step was skipped: its gradients are gone, and what was owed before still is."""
        for name, segments in self._segments.items():
            older = set(self._older.get(name, ()))
            for key in [key for key, segment in segments.items() if segment.in_use and older and key not in older]:
                del segments[key]  # new in this step: the older segments still hold its residuals
                self._found.clear()
            for segment in segments.values():
                segment.is_pending = segment.in_use = False
        self._older.clear()

    def reset(self) -> None:
        """Forget all residuals."""
        self._segments.clear()
        self._older.clear()
        self._found.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the residuals take."""
        return sum(
            tensor.numel() * tensor.element_size()
            for segments in self._segments.values()
            for segment in segments.values()
            for tensor in (segment.committed, segment.pending)
            if tensor is not None
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The committed residuals by "name@offset": bf16, 1-D, not copied."""
        return {
            f"{name}@{offset}": segment.committed
            for name, segments in self._segments.items()
            for (offset, _), segment in segments.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device | str | None = None) -> None:
        """Owe what `state_dict` gave. Raises ConfigError, and owes what it owed, for anything else."""
        loaded: dict[str, dict[Key, _Segment]] = {}
        for key, tensor in state.items():
            name, _, offset = key.rpartition("@")
            if not offset.isdecimal() or tensor.dtype != DTYPE or tensor.dim() != 1:
                got = f"{key}: {tensor.dtype} of shape {tuple(tensor.shape)}"
                raise fail("error feedback", got, "name@offset: bf16 of one dimension", "load what state_dict() gave")
            owed = tensor.to(device=device, copy=True)
            loaded.setdefault(name, {})[int(offset), owed.numel()] = _Segment(owed)
        self._segments = loaded
        self._older.clear()
        self._found.clear()

    def _claim_all(self, pieces: Iterable[Piece], device: torch.device) -> list[_Segment]:
        """The segments of just these pieces. Those of a layout are looked up once: it may have hundreds."""
        known = self._found.get(id(pieces))
        if known is not None and known[0] is pieces:
            for segment in known[1]:
                segment.in_use = True
            return known[1]
        segments = [self._claim(piece, device) for piece in pieces]
        if isinstance(pieces, tuple):
            self._found[id(pieces)] = pieces, segments
        return segments

    def _claim(self, piece: Piece, device: torch.device) -> _Segment:
        """The segment of just this piece, made of what older ones owe where it is new."""
        segments = self._segments.setdefault(piece.name, {})
        key = (piece.offset, piece.numel)
        segment = segments.get(key)
        if segment is None:
            older = self._older.setdefault(piece.name, sorted(segments))
            owed = torch.zeros(piece.numel, dtype=DTYPE, device=device)
            first = max(0, bisect_right(older, (piece.offset, 0)) - 1)
            for offset, numel in itertools.takewhile(
                lambda other: other[0] < piece.offset + piece.numel, older[first:]
            ):
                begin, end = max(offset, piece.offset), min(offset + numel, piece.offset + piece.numel)
                if begin < end:
                    part = segments[offset, numel].latest[begin - offset : end - offset]
                    owed[begin - piece.offset : end - piece.offset] += part.to(device)
            segment = segments[key] = _Segment(owed)
        segment.in_use = True
        return segment


def _overlap(key: Key, other: Key | Piece) -> bool:
    offset, numel = (other.offset, other.numel) if isinstance(other, Piece) else other
    return key[0] < offset + numel and offset < key[0] + key[1]
