"""Measures lines of those tables again that are not of runs, and compares with their CSVs to the last digit.

Where they start from a model of the baseline, it is the one that `repeating` has trained again: nothing of the first
study is needed but its CSVs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

from studying import adapting, isolation, memory, plan, processors, repeating, results
from studying.comparing import Figure, report
from studying.plan import Key
from studying.results import Result
from studying.rows import BASELINE
from studying.training import Training

_OF_ARMS = ("loss", *isolation.QUANTIZERS, *isolation.MEASURES)
_OF_MEMORY = ("peak", *memory.ROLES, "sent")


def adapted(keys: Sequence[Key], first: Training) -> int:
    """From the same checkpoint: those of `keys` that the CSV has; 1 where a figure differs."""
    training, file = repeating.apart(first), adapting.path(first.csv)
    text = first.settings.text
    known = {key: one for key, one in adapting.read(file).items() if one.is_of(first.rows[key.row], text)}
    own = [key for key in keys if key in known]
    adapting.measure(own, training.rows, training.settings, training.csv)
    again, code = adapting.read(adapting.path(training.csv)), 0
    models = [results.read(first.csv), results.read(training.csv)]
    for key in own:
        before, now = known[key], again[key]
        of_seeds = [one for one in known.values() if repeating.of_one_row(one.key, key)]
        same_place = _is_same_place(key, models, before.processor, now.processor)
        figures = _figures(("continued", "after", "adapted"), before, now, of_seeds, same_place)
        code |= report(f"{plan.shown(key)} from the same checkpoint", figures)
    return code


def isolated(keys: Sequence[Key], first: Training) -> int:
    """Sharpness or outliers: one arm of each baseline among `keys`, drawn from those of the CSV; 1 if one differs."""
    training, code = repeating.apart(first), 0
    models = [results.read(first.csv), results.read(training.csv)]
    text = first.settings.text
    known = {of: one for of, one in isolation.read(isolation.path(first.csv)).items() if one.is_of(text)}
    for key in (key for key in keys if key.row == BASELINE):
        arms = [arm for of, arm in known if of == key]
        if not arms:
            continue
        arm = _drawn(arms)
        isolation.measure([key], training.rows, training.settings, training.csv, arms=[arm])
        before, now = known[key, arm], isolation.read(isolation.path(training.csv))[key, arm]
        of_seeds = [one for (of, name), one in known.items() if name == arm and repeating.of_one_row(of, key)]
        same_place = _is_same_place(key, models, before.processor, now.processor)
        code |= report(f"{plan.shown(key)}, {arm}", _figures(_OF_ARMS, before, now, of_seeds, same_place))
    return code


def in_memory(first: Training) -> int:
    """The memory of one job, drawn from those of the CSV; 1 where a figure differs."""
    cases, again = {case.name: case for case in memory.CASES}, repeating.apart(first).csv
    found = memory.read(memory.path(first.csv))
    known = {f"{one.family}, {one.size}, {one.case}": one for one in found if one.case in cases}
    if not known:
        return 0
    name = _drawn(known)
    before = known[name]
    memory.measure(before.size, before.family, first.rows, again, [cases[before.case]])
    now = next(
        one
        for one in memory.read(memory.path(again))
        if (one.size, one.family, one.case) == (before.size, before.family, before.case)
    )
    same_place = repeating.place(before) == repeating.place(now)
    # It has no seeds: elsewhere no limit is known.
    return report(f"memory of {name}", _figures(_OF_MEMORY, before, now, [before], same_place))


def _drawn(names: Iterable[str]) -> str:
    """One as good as drawn by lot, and the same for everybody."""
    return min(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def _figures(
    names: Sequence[str], before: object, now: object, of_seeds: Sequence[object], same_place: bool
) -> list[Figure]:
    return [
        Figure(name, getattr(before, name), getattr(now, name), [getattr(one, name) for one in of_seeds], same_place)
        for name in names
    ]


def _is_same_place(key: Key, models: Sequence[Mapping[Key, Result]], before: str, now: str) -> bool:
    """Whether the models of the baseline, and the figures on processors `before` and `now`, were made alike."""
    of = dataclasses.replace(key, row=BASELINE)
    one, other = (repeating.place(found[of]) for found in models)
    return one == other and processors.kind(before) == processors.kind(now)
