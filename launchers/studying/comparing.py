"""Two figures of one experiment: the same, within what another machine explains, or neither.

On the same kind of processor with the same versions every figure is to be the same. Elsewhere sums are rounded
otherwise, and what becomes of a rounding in hundreds of steps is not known; it is no more than what other initial
weights and another order of the text do. So the limit there is the 95% interval of one more seed, from the seeds that
the CSV has: t * deviation * sqrt(1 + 1 / n) to either side of the figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ds_quant.cli.shared.spreads import Spread, t_quantile

SAME, OTHER, WITHIN, OUTSIDE, UNKNOWN = "same", "OTHER", "within limits", "OUTSIDE", "no limit known"


@dataclass(frozen=True)
class Figure:
    """One figure of a CSV, and the one of now."""

    what: str
    before: float
    now: float
    of_seeds: Sequence[float]
    """The same figure of all seeds that the CSV has."""
    same_place: bool
    """Whether both were made on the same kind of processor with the same versions."""
    alike: bool = True
    """Whether what they are of ended alike."""

    def word(self) -> str:
        """What is to be said of it."""
        if self.alike and repr(self.before) == repr(self.now):
            return SAME
        if self.same_place:
            return OTHER
        return judged(self.now - self.before, self.of_seeds) if self.alike else OUTSIDE

    def is_wrong(self) -> bool:
        """Whether the figure of now speaks against that of the CSV."""
        return self.word() in (OTHER, OUTSIDE)

    def told(self, of: str) -> str:
        """A line of it; of: what it is a figure of."""
        line = f"{self.word()}: {of}: {self.what} {self.before!r}, again {self.now!r}"
        if repr(self.before) == repr(self.now):
            return line
        allowed = limit(self.of_seeds)
        words = "one seed tells no limit" if allowed is None else f"{allowed:.4f} is to be expected of another seed"
        return f"{line}; differs by {self.now - self.before:+.2e}, and {words}"


def report(of: str, figures: Sequence[Figure]) -> int:
    """Print them, with what they are of; 1 where one speaks against its CSV."""
    for figure in figures:
        print(figure.told(of))
    return int(any(figure.is_wrong() for figure in figures))


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
