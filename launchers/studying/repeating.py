"""Trains runs of the CSV again, in a folder of their own, and compares with the CSV to the last digit.

On the same kind of processor with the same versions every figure is to be the same. Elsewhere sums are rounded
otherwise, and what becomes of a rounding in hundreds of steps is not known; it is no more than what other initial
weights and another order of the text do. So the limit there is the 95% interval of one more seed, from the seeds that
the CSV has: t * deviation * sqrt(1 + 1 / n) to either side of the figure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from collecting.runs import DONE

from ds_quant.cli.shared.spreads import Spread, t_quantile
from studying import other_domain, plan, post_training, processors, results
from studying.plan import Key
from studying.post_training import Evaluated
from studying.results import Result
from studying.rows import BASELINE, CONTROL, MATRIX, REPAIR, Row
from studying.training import Training

SAME, OTHER, WITHIN, OUTSIDE, UNKNOWN = "same", "OTHER", "within limits", "OUTSIDE", "no limit known"
FOLDER = "again"


def drawn(
    rows: Mapping[str, Row],
    found: Iterable[Result],
    evaluated: Iterable[Evaluated],
    group: tuple[str, str, float, float],
    seeds: Sequence[int],
) -> list[str]:
    """One row of each table of a group (size, family, ratio, rate): the one whose fingerprint is the smallest.

    A fingerprint is a digest of the row's settings: as good as drawn by lot, and everybody draws the same.
    """
    made = {
        result.key.row
        for result in found
        if (result.key.size, result.key.family, result.key.ratio, result.key.rate) == group
        and result.key.seed in seeds
        and result.fingerprint == plan.fingerprint(rows[result.key.row])
    }
    put_in = {
        one.key.row
        for one in evaluated
        if (one.key.size, one.key.family, one.key.ratio, one.key.rate) == group and one.key.seed in seeds
    }
    tables = [{name for name in made if rows[name].kind == kind} for kind in (CONTROL, MATRIX, REPAIR)]
    tables.append(made & put_in)
    names = [
        min(table, key=lambda name: plan.fingerprint(rows[name])) for part in tables if (table := part - {BASELINE})
    ]
    return list(dict.fromkeys(names))


def repeat(keys: Sequence[Key], first: Training, text: Path | None) -> int:
    """Train `keys` again, evaluate them on `text` as the CSV's were, print each figure beside that of the CSV.

    Returns 1 where a run failed, or a figure is neither the same nor within its limits.
    """
    settings = dataclasses.replace(first.settings, runs=first.settings.runs / FOLDER)
    training = dataclasses.replace(first, settings=settings, csv=settings.runs / "runs.csv")
    old = [key for key in keys if key not in training.missing(keys)]
    if old:
        print(f"{len(old)} of {len(keys)} were repeated before; remove {settings.runs} to train them once more")
    failed = training.run(keys)
    if failed:
        for key in failed:
            print(f"not done: {plan.shown(key)}")
        return 1
    known, evaluated = results.read(first.csv), post_training.read(post_training.path(first.csv))
    if text is not None:
        other_domain.measure(keys, training.rows, settings, training.csv, text)
        models = [key for key in keys if key in evaluated and evaluated[key].text == settings.text]
        post_training.measure(models, training.rows, settings, training.csv, text)
    again, put_in = results.read(training.csv), post_training.read(post_training.path(training.csv))
    code = 0
    for key in keys:
        there = place(known[key]) == place(again[key])
        if not there:
            print(f"{plan.shown(key)}: in the CSV of {place(known[key])}; here {place(again[key])}")
        of_row = [r for r in known.values() if dataclasses.replace(r.key, seed=key.seed) == key and r.state == DONE]
        pairs = [("loss", known[key].loss, again[key].loss, [r.loss for r in of_row])]
        # What the CSV does not have yet cannot be compared.
        if text is not None and not math.isnan(known[key].other_loss):
            others = [r.other_loss for r in of_row]
            pairs.append(("held-out domain", known[key].other_loss, again[key].other_loss, others))
        if key in evaluated and key in put_in:
            of_row_after = [e.loss for e in evaluated.values() if dataclasses.replace(e.key, seed=key.seed) == key]
            pairs.append(("quantized after training", evaluated[key].loss, put_in[key].loss, of_row_after))
        for what, before, now, of_seeds in pairs:
            same = _is_same(known[key], again[key]) and repr(before) == repr(now)
            word = SAME if same else OTHER if there else judged(now - before, of_seeds)
            code = 1 if word in (OTHER, OUTSIDE) else code
            print(f"{word}: {plan.shown(key)}: {what} {before!r}, again {now!r}{_difference(before, now, of_seeds)}")
    return code


def place(result: Result) -> str:
    """Processor and versions, on which the last digit depends."""
    return f"{processors.kind(result.processor)}, torch {result.torch}, DeepSpeed {result.deepspeed}"


def limit(of_seeds: Sequence[float]) -> float | None:
    """How far one more run of a row is from another figure of it, at 95%; None with fewer than 2 seeds."""
    known = [value for value in of_seeds if math.isfinite(value)]
    deviation = Spread.of(known).deviation
    if deviation is None:
        return None
    return t_quantile(len(known) - 1) * deviation * math.sqrt(1 + 1 / len(known))


def judged(difference: float, of_seeds: Sequence[float]) -> str:
    """Of a figure from another kind of processor. NaN, of a run that diverged in one place alone, is outside."""
    allowed = limit(of_seeds)
    if allowed is None and math.isfinite(difference):
        return UNKNOWN
    return WITHIN if allowed is not None and abs(difference) <= allowed else OUTSIDE


def _is_same(one: Result, other: Result) -> bool:
    """Whether they are the same experiment, and ended in the same way."""
    told = [(r.fingerprint, r.text, r.dtype, r.steps, r.state) for r in (one, other)]
    return told[0] == told[1]


def _difference(before: float, now: float, of_seeds: Sequence[float]) -> str:
    if repr(before) == repr(now):
        return ""
    allowed = limit(of_seeds)
    words = "one seed tells no limit" if allowed is None else f"{allowed:.4f} is to be expected of another seed"
    return f"; differs by {now - before:+.2e}, and {words}"
