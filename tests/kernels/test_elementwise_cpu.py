"""Steps of Lion, SGD and AdEMAMix in C++ have the reference's bits, with each instruction set."""

import itertools

import pytest
import torch
from kernels.elementwise_cases import RULES, assert_same, copy_work, make_work
from kernels.works import FORMATS

from ds_quant.kernels import build, native
from ds_quant.kernels.elementwise import cpu, ops, reference
from ds_quant.numerics.codes import MAPS, CodeMap
from ds_quant.numerics.lion import lion_rule

ISAS = native.ISAS[: native.ISAS.index(native.isa()) + 1] if build.load().library else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POWER8, POWER4, LOG4 = ("power", 8), ("power", 4), ("log", 4)

pytestmark = pytest.mark.skipif(not ISAS, reason=f"no C++ kernels: {build.load().reason}")


def check(works, isas=ISAS):
    expected = [copy_work(work) for work in works]
    reference.elementwise_(expected)
    for isa in isas:
        got = [copy_work(work) for work in works]
        cpu.elementwise_(got, isa=isa)
        for number, (mine, right) in enumerate(zip(got, expected, strict=True)):
            assert_same(mine, right, f"{isa} works[{number}]")


@pytest.mark.parametrize("rule", RULES)
def test_formats_roundings_and_sizes(rule, rng):
    check(
        [
            make_work(rng, rule, numel, (form, form, form), stochastic=stochastic, stream=stream)
            for stream, (form, stochastic, numel) in enumerate(
                itertools.product(FORMATS, (False, True), (0, 1, 37, 4611))
            )
        ]
    )


@pytest.mark.parametrize("rule", RULES)
def test_dtypes(rule, rng):
    check([make_work(rng, rule, 1000, (POWER8,) * 3, dtypes=pair) for pair in itertools.product(DTYPES, repeat=2)])


@pytest.mark.parametrize("stochastic", [False, True])
def test_two_scales_to_a_block(stochastic, rng):
    check(
        [
            make_work(rng, "ademamix", numel, (POWER4, POWER8, LOG4), sizes, stochastic=stochastic)
            for numel, sizes in itertools.product((0, 1, 37, 4611), [(256, 256, 128), (64, 32, 4096), (8, 8, 2)])
        ]
    )


@pytest.mark.parametrize(
    "block_sizes", [(1, 2, 8), (64, 4096, 32), (3, 5, 7), (15, 4096, 1), (1155, 1155, 1155)], ids=str
)
def test_block_sizes(block_sizes, rng):
    """Powers of two and divisors of 1155; (15, 4096, 1) go on to the reference."""
    works = [
        make_work(rng, rule, 1155, forms, block_sizes, stream=stream)
        for stream, (rule, forms) in enumerate(
            itertools.product(RULES, [(POWER8, POWER4, POWER8), (POWER4, None, POWER4), (None, POWER8, None)])
        )
    ]
    check(works)


def test_the_number_of_threads_changes_nothing(rng):
    works = [make_work(rng, "ademamix", numel, (POWER8, POWER8, POWER4)) for numel in (100_003, 5, 70_000)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append([copy_work(work) for work in works])
            cpu.elementwise_(results[-1])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


def test_what_cpp_does_not_have_goes_on(rng, monkeypatch):
    """A rule, a map and blocks of its own; the others are still stepped."""
    toy = CodeMap("toy", 8, True, 127, 0, 1)
    assert toy.name not in MAPS
    with_toy_map = make_work(rng, "lion", 600, (POWER8,))
    with_toy_map = with_toy_map._replace(states=[with_toy_map.states[0]._replace(code_map=toy)])
    works = [
        make_work(rng, "lion", 600, (POWER8,)),
        make_work(rng, "lion", 600, (POWER8,))._replace(rule=lambda *arguments: lion_rule(*arguments)),
        make_work(rng, "lion", 8000, (POWER8,), (8000,)),
        with_toy_map,
    ]
    left = []
    monkeypatch.setattr(ops.elementwise_, "after", lambda backend, device: left.extend)
    first = copy_work(works[0])
    reference.elementwise_([first])
    cpu.elementwise_(works)
    assert [id(work) for work in left] == [id(work) for work in works[1:]]
    assert_same(works[0], first)


def test_keys_that_there_are_not(rng):
    work = make_work(rng, "lion", 600, (POWER8,))
    before = copy_work(work)
    with pytest.raises(ValueError, match=r"elementwise_\(works\): got keys \[\(1, 4294967296\)\] and stream 9"):
        cpu.elementwise_([work, work._replace(keys=[(1, 2**32)])])
    assert_same(work, before)
    with pytest.raises(ValueError, match=r"elementwise_\(isa\): got 'sse'; allowed: plain"):
        cpu.elementwise_([work], isa="sse")
