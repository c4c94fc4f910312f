"""The baseline's models with a row's quantizers put in after training, and the row's own models without them.

The first is what training with the quantizers is held against. The second tells what of a row's gap lies in the weights
that its training has found; the rest is what the quantizers take in the forward pass.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collecting import runs

from ds_quant.cli.shared.spreads import Gap
from ds_quant.cli.shared.tables import markdown_table
from studying import other_domain, plan, results, verdicts
from studying.plan import Key, Settings
from studying.rows import BASELINE, Row

_COLUMNS = (*results.KEY_COLUMNS, "fingerprint", "text", "loss", "without")


@dataclass(frozen=True)
class Evaluated:
    """One model of the baseline with the quantizers of one row."""

    key: Key
    """The row whose quantizers these are; all else is the baseline's run."""
    fingerprint: str
    """`plan.fingerprint` of the row."""
    text: str
    """`plan.Settings.text`, of the training."""
    loss: float
    """Of the held-out domain, in nats a token."""
    without: float = math.nan
    """The same of the row's own model, its quantizers taken out; NaN where it has not been there yet."""


def path(csv: Path) -> Path:
    """Where this is kept, beside the runs in `csv`."""
    return csv.with_name("post_training.csv")


def can_be_put_in(row: Row) -> bool:
    """Whether a row quantizes weights or activations to the end. What else it quantizes is no part of an evaluation."""
    stays = "forward_full_precision_from" not in _linear(row)
    return bool(quantized_parts(row) & {"weight", "activation"}) and stays and not row.overrides


def quantized_parts(row: Row) -> set[str]:
    """Which of weight, activation and gradient the linear layers of a row quantize."""
    linear = _linear(row)
    return {part for part in ("weight", "activation", "gradient") if linear.get(part) is not None}


def forward(row: Row) -> str:
    """What an evaluation has of a row's quantizers; rows that differ in nothing else have the same losses."""
    linear = {name: value for name, value in _linear(row).items() if name not in ("gradient", "backward_operands")}
    if "output" not in (linear.get("rotation") or {}).get("used_for", ["output"]):
        del linear["rotation"]
    return json.dumps(linear, sort_keys=True)


def _linear(row: Row) -> Mapping[str, Any]:
    return (json.loads(row.config).get("ds_quant") or {}).get("linear") or {}


def measure(keys: Sequence[Key], rows: Mapping[str, Row], settings: Settings, csv: Path, text: Path) -> None:
    """Evaluate the baseline's models of the seeds in `keys` with the quantizers of their rows, where it is missing.

    And the models of their own runs without quantizers, where they are still there.

    Raises:
        CommandError: a model of the baseline is in no folder of its run, or the evaluation failed.
    """
    known, trained = read(path(csv)), results.read(csv)
    waiting: dict[Key, list[Key]] = {}
    for key in keys:
        model = Key(**{**vars(key), "row": BASELINE})
        told = (plan.fingerprint(rows[key.row]), settings.text)
        done = key in known and (known[key].fingerprint, known[key].text) == told
        if not done and can_be_put_in(rows[key.row]) and model in trained and trained[model].state == runs.DONE:
            waiting.setdefault(model, []).append(key)
    for model, asked in waiting.items():
        folder = plan.finished(model, rows[BASELINE], settings)
        losses = _known_losses(model, rows, known.values(), settings.text)
        files: dict[str, str] = {}
        for key in asked:
            put_in = forward(rows[key.row])
            if put_in not in losses and put_in not in files.values():
                files[str(plan.write_config(key, rows[key.row], settings))] = put_in
        if files:
            found = other_domain.evaluate([folder], model, settings, text, list(files))
            losses |= {files[str(row["quantizers_from"])]: other_domain.loss(row) for row in found}
        for key in asked:
            loss = losses[forward(rows[key.row])]
            known[key] = Evaluated(key, plan.fingerprint(rows[key.row]), settings.text, loss)
        write(path(csv), known.values())
    own = [
        key
        for key in keys
        if key in known
        and math.isnan(known[key].without)
        and (key in trained and trained[key].state == runs.DONE and trained[key].fingerprint == known[key].fingerprint)
        and other_domain.has_model(key, rows[key.row], settings)
    ]
    if own:
        without = other_domain.losses_of_runs(own, rows, settings, text, quantizers="off")
        known |= {key: dataclasses.replace(known[key], without=loss) for key, loss in without.items()}
        write(path(csv), known.values())


def _known_losses(model: Key, rows: Mapping[str, Row], known: Iterable[Evaluated], text: str) -> dict[str, float]:
    """Of the model of the baseline, by what was put in."""
    return {
        forward(rows[one.key.row]): one.loss
        for one in known
        if dataclasses.replace(one.key, row=BASELINE) == model
        and (one.fingerprint, one.text) == (plan.fingerprint(rows[one.key.row]), text)
    }


def read(path: Path) -> dict[Key, Evaluated]:
    """What is known; nothing where there is no file. Raises CommandError for another file."""
    return {one.key: one for one in results.read_lines(path, _COLUMNS, _of_line)}


def write(path: Path, found: Iterable[Evaluated]) -> None:
    """All of them, sorted, in place of what is there."""
    ordered = sorted(found, key=lambda one: dataclasses.astuple(one.key))
    results.write_lines(path, _COLUMNS, [{**vars(one.key), **vars(one)} for one in ordered])


def table(
    rows: Sequence[Row],
    found: Sequence[results.Result],
    evaluated: Mapping[Key, Evaluated],
    group: tuple[str, str, float, float],
) -> list[str]:
    """Gaps on the held-out domain of quantizers that came after training, beside those of training with them."""
    own = [result for result in found if result.key.group == group and result.state == runs.DONE]
    base = {result.key.seed: result for result in own if result.key.row == BASELINE}
    lines = []
    for entry in verdicts.judge(rows, found, group):
        pairs = [
            (one, base[one.key.seed].other_loss)
            for one in evaluated.values()
            if one.key.row == entry.row.name
            and one.key.group == group
            and one.fingerprint == plan.fingerprint(entry.row)
            and one.key.seed in base
            and one.text == base[one.key.seed].text
        ]
        gap = _gap([one.loss - before for one, before in pairs])
        if gap is not None:
            without = _gap([one.without - before for one, before in pairs])
            cells = [cell for each in (gap, entry.other_gap, without) for cell in _cells(each)]
            lines.append([entry.row.name, entry.row.what, *cells])
    if not lines:
        return []
    header = ["row", ""]
    for what in ("after training", "in training", "in training, then taken out"):
        header += ["seeds", what, "95% interval"]
    return ["**Quantized after training, and in training** (held-out domain)", "", *markdown_table(header, lines), ""]


def _gap(differences: Sequence[float]) -> Gap | None:
    return Gap.of([one for one in differences if not math.isnan(one)])


def _cells(gap: Gap | None) -> list[str]:
    return ["", "", ""] if gap is None else [str(gap.num_pairs), f"{gap.mean:+.4f}", gap.interval()]


def _of_line(line: Mapping[str, str]) -> Evaluated:
    return Evaluated(
        results.key_of(line), line["fingerprint"], line["text"], float(line["loss"]), float(line["without"])
    )
