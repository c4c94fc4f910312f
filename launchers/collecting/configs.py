"""What the seeds of a config say together: means, standard deviations, and the gap to a baseline."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from collecting.runs import DONE, STATES, Run

# Student's t with 1, 2, ... 30 degrees of freedom: 95% of it lies between minus this and plus this.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (with n - 1) of n figures; None where there are too few for it."""

    mean: float | None
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        known = [value for value in values if value is not None]
        return cls(
            statistics.fmean(known) if known else None,
            statistics.stdev(known) if len(known) > 1 else None,
        )


@dataclass(frozen=True)
class Gap:
    """Final validation loss less the baseline's with the same seed, in nats a token, over `num_pairs` seeds."""

    num_pairs: int
    mean: float
    half_width: float | None
    """The 95% confidence interval is mean - half_width to mean + half_width; None with one pair."""

    @classmethod
    def of(cls, differences: Sequence[float]) -> Gap | None:
        if not differences:
            return None
        spread, count = Spread.of(differences), len(differences)
        assert spread.mean is not None
        if spread.deviation is None:
            return cls(count, spread.mean, None)
        return cls(count, spread.mean, t_quantile(count - 1) * spread.deviation / math.sqrt(count))


@dataclass(frozen=True)
class Config:
    """One config. Figures are those of its runs that are done."""

    name: str
    states: dict[str, int]
    """Number of runs by state, without the states that no run is in."""
    final: Spread
    """Final validation loss, nats a token."""
    best: Spread
    """Lowest validation loss, nats a token."""
    gap: Gap | None
    """None for the baseline itself, and without a seed in common."""
    tokens_per_second: float | None


def t_quantile(degrees: int) -> float:
    """Half the width, in standard errors, of a two-sided 95% interval of Student's t; exact to 0.001."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    # The normal quantile alone is 4% too small here; these are the first two terms of what is left, in 1 / degrees.
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def summarize(runs: Sequence[Run], baseline: str) -> list[Config]:
    """All configs: the baseline first, then by name."""
    found = {run.config for run in runs}
    base = _by_seed(runs, baseline)
    configs = []
    for name in sorted(found, key=lambda name: (name != baseline, name)):
        own = _by_seed(runs, name)
        done = [*own.values(), *(run for run in runs if _counts(run, name) and run.seed is None)]
        pairs = [] if name == baseline else sorted(own.keys() & base.keys())
        counts = Counter(run.state for run in runs if run.config == name)
        configs.append(
            Config(
                name=name,
                states={state: counts[state] for state in STATES if counts[state]},
                final=Spread.of(run.final_eval_loss for run in done),
                best=Spread.of(run.best_eval_loss for run in done),
                gap=Gap.of([_final(own[seed]) - _final(base[seed]) for seed in pairs]),
                tokens_per_second=Spread.of(run.tokens_per_second for run in done).mean,
            )
        )
    return configs


def contradictions(runs: Sequence[Run], baseline: str) -> list[str]:
    """Lines on what makes the means of `summarize` doubtful."""
    lines = []
    base = _by_seed(runs, baseline)
    if not base:
        lines.append(f"no gaps to {baseline}: no run of it is done and has a known seed")
    for name in sorted({run.config for run in runs}):
        own = _by_seed(runs, name)
        for run in runs:
            if _counts(run, name) and run.seed is not None and run is not own[run.seed]:
                lines.append(
                    f"{run.folder}: {own[run.seed].folder} is {name} with seed {run.seed} too; means take that one only"
                )
        lengths = sorted({run.steps for run in [*own.values(), *base.values()] if run.steps is not None})
        if own and len(lengths) > 1:
            whose = "its runs" if name == baseline else f"its runs and those of {baseline}"
            lines.append(f"{name}: {whose} took different numbers of steps: {', '.join(map(str, lengths))}")
    return lines


def _by_seed(runs: Iterable[Run], config: str) -> dict[int, Run]:
    """The runs of `config` that are done, the first of each seed that is known."""
    found: dict[int, Run] = {}
    for run in runs:
        if _counts(run, config) and run.seed is not None:
            found.setdefault(run.seed, run)
    return found


def _counts(run: Run, config: str) -> bool:
    return run.config == config and run.state == DONE


def _final(run: Run) -> float:
    # That is what done means.
    assert run.final_eval_loss is not None
    return run.final_eval_loss
