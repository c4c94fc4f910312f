"""What the collectives refuse before any rank is spoken to."""

import pytest
import torch
from torch import distributed as dist

import ds_quant.comm
from ds_quant.base.errors import ConfigError
from ds_quant.comm import all_reduce, collectives, reduce_scatter


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes(dtype):
    odd, good = torch.zeros(4).to(dtype), torch.zeros(4)
    for call in (
        lambda: all_reduce(odd),
        lambda: reduce_scatter(good, odd),
        lambda: reduce_scatter(odd, good),
    ):
        with pytest.raises(
            ValueError, match=f"got {dtype}, torch.strided; allowed: float32, bfloat16, float16, float64"
        ):
            call()


def test_sparse_tensors():
    with pytest.raises(ValueError, match=r"torch.sparse_coo; allowed: .* dense; convert it"):
        all_reduce(torch.zeros(4).to_sparse())


@pytest.mark.parametrize("op", [dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT])
def test_operations(op):
    for call in (lambda: all_reduce(torch.zeros(4), op), lambda: reduce_scatter(torch.zeros(4), torch.zeros(4), op)):
        with pytest.raises(ValueError, match=r"\(op\): got .*; allowed: ReduceOp.SUM, ReduceOp.AVG; use torch"):
            call()


def test_no_process_group(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match=r"got no process group; .* call torch.distributed.init_process_group"):
        all_reduce(torch.zeros(4))


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ((3, None, None, 256, "nearest", "none", False), "bits: got 3"),
        ((8, None, None, 48, "nearest", "none", False), "block_size: got 48"),
        ((8, None, None, 256, "up", "none", False), "rounding: got 'up'|rounding: got \"up\""),
        ((8, None, None, 256, "nearest", "dct", False), "rotation: got"),
    ],
)
def test_settings(settings, where):
    with pytest.raises(ConfigError, match=where):
        collectives._config(*settings)


def test_true_is_remembered_apart_from_one():
    """They are equal, and so would be their places in a cache; one rank a node is refused."""
    assert collectives._config(8, None, None, 256, "nearest", "none", True).hierarchical is True
    with pytest.raises(ConfigError, match="hierarchical: got 1; allowed: "):
        collectives._config(8, None, None, 256, "nearest", "none", 1)


def test_ddp_kwargs_is_the_function_at_every_access():
    """It is imported when it is asked for, and no module of its name must take its place."""
    for _ in range(2):
        from ds_quant.comm import ddp_kwargs

        assert callable(ddp_kwargs)
        assert callable(ds_quant.comm.ddp_kwargs)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ds_quant.comm.nothing
