"""torch.compile of any supported torch: limits of compilations, and divisions rounded to nearest."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ds_quant.kernels import compiling


@pytest.fixture(params=["the limit of the call", "the limit of the process"])
def way(request, monkeypatch):
    """Both ways to set a limit, where torch has both. Before 2.13 there is the second alone."""
    if request.param == "the limit of the process":
        monkeypatch.setattr(compiling, "_TAKES_LIMIT", False)
    elif not compiling._TAKES_LIMIT:
        pytest.skip("this torch knows one limit for all functions")


def adding(value, limit, backend):
    def add(x):
        return x + value

    return compiling.compile_whole(add, limit, backend)


def test_each_function_has_its_own_limit(way):
    """Ten dtypes, devices or numbers of dimensions are ten compilations, of which torch allows 8 unless told."""
    counters = [CompileCounter() for _ in range(2)]
    before = torch._dynamo.config.recompile_limit
    for number, counter in enumerate(counters):
        add = adding(float(number), 10, counter)
        for dimensions in range(1, 11):
            assert add(torch.zeros([2] * dimensions)).unique().tolist() == [number]
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            add(torch.zeros([2] * 11))
    assert [counter.frame_count for counter in counters] == [10, 10]
    assert torch._dynamo.config.recompile_limit == before


def test_divisions_are_rounded(monkeypatch):
    """Where Inductor writes addcdiv as `/`, which for CUDA is approximate, it is told to round all of them."""
    from torch._inductor.lowering import lowerings

    asked = []
    compile_now = torch.compile

    def spy(function, **how):
        asked.append(how["options"])
        return compile_now(function, **how)

    monkeypatch.setattr(torch, "compile", spy)
    for has_lowering in (True, False):
        if has_lowering:
            monkeypatch.setitem(lowerings, torch.ops.aten.addcdiv.default, None)
        else:
            monkeypatch.delitem(lowerings, torch.ops.aten.addcdiv.default)
        adding(1.0, 2, "inductor")
        adding(1.0, 2, CompileCounter())
    assert asked == [None, None, {"eager_numerics.division_rounding": True}, None]
    assert "eager_numerics.division_rounding" in torch._inductor.list_options()
