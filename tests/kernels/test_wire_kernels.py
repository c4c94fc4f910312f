"""Gradients on the wire: the C++ kernels against the reference, and which implementation serves."""

import itertools
import logging

import numpy as np
import pytest
import torch
from kernels.wire_jobs import DTYPES, FORMATS, ISAS, KEY, NAMED, Job, assert_same, check, needs_compiler

from ds_quant.kernels import build, registry, wire
from ds_quant.kernels.wire import compiled, cpu
from ds_quant.numerics import wire as reference
from ds_quant.numerics.wire import Parts, Residuals, WireFormat


@needs_compiler
@pytest.mark.parametrize("fmt", [*FORMATS, *NAMED], ids=str)
def test_formats_dtypes_and_roundings(rng, fmt):
    for dtype, key in itertools.product(DTYPES, (None, KEY)):
        check(Job(rng, fmt, dtype=dtype, key=key), f"{dtype} {key}")


@needs_compiler
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_world_sizes(rng, world_size):
    for fmt in (*FORMATS[::5], *NAMED[3::2]):
        for _ in range(3):
            check(Job(rng, fmt, world_size=world_size), f"{fmt}")


@needs_compiler
def test_every_length(rng):
    for fmt in (WireFormat(8, 32), WireFormat(4, 64), WireFormat(4, 128, "hadamard"), NAMED[3], NAMED[6]):
        job = Job(rng, fmt, numels=range(1, 70 if fmt.format else 140), key=KEY, world_size=2)
        # Of one magnitude, so that every element counts in the sums of errors.
        job.tensors = [torch.from_numpy(rng.normal(size=len(job.tensors[0]))).float()]
        check(job, f"{fmt}")


@needs_compiler
def test_many_pieces_of_many_tensors(rng):
    lengths = rng.integers(300, 3000, size=40).tolist()
    job = Job(rng, WireFormat(8, 32), numels=rng.integers(1, 300, size=500).tolist(), lengths=lengths, key=KEY)
    expected = job.run(reference)
    got = job.run(cpu)
    # Pieces may overlap in what is read; what `dequantize` writes is then left to chance.
    overlapping = slice(6, 6 + len(lengths))
    del expected[0][overlapping], got[0][overlapping]
    assert_same(got, expected, "")


@needs_compiler
@pytest.mark.parametrize("extreme", [0.0, -0.0, 2.0**-149, 1e-44, 2.0**-127, 3.4e38, np.inf, -np.inf, np.nan])
def test_extremes(rng, extreme):
    for fmt in (WireFormat(8, 32), WireFormat(4, 32), WireFormat(8, 64, "hadamard"), *NAMED):
        job = Job(rng, fmt, numels=[320], key=KEY if rng.uniform() < 0.5 else None, some=False)
        job.tensors[0][:] = extreme * torch.from_numpy(rng.choice([-1.0, 0.0, 0.5, 1.0], size=320))
        job.tensors[0][40] = extreme
        job.read[0] = torch.zeros(320, dtype=torch.bfloat16)
        check(job, f"{fmt}")
        # Residuals that are not finite, and new ones that pass the largest number.
        job.read[0][100] = extreme
        job.scales = (1.0, 3e38)
        check(job, f"{fmt} residual")


