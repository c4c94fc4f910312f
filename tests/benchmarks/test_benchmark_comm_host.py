"""The host time of an all-reduce: all of its ways are taken, and all gradients are in it."""

from unittest import mock

import benchmark
import pytest
import torch.distributed as dist

from benchmarks import comm_host
from ds_quant.kernels.wire import ops


@pytest.fixture
def no_group():
    """What other tests of this process may have left: the benchmark makes a process group of its own."""
    if dist.is_initialized():
        dist.destroy_process_group()


def test_all_settings_are_measured(no_group):
    found = comm_host.measure(4, 25e6, 2)
    assert list(found) == list(comm_host.SETTINGS)
    # 1 ms is what is promised of a GPU's host; this one may be a tenth as fast, and has five buckets. On meta tensors a
    # read by the host raises, so that nothing waits either.
    assert all(0 < each.milliseconds < 50 for each in found.values())
    # What is asked for is checked there, as on a GPU.
    bucket = [comm_host.bucket_of([10_000])]
    with comm_host.fake_group(4), comm_host.without_device_work():
        checks = mock.Mock(wraps=ops.Check)
        with mock.patch.object(ops, "Check", checks):
            comm_host.all_reduces(bucket, comm_host.SETTINGS["nearest"])()
    assert [call.args[0] for call in checks.call_args_list] == ["quantize", "reduce", "dequantize"]
    # Of each of the five buckets: quantize, two for the sum and its message, dequantize; the more for shorter blocks.
    assert all(5 * 4 <= each.compiled_calls <= 5 * 10 for each in found.values())


def test_buckets_hold_all_gradients():
    for bucket in (5e8, 25e6, 1):
        buckets = list(comm_host.cut(bucket))
        assert sum(map(sum, buckets)) == 124_439_808
        assert all(sum(numels) <= bucket or len(numels) == 1 for numels in buckets)
        assert len(buckets) == {5e8: 1, 1: 148}.get(bucket, len(buckets))


@pytest.mark.parametrize(("option", "value"), [("ranks", "1"), ("bucket", "0"), ("rounds", "0"), ("bucket", "nan")])
def test_what_is_refused(option, value, capsys):
    assert benchmark.main(["comm-host", f"--{option}", value]) == 2
    assert f"--{option}: got {float(value) if option == 'bucket' else value}; allowed: " in capsys.readouterr().err
