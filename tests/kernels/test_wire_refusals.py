"""What the operations on the wire refuse."""

import gc
import itertools

import numpy as np
import pytest
import torch
from kernels.wire_jobs import NUMELS, Job

from ds_quant.kernels import wire
from ds_quant.kernels.wire.checks import Check
from ds_quant.numerics.wire import Parts, Residuals, WireFormat, code_bytes

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


def test_what_is_known_of_a_layout_hides_no_wrong_argument(rng):
    job = Job(rng, FMT, some=False)
    parts = Parts(*(column.copy() for column in job.parts))
    for column in parts:
        column.setflags(write=False)
    residuals = job.residuals()
    for _ in range(2):
        wire.quantize(job.tensors, parts, job.background, FMT, residuals=residuals)
    known = Check("quantize", parts, FMT).known
    assert Check("quantize", parts, FMT).known is known
    assert len(known.columns) == 2

    # A byte less than they take: the last piece's scale, which is looked at first, still fits.
    needed = max(int(at) + code_bytes(int(n), FMT) for at, n in zip(parts.codes_at, parts.numel, strict=True))
    message, tensors = job.background[: needed - 1], [job.tensors[0][:-1]]
    with pytest.raises(ValueError, match=rf"parts\.codes_at.*within the {needed - 1} bytes"):
        wire.dequantize(message, parts, job.tensors, FMT)
    with pytest.raises(ValueError, match=r"parts\.start\[8\]"):
        wire.quantize(tensors, parts, job.background, FMT)
    with pytest.raises(ValueError, match=r"parts\.source\[0\]"):
        wire.quantize([], parts, job.background, FMT)
    wrong = residuals._replace(write=[*residuals.write[:-1], torch.zeros(NUMELS[-1])])
    with pytest.raises(ValueError, match=r"residuals\.write\[8\]"):
        wire.quantize(job.tensors, parts, job.background, FMT, residuals=wrong)
    with pytest.raises(ValueError, match=r"fmt\)"):
        wire.quantize(job.tensors, parts, job.background, WireFormat(8, 48))

    # Another residual may get the address of one that is gone.
    del residuals, wrong
    gc.collect()
    assert len(known.columns) == 1
    assert set(known.columns) == {(torch.device("cpu"), *map(id, job.read))}
    with pytest.raises(ValueError, match=r"residuals\.read\[8\]"):
        wire.quantize(
            *(job.tensors, parts, job.background, FMT),
            residuals=Residuals([*job.read[:-1], job.read[-1].float()], [None] * 9, 1.0, 1.0),
        )


def test_one_that_has_become_writable_is_looked_at_again(rng):
    job = Job(rng, FMT)
    for column in job.parts:
        column.setflags(write=False)
    wire.dequantize(job.background, job.parts, job.tensors, FMT)
    job.parts.start.setflags(write=True)
    job.parts.start[-1] += 1
    with pytest.raises(ValueError, match=r"parts\.start\[8\]"):
        wire.dequantize(job.background, job.parts, job.tensors, FMT)
