"""Partitioned weights fetched as codes: on ranks of one process, whose slots are handed over by hand."""

import functools

import pytest
import torch

from ds_quant.comm import weight_fetch
from ds_quant.comm.weight_codes import values_of, write_values
from ds_quant.comm.weight_fetch import PartitionedWeight
from ds_quant.comm.weight_layout import Coding
from ds_quant.numerics.integer import quantize


def partitions_of(values, world_size):
    """What each rank has; the padding of the last ones is anything."""
    numel = values.numel()
    padded = torch.nn.functional.pad(values.flatten(), (0, -numel % world_size), value=torch.nan)
    return padded.chunk(world_size)


def fetched(values, coding, dtype, world_size, *, with_codes=False):
    """What each rank finds, in `dtype`, and its codes and scales."""
    weights = [PartitionedWeight(values.shape, coding, dtype, world_size, rank) for rank in range(world_size)]
    parts = partitions_of(values, world_size)
    found = [weight.shared_absmax(part) for weight, part in zip(weights, parts, strict=True)]
    shared = torch.stack(found).amax(0)
    slots = [torch.full((weight.slot_bytes,), 255, dtype=torch.uint8) for weight in weights]
    for weight, part, slot in zip(weights, parts, slots, strict=True):
        weight.encode(part, shared, slot)
    numel = values.numel()
    found = [
        weight.decode(torch.stack(slots), part, shared, with_codes=with_codes)
        for weight, part in zip(weights, parts, strict=True)
    ]
    return [(flat[:numel].view(values.shape), codes) for flat, codes in found]


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),  # as under autocast
    ],
)
@pytest.mark.parametrize("side", ["row", "column"])
def test_layers_see_the_same(side, stored, dtype):
    """Codes and scales are those of the weight itself, on all ranks, wherever partitions end."""
    generator = torch.Generator().manual_seed(torch.randint(2**31, ()).item())
    for bits, world_size in ((8, 1), (8, 2), (4, 3), (5, 7), (8, 64)):
        shape = torch.randint(1, 40, (2,), generator=generator).tolist()
        values = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(
            -12, 12, (1, shape[1]), generator=generator
        )
        values.flatten()[torch.randint(values.numel(), (), generator=generator)] = torch.inf
        values[-1, -1], values[0] = torch.nan, 0.0
        values = values.to(stored)
        whole = quantize(values.to(dtype), bits, granularity=side)
        alone = fetched(values, Coding(bits, side), dtype, world_size)
        for rank, (found, codes) in enumerate(fetched(values, Coding(bits, side), dtype, world_size, with_codes=True)):
            assert found.dtype == dtype
            assert torch.equal(found.nan_to_num(nan=1e9), alone[rank][0].nan_to_num(nan=1e9))
            assert alone[rank][1] is None
            assert torch.equal(codes[0], whole.codes)
            assert torch.equal(codes[1].nan_to_num(nan=1e9), whole.scale.flatten().nan_to_num(nan=1e9))
            seen = quantize(found, bits, granularity=side)
            assert torch.equal(seen.codes.nan_to_num(nan=99), whole.codes.nan_to_num(nan=99))
            assert torch.equal(seen.scale.nan_to_num(nan=1e9), whole.scale.nan_to_num(nan=1e9))
            own = partitions_of(values.to(dtype), world_size)[rank]
            there = partitions_of(found, world_size)[rank]
            assert torch.equal(there.nan_to_num(nan=1e9), own.nan_to_num(nan=1e9))


@pytest.mark.parametrize(("bits", "share"), [(8, 1 / 2), (4, 1 / 4)])
def test_bytes(bits, share):
    """A slot holds the codes of a partition and the absmax of its rows, in bf16, up to a multiple of 16 bytes."""
    weight = PartitionedWeight((64, 48), Coding(bits, "row"), torch.bfloat16, 4, 1)
    assert weight.num_shared == 0
    expected = 2 * 16 * 48 * share + 2 * 16
    assert expected <= weight.slot_bytes < expected + 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "shape", "world_size"), [(8, (20, 7), 5), (8, (4, 3), 2), (4, (3 * 512, 128), 3)])
def test_ranks_with_whole_rows_are_decoded_together(monkeypatch, bits, shape, world_size, dtype):
    """As one by one, and by one call."""
    values = torch.randn(shape).to(dtype)
    coding, calls = Coding(bits, "row"), []

    def counted(function, *args):
        calls.append(args)
        return function(*args)

    for with_codes in (False, True):
        calls.clear()
        monkeypatch.undo()
        for function in (values_of, write_values):
            monkeypatch.setattr(weight_fetch, function.__name__, functools.partial(counted, function))
        together = fetched(values, coding, dtype, world_size, with_codes=with_codes)
        assert len(calls) == world_size
        calls.clear()
        original = PartitionedWeight.decode

        def one_by_one(weight, *args, decode=original, **kwargs):
            weight._are_alike = False
            return decode(weight, *args, **kwargs)

        monkeypatch.setattr(PartitionedWeight, "decode", one_by_one)
        apart = fetched(values, coding, dtype, world_size, with_codes=with_codes)
        assert len(calls) == world_size * (world_size - 1)
        for (one, its), (other, others) in zip(together, apart, strict=True):
            assert torch.equal(one, other)
            assert its is others is None or all(map(torch.equal, its, others))


def test_layouts_of_a_large_model_on_1024_ranks():
    """70e9 elements in layers of few shapes: a layout for each shape, and half the bytes of bf16."""
    shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)] * 80
    weight_fetch._layout.cache_clear()
    weights = [PartitionedWeight(shape, Coding(8, "row"), torch.bfloat16, 1024, 5) for shape in shapes]
    assert weight_fetch._layout.cache_info().currsize == 4
    for (rows, width), weight in zip(shapes, weights, strict=True):
        assert weight.num_shared == 0
        exact = rows * width // 1024 + 2 * rows // 1024
        assert exact <= weight.slot_bytes < exact + 16
