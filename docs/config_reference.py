"""Writes config-reference.md from the models of the section: `python docs/config_reference.py`."""

import inspect
import json
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from ds_quant.config import (
    ActivationConfig,
    CommunicationConfig,
    DiagnosticsConfig,
    ExcludeBlocksConfig,
    GradientCommunicationConfig,
    GradientConfig,
    LinearConfig,
    MasterConfig,
    MomentConfig,
    OptimizerConfig,
    OscillationResetConfig,
    QuantConfig,
    RotationConfig,
    WeightCommunicationConfig,
    WeightConfig,
)
from ds_quant.config.section import Section, allowed_values

PAGE = Path(__file__).with_name("config-reference.md")
HEAD = """# Every key of the section

Written from the models in `ds_quant/config` by `python docs/config_reference.py`. What the keys do to a run:
[config.md](config.md). The same as a JSON schema: `ds_quant schema`.
"""
OBJECTS: tuple[type[Section], ...] = (
    QuantConfig,
    LinearConfig,
    WeightConfig,
    OscillationResetConfig,
    ActivationConfig,
    GradientConfig,
    RotationConfig,
    ExcludeBlocksConfig,
    OptimizerConfig,
    MomentConfig,
    MasterConfig,
    CommunicationConfig,
    GradientCommunicationConfig,
    WeightCommunicationConfig,
    DiagnosticsConfig,
)


def page() -> str:
    return "\n".join([HEAD, *(table(section) for section in OBJECTS)])


def table(section: type[Section]) -> str:
    """A heading and a row for each key."""
    lines = [
        f"## `{section.where}`",
        "",
        inspect.cleandoc(section.__doc__ or ""),
        "",
        "| key | values | default | meaning |",
    ]
    lines.append("| --- | --- | --- | --- |")
    for name, field in section.model_fields.items():
        cells = (f"`{name}`", values(section, name), default(field), field.description or "")
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def values(section: type[Section], name: str) -> str:
    words = allowed_values(section, name)
    return "an object, below" if words.startswith("an object") else words


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        try:
            return f"`{as_json(field.default_factory({}))}`"  # type: ignore[call-arg]
        except KeyError:
            return "by `bits`"
    return f"`{as_json(field.default)}`"


def as_json(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(as_json(item) for item in value) + "]"
    return json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(page())
