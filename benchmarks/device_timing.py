"""Time on a device and on its host, apart: CUDA graphs or events for the one, the return of the call for the other.

A call that only queues work is over long before the work is. What stands between two events is the device's time if
the host keeps ahead: a kernel that spins is queued first, so that all launches of the call wait behind it. A queue
holds some thousand launches; the device partly waits for a call with more of them, as it does in use. The replay of a
CUDA graph has no host work at all.

On other devices both are the wall-clock time of the call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import timing

Call = Callable[[], object]

WALL, EVENTS, GRAPH = "wall clock", "events", "graph replay"
_WARM_UP = 3
"""Calls before a capture: what is compiled, tuned or allocated once comes into being."""
_AHEAD = 1.5
"""Times the host's time that the device spins first."""
_LONGEST_SPIN = 0.5
_CYCLES = 10_000_000
"""To find out how fast a spinning kernel counts."""


class Timed(NamedTuple):
    """Seconds of one call, medians."""

    device: float
    host: float
    """Until the call returns, with an empty queue."""
    how: str
    """What told the device's time: WALL, EVENTS or GRAPH."""


class Turns(NamedTuple):
    """Seconds by contender, an entry a round."""

    device: dict[str, list[float]]
    host: dict[str, list[float]]
    how: dict[str, str]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Times one call: once by `turn`, which takes `iterations` calls."""

    def __init__(
        self, call: Call, device: torch.device, *, before: Call | None = None, graphs: bool = True, iterations: int = 1
    ):
        """before: what makes the call's inputs new, outside of its time. It may not use the device: a graph has both.

        graphs: whether to replay a graph where one can be captured.
        """
        self._call, self._before, self._device, self._iterations = call, before or (lambda: None), device, iterations
        self._graph: torch.cuda.CUDAGraph | None = None
        self.how = WALL
        self.why_no_graph: str | None = None
        if device.type == "cuda":
            self.how = EVENTS
            for _ in range(_WARM_UP):
                self._run()
            torch.cuda.synchronize(device)
            if graphs:
                self._capture()

    def turn(self) -> tuple[float, float]:
        """Seconds of a call on the device and on the host: means of the iterations."""
        if self._device.type != "cuda":
            total = 0.0
            for _ in range(self._iterations):
                self._before()
                begin = time.perf_counter()
                self._call()
                total += time.perf_counter() - begin
            return (total / self._iterations,) * 2
        host = self._host_seconds()
        return (self._replays() if self._graph else self._between_events(host)), host

    def measure(self, rounds: int) -> Timed:
        """Medians of so many turns."""
        found = [self.turn() for _ in range(rounds)]
        on_device, on_host = zip(*found, strict=True)
        return Timed(statistics.median(on_device), statistics.median(on_host), self.how)

    def _run(self) -> None:
        self._before()
        self._call()

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            # On a stream of its own, as a capture is: what libraries keep by stream is there then.
            self._run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._run()
            graph.replay()
            torch.cuda.synchronize(self._device)
        except Exception as error:  # whatever cannot be captured raises an error of its own kind
            self.why_no_graph = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            _end_capture_of_random_numbers(self._device)
            return
        self._graph, self.how = graph, GRAPH

    def _host_seconds(self) -> float:
        total = 0.0
        for _ in range(self._iterations):
            self._before()
            torch.cuda.synchronize(self._device)
            begin = time.perf_counter()
            self._call()
            total += time.perf_counter() - begin
        torch.cuda.synchronize(self._device)
        return total / self._iterations

    def _replays(self) -> float:
        assert self._graph is not None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self._iterations):
            self._graph.replay()
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) * 1e-3 / self._iterations

    def _between_events(self, host: float) -> float:
        cycles = int(min(_LONGEST_SPIN, _AHEAD * host + 1e-4) * _cycles_per_second(self._device))
        total = 0.0
        for _ in range(self._iterations):
            self._before()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles)
            start.record()
            self._call()
            end.record()
            torch.cuda.synchronize(self._device)
            total += start.elapsed_time(end) * 1e-3
        return total / self._iterations


def _end_capture_of_random_numbers(device: torch.device) -> None:
    """A capture that failed may leave the default generator in it, which then refuses to draw outside of one."""
    index = torch.cuda.current_device() if device.index is None else device.index
    state = torch.Generator(device).manual_seed(torch.initial_seed()).graphsafe_get_state()
    torch.cuda.default_generators[index].graphsafe_set_state(state)


_rates: dict[torch.device, float] = {}


def _cycles_per_second(device: torch.device) -> float:
    if device not in _rates:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_CYCLES)
        start.record()
        torch.cuda._sleep(_CYCLES)
        end.record()
        torch.cuda.synchronize(device)
        _rates[device] = _CYCLES / (start.elapsed_time(end) * 1e-3)
    return _rates[device]


def take_turns(
    contenders: Mapping[str, Call],
    *,
    rounds: int,
    warm_up: int,
    device: torch.device,
    before: Callable[[str], object] | None = None,
    graphs: bool,
    iterations: int,
) -> Turns:
    """As `timing.take_turns`, each turn `iterations` calls, the device's time and the host's apart.

    What cannot be captured as a graph is timed by events, and a line says so.
    """
    timers: dict[str, Timer] = {}
    for name, call in contenders.items():
        prepare = None if before is None else lambda name=name: before(name)
        timers[name] = Timer(call, device, before=prepare, graphs=graphs, iterations=iterations)
        if timers[name].why_no_graph:
            print(f"timed by events: {name}: {timers[name].why_no_graph}")
    names = list(contenders)
    turns = Turns({name: [] for name in names}, {name: [] for name in names}, {n: t.how for n, t in timers.items()})
    for number in range(warm_up + rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            on_device, on_host = timers[name].turn()
            if number >= warm_up:
                turns.device[name].append(on_device)
                turns.host[name].append(on_host)
    return turns


def seconds_and_columns(
    contenders: Mapping[str, Call],
    *,
    rounds: int,
    warm_up: int,
    device: torch.device,
    before: Callable[[str], object] | None = None,
    graphs: bool,
    iterations: int,
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """What a benchmark compares contenders by, and further columns of their rows.

    On CUDA the device's seconds, with the host's as columns. Elsewhere the wall clock's, by `timing.take_turns`, and no
    columns.
    """
    if device.type != "cuda":
        own = {"rounds": rounds, "warm_up": warm_up, "device": device, "before": before}
        return timing.take_turns(contenders, **own), {name: {} for name in contenders}  # type: ignore[arg-type]
    turns = take_turns(
        contenders,
        rounds=rounds,
        warm_up=warm_up,
        device=device,
        before=before,
        graphs=graphs,
        iterations=iterations,
    )
    columns = {
        name: {
            "timed_by": turns.how[name],
            "iterations": iterations,
            **timing.columns("host_seconds", timing.spread(turns.host[name])),
        }
        for name in contenders
    }
    return turns.device, columns


def host_cell(row: Mapping[str, Any]) -> list[str]:
    """A row's host time in ms for a table, where it has one."""
    return [f"{row['host_seconds_p50'] * 1e3:.2f}"] if "host_seconds_p50" in row else []


