"""Sharpness or outliers: which of them makes quantizing to 4 bits fail. `arms` has what is changed and why.

Each model of the baseline is changed in one respect, measured, and quantized after training, as rows of the paper do
it: outliers of the operands, the sharpness and the curvature of its loss in full precision, and the gap that each
quantizer opens to that loss. What holds for training with quantizers may be something else; from one model everything
else is the same in all arms.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.spreads import Gap
from ds_quant.cli.shared.tables import markdown_table
from studying import checkpoints, plan, processors, results
from studying.plan import Key, Settings
from studying.rows import BASELINE, Row

QUANTIZERS = {
    "w4_tensor": ("weight", "tensor"),
    "w4_channel": ("weight", "row"),
    "a4_tensor": ("activation", "tensor"),
    "a4_token": ("activation", "row"),
}
"""Rows of the paper's matrix: of all linear layers with the output layer, symmetric, to nearest."""
SHARPNESS_BATCHES, CURVATURE_DIRECTIONS, CURVATURE_SPAN = 4, 4, 0.1
MEASURES = ("weight_peak", "weight_kurtosis", "activation_peak", "activation_kurtosis", "sharpness", "curvature")


@dataclass(frozen=True)
class Measured:
    """One model in one arm. Losses in nats a token, of the held-out split."""

    key: Key
    """Of the baseline's run."""
    arm: str
    fingerprint: str
    text: str
    loss: float
    """In full precision."""
    w4_tensor: float
    w4_channel: float
    a4_tensor: float
    a4_token: float
    """With these quantizers."""
    weight_peak: float
    weight_kurtosis: float
    activation_peak: float
    activation_kurtosis: float
    """`products.Outliers`."""
    sharpness: float
    """m-sharpness: how far the loss rises 0.05 up the gradient, with batches of the training's size."""
    curvature: float
    """Second derivative of the loss along random filter-normalized directions, mean: lengths relative to weights."""
    processor: str
    commit: str
    date: str

    def is_of(self, text: str) -> bool:
        """Whether it is of the experiment as it is now, and of that text."""
        return (self.fingerprint, self.text) == (fingerprint(), text)

    def gap(self, quantizer: str) -> float:
        """What the quantizer adds to the loss."""
        return float(getattr(self, quantizer)) - self.loss


_REST = [field.name for field in dataclasses.fields(Measured) if field.name != "key"]
COLUMNS = (*results.KEY_COLUMNS, *_REST)


def path(csv: Path) -> Path:
    """Where this is kept, beside the runs in `csv`."""
    return csv.with_name("isolation.csv")


def read(path: Path) -> dict[tuple[Key, str], Measured]:
    """What is known; nothing where there is no file. Raises CommandError for another file."""
    return {(one.key, one.arm): one for one in results.read_lines(path, COLUMNS, _of_line)}


def write(path: Path, found: Iterable[Measured]) -> None:
    """All of them, sorted, in place of what is there."""
    from studying.arms import ARMS

    ordered = sorted(found, key=lambda one: (dataclasses.astuple(one.key), list(ARMS).index(one.arm)))
    results.write_lines(path, COLUMNS, [{**vars(one.key), **vars(one)} for one in ordered])


def fingerprint() -> str:
    """Of what is fixed in `arms` and here: figures with another one are of another experiment."""
    from studying import arms

    told = [arms.CLIP, arms.BLOCK, arms.FACTOR, arms.ONE_IN, arms.STEPS, arms.RHO, arms.RATE_DIVISOR, QUANTIZERS]
    told += [checkpoints.SEQUENCES, SHARPNESS_BATCHES, CURVATURE_DIRECTIONS, CURVATURE_SPAN]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def measure(
    keys: Iterable[Key],
    rows: Mapping[str, Row],
    settings: Settings,
    csv: Path,
    *,
    arms: Collection[str] | None = None,
) -> int:
    """Measure the baseline's models of `keys` in `arms`, or in all, where it is missing.

    Returns how many models there were.

    Raises:
        CommandError: another family than Llama, or a model that is in no folder of its run.
    """
    from studying.arms import ARMS

    models = [key for key in dict.fromkeys(keys) if key.row == BASELINE]
    known = read(path(csv))
    for key in models:
        if key.family != "llama":
            raise CommandError(f"--families: got {key.family}; allowed: llama, whose layers the arms know; correct it")
        asked = [arm for arm in ARMS if arms is None or arm in arms]
        missing = [arm for arm in asked if (one := known.get((key, arm))) is None or not one.is_of(settings.text)]
        folder = plan.finished(key, rows[BASELINE], settings) / "model" if missing else Path()
        for arm in missing:
            known[key, arm] = _measured(key, arm, folder, settings)
            print(f"{plan.shown(key)}: {arm}: {known[key, arm].loss:.4f} nats a token")
            write(path(csv), known.values())
    return len(models)


