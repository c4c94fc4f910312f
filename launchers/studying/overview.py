"""What failed, and the best repair of it, in every group of runs: the first table of docs/study.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_quant.cli.shared.tables import markdown_table
from studying import protocol, verdicts
from studying.rows import MATRIX
from studying.verdicts import Judged

_BEST = ("best repair", "its gap", "95% interval", "seeds", "repaired", "lower, with more bits in")


def table(judged: Mapping[str, Sequence[Judged]]) -> list[str]:
    """A line for each group in which a row of the matrix, or what combined repairs are held against, failed.

    judged: rows at the tuned rate, by the title of their group. Of the repairs with the same component and bits, those
    with all seeds come before the others, then the lowest mean gap: the best of many is luckier than it would be again.
    Those that spare layers, channels or steps are in a column of their own, where they end lower.
    """
    repaired_rows = {entry.row.repairs for own in judged.values() for entry in own}
    lines = {}
    for title, own in judged.items():
        for failed in own:
            is_one = failed.row.kind == MATRIX or failed.row.name in repaired_rows
            if is_one and failed.verdict in (verdicts.DEGRADED, verdicts.DIVERGED):
                lines[failed.row.name, title] = [failed.row.name, title, _gap(failed), *_best(failed, own)]
    if not lines:
        return []
    order = [entry.row.name for own in judged.values() for entry in own]
    ordered = sorted(lines, key=lambda key: order.index(key[0]))
    return ["### At a glance", "", *markdown_table(("row", "of", "gap", *_BEST), [lines[key] for key in ordered]), ""]


def _gap(entry: Judged) -> str:
    return entry.verdict if entry.gap is None else f"{entry.gap.mean:+.4f}"


def _best(failed: Judged, own: Sequence[Judged]) -> list[str]:
    kind = _component_and_bits(failed.row.name)
    repairs = [
        (entry.seeds < len(protocol.SEEDS), entry.gap.mean, entry, entry.gap)
        for entry in own
        if _component_and_bits(entry.row.repairs) == kind and entry.gap is not None and not entry.num_diverged
    ]
    repairs.sort(key=lambda repair: repair[:2])
    best = next((repair for repair in repairs if not repair[2].row.spared), None)
    cells = ["none", *[""] * (len(_BEST) - 1)]
    if best is not None:
        _, mean, entry, gap = best
        cells = [entry.row.name, f"{mean:+.4f}", gap.interval(), str(entry.seeds), verdicts.repaired(entry, failed), ""]
    if repairs and repairs[0] is not best and (best is None or repairs[0][1] < best[1]):
        *_, entry, gap = repairs[0]
        cells[-1] = f"some {entry.row.spared}: {entry.row.name} {verdicts.figures(gap)}"
    return cells


def _component_and_bits(row: str) -> str:
    return row.partition("_")[0]
