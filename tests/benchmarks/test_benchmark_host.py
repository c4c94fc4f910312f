"""What `benchmark.py host` times, and that ours take the way that they take on a GPU."""

import importlib.util

import benchmark
import pytest
import torch
import torch.distributed as dist
from benchmark_files import read

from benchmarks import gpus_way, host_calls

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the extra dev has triton for Linux on x86_64 only"
)


FORWARD = ["group_kernel", "group_kernel", "kernel"]
BACKWARD = ["scan_kernel", "tile_kernel", "kernel", "kernel"]


@pytest.fixture
def no_group():
    """What other tests of this process may have left: the benchmark makes a process group of its own."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def bound(monkeypatch):
    """The kernels that would be launched, in place of what Triton does for that."""
    names = []
    monkeypatch.setattr(gpus_way, "bind", lambda launch, device: names.append(launch.kernel.fn.__name__))
    return names


def test_steps_and_all_reduces(no_group, tmp_path, capsys):
    output = tmp_path / "host.csv"
    arguments = ["--parts", "optimizer,all-reduce", "--ranks", "4", "--rounds", "2", "--warm-up", "1"]
    assert benchmark.main(["host", *arguments, "--output", str(output)]) == 0
    rows = read(output)
    assert [row["part"] for row in rows] == 4 * ["optimizer"] + 5 * ["all-reduce"]
    bases = [row for row in rows if float(row["ratio_p20"]) == float(row["ratio_p80"]) == 1]
    assert [row["call"] for row in bases] == ["torch AdamW, fused", "dist.all_reduce"]
    # A second is more than any of them takes, whatever else the machine does: nothing computes 124M elements.
    assert all(0 < float(row["seconds_p50"]) < 1 for row in rows)
    assert {row["call"] for row in rows if row["goal_seconds"] == "0.001"} == {
        f"8 bits, {name}" for name in ("nearest", "stochastic", "stochastic, error feedback")
    }
    assert not dist.is_initialized()
    assert "an all-reduce of 124M elements, 4 ranks" in capsys.readouterr().out


def test_layers_and_steps_launch_what_they_launch_on_a_gpu(bound):
    with host_calls.layers(2) as part:
        for name in ("int8, nearest", "int8, stochastic"):
            for _ in range(2):  # nothing is kept from call to call
                bound.clear()
                part.calls[name]()
                assert bound == [*FORWARD, *BACKWARD]
        bound.clear()
        part.calls["nn.Linear"]()
        assert bound == []
    with host_calls.optimizer(2) as part:
        bound.clear()
        part.calls["QuantAdamW, 8 bits"]()
        assert bound == ["kernel"]


def test_what_is_on_the_cpu_stays_there(bound):
    """Beside the part the registry is as it was."""
    with host_calls.layers(2) as part:
        call = part.calls["int8, nearest"]
        call()
    assert bound
    bound.clear()
    call()
    assert bound == []


@pytest.mark.slow
def test_calls_and_layers(tmp_path):
    output = tmp_path / "host.csv"
    assert benchmark.main(["host", "--parts", "calls,layers", "--rounds", "2", "--output", str(output)]) == 0
    rows = read(output)
    assert [row["part"] for row in rows] == 7 * ["calls"] + 6 * ["layers"]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "calls,gpu"], "--parts: got 'gpu'; allowed: calls, layers, optimizer, all-reduce"),
        (["--ranks", "1"], "--ranks: got 1; allowed: 2 or more"),
        (["--rounds", "1"], "--rounds: got 1; allowed: 2 or more"),
        (["--warm-up", "0"], "--warm-up: got 0; allowed: 1 or more"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    assert benchmark.main(["host", *arguments]) == 2
    assert message in capsys.readouterr().err
