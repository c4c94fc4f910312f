"""Times on a device and on its host, with a device that is simulated: a clock for each, and a queue between them."""

from __future__ import annotations

import types
from contextlib import contextmanager

import benchmark
import pytest
import torch

from benchmarks import comm, comm_contenders, device_timing, linear_contenders, step_contenders
from benchmarks.device_timing import EVENTS, GRAPH, WALL, Timer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Machine:
    """Host and device, in seconds. What is queued runs when all before it has, and not before it was queued."""

    def __init__(self):
        self.host = self.device = 0.0
        self.captured = None
        """Seconds of the device's work within a capture."""
        self.refuses_capture = False
        self.rate = 1e9

    def launch(self, on_host, on_device):
        self.host += on_host
        if self.captured is not None:
            if self.refuses_capture:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
            self.captured += on_device
        else:
            self.device = max(self.device, self.host) + on_device

    def synchronize(self, device=None):
        self.host = max(self.host, self.device)


@pytest.fixture
def machine(monkeypatch):
    found = Machine()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(found.device, found.host)

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    class Graph:
        def replay(self):
            found.device = max(found.device, found.host) + self.seconds

    @contextmanager
    def graph(into, stream):
        found.captured = 0.0
        try:
            yield
            into.seconds = found.captured
        finally:
            found.captured = None

    @contextmanager
    def stream_context(stream):
        yield

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "stream": stream_context,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "synchronize": found.synchronize,
        "_sleep": lambda cycles: found.launch(0.0, cycles / found.rate),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    found.reset_generators = []
    monkeypatch.setattr(device_timing, "_end_capture_of_random_numbers", found.reset_generators.append)
    monkeypatch.setattr(device_timing.time, "perf_counter", lambda: found.host)
    monkeypatch.setattr(device_timing, "_rates", {})
    return found


def slow_host(machine):
    """Ten launches, each longer on the host than on the device."""

    def call():
        for _ in range(10):
            machine.launch(50e-6, 10e-6)

    return call


def test_events_show_the_device_where_the_host_is_slower(machine):
    timed = Timer(slow_host(machine), CUDA, graphs=False, iterations=3).measure(3)
    assert timed.device == pytest.approx(100e-6)
    assert timed.host == pytest.approx(500e-6)
    assert timed.how == EVENTS


def test_a_graph_has_no_host_time(machine):
    before = []
    timer = Timer(slow_host(machine), CUDA, before=lambda: before.append(1), iterations=4)
    timed = timer.measure(2)
    assert (timed.device, timed.host) == (pytest.approx(100e-6), pytest.approx(500e-6))
    assert timed.how == GRAPH
    assert timer.why_no_graph is None
    assert before


def test_what_cannot_be_captured_is_timed_by_events_and_says_why(machine, capsys):
    machine.refuses_capture = True
    turns = device_timing.take_turns(
        {"a": slow_host(machine), "b": lambda: machine.launch(1e-6, 2e-3)},
        rounds=2,
        warm_up=1,
        device=CUDA,
        graphs=True,
        iterations=2,
    )
    assert turns.device == {"a": pytest.approx([100e-6] * 2), "b": pytest.approx([2e-3] * 2)}
    assert turns.host == {"a": pytest.approx([500e-6] * 2), "b": pytest.approx([1e-6] * 2)}
    assert turns.how == {"a": EVENTS, "b": EVENTS}
    assert machine.reset_generators == [CUDA, CUDA]
    line = "timed by events: a: RuntimeError: operation not permitted when stream is capturing\n"
    assert line in capsys.readouterr().out


def test_rows_on_cuda_have_the_host_apart(machine):
    calls = {"a": slow_host(machine)}
    options = {"rounds": 2, "warm_up": 0, "iterations": 2, "graphs": True, "before": None}
    seconds, columns = device_timing.seconds_and_columns(calls, device=CUDA, **options)
    assert seconds == {"a": pytest.approx([100e-6] * 2)}
    assert columns["a"]["host_seconds_p50"] == pytest.approx(500e-6)
    assert (columns["a"]["timed_by"], columns["a"]["iterations"]) == (GRAPH, 2)
    assert device_timing.host_cell(columns["a"]) == ["0.50"]
    seconds, columns = device_timing.seconds_and_columns(calls, device=CPU, **options)
    assert len(seconds["a"]) == 2
    assert columns == {"a": {}}
    assert device_timing.host_cell({}) == device_timing.host_column(CPU) == []


