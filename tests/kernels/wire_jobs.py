"""Random calls of the operations on the wire, and comparing what two implementations write."""

import itertools

import numpy as np
import pytest
import torch
from numerics.wire_oracle import any_scales, gradient, lay_out

from ds_quant.kernels import build, native
from ds_quant.kernels.wire import cpu
from ds_quant.numerics import wire as reference
from ds_quant.numerics.wire import Residuals, WireFormat

ISAS = native.ISAS[: native.ISAS.index(native.isa()) + 1] if build.load().library else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (1, 2, 31, 32, 33, 257, 1000, 4096, 4133)
KEY = (0x12345678, 0x9ABCDEF0)
MAX_BLOCK = 4096
FORMATS = [WireFormat(*fields) for fields in itertools.product((8, 4), (32, 256, MAX_BLOCK), ("none", "hadamard"))]
NAMED = [
    WireFormat(4, 32, "hadamard", "fp4_e2m1"),
    WireFormat(4, 256, "none", "fp4_e2m1"),
    WireFormat(4, MAX_BLOCK, "none", "fp4_e2m1"),
    WireFormat(4, 32, "none", "mxfp4"),
    WireFormat(4, 32, "hadamard", "mxfp4", "up"),
    WireFormat(4, 16, "hadamard", "nvfp4"),
    WireFormat(4, 16, "none", "nvfp4", "four_six"),
    WireFormat(4, 16, "none", "nvint4"),
]
"""One of each format, scale rule, and size of blocks that the kernels treat differently."""

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
                scales = any_scales(rng, int(numel), fmt)
                row[scale_at : scale_at + len(scales)] = torch.from_numpy(scales)
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
