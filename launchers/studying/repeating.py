"""Trains runs of the CSV again, in a folder of their own, and compares with the CSV to the last digit.

`comparing` has what is allowed on another machine, `remeasuring` the tables that are not of runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from collecting.runs import DONE

from studying import adapting, comparing, other_domain, plan, post_training, processors, protocol, results
from studying.adapting import Adapted
from studying.comparing import Figure
from studying.memory import Measured
from studying.plan import Key
from studying.post_training import Evaluated
from studying.results import Result
from studying.rows import BASELINE, CONTROL, MATRIX, REPAIR, Row
from studying.training import Training


def drawn(
    rows: Mapping[str, Row],
    found: Iterable[Result],
    evaluated: Iterable[Evaluated],
    adapted: Iterable[Adapted],
    group: tuple[str, str, float, float],
    seeds: Sequence[int],
) -> list[str]:
    """One row of each table of a group (size, family, ratio, rate): the one whose fingerprint is the smallest.

    A fingerprint is a digest of the row's settings: as good as drawn by lot, and everybody draws the same.
    """

    def is_asked(key: Key) -> bool:
        return key.group == group and key.seed in seeds

    made = {
        result.key.row
        for result in found
        if is_asked(result.key) and result.fingerprint == plan.fingerprint(rows[result.key.row])
    }
    tables = [{name for name in made if rows[name].kind == kind} for kind in (CONTROL, MATRIX, REPAIR)]
    tables.append(made & {one.key.row for one in evaluated if is_asked(one.key)})
    tables.append(
        made
        & {
            one.key.row
            for one in adapted
            if is_asked(one.key) and one.fingerprint == adapting.fingerprint(rows[one.key.row])
        }
    )
    names = [
        min(table, key=lambda name: plan.fingerprint(rows[name])) for part in tables if (table := part - {BASELINE})
    ]
    return list(dict.fromkeys(names))


def drawn_at_another_rate(
    rows: Mapping[str, Row], found: Iterable[Result], group: tuple[str, str, float, float], seeds: Sequence[int]
) -> tuple[str, float] | None:
    """One row of the table of other rates and its scale of the tuned rate, the group's; None where there is no row.

    Drawn as in `drawn`; of a row at several rates, the lowest.
    """
    *_, tuned = group
    made = {
        (result.fingerprint, scale, result.key.row)
        for result in found
        for scale in protocol.SCALES
        if scale != 1
        and result.key.group == (*group[:-1], scale * tuned)
        and result.key.seed in seeds
        and result.key.row != BASELINE
        and result.fingerprint == plan.fingerprint(rows[result.key.row])
    }
    if not made:
        return None
    _, scale, row = min(made)
    return row, scale


def apart(training: Training) -> Training:
    """The same, with runs and a CSV of its own."""
    settings = dataclasses.replace(training.settings, runs=training.settings.runs / plan.AGAIN)
    return dataclasses.replace(training, settings=settings, csv=settings.runs / "runs.csv")


def repeat(keys: Sequence[Key], first: Training, text: Path | None) -> int:
    """Train `keys` again, evaluate them on `text` as the CSV's were, print each figure beside that of the CSV.

    Returns 1 where a run failed, or a figure is neither the same nor within its limits.
    """
    training = apart(first)
    old = [key for key in keys if key not in training.missing(keys)]
    if old:
        print(
            f"{len(old)} of {len(keys)} were repeated before; remove {training.settings.runs} to train them once more"
        )
    failed = training.run(keys)
    if failed:
        for key in failed:
            print(f"not done: {plan.shown(key)}")
        return 1
    known, evaluated = results.read(first.csv), post_training.read(post_training.path(first.csv))
    if text is not None:
        other_domain.measure(keys, training.rows, training.settings, training.csv, text)
        models = [key for key in keys if key in evaluated and evaluated[key].text == training.settings.text]
        post_training.measure(models, training.rows, training.settings, training.csv, text)
    again, put_in = results.read(training.csv), post_training.read(post_training.path(training.csv))
    code = 0
    for key in keys:
        before, now = known[key], again[key]
        if place(before) != place(now):
            print(f"{plan.shown(key)}: in the CSV of {place(before)}; here {place(now)}")
        of_row = [r for r in known.values() if of_one_row(r.key, key) and r.state == DONE]
        figures = _of_run(before, now, of_row, with_other_domain=text is not None)
        if key in evaluated and key in put_in:
            own = [one for one in evaluated.values() if of_one_row(one.key, key)]
            figures += _of_quantizers(evaluated[key], put_in[key], own, place(before) == place(now))
        code |= comparing.report(plan.shown(key), figures)
    return code


def _of_run(before: Result, now: Result, of_row: Sequence[Result], *, with_other_domain: bool) -> list[Figure]:
    pairs = {"loss": (before.loss, now.loss, [r.loss for r in of_row])}
    # What the CSV does not have yet cannot be compared.
    if with_other_domain and not math.isnan(before.other_loss):
        pairs["held-out domain"] = (before.other_loss, now.other_loss, [r.other_loss for r in of_row])
    alike = (before.steps, before.state) == (now.steps, now.state)
    return [Figure(what, *pair, place(before) == place(now), alike) for what, pair in pairs.items()]


def _of_quantizers(before: Evaluated, now: Evaluated, own: Sequence[Evaluated], same_place: bool) -> list[Figure]:
    pairs = {
        "quantized after training": (before.loss, now.loss, [one.loss for one in own]),
        "without its quantizers": (before.without, now.without, [one.without for one in own]),
    }
    return [Figure(what, *pair, same_place) for what, pair in pairs.items() if not math.isnan(pair[0])]


def of_one_row(key: Key, of: Key) -> bool:
    """Whether two keys are of one row, and differ in no more than the seed."""
    return dataclasses.replace(key, seed=of.seed) == of


def place(one: Result | Measured) -> str:
    """Processor and versions, on which the last digit depends."""
    return f"{processors.kind(one.processor)}, torch {one.torch}, DeepSpeed {one.deepspeed}"
