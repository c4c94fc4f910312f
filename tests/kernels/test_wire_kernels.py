"""Gradients on the wire: C++ and the compiled function for CUDA against the reference, and what is refused."""

import gc
import itertools
import logging

import numpy as np
import pytest
import torch
from numerics.wire_oracle import gradient, lay_out
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from ds_quant.kernels import build, native, registry, wire
from ds_quant.kernels.wire import compiled, cpu, places
from ds_quant.numerics import wire as reference
from ds_quant.numerics.wire import Parts, Residuals, WireFormat

ISAS = native.ISAS[: native.ISAS.index(native.isa()) + 1] if build.load().library else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (1, 2, 31, 32, 33, 257, 1000, 4096, 4133)
KEY = (0x12345678, 0x9ABCDEF0)
MAX_BLOCK = 4096
FORMATS = [WireFormat(*fields) for fields in itertools.product((8, 4), (32, 256, MAX_BLOCK), ("none", "hadamard"))]

needs_compiler = pytest.mark.skipif(not ISAS, reason=f"no C++ kernels: {build.load().reason}")


class Job:
    """The arguments of one call of each operation; `run` gives all that they write."""

    def __init__(
        self, rng, fmt, *, numels=NUMELS, lengths=None, dtype=torch.float32, world_size=3, key=None, some=True
    ):
        self.fmt, self.key = fmt, key
        self.parts, self.size = lay_out(rng, numels, fmt, lengths=lengths)
        self.tensors = [torch.from_numpy(gradient(rng, n)).to(dtype) for n in lengths or [sum(numels)]]
        self.own_rank = int(rng.integers(world_size))
        self.factor = float(rng.uniform(0.1, 1.0))
        # Any bytes are codes; scales are those of real messages, and some are NaN.
        self.received = torch.from_numpy(rng.integers(256, size=(world_size - 1, self.size)).astype(np.uint8))
        for row in self.received:
            for scale_at, numel in zip(self.parts.scale_at, self.parts.numel, strict=True):
                scales = 10.0 ** rng.uniform(-6, 0, size=reference.num_blocks(int(numel), fmt))
                scales[rng.uniform(size=len(scales)) < 0.05] = rng.choice([0.0, np.nan])
                row[scale_at : scale_at + 4 * len(scales)] = torch.from_numpy(scales.astype(np.float32).view(np.uint8))
        self.background = torch.from_numpy(rng.integers(256, size=self.size).astype(np.uint8))
        self.read = [
            None if some and rng.uniform() < 0.3 else torch.from_numpy(rng.normal(size=n)).bfloat16() for n in numels
        ]
        self.writes = [not some or rng.uniform() < 0.7 for _ in numels]
        self.scales = (float(rng.uniform(0.1, 2.0)), float(rng.uniform(0.5, 10.0)))

    def residuals(self):
        numels = zip(self.parts.numel.tolist(), self.writes, strict=True)
        write = [torch.full((numel,), 7.0).bfloat16() if is_written else None for numel, is_written in numels]
        return Residuals(self.read, write, *self.scales)

    def run(self, module, **options):
        first, second, unused = self.residuals(), self.residuals(), self.residuals()
        errors = [np.array([1.0, 2.0]), np.array([3.0, 4.0])]
        messages = [self.background.clone(), self.background.clone(), self.background.clone()]
        numel = int(self.parts.numel.sum())
        outputs = [torch.full((numel,), 5.0, dtype=dtype) for dtype in DTYPES]
        backs = [torch.full_like(tensor, 5.0) for tensor in self.tensors]
        sending = {"key": self.key, **options}
        module.quantize(
            *(self.tensors, self.parts, messages[0], self.fmt), residuals=first, errors=errors[0], **sending
        )
        module.quantize(self.tensors, self.parts, messages[1], self.fmt, **sending)
        arguments = (self.tensors, self.parts, self.received, self.own_rank, self.fmt)
        module.reduce(
            *arguments, factor=self.factor, message=messages[2], residuals=second, errors=errors[1], **sending
        )
        for output in outputs:
            module.reduce(*arguments, factor=self.factor, output=output, residuals=unused, **options)
        module.dequantize(messages[0], self.parts, backs, self.fmt, **options)
        written = [tensor for r in (first, second, unused) for tensor in r.write if tensor is not None]
        return [*messages, *outputs, *backs, *written], errors


