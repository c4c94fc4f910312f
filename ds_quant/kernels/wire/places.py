"""Where the blocks of a call lie, kept on the device: what `compiled` hands to the functions of `rows`.

A number for each block, of its piece, and a few for each piece. Everything else about a block is computed where it is
needed. Layouts are used again in every step, so that their places are made once (see `kept`).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds_quant.kernels.transfers import sent
from ds_quant.kernels.wire.kept import KeptOfParts
from ds_quant.numerics.wire import Parts, WireFormat


class Places(NamedTuple):
    """Blocks of a call, all of them whole or all shorter. Columns are int64 [num_pieces], 2 at least."""

    piece: Tensor
    """int32 [num_rows]: whose block a row is."""
    begin: Tensor
    """First element of the piece in the flat tensor."""
    scale_at: Tensor
    codes_at: Tensor
    offset: Tensor
    """Of whole blocks the row of the piece's first one, of shorter blocks the number of whole ones before them."""
    tail: Tensor | None
    """Elements of the shorter block; None: all are whole."""


class Kept(NamedTuple):
    """What is known of the pieces of a call."""

    groups: list[Places]
    """The whole blocks, and the shorter ones; without those that are none."""
    lengths: list[int]
    runs: list[tuple[int, int, int]]
    """(source, start, numel) of the pieces, those that follow each other in one tensor joined."""
    numel: int


_kept = KeptOfParts[Kept]()


def places_of(parts: Parts, fmt: WireFormat, device: torch.device) -> Kept:
    """The places of `parts` on `device`, made where they are not kept. Nothing waits for the device."""
    # Kept for each stream: another one could read what is not written yet.
    stream = None if device.type in ("cpu", "meta") else torch.accelerator.current_stream(device).stream_id
    return _kept.get(parts, (fmt.block_size, fmt.bits, device, stream), lambda: _make(parts, fmt, device))


def _make(parts: Parts, fmt: WireFormat, device: torch.device) -> Kept:
    numel = parts.numel
    whole, tail = np.divmod(numel, fmt.block_size)
    # Two pieces at least: a size of one would be recompiled.
    empty = np.zeros(max(0, 2 - len(numel)), np.int64)
    begin, scale_at, codes_at = np.cumsum(numel) - numel, parts.scale_at, parts.codes_at
    columns = (begin, scale_at, codes_at, np.cumsum(whole) - whole, whole, tail)
    groups = []
    # Views of normal tensors: those made in inference mode would cause a recompilation.
    with torch.inference_mode(False):
        table = sent(np.stack([np.concatenate((column, empty)) for column in columns]), device)
        starts, scales, codes, first_row, num_whole, tails = (row.data for row in table.unbind())
        number = torch.arange(len(numel) + len(empty), dtype=torch.int32, device=device)
        num_rows = int(whole.sum())
        if num_rows:
            piece = torch.repeat_interleave(number, num_whole, output_size=num_rows)
            groups.append(Places(piece, starts, scales, codes, first_row, None))
        num_rows = int((tail > 0).sum())
        if num_rows:
            piece = torch.repeat_interleave(number, (tails > 0).long(), output_size=num_rows)
            groups.append(Places(piece, starts, scales, codes, num_whole, tails))
    return Kept(groups, numel.tolist(), _runs(parts), int(numel.sum()))


def _runs(parts: Parts) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    for source, start, numel in zip(parts.source.tolist(), parts.start.tolist(), parts.numel.tolist(), strict=True):
        if found and found[-1][0] == source and found[-1][1] + found[-1][2] == start:
            found[-1] = (source, found[-1][1], found[-1][2] + numel)
        else:
            found.append((source, start, numel))
    return found