def test_on_a_cpu_it_is_the_wall_clock_of_the_call(machine):
    def before():
        machine.host += 1.0

    def call():
        machine.host += 0.25

    assert Timer(call, CPU, before=before, iterations=2).measure(2) == (0.25, 0.25, WALL)


def event(name, kind="CUDA", **more):
    return types.SimpleNamespace(name=name, device_type=types.SimpleNamespace(name=kind), **more)


def test_launches_are_kernels_copies_and_fills():
    events = [
        event("triton_kernel"),
        event("triton_kernel", is_user_annotation=False),
        event("Memcpy HtoD (Pinned -> Device)"),
        event("ds_quant::quantize_rows"),
        event("forward", is_user_annotation=True),
        event("aten::mm", kind="CPU"),
    ]
    assert device_timing.kernels_of(events) == {"triton_kernel": 2, "Memcpy HtoD (Pinned -> Device)": 1}


def test_operators_and_waits_on_a_cpu():
    x = torch.ones(3)
    assert device_timing.launches(lambda: (x + 1) * 2, CPU) == {"aten.add.Tensor": 1, "aten.mul.Tensor": 1}
    assert device_timing.host_waits(lambda: x + 1, CPU) == ""
    assert "_local_scalar_dense" in device_timing.host_waits(lambda: (x + 1).sum().item(), CPU)


def test_waits_on_cuda_are_what_torch_raises_for(machine, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait():
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    def fail():
        raise RuntimeError("out of memory")

    assert device_timing.host_waits(wait, CUDA) == "called a synchronizing CUDA operation"
    assert device_timing.host_waits(lambda: None, CUDA) == ""
    with pytest.raises(RuntimeError, match="out of memory"):
        device_timing.host_waits(fail, CUDA)
    assert modes == ["error", "default"] * 3


# ---- contenders, and comm over NCCL


def test_peers_are_compiled_on_cuda_and_cpus_keep_theirs():
    for contenders in (linear_contenders.contenders, step_contenders.contenders):
        on_cpu, on_cuda = ([each.name for each in contenders("int8", device)] for device in (CPU, CUDA))
        assert [name for name in on_cuda if name in on_cpu] == on_cpu
        assert not any("float8" in name for name in on_cpu)
        more = set(on_cuda) - set(on_cpu)
        assert {f"torchao float8 {recipe}, compiled" for recipe in ("tensorwise", "rowwise")} <= more
    assert {"bf16 nn.Linear, compiled", "bitsandbytes int8", "Transformer Engine float8"} <= {
        each.name for each in linear_contenders.contenders("int8", CUDA)
    }


@pytest.mark.parametrize(
    ("gpus", "arguments", "message"),
    [
        (0, [], "--device: got 'cuda' with 0 GPUs for 2 ranks; allowed: 2 GPUs or more, one a rank"),
        (1, [], "--device: got 'cuda' with 1 GPUs for 2 ranks"),
        (2, ["--ranks", "4"], "--device: got 'cuda' with 2 GPUs for 4 ranks"),
        (2, ["--links", "1gbit"], "--links: got '1gbit'; allowed with --device cuda: none"),
    ],
)
def test_comm_over_nccl_is_refused_by_name(gpus, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert benchmark.main(["comm", "--device", "cuda", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_comm_over_nccl_has_one_link_and_sends_less_than_over_gloo(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert comm._nccl(types.SimpleNamespace(ranks=2, links=None)) == [comm.NCCL]
    for contender in comm_contenders.ALL:
        over_nccl = contender.sent_over_nccl
        assert (over_nccl is not None) == (contender.name in ("fp32 reduce-scatter", "bf16 reduce-scatter"))
        if over_nccl is not None:
            assert 2 * over_nccl(1000, 4) == contender.sent(1000, 4)