def assert_same(got, expected, context):
    """Bit for bit, but that any NaN equals any other, and that sums are added up in another order."""
    for number, (left, right) in enumerate(zip(got[0], expected[0], strict=True)):
        if left.dtype.is_floating_point:
            integer = torch.int32 if left.dtype == torch.float32 else torch.int16
            differ = (left.view(integer) != right.view(integer)) & ~(left.isnan() & right.isnan())
        else:
            differ = left != right
        assert not differ.any(), f"{context} tensor {number}: {differ.sum()} differ, first {differ.nonzero()[0].item()}"
    for left, right in zip(got[1], expected[1], strict=True):
        # Quotient, product and difference are each rounded to fp32, by 2^-24 of the element y, so that the vector of
        # errors e is off by some d with |d| <= 3 * 2^-24 |y|, and |e + d|^2 by 2 |e| |d| + |d|^2 at most. Besides, the
        # squares of a block are added up in fp32.
        rounding = (3 * 2.0**-24) ** 2 * np.nan_to_num(right[1])
        atol = 2 * np.sqrt(np.nan_to_num(right[0]) * rounding) + rounding
        rtol = MAX_BLOCK * 2.0**-24
        np.testing.assert_allclose(left[0], right[0], rtol=rtol, atol=atol, err_msg=context)
        np.testing.assert_allclose(left[1], right[1], rtol=rtol, err_msg=context)


def check(job, context="", isas=ISAS):
    expected = job.run(reference)
    for isa in isas:
        assert_same(job.run(cpu, isa=isa), expected, f"{isa} {context}")


@needs_compiler
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_formats_dtypes_and_roundings(rng, fmt):
    for dtype, key in itertools.product(DTYPES, (None, KEY)):
        check(Job(rng, fmt, dtype=dtype, key=key), f"{dtype} {key}")


@needs_compiler
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_world_sizes(rng, world_size):
    for fmt in FORMATS[::5]:
        for _ in range(3):
            check(Job(rng, fmt, world_size=world_size), f"{fmt}")


@needs_compiler
def test_every_length(rng):
    for fmt in (WireFormat(8, 32), WireFormat(4, 64), WireFormat(4, 128, "hadamard")):
        job = Job(rng, fmt, numels=range(1, 140), key=KEY, world_size=2)
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
    for fmt in (WireFormat(8, 32), WireFormat(4, 32), WireFormat(8, 64, "hadamard")):
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
def test_residuals_in_place(rng):
    """What is read may be what is written."""
    for fmt in FORMATS[::3]:
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
def test_threads_make_no_difference(rng):
    for numels in ([300_001], [70_000, 50_000, *[7] * 1000]):
        job = Job(rng, WireFormat(8, 256), numels=numels, key=KEY, world_size=2)
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


# ---- CUDA ----------------------------------------------------------------------------------------------------------


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


