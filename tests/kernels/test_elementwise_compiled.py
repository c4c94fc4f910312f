"""Compiled steps of Lion, SGD and AdEMAMix, on the CPU as far as they go there."""

import functools

import pytest
import torch
from kernels.elementwise_cases import assert_same, copy_work, make_work
from torch._dynamo.testing import CompileCounter

from ds_quant.kernels.elementwise import compiled, ops, reference

FORMS = {
    "8": (("power", 8), ("power", 8), ("float", 8)),
    "4": (("power", 4), ("power", 8), ("power", 4)),
    "32": (None, None, None),
}


def test_what_serves_cuda(monkeypatch):
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
    assert ops.elementwise_.on(torch.device("cuda")) is compiled.elementwise_


@pytest.mark.parametrize(("rule", "stored"), [("lion", "8"), ("nesterov", "32"), ("ademamix", "4")])
def test_compiles_once_and_has_the_bits_of_the_reference(rule, stored, rng, monkeypatch):
    """Operations as they are, for two parameters of other lengths and steps with other scalars, gradients and keys."""
    counter = CompileCounter()
    with_inductor = compiled._compiled
    monkeypatch.setattr(compiled, "_compiled", functools.partial(with_inductor, backend=counter))
    with_inductor.cache_clear()
    works = [make_work(rng, rule, numel, FORMS[stored], stream=numel) for numel in (700, 1500)]
    for step in range(3):
        works = [
            work._replace(
                grad=work.grad.flip(0) * 0.5,
                scalars=work.scalars._replace(lr=0.01 / (step + 1)),
                keys=[(step, 7)] * len(work.keys),
            )
            for work in works
        ]
        expected = [copy_work(work) for work in works]
        reference.elementwise_(expected)
        compiled.elementwise_(works)
        for got, wanted in zip(works, expected, strict=True):
            assert_same(got, wanted, f"step {step}")
    assert counter.frame_count == 1
    with_inductor.cache_clear()


@pytest.mark.thorough
def test_inductor_keeps_the_bits_on_a_cpu(rng):
    """Where it fuses no products into sums."""
    work = make_work(rng, "lion", 1500, FORMS["8"])
    expected = copy_work(work)
    reference.elementwise_([expected])
    compiled.elementwise_([work])
    assert_same(work, expected)
