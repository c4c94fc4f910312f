"""Measurements as one HTML file that works offline: plots, what each of them shows, and all figures as tables.

Nothing in it is loaded from elsewhere and there is no script; a policy inside the file forbids both.
"""

import base64
import importlib.util
import io
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ds_quant.base.errors import fail
from ds_quant.base.whole_folder import write_whole
from ds_quant.diagnostics import folder
from ds_quant.diagnostics.measurement import KINDS, Measurement

COMMAND = "ds_quant diagnose report FOLDER"

TITLES = {
    "outliers": "Activation outliers",
    "sharpness": "Sharpness",
    "landscape": "Loss landscape",
    "gradient_error": "Error of quantized weight gradients",
    "gradient_norms": "Gradient norms and sparsity",
    "moments": "Second moments of Adam",
    "quantization_error": "Quantization error of weights and activations",
    "oscillation": "Weights oscillating between codes",
}
MOST_BYTES = 400_000
"""A plot whose SVG is larger becomes a PNG."""


class Plot(NamedTuple):
    """A picture in a report."""

    uri: str
    """A data URI, SVG or PNG."""
    sentence: str
    """What it shows, with its numbers; its alternative text too."""


def missing_packages() -> list[str]:
    """Packages that a report needs and that are not installed."""
    return [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]


def read_folders(folders: Iterable[Path]) -> list[Measurement]:
    """All measurements in the JSON files of folders, or in files that are named, by kind and step.

    Raises:
        ConfigError: a folder or file is missing or broken, or there is no measurement at all.
    """
    found: list[Measurement] = []
    places = list(folders)
    for place in places:
        if not place.exists():
            raise fail(str(place), "nothing there", "a folder that diagnostics wrote", "correct the path")
        files = sorted(place.glob("*.json")) if place.is_dir() else [place]
        for path in files:
            found += folder.read_file(path)
    if not found:
        allowed = "folders with the JSON files of diagnostics"
        fix = 'measure first: "diagnostics" in the JSON of a run, or ds_quant diagnose'
        raise fail(", ".join(map(str, places)), "no measurement", allowed, fix)
    return sorted(found, key=lambda one: (KINDS.index(one.kind), -1 if one.step is None else one.step))


def write_report(folders: Sequence[Path], output: Path, title: str | None = None) -> list[Measurement]:
    """Write the report of all measurements in `folders`, whole or not at all; returns them.

    Raises:
        ConfigError: as `read_folders`, or a package is missing.
        OSError: it cannot be written.
    """
    if missing := missing_packages():
        fix = "pip install 'ds_quant[plot]'"
        raise fail("report", f"no {' and no '.join(missing)}", "both installed", fix)
    measurements = read_folders(folders)
    write_whole(output, render(measurements, title or f"Diagnostics of {', '.join(map(str, folders))}"))
    return measurements


def render(measurements: Sequence[Measurement], title: str) -> str:
    """The HTML of `measurements`, in their order; those of one kind become one section."""
    import jinja2  # with matplotlib an extra

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = _figure
    kinds = list(dict.fromkeys(found.kind for found in measurements))
    sections = [_section(kind, [found for found in measurements if found.kind == kind]) for kind in kinds]
    steps = sorted({found.step for found in measurements if found.step is not None})
    return environment.get_template("report.html.jinja").render(
        title=title, sections=sections, steps=steps, version=version("ds_quant"), num_looks=len(steps)
    )


def _section(kind: str, measurements: list[Measurement]) -> dict[str, Any]:
    from ds_quant.diagnostics import figures  # imports matplotlib

    failure = None
    plots: list[Plot] = []
    try:
        plots = [Plot(_data_uri(figure), sentence) for figure, sentence in figures.draw(kind, measurements)]
    except Exception as error:  # of a run that diverged, say: what is there is worth reporting
        failure = f"The plots could not be drawn: {type(error).__name__}: {error}"
    names = list(dict.fromkeys(name for found in measurements for name in found.scalars))
    return {
        "kind": kind,
        "title": TITLES[kind],
        "plots": plots,
        "failure": failure,
        "scalar_names": names,
        "measurements": measurements,
        "tables": [_table(found) for found in _last_of_each(measurements)],
    }


def _last_of_each(measurements: list[Measurement]) -> list[Measurement]:
    """The last measurement of each model that commands named, and of each set of columns: rows a layer, rows a step."""
    return list({(found.settings.get("name"), *_columns(found)): found for found in measurements}.values())


def _columns(found: Measurement) -> list[str]:
    return list(found.rows[0]) if found.rows else []


def _table(found: Measurement) -> dict[str, Any]:
    of = "" if found.step is None else f" at step {found.step}"
    if name := found.settings.get("name"):
        of += f" of {name}"
    settings = json.dumps(found.settings, indent=1, default=str)
    return {"of": of, "columns": _columns(found), "rows": found.rows, "settings": settings}


def _figure(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return str(value)


def _data_uri(figure: Any) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "ds_quant", "svg.fonttype": "path"}):
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
    if len(svg.getvalue()) <= MOST_BYTES:
        return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
