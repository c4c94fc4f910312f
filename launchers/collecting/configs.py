"""Statistics of a config over its seeds: means, standard deviations, and the gap to a baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from collecting.runs import DONE, STATES, Run
from ds_quant.cli.shared.spreads import Gap, Spread, t_quantile

__all__ = ["Config", "Gap", "Spread", "contradictions", "summarize", "t_quantile"]


@dataclass(frozen=True)
class Config:
    """One config. The figures are over its runs that are done."""

    name: str
    states: dict[str, int]
    """Number of runs by state, without states that have none."""
    final: Spread
    """Final validation loss, in nats per token."""
    best: Spread
    """Lowest validation loss, in nats per token."""
    gap: Gap | None
    """None for the baseline itself, and if there is no common seed."""
    tokens_per_second: float | None


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
    """Warnings about data that make the means of `summarize` doubtful, one per line."""
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
    """The runs of `config` that are done: the first for each known seed."""
    found: dict[int, Run] = {}
    for run in runs:
        if _counts(run, config) and run.seed is not None:
            found.setdefault(run.seed, run)
    return found


def _counts(run: Run, config: str) -> bool:
    return run.config == config and run.state == DONE


def _final(run: Run) -> float:
    # This is what "done" means.
    assert run.final_eval_loss is not None
    return run.final_eval_loss
