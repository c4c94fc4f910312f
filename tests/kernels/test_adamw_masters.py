"""The fused step of masters of 24 and 16 bits against its definition, bit for bit: to fp32, a step, and back."""

import itertools

import pytest
import torch
from kernels.works import KEY, assert_same, copy_work, make_work, rough_values

from ds_quant.kernels import build, native, registry
from ds_quant.kernels.adamw import cpu, ops, reference
from ds_quant.kernels.adamw.work import MOST_DRAWN, MastersWork
from ds_quant.numerics.master import round_weight, split_master

ISAS = native.ISAS[: native.ISAS.index(native.isa()) + 1] if build.load().library else ()
FLOAT8, POWER8, POWER4 = ("float", 8), ("power", 8), ("power", 4)
RECIPES = {
    "8 bits": (FLOAT8, FLOAT8, (256, 256)),
    "4 and 8 bits": (POWER4, FLOAT8, (128, 256)),
    "4 bits": (POWER4, POWER4, (128, 128)),
    "32 bits": (None, None, (1, 1)),
    "8 and 32 bits": (FLOAT8, None, (256, 1)),
    "a table": (("dynamic", 8), POWER8, (64, 128)),
    "long blocks": (POWER8, POWER4, (8192, 8192)),
}
SIZES = (1, 37, 960, 3840, 5001)
"""One element, less than a block, whole blocks, whole and larger than what is done at a time, with a tail."""
EDGES = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 1.0, 3e38, -3.402e38, torch.inf, -torch.inf, torch.nan]

pytestmark = pytest.mark.skipif(not ISAS, reason=f"no C++ kernels: {build.load().reason}")