def _measured(key: Key, arm: str, folder: Path, settings: Settings) -> Measured:
    from studying.arms import ARMS, STEPS

    model: Any = checkpoints.load(folder, settings)
    change = ARMS[arm].change
    if change is not None:
        change(model, checkpoints.more_text(key, settings, STEPS), key.rate)
    figures = measures(model, arm, checkpoints.held_out_text(key, settings))
    where = processors.where(settings.device)
    told: dict[str, Any] = {**figures, **{name: str(where[name]) for name in ("processor", "commit", "date")}}
    return Measured(key=key, arm=arm, fingerprint=fingerprint(), text=settings.text, **told)


def measures(model: Any, arm: str, text: Sequence[Any]) -> dict[str, float]:
    """The figures of a changed model, by the names of `Measured`, on batches of text."""
    import torch

    from ds_quant.diagnostics.landscape import landscape
    from ds_quant.diagnostics.sharpness import sharpness
    from studying.arms import ARMS
    from studying.products import Outliers, Rounded, products

    operands = ARMS[arm].operands
    seen = {"weight": Outliers(), "activation": Outliers()}

    with products(model, operands, seen=seen), torch.no_grad():
        model(**text[0])
    figures = {f"{name}_peak": found.peak for name, found in seen.items()}
    figures |= {f"{name}_kurtosis": found.kurtosis for name, found in seen.items()}
    with products(model, operands):
        figures["loss"] = checkpoints.loss(model, text)
        some = text[:: max(1, len(text) // SHARPNESS_BATCHES)][:SHARPNESS_BATCHES]
        figures["sharpness"] = sharpness(model, some).scalars["sharpness"]
        found = [
            landscape(model, some[:1], points=3, span=CURVATURE_SPAN, seed=seed).scalars["curvature_1"]
            for seed in range(CURVATURE_DIRECTIONS)
        ]
        figures["curvature"] = sum(found) / len(found)
    for name, (operand, granularity) in QUANTIZERS.items():
        with products(model, operands, Rounded(operand, granularity)):
            figures[name] = checkpoints.loss(model, text)
    return figures


def table(found: Mapping[tuple[Key, str], Measured], group: tuple[str, str, float, float], text: str) -> list[str]:
    """Figures of each arm, then how each moved every gap; nothing without figures of the group (size ... rate)."""
    from studying.arms import ARMS

    own: dict[str, dict[int, Measured]] = {name: {} for name in ARMS}
    for one in found.values():
        key = one.key
        if key.group == group and one.is_of(text):
            own[one.arm][key.seed] = one
    if not any(own.values()):
        return []
    figures = [
        [name, ARMS[name].what, str(len(seeds)), *_means(list(seeds.values()))] for name, seeds in own.items() if seeds
    ]
    header = ["model", "", "seeds", "loss", "W peak", "W kurtosis", "A peak", "A kurtosis", "sharpness", "curvature"]
    lines = ["**Outliers or sharpness**: the baseline's models, changed, and quantized after it (held-out split)", ""]
    lines += [*markdown_table([*header, *(f"gap {name}" for name in QUANTIZERS)], figures), ""]
    moved = []
    for name, seeds in own.items():
        before = own.get(ARMS[name].of, {})
        pairs = [(seeds[seed], before[seed]) for seed in sorted(seeds.keys() & before.keys())]
        if pairs:
            cells = [_interval([one.gap(q) - other.gap(q) for one, other in pairs]) for q in QUANTIZERS]
            ratios = [sum(one.sharpness / other.sharpness for one, other in pairs) / len(pairs)]
            moved.append([name, ARMS[name].of, str(len(pairs)), *(f"{ratio:.2f}" for ratio in ratios), *cells])
    header = ["change", "against", "seeds", "sharpness, times", *(f"change of gap {name}" for name in QUANTIZERS)]
    return [*lines, *markdown_table(header, moved), ""] if moved else lines


def _means(of_seeds: Sequence[Measured]) -> list[str]:
    count = len(of_seeds)
    means = {name: sum(float(getattr(one, name)) for one in of_seeds) / count for name in ("loss", *MEASURES)}
    gaps = [sum(one.gap(name) for one in of_seeds) / count for name in QUANTIZERS]
    return [f"{means['loss']:.4f}", *(f"{means[name]:.3g}" for name in MEASURES), *(f"{gap:+.4f}" for gap in gaps)]


def _interval(differences: Sequence[float]) -> str:
    gap = Gap.of(differences)
    assert gap is not None
    return f"{gap.mean:+.4f}" if gap.half_width is None else f"{gap.mean:+.4f} ({gap.interval()})"


def _of_line(line: Mapping[str, str]) -> Measured:
    words = ("arm", "fingerprint", "text", "processor", "commit", "date")
    values: dict[str, Any] = {name: line[name] if name in words else float(line[name]) for name in _REST}
    return Measured(key=results.key_of(line), **values)
