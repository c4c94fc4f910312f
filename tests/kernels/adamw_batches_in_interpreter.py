"""Many small parameters in one launch, in Triton's interpreter: bit for bit what a launch for each gives.

`test_adamw_batches.py` runs this file in a process of its own: TRITON_INTERPRET must be set before triton is imported.
"""

import numpy as np
import pytest
import torch
from adamw_triton_in_interpreter import FORMATS, exact_roots, make_work, random_key  # noqa: F401
from works import assert_same, copy_work

from ds_quant.kernels.adamw import triton_batches, triton_kernel

NUMELS = (1, 2, 255, 256, 257, 1025, 1536)


def mixture(rng, layouts, *, stochastic, dtypes=(torch.float32, torch.float32)):
    keys = [random_key(rng) if stochastic and layout else None for layout in layouts]
    scalars = make_work(rng, 1, layouts).scalars
    works = [
        make_work(rng, int(numel), layouts, dtype=dtypes[0], grad_dtype=dtypes[1], keys=keys)
        for numel in (*rng.permutation(NUMELS), rng.integers(1, 3000))
    ]
    works = [work._replace(scalars=scalars, stream=int(rng.integers(2**63, dtype=np.uint64))) for work in works]
    spoilt = works[int(rng.integers(len(works)))].grad
    spoilt[-1] = [np.nan, np.inf, 0.0][rng.integers(3)]
    return works


def shared(work):
    return {name: getattr(work, name) for name in ("scalars", "exp_avg_key", "exp_avg_sq_key")}


def check(works, num_launches):
    alone, together = [copy_work(work) for work in works], [copy_work(work) for work in works]
    for work in alone:
        triton_kernel.adamw_(work)
    # One for parameters of whole blocks, one for the others.
    is_wide = [
        launch.arguments[triton_batches.kernel.arg_names.index("IS_WIDE")]
        for launch in triton_batches.launches(together)
    ]
    assert sorted(is_wide) == [False] * num_launches + [True] * num_launches
    triton_batches.adamw_(together)
    for got, expected, before in zip(together, alone, works, strict=True):
        assert_same(got, expected, got.param.numel())
        # A few elements of 16 bits may stay where they are.
        assert got.param.numel() < 31 or not torch.equal(got.param, before.param)


@pytest.mark.parametrize("name", ["float 8/8", "m4 vfloat", "m8v32", "large blocks"])
def test_as_one_by_one(name, rng):
    works = mixture(rng, FORMATS[name], stochastic=bool(rng.integers(2)))
    _, largest = triton_kernel.block_sizes(works[0])
    check([*works, make_work(rng, largest, FORMATS[name])._replace(**shared(works[0]))], 1)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_dtypes(dtypes, rng):
    check(mixture(rng, FORMATS["m4v8"], stochastic=True, dtypes=dtypes), 1)


def test_what_differs_is_launched_apart(rng):
    """Formats, dtypes, scalars, keys: those of each launch are one."""
    works = mixture(rng, FORMATS["8/8"], stochastic=True)
    works += mixture(rng, FORMATS["m4v8"], stochastic=True)
    works += mixture(rng, FORMATS["8/8"], stochastic=True, dtypes=(torch.bfloat16, torch.float32))
    decayed = works[0].scalars._replace(decay=1.0)
    works += [work._replace(scalars=decayed) for work in mixture(rng, FORMATS["8/8"], stochastic=False)]
    works = [works[index] for index in rng.permutation(len(works))]
    check(works, 4)


def test_neighbours_are_left_alone(rng):
    """Parameters that lie behind one another in one tensor, as DeepSpeed has them."""
    works = mixture(rng, FORMATS["m4v8"], stochastic=True)
    flat = torch.cat([work.param for work in works] + [torch.full((64,), 77.0)])
    parts = flat[:-64].split([work.param.numel() for work in works])
    works = [work._replace(param=part) for work, part in zip(works, parts, strict=True)]
    expected = [copy_work(work) for work in works]
    for work in expected:
        triton_kernel.adamw_(work)
    triton_batches.adamw_(works)
    for got, wanted in zip(works, expected, strict=True):
        assert_same(got, wanted)
    assert (flat[-64:] == 77).all()


def test_addresses_for_narrow_loads(rng):
    """Whole blocks, but a parameter that begins 4 bytes behind a multiple of 16."""
    works = mixture(rng, FORMATS["8/8"], stochastic=True)
    works = [work for work in works if work.param.numel() == 256]
    assert [launch.arguments[-5] for launch in triton_batches.launches(works)] == [True]
    moved = torch.cat([torch.zeros(1), works[0].param])[1:]
    works = [works[0]._replace(param=moved)]
    assert [launch.arguments[-5] for launch in triton_batches.launches(works)] == [False]
    expected = copy_work(works[0])
    triton_kernel.adamw_(expected)
    triton_batches.adamw_(works)
    assert_same(works[0], expected, 256)


def test_tables_are_kept_and_follow_their_tensors(rng):
    """Steps with other scalars and keys send nothing; another gradient has another table."""
    works = mixture(rng, FORMATS["8/8"], stochastic=True)
    first = [launch.arguments[0] for launch in triton_batches.launches(works)]
    for _ in range(3):
        alone = [copy_work(work) for work in works]
        for work in alone:
            triton_kernel.adamw_(work)
        tables = [launch.arguments[0] for launch in triton_batches.launches(works)]
        assert all(table is kept for table, kept in zip(tables, first, strict=True))
        triton_batches.adamw_(works)
        for got, expected in zip(works, alone, strict=True):
            assert_same(got, expected)
        key = random_key(rng)
        scalars = works[0].scalars._replace(step_size=works[0].scalars.step_size * 2)
        works = [work._replace(scalars=scalars, exp_avg_key=key) for work in works]
    works[0] = works[0]._replace(grad=works[0].grad.clone())
    assert any(
        launch.arguments[0] is not table for launch, table in zip(triton_batches.launches(works), first, strict=True)
    )
