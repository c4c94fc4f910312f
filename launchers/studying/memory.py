"""What quantized gradients save in measured memory: whole training steps, the peak of each kind of memory.

The steps are real, of `ds_quant diagnose memory`: two to warm up, then the one that counts, in bf16 with fp32 masters
at ZeRO stage 1. Three things are called quantized gradients, so all are measured: the paper's, simulated, which rounds
the gradient of an output for a product; integers, which layers multiply in int8; and gradients of weights that are
sent, on two ranks. A bucket of DeepSpeed's is as large as the model here: its own size of half a billion elements hides
what a small model takes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeping.paper import FOLDER

from ds_quant.cli.shared.tables import markdown_table
from studying import processors, protocol, results
from studying.rows import BASELINE, Row

ROLES = ("weights", "masters", "moments", "gradients", "activations", "communication", "temporaries")
_TOLD = ("processor", "torch", "deepspeed", "commit", "date")
TIMEOUT = 900.0


@dataclass(frozen=True)
class Case:
    """One job."""

    name: str
    what: str
    ranks: int
    of: str
    """The case that it is held against; empty: nothing."""
    row: str = ""
    """Of the study."""
    file: str = ""
    """Or one of ds_configs."""


CASES = (
    Case(BASELINE, "full precision", 1, "", row=BASELINE),
    Case("g8_token", "output gradients in 8 bits, simulated", 1, BASELINE, row="g8_token"),
    Case("g4_token", "output gradients in 4 bits, simulated", 1, BASELINE, row="g4_token"),
    Case("w8a8_int8", "W, A in int8", 1, BASELINE, file="w8a8_int8.json"),
    Case("w8a8g8_int8", "W, A, G in int8", 1, "w8a8_int8", file="w8a8g8_int8.json"),
    Case("baseline_2", "full precision", 2, "", row=BASELINE),
    Case("sent_8", "gradients sent in 8 bits", 2, "baseline_2", file="comm8.json"),
    Case("sent_4", "gradients sent in 4 bits", 2, "baseline_2", file="comm4.json"),
)


@dataclass(frozen=True)
class Measured:
    """One case at one size: bytes of the rank that took most."""

    size: str
    family: str
    case: str
    ranks: int
    parameters: int
    tokens: int
    """Of a rank in a step."""
    peak: int
    """Of all memory, as torch's allocator counts it."""
    weights: int
    masters: int
    moments: int
    gradients: int
    activations: int
    communication: int
    temporaries: int
    """The most of each at any time, which need not be at the same time."""
    sent: int
    """By a rank in a step."""
    processor: str
    torch: str
    deepspeed: str
    commit: str
    date: str


COLUMNS = tuple(field.name for field in dataclasses.fields(Measured))


def path(csv: Path) -> Path:
    """Where this is kept, beside the runs in `csv`."""
    return csv.with_name("memory.csv")


def read(path: Path) -> list[Measured]:
    """What is known; nothing where there is no file. Raises CommandError for another file."""
    return results.read_lines(path, COLUMNS, _of_line)


def measure(size: str, family: str, rows: Mapping[str, Row], csv: Path, cases: Sequence[Case] = CASES) -> None:
    """Measure all cases anew and keep them in place of those of the same size and family. Raises CommandError."""
    from ds_quant.cli.diagnosing import memory

    where = processors.where("cpu")
    found: list[Measured] = []
    for ranks in sorted({case.ranks for case in cases}):
        own = [case for case in cases if case.ranks == ranks]
        jobs = [memory.Case(size, case.name, 1, job(case, size, family, rows)) for case in own]
        for case, row in zip(own, memory.measure(jobs, TIMEOUT), strict=True):
            told = {name: str(where[name]) for name in _TOLD}
            tokens = protocol.SIZES[size].micro_batch * protocol.SIZES[size].context_length
            values: dict[str, Any] = {**{role: row["role_peaks"][role] for role in ROLES}, **told}
            one = Measured(
                size=size,
                family=family,
                case=case.name,
                ranks=ranks,
                parameters=row["parameters"],
                tokens=tokens,
                peak=row["peak_bytes"],
                sent=max(row["wire_bytes"]),
                **values,
            )
            found.append(one)
            print(f"{case.name}: {one.peak:,} bytes at the peak, {one.gradients:,} of gradients")
    others = [one for one in read(path(csv)) if (one.size, one.family) != (size, family)]
    results.write_lines(path(csv), COLUMNS, [vars(one) for one in (*others, *found)])


def job(case: Case, size: str, family: str, rows: Mapping[str, Row]) -> Any:
    """The `planning.job.Job` of a case."""
    from ds_quant.planning.configs import job_config
    from ds_quant.planning.job import Job
    from ds_quant.planning.models import resolve_model

    shape = protocol.SIZES[size]
    text = rows[case.row].config if case.row else (FOLDER / case.file).read_text(encoding="utf-8")
    config = job_config(json.loads(text), world_size=case.ranks, rows=shape.micro_batch)
    config["zero_optimization"]["reduce_bucket_size"] = shape.parameters(family, protocol.VOCABULARY)
    described = {"model_type": family, "vocab_size": protocol.VOCABULARY, **shape.overrides(family)}
    described |= {"n_positions" if family == "gpt2" else "max_position_embeddings": shape.context_length}
    # True and False as JSON has them.
    words = ",".join(f"{name}={str(value).lower()}" for name, value in described.items())
    model, length = resolve_model(words, length=shape.context_length)
    return Job(config, model, shape.micro_batch, length, case.ranks)


def table(found: Sequence[Measured]) -> list[str]:
    """Peaks of each kind of memory, for each size and family; nothing without figures."""
    lines: list[str] = ["### Memory", ""] if found else []
    for size, family in dict.fromkeys((one.size, one.family) for one in found):
        own = {one.case: one for one in found if (one.size, one.family) == (size, family)}
        one = next(iter(own.values()))
        title = f"**What quantized gradients save in memory**: {family}, {size}, {one.parameters:,} parameters"
        step = f"{one.tokens:,} tokens a rank and step, bf16 with fp32 masters, ZeRO 1"
        how = f"{one.date}; {one.processor}; torch {one.torch}, DeepSpeed {one.deepspeed}"
        what = "the most of each at any time, in MB; in brackets less what it is held against"
        lines += [f"{title}, {step}: {what} ({how}).", ""]
        cells = []
        for case in CASES:
            if case.name in own:
                before = own.get(case.of)
                parts = ("peak", "gradients", "activations", "communication", "temporaries", "sent")
                figures = [_cell(own[case.name], before, part) for part in parts]
                cells.append([case.name, case.what, case.of, str(case.ranks), *figures])
        header = ["job", "", "held against", "ranks", "all, at its peak", "gradients", "activations", "communication"]
        lines += [*markdown_table([*header, "temporaries", "sent in a step"], cells), ""]
    return lines


def _cell(one: Measured, before: Measured | None, part: str) -> str:
    value = int(getattr(one, part))
    if before is None:
        return f"{value / 1e6:.2f}"
    return f"{value / 1e6:.2f} ({(value - int(getattr(before, part))) / 1e6:+.2f})"


def _of_line(line: Mapping[str, str]) -> Measured:
    words = ("size", "family", "case", *_TOLD)
    values: dict[str, Any] = {name: line[name] if name in words else int(line[name]) for name in COLUMNS}
    return Measured(**values)
