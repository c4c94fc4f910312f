"""Masters to fp32 and back: each kernel against `numerics.master`, bit for bit."""

import functools

import numpy as np
import pytest
import torch

from ds_quant.base.errors import ConfigError
from ds_quant.kernels import native
from ds_quant.kernels.masters import compiled, cpu, ops, reference

SIZES = (1, 31, 32_768, 100_003)
"""One element, less than a vector, a whole chunk of a thread, some chunks and a rest."""


def some(rng, numel):
    """Any bit patterns: of all exponents, with NaNs and denormals; and the largest numbers of both signs."""
    patterns = rng.integers(0, 2**32, numel, dtype=np.uint64).astype(np.uint32)
    edges = np.array([0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7FFF7F, 0x7FFFFFFF, 0, 0x80000000])
    patterns[: len(edges)] = edges[:numel]
    return torch.from_numpy(patterns.view(np.float32))


def same_bits(first, second):
    integers = {4: torch.int32, 2: torch.int16, 1: torch.int8}[first.element_size()]
    return torch.equal(first.view(integers), second.view(integers))


def empty(numel, bits):
    return torch.empty(numel, dtype=torch.bfloat16), torch.empty(numel, dtype=torch.int8) if bits == 24 else None


def check(join, split, bits, is_stochastic, numel, rng):
    values = some(rng, numel)
    key = tuple(int(word) for word in rng.integers(0, 2**32, 2)) if is_stochastic else None
    (weight, low), (own_weight, own_low) = empty(numel, bits), empty(numel, bits)
    reference.split(values, weight, low, key=key)
    split(values, own_weight, own_low, key=key)
    assert same_bits(own_weight, weight)
    assert low is None or same_bits(own_low, low)
    expected, found = torch.empty(numel), torch.empty(numel)
    reference.join(weight, low, expected)
    join(weight, low, found)
    assert same_bits(found, expected)


@pytest.mark.parametrize("is_stochastic", [False, True])
@pytest.mark.parametrize("bits", [24, 16])
@pytest.mark.parametrize("isa", native.ISAS)
def test_cpp(isa, bits, is_stochastic, rng):
    if isa not in native.ISAS[: native.library().widest + 1]:
        pytest.skip(f"this processor has no {isa}")
    join, split = (functools.partial(function, isa=isa) for function in (cpu.join, cpu.split))
    for numel in SIZES:
        check(join, split, bits, is_stochastic, numel, rng)


def test_threads_make_no_difference(rng):
    torch.set_num_threads(2)
    check(cpu.join, cpu.split, 24, True, 200_001, rng)


@pytest.mark.parametrize("bits", [24, 16])
def test_compiled(bits, rng):
    for is_stochastic in (False, True):
        check(compiled.join, compiled.split, bits, is_stochastic, 1001, rng)


def test_what_serves_a_cpu(rng):
    assert ops.split.on(torch.device("cpu")) is cpu.split
    check(ops.join, ops.split, 24, False, 77, rng)


def test_what_is_refused():
    weight, low_bits = empty(8, 24)
    with pytest.raises(ConfigError, match=r"masters.split: got .torch.float64 of shape \(8,\)"):
        ops.split(torch.zeros(8, dtype=torch.float64), weight, low_bits)
    with pytest.raises(ConfigError, match=r"torch.int8 of shape \(4,\) .*allowed: torch.int8 of shape \(8,\)"):
        ops.join(weight, low_bits[::2], torch.zeros(8))
