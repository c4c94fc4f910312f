"""Step 7: training steps of GPT-2 small and of blocks of 2048 and 4096 features, beside bf16 and torchao.

What promises are about comes first; what the step's time does not suffice for is named.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import step_contenders, step_models
from benchmarks.device_timing import Timer, synchronize
from benchmarks.gpu_check import environment
from benchmarks.gpu_check.recording import Record
from benchmarks.step_contenders import BASE, Contender
from ds_quant.cli.shared import process_memory

_BF16, _OURS = f"{BASE}, compiled", "ds_quant W8A8G8, compiled"
_FIRST = (_BF16, _OURS)
_EAGER = (BASE, "ds_quant W8A8G8", "ds_quant W8A8G8, stochastic G", "ds_quant W8A8")
_PEERS = (
    "torchao int8, compiled",
    "torchao float8 tensorwise, compiled",
    "torchao float8 rowwise, compiled",
    "ds_quant W8A8, compiled",
)
_RESERVE = 25
"""Seconds that a contender may take: none begins with less of the step's time left."""
_STEPS = 10
_ROUNDS = 3


class Job(NamedTuple):
    """Contenders that train one model on so many tokens."""

    model: str
    sequences: int
    length: int
    names: tuple[str, ...]


_JOBS = (
    Job("block-4096", 4, 2048, _FIRST),
    Job("block-2048", 4, 2048, _FIRST),
    Job("gpt2", 8, 1024, (*_FIRST, *_EAGER)),
    Job("block-4096", 4, 2048, (*_EAGER, *_PEERS)),
    Job("block-2048", 4, 2048, (*_EAGER, *_PEERS)),
    Job("gpt2", 8, 1024, _PEERS),
    *(Job(model, n, 2048, _FIRST) for n in (1, 8) for model in ("block-4096", "block-2048")),
    *(Job("gpt2", n, 1024, _FIRST) for n in (2, 16)),
)
_SMALL_JOBS = (
    Job("tiny-llama", 1, 16, (*_FIRST, BASE, "ds_quant W8A8G8", "torchao int8, compiled")),
    Job("tiny-gpt2", 1, 16, ("ds_quant W8A8",)),
)
_PROMISED = {"block-2048": ("block_2048",), "block-4096": ("block_4096",), "tiny-llama": ("block_2048", "block_4096")}


def run(record: Record) -> None:
    """Every job that there is time for."""
    # Each way to train is a compilation of the same code: the usual limit would end some of them in eager mode.
    torch._dynamo.config.recompile_limit = 64
    contenders = {each.name: each for each in step_contenders.contenders("int8", record.device)}
    seconds: dict[tuple[str, int, str], float] = {}
    for job in record.pick(_JOBS, _SMALL_JOBS):
        model = step_models.build(job.model, dropout=0.0, device=record.device)
        for name in job.names:
            line = {"model": job.model, "tokens": job.sequences * job.length, "what": name}
            if record.device.type == "cuda" and time.monotonic() > record.end - _RESERVE:
                record.row("not measured for want of time", **line)
                continue
            needs = contenders[name].needs
            if needs and not environment.installed(needs):
                record.row("training steps", **line, note="not installed")
                continue
            key = (job.model, job.sequences * job.length)
            with record.part(f"{job.model}, {name}"):
                seconds[*key, name] = _measure(record, model, contenders[name], job, line, seconds.get((*key, _BF16)))
            if record.device.type == "cuda":
                torch.cuda.empty_cache()
        key = (job.model, job.sequences * job.length)
        bf16, ours = (seconds.get((*key, name)) for name in _FIRST)
        if bf16 and ours:
            for measure in _PROMISED.get(job.model, ()):
                if measure not in record.content["measures"]:
                    record.measure(measure, bf16 / ours)


def _measure(
    record: Record, model: nn.Module, contender: Contender, job: Job, line: dict[str, object], base: float | None
) -> float:
    """Seconds of a step in a row of them, which is what training takes."""
    begin = time.perf_counter()
    batch = _batch(model, job, record.device)
    step = contender.make(model, batch, with_optimizer=False, backend=record.pick("inductor", "eager"))
    for _ in range(2):
        step.clear()
        step.run()
    synchronize(record.device)
    first = time.perf_counter() - begin
    number = record.pick(_STEPS, 1)
    begin = time.perf_counter()
    for _ in range(number):
        step.clear()
        step.run()
    synchronize(record.device)
    pace = (time.perf_counter() - begin) / number
    timed = Timer(step.run, record.device, before=step.clear, graphs=False).measure(record.pick(_ROUNDS, 1))
    step.clear()
    peak = process_memory.peak_bytes(step.run, record.device)
    record.row(
        "training steps",
        **line,
        ms=pace * 1e3,
        speed_up=None if base is None else base / pace,
        device_ms=timed.device * 1e3,
        host_ms=timed.host * 1e3,
        peak_mb=None if peak is None else peak / 1e6,
        first_steps_s=first,
    )
    return pace


def _batch(model: nn.Module, job: Job, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    return torch.randint(vocabulary, (job.sequences, job.length), generator=generator).to(device)