@needs_compiler
def test_ties_and_the_clamp():
    """Halves go to the even code, and a quotient just above the levels is not rounded up to the next code."""
    levels = torch.arange(-127, 128) / 2
    for scale in (1.0, 2.0**-20, 3.0):
        x = torch.cat((torch.tensor([127.0]), levels)) * scale
        parts = Parts(*(np.array([v]) for v in (0, 0, 256, 0, 4)), np.array([0], dtype=np.uint64))
        for isa in ISAS:
            message = torch.zeros(260, dtype=torch.uint8)
            cpu.quantize([x], parts, message, WireFormat(8, 256), isa=isa)
            assert torch.equal(message[5:].view(torch.int8), levels.round().to(torch.int8))
    largest = np.float32(1.0)
    while not largest / (largest / np.float32(127)) > 127:
        largest = np.nextafter(largest, np.float32(2))
    x = torch.full((2**18,), float(largest))  # some 30 of the draws are below the fraction
    x[::2] *= -1
    fmt = WireFormat(8, 32)
    count = len(x)
    parts = Parts(*(np.array([v]) for v in (0, 0, count, 0, count // 8)), np.array([0], dtype=np.uint64))
    for isa in ISAS:
        message = torch.zeros(count // 8 + count, dtype=torch.uint8)
        cpu.quantize([x], parts, message, fmt, key=KEY, isa=isa)
        assert torch.equal(message[count // 8 :].view(torch.int8), (x.sign() * 127).to(torch.int8))


@needs_compiler
@pytest.mark.parametrize("fmt", NAMED, ids=str)
def test_ties_of_named_formats(fmt):
    """Each value, what lies halfway to the next, and the neighbours of these in fp32, at the scale that values have."""
    steps = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0] if "fp4" in fmt.format else range(8)).float()
    halfway = torch.cat((steps, (steps[1:] + steps[:-1]) / 2))
    near = torch.cat((halfway, *(torch.nextafter(halfway, torch.tensor(to)) for to in (-8.0, 8.0)))).clamp(
        max=steps[-1]
    )
    size = fmt.block_size
    rows = torch.cat((near, -near)).split(size - 1)
    filled = [torch.nn.functional.pad(row, (0, size - 1 - len(row))) for row in rows]
    x = torch.cat([torch.cat((steps[-1:], row)) for row in filled]) * 2.0**-20
    if fmt.format.startswith("nv"):  # the largest block's part of the scale is then a power of two
        x = torch.cat((x, torch.full((size,), float(steps[-1]) * 448 * 2.0**-20)))
    for key in (None, KEY):
        job = Job(np.random.default_rng(0), fmt._replace(rotation="none"), numels=[len(x)], key=key, some=False)
        job.tensors[0] = x
        job.read[0] = torch.zeros(len(x)).bfloat16()
        check(job, f"{key}")


@pytest.mark.parametrize(
    ("fmt", "dtype", "first"),
    [
        (WireFormat(4, 32, "none", "mxfp4"), torch.float8_e8m0fnu, b""),
        (WireFormat(4, 16, "none", "nvint4"), torch.float8_e4m3fn, np.float32(1.0).tobytes()),
    ],
    ids=["e8m0", "e4m3"],
)
def test_stored_scales_are_those_of_torchs_dtypes(fmt, dtype, first):
    """All bytes, of the definition and of the kernels."""
    stored = torch.arange(256, dtype=torch.uint8)
    want = stored.view(dtype).float().repeat_interleave(fmt.block_size)
    codes = torch.full((len(want) // 2,), {"mxfp4": 0x22, "nvint4": 0x11}[fmt.format], dtype=torch.uint8)  # of 1.0
    message = torch.cat((torch.frombuffer(bytearray(first + stored.numpy().tobytes()), dtype=torch.uint8), codes))
    parts = Parts(*(np.array([v]) for v in (0, 0, len(want), 0, len(first) + 256)), np.zeros(1, dtype=np.uint64))
    for module, options in [(reference, {}), *((cpu, {"isa": isa}) for isa in ISAS)]:
        got = torch.empty(len(want))
        module.dequantize(message, parts, [got], fmt, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@needs_compiler
def test_residuals_in_place(rng):
    """What is read may be what is written."""
    for fmt in (*FORMATS[::3], *NAMED[4:]):
        job = Job(rng, fmt, some=False)
        results = []
        for module in (reference, cpu):
            residuals = [tensor.clone() for tensor in job.read]
            message = job.background.clone()
            for _ in range(3):
                kept = Residuals(residuals, residuals, *job.scales)
                module.quantize(job.tensors, job.parts, message, fmt, residuals=kept)
                module.reduce(job.tensors, job.parts, job.received, job.own_rank, fmt, message=message, residuals=kept)
            results.append(([message, *residuals], []))
        assert_same(*results, f"{fmt}")


@needs_compiler
@pytest.mark.parametrize("fmt", [WireFormat(8, 256), WireFormat(4, 16, "none", "nvint4")], ids=str)
def test_threads_make_no_difference(rng, fmt):
    for numels in ([300_001], [70_000, 50_000, *[7] * 200]):
        # Of e4m3 scales, several chunks of a piece have one scale in common.
        job = Job(rng, fmt, numels=numels, key=KEY, world_size=2)
        results, before = [], torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(job.run(cpu))
        finally:
            torch.set_num_threads(before)
        assert_same(*results, f"{len(numels)}")
        assert_same(results[0], job.run(reference), f"{len(numels)}")
        for one, two in zip(results[0][1], results[1][1], strict=True):
            assert one.tolist() == two.tolist()


def test_dispatch(rng, monkeypatch):
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
    job = Job(rng, WireFormat(8, 32))
    expected = job.run(reference)
    assert_same(job.run(wire), expected, "")
    for name in ("quantize", "reduce", "dequantize"):
        serving = getattr(wire, name).on
        assert serving(torch.device("cpu")) is getattr(cpu if ISAS else reference, name)
        assert serving(torch.device("cuda")) is getattr(compiled, name)
        assert serving(torch.device("meta")) is getattr(reference, name)
    monkeypatch.setenv("DS_QUANT_KERNELS", "reference")
    assert wire.quantize.on(torch.device("cpu")) is reference.quantize
    assert_same(job.run(wire), expected, "")


def forget():
    registry._serving.cache_clear()
    registry._is_ready.cache_clear()


def test_without_a_compiler_the_reference_serves_and_says_so_once(rng, monkeypatch, caplog):
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
    monkeypatch.setattr(build, "load", lambda: build.Loaded(None, "no compiler here"))
    forget()
    job = Job(rng, WireFormat(8, 32))
    with caplog.at_level(logging.WARNING, logger="ds_quant"):
        results = job.run(wire)
    forget()
    assert_same(results, job.run(reference), "")
    (said,) = (record.getMessage() for record in caplog.records)
    assert "no compiler here" in said


def test_no_pieces(rng):
    fmt = WireFormat(8, 32)
    empty = np.zeros(0, dtype=np.int64)
    parts = Parts(*[empty] * 5, empty.astype(np.uint64))
    message = torch.zeros(3, dtype=torch.uint8)
    wire.quantize([], parts, message, fmt)
    wire.reduce([], parts, message.view(1, 3), 0, fmt, output=torch.zeros(0))
    wire.dequantize(message, parts, [], fmt)
    assert not message.any()


@pytest.mark.parametrize("fmt", [WireFormat(8, 32, "hadamard"), *NAMED[2:]], ids=str)
def test_a_message_at_an_odd_address(rng, fmt):
    job = Job(rng, fmt)
    store = torch.zeros(job.size + 1, dtype=torch.uint8)
    expected = torch.zeros(job.size, dtype=torch.uint8)
    wire.quantize(job.tensors, job.parts, store[1:], fmt)
    reference.quantize(job.tensors, job.parts, expected, fmt)
    assert torch.equal(store[1:], expected)
    backs = [torch.zeros_like(job.tensors[0]) for _ in range(2)]
    wire.dequantize(store[1:], job.parts, backs[:1], fmt)
    reference.dequantize(store[1:], job.parts, backs[1:], fmt)
    assert_same((backs[:1], []), (backs[1:], []), "")
