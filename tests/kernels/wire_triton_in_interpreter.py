"""The sum over ranks in Triton's interpreter, against the same loop in torch: bit for bit.

`test_wire_triton.py` runs this file in a process of its own: TRITON_INTERPRET must be set before triton is imported.
"""

import functools

import numpy as np
import pytest
import torch
from numerics.wire_oracle import lay_out

from ds_quant.kernels.wire import compiled, cuda, places, rows, triton_sums
from ds_quant.numerics import wire
from ds_quant.numerics.wire import WireFormat


def messages(rng, parts, size, fmt, count):
    """Any codes; scales of many magnitudes, among them 0, NaN and Inf."""
    found = rng.integers(256, size=(count, size)).astype(np.uint8)
    for row in found:
        for scale_at, numel in zip(parts.scale_at, parts.numel, strict=True):
            scales = 10.0 ** rng.uniform(-42, 3, size=wire.num_blocks(int(numel), fmt))
            scales[rng.uniform(size=len(scales)) < 0.1] = rng.choice([0.0, np.nan, np.inf])
            row[scale_at : scale_at + 4 * len(scales)] = scales.astype(np.float32).view(np.uint8)
    return torch.from_numpy(found)


@pytest.mark.parametrize("count", [1, 2, 5, 67])
@pytest.mark.parametrize("fmt", [WireFormat(8, 32), WireFormat(4, 64), WireFormat(4, 2048)], ids=str)
def test_sums_have_the_bits_of_the_loop(fmt, count):
    rng = np.random.default_rng()
    parts, size = lay_out(rng, (1, 2, 31, 33, 64, 257, 2048, 4133), fmt)
    received = messages(rng, parts, size, fmt, count)
    first, last = sorted(rng.integers(count + 1, size=2).tolist())
    for group in places.places_of(parts, fmt, torch.device("cpu")).groups:
        total = torch.from_numpy(rng.normal(size=(len(group.piece), fmt.block_size))).float()
        total[0, 0] = [torch.inf, torch.nan, -0.0][rng.integers(3)]
        expected = total.clone()
        each = rows._rows(fmt, group)
        for number in range(first, last):
            expected += rows._values(received[number], each, fmt)
        triton_sums.add_messages(fmt, group, received, first, last, total)
        # What lies behind the end of a short row means nothing.
        length = fmt.block_size if group.tail is None else group.tail[group.piece.long()].unsqueeze(1)
        counts = (torch.arange(fmt.block_size) < length).expand_as(total)
        torch.testing.assert_close(total[counts], expected[counts], rtol=0, atol=0, equal_nan=True)
        assert torch.equal((total.signbit() & ~total.isnan())[counts], (expected.signbit() & ~expected.isnan())[counts])


def test_reduces_as_the_definition(monkeypatch):
    """On what CUDA takes, with the functions that are compiled there run as they are."""
    monkeypatch.setattr(compiled, "_compiled", lambda function, settings: functools.partial(function, settings))
    rng, fmt = np.random.default_rng(), WireFormat(4, 64, "hadamard")
    parts, size = lay_out(rng, (1, 33, 257, 2048), fmt)
    tensors = [torch.from_numpy(rng.normal(size=int(parts.numel.sum()))).float()]
    received, own_rank = messages(rng, parts, size, fmt, 6), int(rng.integers(7))
    summed, expected = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
    calls, add_messages = [], triton_sums.add_messages

    def add(*arguments):
        calls.append(arguments[3:5])
        add_messages(*arguments)

    monkeypatch.setattr(triton_sums, "add_messages", add)
    cuda.reduce(tensors, parts, received, own_rank, fmt, factor=0.3, output=summed)
    wire.reduce(tensors, parts, received, own_rank, fmt, factor=0.3, output=expected)
    torch.testing.assert_close(summed, expected, rtol=0, atol=0, equal_nan=True)
    assert calls == [(0, own_rank), (own_rank, 6)] * 2, "of the whole blocks, and of the shorter ones"
