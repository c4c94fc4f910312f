"""Gradients on the wire: the compiled function for CUDA against the reference."""

import gc

import numpy as np
import pytest
import torch
from helpers.host_reads import reads
from kernels.wire_jobs import DTYPES, FORMATS, KEY, NUMELS, Job, assert_same
from numerics.wire_oracle import lay_out
from torch._dynamo.testing import CompileCounter

from ds_quant.kernels.wire import compiled, places
from ds_quant.numerics import wire as reference
from ds_quant.numerics.wire import Parts, WireFormat


@pytest.fixture
def uncompiled(monkeypatch):
    """What would be compiled, as it stands."""
    monkeypatch.setattr(compiled, "_compiled", lambda f, settings: lambda *arguments: f(settings, *arguments))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_batched_function_has_the_bits_of_the_reference(rng, fmt, uncompiled):
    for dtype, key, numels in (
        (torch.float32, KEY, NUMELS),
        (torch.bfloat16, None, (fmt.block_size,) * 2),
        (DTYPES[2], KEY, (5,)),
    ):
        job = Job(rng, fmt, dtype=dtype, key=key, numels=numels)
        assert_same(job.run(compiled), job.run(reference), f"{dtype} {key}")


def counting(monkeypatch):
    """By function, a backend of torch.compile that counts compilations and leaves operations as they are."""
    original, found = compiled._compiled, {}
    original.cache_clear()

    def count(function, settings):
        return original(function, settings, found.setdefault((function, settings), CompileCounter()))

    monkeypatch.setattr(compiled, "_compiled", count)
    return found


def test_new_pieces_and_keys_compile_nothing(rng, monkeypatch):
    counters = counting(monkeypatch)
    fmt = WireFormat(4, 32, "hadamard")

    def step(numels, key):
        job = Job(rng, fmt, numels=numels, key=key, some=False)
        message = job.background.clone()
        compiled.quantize(job.tensors, job.parts, message, fmt, key=key, residuals=job.residuals())
        compiled.dequantize(message, job.parts, job.tensors, fmt)

    step((100, 70, 300), KEY)
    counts = {name: counter.frame_count for name, counter in counters.items()}
    assert set(counts.values()) == {2}  # whole blocks, and shorter ones
    step((50, 64, 200, 111), (1, 2))
    assert counts == {name: counter.frame_count for name, counter in counters.items()}


@pytest.mark.parametrize("fmt", [WireFormat(8, 32), WireFormat(4, 64, "hadamard")], ids=str)
def test_any_number_of_ranks_is_summed_in_their_order(rng, fmt, uncompiled):
    for world_size in range(1, 10):
        job = Job(rng, fmt, world_size=world_size, key=KEY)
        assert_same(job.run(compiled), job.run(reference), f"{world_size} ranks, own {job.own_rank}")


def test_more_ranks_compile_no_more(rng, monkeypatch):
    sizes = {}
    # With two messages before the own pieces, a view of the second one would begin at the size of the first.
    for world_size, own_rank in ((2, 0), (4, 3), (8, 2)):
        counters = counting(monkeypatch)
        job = Job(rng, WireFormat(4, 32), numels=(100, 70, 300), world_size=world_size, some=False)
        job.own_rank = own_rank
        output = torch.zeros(470)
        compiled.reduce(job.tensors, job.parts, job.received, job.own_rank, job.fmt, output=output)
        sizes[world_size] = {
            (function.__name__, settings): (counter.frame_count, counter.op_count)
            for (function, settings), counter in counters.items()
        }
        monkeypatch.undo()
    assert len(sizes[2]) == 3  # the others, the own pieces, and what is made of the sum
    assert sizes[2] == sizes[4] == sizes[8]


def test_places_are_kept_with_the_layout(rng, monkeypatch):
    made = []
    make = places._make
    monkeypatch.setattr(places, "_make", lambda *arguments: made.append(arguments) or make(*arguments))
    fmt, device = WireFormat(8, 32), torch.device("cpu")
    parts, _ = lay_out(rng, NUMELS, fmt)
    places.places_of(parts, fmt, device)
    places.places_of(parts, fmt, device)
    assert len(made) == 2, "columns that can be written to are not kept"
    parts = Parts(*(column.copy() for column in parts))
    for column in parts:
        column.setflags(write=False)
    before = len(places._kept.entries)
    kept = places.places_of(parts, fmt, device)
    assert places.places_of(parts, fmt, device) is kept
    assert places.places_of(parts, WireFormat(4, 32), device) is not kept
    assert len(places._kept.entries) == before + 2
    made.clear()
    del parts, column
    gc.collect()
    assert len(places._kept.entries) == before


def test_errors_are_added_up_on_the_device(rng, uncompiled):
    job = Job(rng, WireFormat(8, 32), key=KEY)
    there, here = torch.tensor([1.0, 2.0]).double(), np.array([1.0, 2.0])
    with reads() as found:
        compiled.quantize(job.tensors, job.parts, job.background.clone(), job.fmt, key=KEY, errors=there)
    assert not found
    compiled.quantize(job.tensors, job.parts, job.background.clone(), job.fmt, key=KEY, errors=here)
    assert there[0] > 1.0
    np.testing.assert_allclose(there.numpy(), here)


def test_nothing_waits_for_the_device(rng, uncompiled):
    """Whole and short blocks, residuals, both ways of a sum."""
    fmt = WireFormat(4, 32, "hadamard")
    job = Job(rng, fmt, key=KEY, world_size=4)
    there = torch.zeros(2, dtype=torch.float64)
    sending = {"key": KEY, "residuals": job.residuals(), "errors": there}
    message, output = job.background.clone(), torch.empty(int(job.parts.numel.sum()))
    for _ in range(2):  # the first call makes what later ones keep
        with reads() as found:
            compiled.quantize(job.tensors, job.parts, message, fmt, **sending)
            arguments = (job.tensors, job.parts, job.received, job.own_rank, fmt)
            compiled.reduce(*arguments, factor=job.factor, message=message, **sending)
            compiled.reduce(*arguments, factor=job.factor, output=output)
            compiled.dequantize(message, job.parts, job.tensors, fmt)
        assert not found


def test_compiled_by_inductor(rng):
    """Of whole blocks only, to save time: its compiler is slow."""
    fmt = WireFormat(8, 64)
    job = Job(rng, fmt, numels=(64, 256, 128))
    messages = [job.background.clone(), job.background.clone()]
    for module, message in zip((compiled, reference), messages, strict=True):
        module.quantize(job.tensors, job.parts, message, fmt)
    assert (messages[0] == messages[1]).double().mean() > 0.999
