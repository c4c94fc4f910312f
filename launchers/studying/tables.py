"""docs/study.md from the committed CSV: nothing between its marks is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ds_quant.base.whole_folder import write_whole
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.spreads import Gap
from ds_quant.cli.shared.tables import markdown_table
from studying import adapting, fits, isolation, memory, overview, post_training, processors, protocol, rates, verdicts
from studying.plan import Key
from studying.post_training import Evaluated
from studying.results import Result, tuned_rate
from studying.rows import BASELINE, CONTROL, MATRIX, REPAIR, Row
from studying.verdicts import Judged

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
_AGREES = {
    # What the paper says in a few words, and the verdicts that say the same.
    "better": (verdicts.EQUAL, verdicts.BETTER),
    "competitive": (verdicts.EQUAL, verdicts.BETTER),
    "about baseline": (verdicts.EQUAL, verdicts.BETTER),
    "fine": (verdicts.EQUAL, verdicts.BETTER),
    "worse": (verdicts.DEGRADED, verdicts.DIVERGED),
    "degraded": (verdicts.DEGRADED, verdicts.DIVERGED),
    "unstable": (verdicts.DEGRADED, verdicts.DIVERGED),
    "fails": (verdicts.DEGRADED, verdicts.DIVERGED),
}
# "converges, worse than baseline" and "slightly better than its baseline" have one of them each.


def groups(found: Iterable[Result]) -> list[tuple[str, str, float]]:
    """Each (size, family, ratio) with runs of the baseline: by size, tokens a parameter and family."""
    known = {(r.key.size, r.key.family, r.key.ratio) for r in found if r.key.row == BASELINE}
    sizes = list(protocol.SIZES)
    return sorted(known, key=lambda group: (sizes.index(group[0]), group[2], protocol.FAMILIES.index(group[1])))


def text(
    found: Sequence[Result],
    rows: Sequence[Row],
    evaluated: Mapping[Key, Evaluated],
    isolated: Mapping[tuple[Key, str], isolation.Measured],
    peaks: Sequence[memory.Measured],
    adapted: Mapping[Key, adapting.Adapted],
) -> str:
    """All tables as Markdown.

    evaluated: the baseline's models quantized after training. isolated: changed in one respect before.
    peaks: memory of whole steps. adapted: the baseline's models trained on with quantizers.
    """
    if not found:
        return "No run has ended yet.\n"
    lines = []
    at_tuned_rates = {}
    for size, family, ratio in groups(found):
        rate = tuned_rate(found, size, family, ratio)
        title = f"{family}, {size}, D/N {ratio:g}"
        lines += [f"### {title}", ""]
        if rate is None:
            lines += ["The learning rate is not tuned yet.", ""]
            continue
        group = (size, family, ratio, BASELINE)
        baseline = [r for r in found if (r.key.size, r.key.family, r.key.ratio, r.key.row) == group]
        one = baseline[0]
        lines.append(
            f"{one.parameters:,} parameters, {one.tokens:,} tokens ({one.tokens / one.parameters:.2f} a parameter, "
            f"{one.steps} steps), {one.dtype}. Tuned learning rate: {rate:g}."
        )
        lines += ["", *_tuning(baseline), ""]
        own = [row for row in rows if row.is_of(family)]
        at_rates = [scale * rate for scale in protocol.SCALES]
        judged = {at: verdicts.judge(own, found, (size, family, ratio, at)) for at in at_rates}
        at_tuned_rates[title] = judged[rate]
        if any(entry.seeds for entry in judged[rate] if entry.row.name != BASELINE):
            lines += _judged(judged[rate])
        lines += rates.table(judged, baseline, rate)
        for at in at_rates:
            lines += post_training.table(rows, found, evaluated, (size, family, ratio, at))
        lines += adapting.table(rows, adapted, (size, family, ratio, rate), one.text)
        lines += isolation.table(isolated, (size, family, ratio, rate), one.text)
    lines = [_about(found), "", *overview.table(at_tuned_rates), *lines]
    return "\n".join([*lines, *fits.text(found, rows), *memory.table(peaks)])


def put(page: str, made: str) -> str:
    """The page with `made` between its marks. Raises CommandError without the marks."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise CommandError(f"tables: got a page without {BEGIN} and {END}; allowed: docs/study.md; restore its marks")
    return f"{head}{BEGIN}\n\n{made}\n{END}{tail}"