def masters_work(rng, numel, recipe="8 bits", bits=24, key=None, grad_dtype=torch.bfloat16, with_edges=True):
    """`with_edges`: some masters and gradients are zeros, denormal, huge, Inf and NaN, in blocks of their own."""
    first, second, sizes = RECIPES[recipe]
    step = make_work(
        rng, numel, first, second, block_sizes=sizes, stochastic=(True, True), dtypes=(torch.bfloat16, grad_dtype)
    )
    values = rough_values(rng, numel)
    if with_edges:
        edges = torch.tensor(EDGES)
        values[-len(edges) :] = edges[:numel]
        step.grad[numel // 2 : numel // 2 + len(edges)] = edges[: numel - numel // 2].to(grad_dtype)
    weight, low_bits = split_master(values)
    if bits == 24:
        return MastersWork(step._replace(param=weight), low_bits, key)
    return MastersWork(step._replace(param=round_weight(values)), None, key)


def copied(work):
    low_bits = None if work.low_bits is None else work.low_bits.clone()
    return work._replace(step=copy_work(work.step), low_bits=low_bits)


def check(works, context="", isas=ISAS):
    """Every instruction set does what the definition does."""
    expected = [copied(work) for work in works]
    reference.adamw_masters_(expected)
    for isa in isas:
        got = [copied(work) for work in works]
        cpu.adamw_masters_(got, isa=isa)
        for number, (mine, right) in enumerate(zip(got, expected, strict=True)):
            assert_same(mine.step, right.step, f"{isa} {context} works[{number}]")
            assert mine.low_bits is None or torch.equal(mine.low_bits, right.low_bits), f"{isa} {context} {number}"
    return expected


@pytest.mark.parametrize("bits", [24, 16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_sizes_and_roundings(rng, recipe, bits):
    works = []
    for numel, is_stochastic in itertools.product(SIZES, (False, True)):
        # Long blocks are cut nowhere: as granularities "tensor" have it.
        size = 8192 if recipe == "long blocks" and numel == SIZES[-1] else numel
        key = tuple(int(word) for word in rng.integers(0, 2**32, 2)) if is_stochastic else None
        works.append(masters_work(rng, size, recipe, bits, key))
    stepped = check(works, recipe)
    check([work._replace(step=work.step._replace(grad=work.step.grad.flip(0))) for work in stepped], f"{recipe} again")


@pytest.mark.parametrize("grad", [torch.float32, torch.float16], ids=str)
def test_gradients_of_other_dtypes(rng, grad):
    check([masters_work(rng, 1000, grad_dtype=grad), masters_work(rng, 1000, "4 bits", 16, KEY, grad_dtype=grad)])


def test_the_largest_masters_stay_finite(rng):
    """They grow by their own half a step: rounding must not make them Inf at 24 bits, and does so at 16."""
    work = masters_work(rng, 512, with_edges=False)
    largest = torch.full((512,), torch.finfo(torch.float32).max)
    largest[::2] *= -1
    weight, low_bits = split_master(largest)
    scalars = work.step.scalars._replace(decay=1.0, step_size=0.0)
    for key in (None, KEY):
        step = work.step._replace(param=weight, scalars=scalars)
        stepped = check([work._replace(step=step, low_bits=low_bits, key=key)])[0]
        assert torch.equal(stepped.low_bits, low_bits)
        assert torch.equal(stepped.step.param, weight)
        check([work._replace(step=step._replace(param=largest.bfloat16()), low_bits=None, key=key)])


def test_threads_make_no_difference(rng):
    works = [masters_work(rng, numel, recipe, 24, KEY) for numel in (70_001, 5) for recipe in ("8 bits", "4 bits")]
    expected = [copied(work) for work in works]
    torch.set_num_threads(1)
    cpu.adamw_masters_(expected)
    torch.set_num_threads(2)
    got = [copied(work) for work in works]
    cpu.adamw_masters_(got)
    for mine, right in zip(got, expected, strict=True):
        assert_same(mine.step, right.step)
        assert torch.equal(mine.low_bits, right.low_bits)


def test_moments_with_a_map_that_the_kernel_lacks_take_the_definition(rng, monkeypatch):
    work, other = masters_work(rng, 700), masters_work(rng, 300, key=KEY)
    expected = [copied(work), copied(other)]
    reference.adamw_masters_(expected)
    # As of a registered map, once for each format.
    monkeypatch.setattr(cpu, "has_map", lambda optimizer, code_map: False)
    got = [copied(work), copied(other)]
    ops.adamw_masters_(got)
    for mine, right in zip(got, expected, strict=True):
        assert_same(mine.step, right.step)
        assert torch.equal(mine.low_bits, right.low_bits)


def test_it_serves_where_it_steps_the_rest(monkeypatch):
    here = torch.device("cpu")
    assert ops.adamw_masters_.on(here) is cpu.adamw_masters_
    assert ops.fuses_masters(here)
    assert not ops.fuses_masters(torch.device("cuda"))
    monkeypatch.setattr(registry, "BACKENDS", [registry.Backend("own", ("cpu",)), *registry.BACKENDS])
    monkeypatch.setitem(ops.adamw_.implementations, "own", reference.adamw_)
    registry._serving.cache_clear()
    assert not ops.fuses_masters(here), "a backend that does not know masters is passed by"
    registry._serving.cache_clear()
    monkeypatch.setenv("DS_QUANT_KERNELS", "reference")
    assert not ops.fuses_masters(here)


def test_what_is_refused_before_anything_is_written(rng):
    good = masters_work(rng, 100)
    before = copied(good)
    half = good.low_bits.repeat(2)[::2]
    bad = [
        (good._replace(low_bits=good.low_bits[:-1]), r"\.low_bits\): got 99 elements, torch.int8"),
        (good._replace(low_bits=good.low_bits.float()), r"\.low_bits\): got 100 elements, torch.float32"),
        (good._replace(low_bits=half), r"\.low_bits\): got .* not contiguous; allowed: 100 elements"),
        (good._replace(step=good.step._replace(param=torch.zeros(100))), r"\.step.param\): got .*torch.float32"),
        (good._replace(key=(0, 2**32)), r"\): got keys .*; allowed: keys of two words"),
    ]
    for work, message in bad:
        with pytest.raises(ValueError, match=r"adamw_masters_\(works\[1\]" + message):
            ops.adamw_masters_([good, work])
    assert_same(good.step, before.step)
    many = torch.empty(MOST_DRAWN + 1, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=rf"got {MOST_DRAWN + 1} elements .*; allowed: {MOST_DRAWN}; step them in"):
        ops.adamw_masters_([good._replace(step=good.step._replace(param=many), low_bits=None, key=KEY)])
