"""The committed CSV: a line a run that has ended, and what it says about the run."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from collecting import files, runs

from ds_quant.base.whole_folder import write_whole
from ds_quant.cli.shared.errors import CommandError
from studying import plan, protocol
from studying.plan import ROOT, Key, Settings
from studying.rows import BASELINE, Row

T = TypeVar("T")

PATH = ROOT / "docs" / "results" / "study" / "runs.csv"


@dataclass(frozen=True)
class Result:
    """How one run ended. Losses in nats a token; NaN where a loss was NaN, Inf or was not measured."""

    key: Key
    fingerprint: str
    """`plan.fingerprint` of the row."""
    text: str
    """`plan.Settings.text`."""
    parameters: int
    steps: int
    tokens: int
    state: str
    """`done`, or `diverged` where the run ended itself or rose as `protocol.has_diverged` says."""
    loss: float
    """Of the held-out split, at the end."""
    lowest: float
    """The lowest on the way there."""
    other_loss: float
    """Of the held-out domain."""
    dtype: str
    processor: str
    """Its kind; `processors.kind` reads older lines, too."""
    torch: str
    deepspeed: str
    commit: str
    date: str


KEY_COLUMNS = [field.name for field in dataclasses.fields(Key)]
_REST = [field.name for field in dataclasses.fields(Result) if field.name != "key"]
COLUMNS = (*KEY_COLUMNS, *_REST)


def read(path: Path) -> dict[Key, Result]:
    """The results of a CSV that `write` wrote; none where there is no file. Raises CommandError for another file."""
    return {result.key: result for result in read_lines(path, COLUMNS, _result)}


def write(path: Path, results: Iterable[Result]) -> None:
    """All of them, sorted, so that a diff shows what is new."""
    ordered = sorted(results, key=lambda result: dataclasses.astuple(result.key))
    write_lines(path, COLUMNS, [{**dataclasses.asdict(one.key), **dataclasses.asdict(one)} for one in ordered])


def read_lines(path: Path, columns: Sequence[str], made: Callable[[Mapping[str, str]], T]) -> list[T]:
    """What `made` makes of each line; none where there is no file. Raises CommandError for a file of other columns."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != tuple(columns):
                raise ValueError(f"columns {', '.join(reader.fieldnames or ())}")
            return [made(line) for line in reader]
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(
            f"results: got {path} ({error}); allowed: a CSV that launchers/study.py wrote; restore it"
        ) from error


def write_lines(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """A whole CSV, or the one before stays."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for line in lines:
        # repr of a float reads back as the same number.
        writer.writerow([repr(value) if isinstance(value, float) else value for value in map(line.get, columns)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue())


def keep(path: Path, result: Result) -> None:
    """Add it to the CSV, in place of an earlier one of the same run."""
    write(path, {**read(path), result.key: result}.values())


def of_run(key: Key, row: Row, settings: Settings, where: Mapping[str, Any]) -> Result | None:
    """What the folder of a run says; None while the run has not ended.

    `where` has processor, torch, deepspeed, commit and date.
    """
    folder = plan.folder(key, row, settings)
    if not runs.is_run(folder):
        return None
    run, _ = runs.read(folder, folder.parent, now=math.inf, stale_after=0.0)
    if run.state not in (runs.DONE, runs.DIVERGED):
        return None
    size = protocol.SIZES[key.size]
    steps = run.steps or 0
    loss, lowest = _number(run.final_eval_loss), _number(run.best_eval_loss)
    # None where a run ended itself.
    summary = files.read_summary(folder / "summary.json")[0] or {}
    planned = size.parameters(key.family, settings.index.vocab_size)
    parameters = summary["model"]["num_parameters"] if summary else planned
    diverged = run.state == runs.DIVERGED or protocol.has_diverged(loss, lowest)
    return Result(
        key=key,
        fingerprint=plan.fingerprint(row),
        text=settings.text,
        parameters=parameters,
        steps=steps,
        tokens=steps * size.tokens_per_step,
        state=runs.DIVERGED if diverged else runs.DONE,
        loss=loss,
        lowest=lowest,
        other_loss=math.nan,
        dtype=settings.dtype,
        # Of a cluster, the run's own machine.
        processor=str(summary.get("processor", where["processor"])),
        **{name: str(where[name]) for name in ("torch", "deepspeed", "commit", "date")},
    )


def key_of(line: Mapping[str, str]) -> Key:
    """The run that a line of a CSV is about. Raises ValueError."""
    return Key(
        size=line["size"],
        family=line["family"],
        ratio=float(line["ratio"]),
        rate=float(line["rate"]),
        row=line["row"],
        seed=int(line["seed"]),
    )


def _result(line: Mapping[str, str]) -> Result:
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Result)}
    convert = {"int": int, "float": float, "str": str}
    return Result(key=key_of(line), **{name: convert[kinds[name]](line[name]) for name in _REST})


def _number(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def best_rate(found: Iterable[Result], size: str, family: str, ratio: float) -> float | None:
    """The learning rate with which the baseline of seed 0 ended lowest; None without such runs."""
    losses = _tuning_losses(found, size, family, ratio)
    return min(losses, key=lambda rate: (losses[rate], rate)) if losses else None


def tuned_rate(found: Sequence[Result], size: str, family: str, ratio: float) -> float | None:
    """The best one, once half and double of it were run, too; None before."""
    losses = _tuning_losses(found, size, family, ratio)
    best = best_rate(found, size, family, ratio)
    return best if best is not None and {best / 2, best * 2} <= losses.keys() else None


def _tuning_losses(found: Iterable[Result], size: str, family: str, ratio: float) -> dict[float, float]:
    """By rate. A run that diverged ended nowhere."""
    return {
        result.key.rate: result.loss if result.state == runs.DONE else math.inf
        for result in found
        if (result.key.size, result.key.family, result.key.ratio) == (size, family, ratio)
        and (result.key.row, result.key.seed) == (BASELINE, 0)
    }