def write(path: Path, made: str) -> bool:
    """Put them into the page at `path`; whether it changed."""
    before = path.read_text(encoding="utf-8")
    after = put(before, made)
    if after != before:
        write_whole(path, after)
    return after != before


def _about(found: Sequence[Result]) -> str:
    kinds = sorted({processors.kind(r.processor) for r in found})
    versions = sorted({f"torch {r.torch}, DeepSpeed {r.deepspeed}" for r in found})
    dates = sorted({r.date for r in found})
    seconds = f"{dates[0]} to {dates[-1]}" if len(dates) > 1 else dates[0]
    return (
        f"{len(found)} runs, {seconds}; {'; '.join(kinds)}; {'; '.join(versions)}. Gaps in nats a token, with 95% "
        "intervals from 2 seeds on."
    )


def _tuning(baseline: Sequence[Result]) -> list[str]:
    tuned = sorted((r for r in baseline if r.key.seed == 0), key=lambda r: r.key.rate)
    header = ["baseline, seed 0", *(f"{r.key.rate:g}" for r in tuned)]
    return markdown_table(header, [["validation loss", *(f"{r.loss:.4f}" for r in tuned)]])


def _judged(judged: Sequence[Judged]) -> list[str]:
    by_kind = {kind: [entry for entry in judged if entry.row.kind == kind] for kind in (CONTROL, MATRIX, REPAIR)}
    ran = {entry.row.name: entry for entry in judged if entry.seeds}
    lines = []
    controls = [entry for entry in by_kind[CONTROL] if entry.row.name != BASELINE and entry.seeds]
    if controls:
        lines += ["**Controls**", "", *markdown_table(["row", "", *_FIGURES], map(_cells, controls)), ""]
    matrix = [[*_cells(e), e.row.outcome or "not known", _agreed(e)] for e in by_kind[MATRIX] if e.seeds]
    if matrix:
        header = ["row", "", *_FIGURES, "the paper", "agreed"]
        lines += ["**The paper's matrix**", "", *markdown_table(header, matrix), ""]
    missing = [entry.row.name for entry in by_kind[MATRIX] if not entry.seeds]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    repairs = [entry for entry in by_kind[REPAIR] if entry.seeds]
    if repairs:
        header = ["repair", "of", "", *_FIGURES, "gap of what it repairs", "repaired"]
        lines += ["**Repairs**", "", *markdown_table(header, [_repair_cells(entry, ran) for entry in repairs]), ""]
    missing = [entry.row.name for entry in by_kind[REPAIR] if not entry.seeds]
    if missing:
        summary = f"<details><summary>{len(missing)} repairs were not run here</summary>"
        lines += [f"{summary}{', '.join(missing)}</details>", ""]
    return lines


_FIGURES = ("seeds", "gap", "95% interval", "verdict", "gap, held-out domain")


def _cells(entry: Judged) -> list[str]:
    diverged = f" ({entry.num_diverged} diverged)" if entry.num_diverged else ""
    interval = "" if entry.gap is None else entry.gap.interval()
    figures = [f"{entry.seeds}{diverged}", _mean(entry.gap), interval, entry.verdict, _mean(entry.other_gap)]
    return [entry.row.name, entry.row.what, *figures]


def _repair_cells(entry: Judged, ran: dict[str, Judged]) -> list[str]:
    name, what, *figures = _cells(entry)
    of = ran.get(entry.row.repairs)
    before = "" if of is None else (_mean(of.gap) or of.verdict)
    return [name, entry.row.repairs, what, *figures, before, verdicts.repaired(entry, of)]


def _agreed(entry: Judged) -> str:
    if not entry.row.outcome or entry.verdict == verdicts.UNDECIDED:
        return ""
    for word, same in _AGREES.items():
        if word in entry.row.outcome:
            return "yes" if entry.verdict in same else "no"
    return ""


def _mean(gap: Gap | None) -> str:
    return "" if gap is None else f"{gap.mean:+.4f}"
