"""Host time of quantized all-reduces of GPT-2 small's gradients on a GPU's way, without a GPU.

Tensors are on the meta device, ranks and what they send are torch's fake process group, and the compiled functions
return at once: what is left is what the host does in Python and to launch torch's own operations. Compiled calls are
counted, and one of a small function with as many tensors is timed: its guards, its wrapper and an operation on the CPU,
in place of a launch. Left out are copies to pinned memory. Times are the thread's, so that neighbours do not count.
torch.cat is C++ on CUDA and some hundred lines of Python for each tensor on meta: here it is C++ as well, of as many
tensors of one element on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from benchmarks.gpu_check.optimizer import gpt2_shapes
from ds_quant.cli.shared.errors import CommandError
from ds_quant.comm.exchange import Call
from ds_quant.comm.layout import Span
from ds_quant.comm.reducer import Reducer
from ds_quant.comm.statistics import Statistics
from ds_quant.config import GradientCommunicationConfig
from ds_quant.kernels import registry, wire
from ds_quant.kernels.compiling import compile_whole
from ds_quant.kernels.wire import compiled, places

HELP = "host time of all-reduces of GPT-2's gradients, with all work of a device left out"
SETTINGS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic"},
    "stochastic, error feedback": {"rounding": "stochastic", "error_feedback": True},
}
_NAME = "as on a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` is asked to do."""
    parser.add_argument("--ranks", type=int, default=8, help="of the process group that is not there (default: 8)")
    parser.add_argument("--bucket", type=float, default=5e8, help="elements of a bucket (default: 5e8, DeepSpeed's)")
    parser.add_argument("--rounds", type=int, default=50, help="all-reduces of all gradients (default: 50)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a line for each setting."""
    for name, value, least in (
        ("ranks", options.ranks, 2),
        ("bucket", options.bucket, 1),
        ("rounds", options.rounds, 1),
    ):
        if not value >= least:
            raise CommandError(f"--{name}: got {value}; allowed: {least} or more; correct it")
    call = compiled_call(options.rounds)
    for name, found in measure(options.ranks, options.bucket, options.rounds).items():
        total = found.milliseconds + found.compiled_calls * call
        print(
            f"{name}: {found.milliseconds:.2f} ms, and {found.compiled_calls} compiled calls of {call * 1e3:.0f} us: "
            f"{total:.2f} ms",
            flush=True,
        )


class HostTime(NamedTuple):
    """Of the all-reduces of all gradients."""

    milliseconds: float
    """Median, without compiled calls."""
    compiled_calls: int


def compiled_call(rounds: int) -> float:
    """Median milliseconds of a compiled call with the tensors of a sum over ranks, on the CPU."""
    tensors = [torch.zeros(2) for _ in range(12)]
    function = compile_whole(lambda *given: given[0] + given[-1], 8)
    milliseconds = []
    for _ in range(rounds + 3):
        begin = time.thread_time()
        function(*tensors)
        milliseconds.append((time.thread_time() - begin) * 1e3)
    return statistics.median(milliseconds[3:])  # the first ones compile


def measure(num_ranks: int, bucket: float, rounds: int) -> dict[str, HostTime]:
    """The host's time for all gradients, by the name of the setting."""
    buckets = [bucket_of(numels) for numels in cut(bucket)]
    with fake_group(num_ranks), without_device_work() as calls:
        return {name: _median(buckets, settings, rounds, calls) for name, settings in SETTINGS.items()}


@contextmanager
def fake_group(num_ranks: int) -> Iterator[None]:
    """Ranks that are not there, among which nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _median(
    buckets: list[tuple[Tensor, list[Span]]], settings: dict[str, Any], rounds: int, calls: list[Any]
) -> HostTime:
    all_reduce = all_reduces(buckets, settings)
    seconds = []
    for _ in range(rounds + 2):
        calls.clear()
        begin = time.thread_time()
        all_reduce()
        seconds.append(time.thread_time() - begin)
    return HostTime(statistics.median(seconds[2:]) * 1e3, len(calls))  # the first ones make layouts and fill pools


def all_reduces(buckets: list[tuple[Tensor, list[Span]]], settings: dict[str, Any]) -> Callable[[], None]:
    """All-reduces of all buckets, with the keys of another step in each call."""
    config = GradientCommunicationConfig.parse({"bits": 8, **settings})
    reducer = Reducer(config, statistics=Statistics(with_errors=False))
    steps = itertools.count()

    def call() -> None:
        step = next(steps)
        for number, (tensor, spans) in enumerate(buckets):
            reducer.all_reduce([tensor], spans, Call(1 / reducer.world_size, reducer.key(step, 0, number)))

    return call


def cut(bucket: float) -> Iterator[list[int]]:
    """The parameters' elements in buckets, as DeepSpeed fills them."""
    numels: list[int] = []
    for shape in gpt2_shapes():
        if numels and sum(numels) + torch.Size(shape).numel() > bucket:
            yield numels
            numels = []
        numels.append(torch.Size(shape).numel())
    yield numels


def bucket_of(numels: list[int]) -> tuple[Tensor, list[Span]]:
    """A bucket on the meta device, and where its parameters lie in it."""
    ends = np.cumsum(numels).tolist()
    spans = [
        Span(f"{len(numels)}.{number}", 0, 0, end - numel, numel)
        for number, (end, numel) in enumerate(zip(ends, numels, strict=True))
    ]
    return torch.empty(ends[-1], device="meta"), spans


@contextmanager
def without_device_work() -> Iterator[list[Any]]:
    """The compiled functions' ways, with nothing computed, copied or compiled; yields a list that takes their calls."""
    calls: list[Any] = []
    cat, element = torch.cat, torch.zeros(1)

    def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
        return torch.empty(numbers.shape, dtype=torch.int64, device=device)

    def cat_elements(tensors: Sequence[Tensor]) -> Tensor:
        cat([element] * len(tensors))
        return tensors[0].new_empty(sum(map(Tensor.numel, tensors)))

    with ExitStack() as stack:
        stack.callback(registry._serving.cache_clear)
        backends = [registry.Backend(_NAME, ("meta",)), *registry.BACKENDS]
        stack.enter_context(mock.patch.object(registry, "BACKENDS", backends))
        for operation in (wire.quantize, wire.reduce, wire.dequantize):
            ours = {_NAME: operation.implementations["compiled"]}
            stack.enter_context(mock.patch.dict(operation.implementations, ours))
        registry._serving.cache_clear()
        returns_at_once: dict[str, Any] = {"_compiled": lambda function, _: lambda *_: calls.append(function)}
        stack.enter_context(mock.patch.multiple(compiled, **returns_at_once, sent=sent))
        stack.enter_context(mock.patch.object(places, "sent", sent))
        stack.enter_context(mock.patch.object(torch, "cat", cat_elements))
        yield calls
