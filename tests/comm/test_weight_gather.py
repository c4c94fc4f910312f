"""Weights gathered as codes: on ranks of one process, whose messages are handed over by hand."""

import itertools

import pytest
import torch

from ds_quant.comm.weight_codes import decode, encode, shared_absmax
from ds_quant.comm.weight_layout import Coding, Weight, build
from ds_quant.numerics.integer import quantize

ROW, COLUMN = "row", "column"


def group(shapes, generator, dtype):
    """A flat group with gaps between its weights, and the weights' places in it."""
    flat, places, start = [], [], 0
    for number, (shape, coding) in enumerate(shapes):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        # Magnitudes as far apart as a dtype allows, and between neighbours.
        values *= 2.0 ** torch.randint(-12, 12, (1, *shape[1:]), generator=generator)
        flat.append(values.to(dtype).flatten())
        places.append(Weight(f"w{number}", start, shape, coding))
        gap = number % 3
        flat.append(torch.zeros(gap, dtype=dtype))
        start += values.numel() + gap
    return torch.cat(flat), places


def gathered(flat, layout, world_size):
    """What each rank holds after the gather; before it, all but its own partition is stale."""
    size = flat.numel() // world_size
    ranks = []
    for rank in range(world_size):
        own = torch.full_like(flat, 7.0)
        own[rank * size : (rank + 1) * size] = flat[rank * size : (rank + 1) * size]
        ranks.append(own)
    found = [shared_absmax(ranks[rank], layout.shared_runs[rank], layout.num_shared) for rank in range(world_size)]
    shared = torch.stack(found).amax(0)
    for messages in layout.rounds:
        sent = []
        for rank, message in enumerate(messages):
            sent.append(torch.full((message.num_bytes,), 255, dtype=torch.uint8))
            for run in message.runs:
                encode(ranks[rank], run, shared, sent[-1])
        for rank, sender in itertools.permutations(range(world_size), 2):
            for run in messages[sender].runs:
                decode(sent[sender], run, shared, ranks[rank])
    return ranks


def same(a, b):
    return torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30)) and torch.equal(a.isnan(), b.isnan())


def seen(flat, weight):
    """What a layer makes of a weight."""
    numel = torch.Size(weight.shape).numel()
    values = flat[weight.start : weight.start + numel].view(weight.shape)
    if weight.coding is None:
        return (values,)
    q = quantize(values, weight.coding.bits, granularity=weight.coding.side)
    return q.codes, q.scale


def shapes_of(bits, generator):
    sizes = torch.randint(1, 40, (7, 2), generator=generator).tolist()
    codings = [None, *(Coding(bits, side) for side in (ROW, COLUMN, ROW, ROW, COLUMN, COLUMN))]
    return [(tuple(size), coding) for size, coding in zip(sizes, codings, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_layers_see_the_same(bits, dtype):
    check_layers_see_the_same(bits, dtype, [(2, 10**6), (3, 50), (5, 7)])


def test_layers_see_the_same_where_rows_lie_on_many_ranks():
    check_layers_see_the_same(8, torch.bfloat16, [(64, 10**6)])


def check_layers_see_the_same(bits, dtype, cuts):
    """Codes and scales of what was gathered are those of the weights themselves, on all ranks, wherever cuts fall."""
    generator = torch.Generator().manual_seed(torch.randint(2**31, ()).item())
    for world_size, round_numel in cuts:
        flat, weights = group(shapes_of(bits, generator), generator, dtype)
        flat[weights[2].start] = torch.inf
        flat[weights[3].start] = torch.nan
        flat[weights[4].start : weights[4].start + weights[4].shape[1]] = 0.0
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % world_size))
        layout = build(weights, flat.numel(), world_size, flat.element_size(), round_numel)
        for rank in gathered(flat, layout, world_size):
            for weight in weights:
                for want, got in zip(seen(flat, weight), seen(rank, weight), strict=True):
                    assert same(got, want), (weight, world_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_see_the_same_of_the_smallest_and_the_largest(dtype):
    """Of denormals, whose scale is one, and of numbers next to the largest."""
    generator = torch.Generator().manual_seed(torch.randint(2**31, ()).item())
    info, width = torch.finfo(dtype), 33
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    for bits, exponent in itertools.product((8, 5, 2), range(1, 14)):
        denormals = torch.randint(0, 2**exponent, (40, width), generator=generator, dtype=torch.int32)
        values = denormals.to(integers).view(dtype)
        values[::2] *= -1
        values[20:] = (info.max * torch.rand(20, width, generator=generator)).to(dtype)
        values[30:, 0] = -info.max
        weights = [Weight("w", 0, (40, width), Coding(bits, ROW))]
        layout = build(weights, values.numel(), 2, values.element_size())
        for rank in gathered(values.flatten(), layout, 2):
            for want, got in zip(seen(values.flatten(), weights[0]), seen(rank, weights[0]), strict=True):
                assert same(got, want)


def test_all_bf16_numbers_keep_their_codes():
    """Each bf16 number of a binade beside each absmax that may be its channel's."""
    significands = torch.arange(128)
    top = ((127 << 7) + significands).to(torch.int16).view(torch.bfloat16)  # from 1 on, below 2
    below = torch.cat([((exponent << 7) + significands).to(torch.int16) for exponent in range(112, 128)])
    rows = torch.cat([top[:, None], below.view(torch.bfloat16).expand(128, -1)], 1)
    rows = torch.minimum(rows, top[:, None])
    for bits in (8, 7, 4):
        weights = [Weight("w", 0, tuple(rows.shape), Coding(bits, ROW))]
        layout = build(weights, rows.numel(), 2, 2)
        for rank in gathered(rows.flatten(), layout, 2):
            for want, got in zip(seen(rows.flatten(), weights[0]), seen(rank, weights[0]), strict=True):
                assert torch.equal(got, want)
