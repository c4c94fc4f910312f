"""Quantizers put into a finished model, and the same model trained on with them: both from one checkpoint.

Each model of the baseline is trained `arms.STEPS` more steps twice, on the same text: in full precision, and with the
quantizers of a row. The first is quantized afterwards. Both gaps are to the first in full precision, so that none of
them is what more steps are worth.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_quant.cli.shared.spreads import Gap
from ds_quant.cli.shared.tables import markdown_table
from studying import checkpoints, plan, post_training, processors, results
from studying.plan import Key, Settings
from studying.rows import BASELINE, Row


@dataclass(frozen=True)
class Adapted:
    """One model of the baseline and the quantizers of one row. Losses in nats a token, of the held-out split."""

    key: Key
    """The row whose quantizers these are; all else is the baseline's run."""
    fingerprint: str
    text: str
    continued: float
    """After more steps in full precision."""
    after: float
    """The same, quantized."""
    adapted: float
    """After as many steps with the quantizers, which stay in."""
    processor: str
    commit: str
    date: str

    def is_of(self, row: Row, text: str) -> bool:
        """Whether it is of the row as it is now, and of that text."""
        return (self.fingerprint, self.text) == (fingerprint(row), text)


_REST = [field.name for field in dataclasses.fields(Adapted) if field.name != "key"]
COLUMNS = (*results.KEY_COLUMNS, *_REST)


def path(csv: Path) -> Path:
    """Where this is kept, beside the runs in `csv`."""
    return csv.with_name("adaptation.csv")


def read(path: Path) -> dict[Key, Adapted]:
    """What is known; nothing where there is no file. Raises CommandError for another file."""
    return {one.key: one for one in results.read_lines(path, COLUMNS, _of_line)}


def write(path: Path, found: Iterable[Adapted]) -> None:
    """All of them, sorted, in place of what is there."""
    ordered = sorted(found, key=lambda one: dataclasses.astuple(one.key))
    results.write_lines(path, COLUMNS, [{**vars(one.key), **vars(one)} for one in ordered])


def fingerprint(row: Row) -> str:
    """Of the row, and of how much is trained: figures with another one are of another experiment."""
    from studying import arms

    told = [plan.fingerprint(row), arms.STEPS, arms.RATE_DIVISOR, checkpoints.SEQUENCES]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def can_be_adapted(row: Row) -> bool:
    """Whether a row quantizes weights or activations alone, and can be trained without an engine."""
    forward_alone = post_training.can_be_put_in(row) and "gradient" not in post_training.quantized_parts(row)
    return forward_alone and "oscillation_reset" not in row.config


def measure(keys: Sequence[Key], rows: Mapping[str, Row], settings: Settings, csv: Path) -> int:
    """Train the baseline's models of `keys` on, with the quantizers of their rows and without, where it is missing.

    Returns how many of `keys` can be done, those that were known among them.

    Raises:
        CommandError: a model of the baseline is in no folder of its run.
    """
    known = read(path(csv))
    waiting: dict[Key, list[Key]] = {}
    possible = [key for key in keys if can_be_adapted(rows[key.row])]
    for key in possible:
        one = known.get(key)
        if one is None or not one.is_of(rows[key.row], settings.text):
            waiting.setdefault(dataclasses.replace(key, row=BASELINE), []).append(key)
    for model_key, asked in waiting.items():
        folder = plan.finished(model_key, rows[BASELINE], settings) / "model"
        where = processors.where(settings.device)
        told: dict[str, Any] = {name: str(where[name]) for name in ("processor", "commit", "date")}
        sections = {key: _section(key, rows[key.row], settings) for key in asked}
        for key, losses in _both_ways(model_key, folder, sections, settings):
            known[key] = Adapted(key, fingerprint(rows[key.row]), settings.text, *losses, **told)
            _, after, adapted = losses
            print(f"{plan.shown(key)}: quantized after {after:.4f}, trained on with it {adapted:.4f} nats a token")
            write(path(csv), known.values())
    return len(possible)


def _section(key: Key, row: Row, settings: Settings) -> dict[str, Any]:
    section: dict[str, Any] = json.loads(plan.config_text(key, row, settings))["ds_quant"]["linear"]
    return section


def _both_ways(
    model_key: Key, folder: Path, sections: Mapping[Key, dict[str, Any]], settings: Settings
) -> Iterator[tuple[Key, tuple[float, float, float]]]:
    """(key, losses) of each: continued, quantized after that, trained on with the quantizers."""
    from ds_quant.linear.convert import convert
    from studying.arms import STEPS

    model = checkpoints.load(folder, settings)
    more, held_out = checkpoints.more_text(model_key, settings, STEPS), checkpoints.held_out_text(model_key, settings)
    continued = copy.deepcopy(model)
    _train_on(continued, more, model_key.rate)
    before = checkpoints.loss(continued, held_out)
    for key, section in sections.items():
        after, adapted = copy.deepcopy(continued), copy.deepcopy(model)
        for one in (after, adapted):
            convert(one, section)
        _train_on(adapted, more, model_key.rate)
        yield key, (before, checkpoints.loss(after, held_out), checkpoints.loss(adapted, held_out))


def _train_on(model: Any, text: Sequence[dict[str, Any]], rate: float) -> None:
    """A step of AdamW for each batch, at a tenth of the training's peak `rate`."""
    from studying import arms

    model.train()
    arms.train_on(model, text, rate / arms.RATE_DIVISOR, rho=0.0)
    model.eval()


def table(
    rows: Sequence[Row], adapted: Mapping[Key, Adapted], group: tuple[str, str, float, float], text: str
) -> list[str]:
    """Gaps of both ways, and what training on with the quantizers gains; nothing without figures of the group."""
    from studying.arms import STEPS

    lines = []
    for row in rows:
        own = [
            one for key, one in adapted.items() if key.row == row.name and key.group == group and one.is_of(row, text)
        ]
        ended = [one for one in own if math.isfinite(one.after + one.adapted)]
        cells = []
        for differences in (
            [one.after - one.continued for one in ended],
            [one.adapted - one.continued for one in ended],
            [one.adapted - one.after for one in ended],
        ):
            gap = Gap.of(differences)
            cells += ["", ""] if gap is None else [f"{gap.mean:+.4f}", gap.interval()]
        if own:
            diverged = f" ({len(own) - len(ended)} diverged)" if len(own) > len(ended) else ""
            lines.append([row.name, row.what, f"{len(own)}{diverged}", *cells])
    if not lines:
        return []
    title = f"**From the same checkpoint**: {STEPS} more steps, quantized after them or trained with quantizers"
    header = ["row", "", "seeds"]
    for what in ("quantized after", "trained on with it", "difference"):
        header += [what, "95% interval"]
    return [f"{title} (held-out split)", "", *markdown_table(header, lines), ""]


def _of_line(line: Mapping[str, str]) -> Adapted:
    floats = ("continued", "after", "adapted")
    values: dict[str, Any] = {name: float(line[name]) if name in floats else line[name] for name in _REST}
    return Adapted(key=results.key_of(line), **values)
