"""What a diagnostic found: one record, the same on a checkpoint and in training, for every kind of diagnostic.

JSON has no NaN and no infinities; they are written as the strings "NaN", "Infinity" and "-Infinity", and only where a
number is expected are such strings read back as numbers.
"""

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from ds_quant.base.errors import fail

KINDS = (
    "outliers",
    "sharpness",
    "landscape",
    "gradient_error",
    "gradient_norms",
    "moments",
    "quantization_error",
    "oscillation",
)
Row = dict[str, float | int | str | None]

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Measurement:
    """One diagnostic at one step.

    Raises:
        ConfigError: `kind` is not in `KINDS`.
    """

    kind: str
    """One of `KINDS`."""
    step: int | None
    """Optimizer step of the checkpoint or the run; None where no step is known."""
    scalars: dict[str, float] = field(default_factory=dict)
    """What goes to DeepSpeed's monitor and to the CSV, such as {"outlier_channels": 12.0}."""
    rows: list[Row] = field(default_factory=list)
    """One row a layer, point or histogram bin; the first key is its name. All rows of a measurement have its keys."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What another person needs to repeat it: numbers, texts, lists and objects of them."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise fail("Measurement: kind", self.kind, ", ".join(KINDS), "use one of these names")

    def to_json(self) -> str:
        """One line of plain JSON."""
        return json.dumps(_encode(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Measurement":
        """What `to_json` wrote.

        Raises:
            ConfigError: the text is no such JSON.
        """
        try:
            found = json.loads(text)
            return cls(
                kind=found["kind"],
                step=found["step"],
                scalars={name: float(value) for name, value in found["scalars"].items()},
                rows=[{key: _decode(value) for key, value in row.items()} for row in found["rows"]],
                settings=found["settings"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"
            raise fail("measurement", what, "a line that ds_quant wrote", "measure again") from error


def scalars_csv(measurements: Iterable[Measurement], header: bool = True) -> str:
    """The scalars of `measurements` as CSV with the columns step, kind, name, value."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(("step", "kind", "name", "value"))
    for found in measurements:
        step = "" if found.step is None else found.step
        writer.writerows((step, found.kind, name, repr(float(value))) for name, value in found.scalars.items())
    return text.getvalue()


def rows_csv(measurements: Iterable[Measurement]) -> str:
    """The rows of `measurements` of one kind as CSV: step, kind, then the rows' own columns.

    A column that a row does not have is empty there.
    """
    measurements = list(measurements)
    columns = list(dict.fromkeys(key for found in measurements for row in found.rows for key in row))
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step", "kind", *columns))
    for found in measurements:
        step = "" if found.step is None else found.step
        writer.writerows((step, found.kind, *(row.get(column) for column in columns)) for row in found.rows)
    return text.getvalue()


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value