class NoReads(TorchDispatchMode):
    """Fails where the host asks a tensor for a number."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*args, **(kwargs or {}))


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
    before = len(places._kept)
    kept = places.places_of(parts, fmt, device)
    assert places.places_of(parts, fmt, device) is kept
    assert places.places_of(parts, WireFormat(4, 32), device) is not kept
    assert len(places._kept) == before + 2
    made.clear()
    del parts, column
    gc.collect()
    assert len(places._kept) == before


def test_errors_are_added_up_on_the_device(rng, uncompiled):
    job = Job(rng, WireFormat(8, 32), key=KEY)
    there, here = torch.tensor([1.0, 2.0]).double(), np.array([1.0, 2.0])
    with NoReads():
        compiled.quantize(job.tensors, job.parts, job.background.clone(), job.fmt, key=KEY, errors=there)
    compiled.quantize(job.tensors, job.parts, job.background.clone(), job.fmt, key=KEY, errors=here)
    assert there[0] > 1.0
    np.testing.assert_allclose(there.numpy(), here)


def test_compiled_by_inductor(rng):
    """Of whole blocks only, to save time: its compiler is slow."""
    fmt = WireFormat(8, 64)
    job = Job(rng, fmt, numels=(64, 256, 128))
    messages = [job.background.clone(), job.background.clone()]
    for module, message in zip((compiled, reference), messages, strict=True):
        module.quantize(job.tensors, job.parts, message, fmt)
    assert (messages[0] == messages[1]).double().mean() > 0.999


# ---- dispatch ------------------------------------------------------------------------------------------------------


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


def test_a_message_at_an_odd_address(rng):
    fmt = WireFormat(8, 32, "hadamard")
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


FMT = WireFormat(8, 32)


def changed(job, **columns):
    """Its parts with the last entry of columns changed."""
    parts = {name: getattr(job.parts, name).copy() for name in columns}
    for name, value in columns.items():
        parts[name][-1] = value
    return job.parts._replace(**parts)


REFUSED = {
    "bits": (r"fmt\).*bits=2", {"fmt": WireFormat(2, 32)}),
    "block size": (r"fmt\).*block_size=48", {"fmt": WireFormat(8, 48)}),
    "small blocks": (r"fmt\).*block_size=16", {"fmt": WireFormat(8, 16)}),
    "rotation": (r"fmt\).*fourier", {"fmt": WireFormat(8, 32, "fourier")}),
    "dtype": (r"tensors\[0\]\).*float64", {"tensors": lambda job: [job.tensors[0].double()]}),
    "two dtypes": (r"tensors\[1\]\).*bfloat16", {"tensors": lambda job: [*job.tensors, torch.zeros(1).bfloat16()]}),
    "matrix": (r"tensors\[0\]\).*1-D", {"tensors": lambda job: [job.tensors[0].view(-1, 1)]}),
    "strided": (r"tensors\[0\]\).*not contiguous", {"tensors": lambda job: [job.tensors[0].repeat(2)[::2]]}),
    "devices": (r"tensors\[1\]\).*meta", {"tensors": lambda job: [*job.tensors, torch.zeros(1, device="meta")]}),
    "no tensors": (r"parts.source\[0\]", {"tensors": []}),
    "source": (r"parts.source\[8\]\): got 1;", {"parts": lambda job: changed(job, source=1)}),
    "negative source": (r"parts.source\[8\]", {"parts": lambda job: changed(job, source=-1)}),
    "start": (r"parts.start\[8\]", {"parts": lambda job: changed(job, start=job.parts.start[-1] + 1)}),
    "huge start": (r"parts.start\[8\]", {"parts": lambda job: changed(job, start=2**63 - 1)}),
    "negative start": (r"parts.start\[8\]", {"parts": lambda job: changed(job, start=-1)}),
    "zero numel": (r"parts.numel\[8\]\): got 0;", {"parts": lambda job: changed(job, numel=0)}),
    "large numel": (r"parts.start\[8\]", {"parts": lambda job: changed(job, numel=job.parts.numel[-1] + 1)}),
    "odd scale_at": (r"parts.scale_at\[8\]", {"parts": lambda job: changed(job, scale_at=2)}),
    "negative scale_at": (r"parts.scale_at\[8\]", {"parts": lambda job: changed(job, scale_at=-4)}),
    "scale_at": (r"parts.scale_at\[8\].*bytes of", {"parts": lambda job: changed(job, scale_at=job.size // 4 * 4)}),
    "codes_at": (
        r"parts.codes_at\[8\].*bytes of",
        {"parts": lambda job: changed(job, codes_at=job.size - job.parts.numel[-1] + 1)},
    ),
    "negative codes_at": (r"parts.codes_at\[8\]", {"parts": lambda job: changed(job, codes_at=-1)}),
    "lists": (r"parts.start\)", {"parts": lambda job: job.parts._replace(start=job.parts.start.tolist())}),
    "int32": (r"parts.numel\).*int32", {"parts": lambda job: job.parts._replace(numel=job.parts.numel.astype("i4"))}),
    "stream": (r"parts.stream\).*int64", {"parts": lambda job: job.parts._replace(stream=job.parts.start)}),
    "columns": (
        r"parts.scale_at\).*\(8,\)",
        {"parts": lambda job: job.parts._replace(scale_at=job.parts.scale_at[1:])},
    ),
}
REFUSED_MESSAGES = {
    "message of int8": (r"message\).*int8", {"message": lambda job: job.background.view(torch.int8)}),
    "message strided": (r"message\)", {"message": lambda job: job.background.repeat(2)[::2]}),
    "message 2-D": (r"message\)", {"message": lambda job: job.background.view(1, -1)}),
}
REFUSED_SENDING = {
    "key": (r"key\)", {"key": (1, 2**32)}),
    "long key": (r"key\)", {"key": (1, 2, 3)}),
    "errors": (r"errors\).*float32", {"errors": np.zeros(2, dtype=np.float32)}),
    "errors of three": (r"errors\)", {"errors": np.zeros(3)}),
    "few residuals": (r"residuals.read\): got 1 entries", {"residuals": Residuals([None], [None], 1.0, 1.0)}),
    "fp32 residual": (
        r"residuals.write\[8\]\)",
        {"residuals": Residuals([None] * 9, [None] * 8 + [torch.zeros(NUMELS[-1])], 1.0, 1.0)},
    ),
    "long residual": (
        r"residuals.read\[0\]\)",
        {"residuals": Residuals([torch.zeros(2).bfloat16(), *[None] * 8], [None] * 9, 1.0, 1.0)},
    ),
}
REFUSED_SUMS = {
    "both": (r"output, message\): got both", {"output": lambda job: torch.zeros(sum(NUMELS))}),
    "neither": (r"output, message\): got neither", {"message": None}),
    "output": (r"output\)", {"message": None, "output": lambda job: torch.zeros(sum(NUMELS) - 1)}),
    "output of fp64": (r"output\)", {"message": None, "output": lambda job: torch.zeros(sum(NUMELS)).double()}),
    "flat received": (r"received\)", {"received": lambda job: job.received[0]}),
    "received of int32": (r"received\)", {"received": lambda job: job.received.int()}),
    "short received": (r"bytes of `received`", {"received": lambda job: job.received[:, :100].contiguous()}),
    "own_rank": (r"own_rank\): got 3; allowed: 0 to 2", {"own_rank": 3}),
}


def arguments_of(job, operation, changes):
    given = {"tensors": job.tensors, "parts": job.parts, "message": job.background, "fmt": job.fmt}
    if operation == "reduce":
        given |= {"received": job.received, "own_rank": 0}
    return given | {name: value(job) if callable(value) else value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        *itertools.product(("quantize", "reduce", "dequantize"), {**REFUSED, **REFUSED_MESSAGES}),
        *itertools.product(("quantize", "reduce"), REFUSED_SENDING),
        *itertools.product(("reduce",), REFUSED_SUMS),
    ],
)
def test_refused(rng, operation, name):
    pattern, changes = {**REFUSED, **REFUSED_MESSAGES, **REFUSED_SENDING, **REFUSED_SUMS}[name]
    job = Job(rng, FMT)
    given = arguments_of(job, operation, changes)
    before = job.background.clone(), job.tensors[0].clone()
    with pytest.raises(ValueError, match=rf"^{operation}\((.|\n)*{pattern}" if "bytes of" in pattern else pattern) as e:
        getattr(wire, operation)(**given)
    assert str(e.value).startswith(f"{operation}(")
    assert "allowed: " in str(e.value)
    assert torch.equal(job.background, before[0])
    assert torch.equal(job.tensors[0].view(torch.int32), before[1].view(torch.int32))
