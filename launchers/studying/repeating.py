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
    settings = dataclasses.replace(first.settings, runs=first.settings.runs / plan.AGAIN)
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
        before, now = known[key], again[key]
        of_row = [r for r in known.values() if _is_of(r.key, key) and r.state == DONE]
        compared = [("loss", before.loss, now.loss, [r.loss for r in of_row])]
        # What the CSV does not have yet cannot be compared.
        if text is not None and not math.isnan(before.other_loss):
            compared.append(("held-out domain", before.other_loss, now.other_loss, [r.other_loss for r in of_row]))
        if key in evaluated and key in put_in:
            of_seeds = [one.loss for one in evaluated.values() if _is_of(one.key, key)]
            compared.append(("quantized after training", evaluated[key].loss, put_in[key].loss, of_seeds))
        if place(before) != place(now):
            print(f"{plan.shown(key)}: in the CSV of {place(before)}; here {place(now)}")
        for what, one, other, of_seeds in compared:
            word = _word(before, now, one, other, of_seeds)
            code = 1 if word in (OTHER, OUTSIDE) else code
            print(f"{word}: {plan.shown(key)}: {what} {one!r}, again {other!r}{_difference(one, other, of_seeds)}")
    return code


def _word(before: Result, now: Result, one: float, other: float, of_seeds: Sequence[float]) -> str:
    """What is to be said of the figures `one` and `other` of two runs."""
    alike = (before.steps, before.state) == (now.steps, now.state)
    if alike and repr(one) == repr(other):
        return SAME
    if place(before) == place(now):
        return OTHER
    return judged(other - one, of_seeds) if before.state == now.state else OUTSIDE


def _is_of(key: Key, of: Key) -> bool:
    """Whether two keys are of one row, and differ in no more than the seed."""
    return dataclasses.replace(key, seed=of.seed) == of


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


def _difference(before: float, now: float, of_seeds: Sequence[float]) -> str:
    if repr(before) == repr(now):
        return ""
    allowed = limit(of_seeds)
    words = "one seed tells no limit" if allowed is None else f"{allowed:.4f} is to be expected of another seed"
    return f"; differs by {now - before:+.2e}, and {words}"