def host_column(device: torch.device) -> list[str]:
    """The title of `host_cell`'s column."""
    return ["host ms"] if device.type == "cuda" else []


# What a profile shows of a range that was opened on the host, and not of a kernel.
_RANGES = ("ds_quant::", "aten::", "autograd::", "ProfilerStep", "Optimizer.", "## Call CompiledFxGraph", "Torch-")


def launches(call: Call, device: torch.device) -> dict[str, int]:
    """Kernels, copies and fills that one call launches, by name. On other devices: torch's operators that it calls."""
    if device.type != "cuda":
        with _Operators() as operators:
            call()
        return operators.found
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    return kernels_of(profile.events())


def kernels_of(events: Any) -> dict[str, int]:
    """Those events of a profile that ran on the device, by name."""
    found: dict[str, int] = {}
    for event in events:
        is_range = getattr(event, "is_user_annotation", False) or event.name.startswith(_RANGES)
        if event.device_type.name == "CUDA" and not is_range:
            found[event.name] = found.get(event.name, 0) + 1
    return found


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.found[name] = self.found.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.item")
"""Operators in which the host waits for what the device has computed."""


def host_waits(call: Call, device: torch.device) -> str:
    """What the host waits for within a call, the empty string for nothing.

    On CUDA the first wait that torch notices raises; on other devices operators are looked at.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return ""
    found = launches(call, device)
    return ", ".join(name for name in found if name.startswith(WAITS))
