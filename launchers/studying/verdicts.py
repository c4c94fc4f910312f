"""What paired gaps say: their interval, and a verdict by the limits that the protocol fixed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from collecting.runs import DIVERGED as RUN_DIVERGED
from collecting.runs import DONE

from ds_quant.cli.shared.spreads import Gap
from studying import plan, protocol
from studying.results import Result
from studying.rows import BASELINE, Row

EQUAL, DEGRADED, BETTER, DIVERGED, UNDECIDED = "equal", "degraded", "better", "diverged", "undecided"


@dataclass(frozen=True)
class Judged:
    """A row at one size, family, budget and learning rate."""

    row: Row
    gap: Gap | None
    """Of the held-out split, over the seeds whose runs are both done."""
    other_gap: Gap | None
    """Of the held-out domain."""
    num_diverged: int
    """Seeds whose run diverged."""
    gaps: tuple[float, ...] = ()
    """What `gap` is the mean of."""

    @property
    def verdict(self) -> str:
        """One of the constants above; undecided without figures."""
        return verdict(self.gap, self.num_diverged)

    @property
    def seeds(self) -> int:
        """Seeds that ended, diverged or not."""
        return (0 if self.gap is None else self.gap.num_pairs) + self.num_diverged


def verdict(gap: Gap | None, num_diverged: int) -> str:
    """The first that holds, in the order of docs/study.md."""
    if num_diverged:
        return DIVERGED
    if gap is None or gap.half_width is None or gap.num_pairs < len(protocol.SEEDS):
        return UNDECIDED
    low, high = gap.mean - gap.half_width, gap.mean + gap.half_width
    if max(-low, high) <= protocol.EQUAL_WITHIN:
        return EQUAL
    if low > 0:
        return DEGRADED
    return BETTER if high < 0 else UNDECIDED


def judge(rows: Iterable[Row], found: Sequence[Result], group: tuple[str, str, float, float]) -> list[Judged]:
    """Each row against the baseline, among the runs of one (size, family, ratio, rate); rows without runs have no gap.

    Runs of other settings of a row, of another text or dtype than the newest baseline's, are left out.
    """
    own = [result for result in found if result.key.group == group]
    base = {
        result.key.seed: result
        for result in own
        if result.key.row == BASELINE and result.state == DONE and _is_current(result, rows)
    }
    judged = []
    for row in rows:
        runs = [result for result in own if result.key.row == row.name and result.fingerprint == plan.fingerprint(row)]
        pairs = [
            (result, base[result.key.seed])
            for result in runs
            if result.key.seed in base and _alike(result, base[result.key.seed])
        ]
        done = [(one, other) for one, other in pairs if one.state == DONE]
        gaps = [one.loss - other.loss for one, other in done]
        judged.append(
            Judged(
                row,
                Gap.of(gaps),
                Gap.of([d for one, other in done if (d := one.other_loss - other.other_loss) == d]),
                sum(one.state == RUN_DIVERGED for one, _ in pairs),
                tuple(gaps),
            )
        )
    return judged


def repaired(entry: Judged, of: Judged | None) -> str:
    """Whether `entry` repairs `of`, in words; empty where nothing is to be repaired, as far as is known."""
    if of is None or of.verdict not in (DEGRADED, DIVERGED):
        return ""
    if entry.gap is None or entry.num_diverged:
        return "no"
    if entry.seeds < len(protocol.SEEDS):
        return "too few seeds"
    if entry.gap.mean >= protocol.REPAIRED_WITHIN:
        return "no"
    return f"yes, but for some {entry.row.spared}" if entry.row.spared else "yes"


def figures(gap: Gap) -> str:
    """Mean and interval, and the number of seeds where there are fewer than SEEDS."""
    if gap.half_width is None:
        return f"{gap.mean:+.4f} (one seed)"
    few = "" if gap.num_pairs >= len(protocol.SEEDS) else f", {gap.num_pairs} seeds"
    return f"{gap.mean:+.4f} ({gap.interval()}{few})"


def needs_more_seeds(judged: Judged) -> bool:
    """Whether the protocol asks for MORE_SEEDS: SEEDS are done, and the effect is small."""
    if judged.gap is None or judged.num_diverged or judged.gap.num_pairs < len(protocol.SEEDS):
        return False
    return abs(judged.gap.mean) < protocol.SMALL_EFFECT


def _alike(one: Result, other: Result) -> bool:
    return (one.text, one.dtype, one.steps) == (other.text, other.dtype, other.steps) or (
        # A run that ended itself took fewer steps.
        one.state == RUN_DIVERGED and (one.text, one.dtype) == (other.text, other.dtype)
    )


def _is_current(result: Result, rows: Iterable[Row]) -> bool:
    return any(row.name == BASELINE and plan.fingerprint(row) == result.fingerprint for row in rows)
