"""Means and deviations over seeds, and paired gaps with their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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

    def interval(self) -> str:
        """As text; empty with fewer than two pairs."""
        if self.half_width is None:
            return ""
        return f"{self.mean - self.half_width:+.4f} to {self.mean + self.half_width:+.4f}"

    @classmethod
    def of(cls, differences: Sequence[float]) -> Gap | None:
        if not differences:
            return None
        spread, count = Spread.of(differences), len(differences)
        assert spread.mean is not None
        if spread.deviation is None:
            return cls(count, spread.mean, None)
        return cls(count, spread.mean, t_quantile(count - 1) * spread.deviation / math.sqrt(count))


def t_quantile(degrees: int) -> float:
    """Half the width, in standard errors, of a two-sided 95% interval of Student's t; exact to 0.001."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    # The normal quantile alone is 4% too small here; these are the first two terms of what is left, in 1 / degrees.
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
