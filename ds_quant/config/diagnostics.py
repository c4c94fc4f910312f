"""`ds_quant.diagnostics`: what is measured inside training."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ds_quant.base.errors import problem
from ds_quant.config.deepspeed_json import SECTION
from ds_quant.config.operands import GradientConfig
from ds_quant.config.optimizer import MomentConfig
from ds_quant.config.section import Allowed, Rule, Section, allowed_values


def _path(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise PydanticCustomError("empty_path", "an empty path names no folder")
    return value


ON_CHECKPOINTS = ("sharpness", "landscape")
"""Diagnostics that move the weights: on checkpoints only."""


def _leaves_weights_alone(value: Any) -> Any:
    moving = [kind for kind in value if kind in ON_CHECKPOINTS] if isinstance(value, list | tuple) else []
    if moving:
        fix = f"take it out, and run ds_quant diagnose {moving[0]} CHECKPOINT"
        reason = "what leaves the weights alone: ZeRO holds them in 16 bits, which swallow such small changes"
        broken = [("", list(value), reason, fix)]
        raise PydanticCustomError("rules", "{text}", {"text": problem("kinds", *broken[0][1:]), "broken": broken})
    return value


class DiagnosticsConfig(Section):
    """What is measured inside training, and how often."""

    where: ClassVar[str] = f"{SECTION}.diagnostics"

    every: Annotated[int, Field(ge=1), Allowed("an integer, 1 or more: steps of the optimizer")]
    """Optimizer steps between two looks. Required."""
    kinds: Annotated[
        tuple[
            Literal[
                "outliers",
                "gradient_error",
                "gradient_norms",
                "moments",
                "quantization_error",
                "oscillation",
            ],
            ...,
        ]
        | None,
        Field(strict=False),
        BeforeValidator(_leaves_weights_alone),
        Allowed(
            'a list of "outliers", "gradient_error", "gradient_norms", "moments", "quantization_error", "oscillation", '
            "each once"
        ),
    ] = None
    """What is measured. Null (default): all that this run has the components for."""
    output_dir: Annotated[str, AfterValidator(_path), Allowed("a path")] = "diagnostics"
    """Folder of the JSON files, the CSV and the report. Written by rank 0."""
    report: bool = True
    """Keep report.html up to date; needs matplotlib and jinja2."""
    gradient: GradientConfig | None = None
    """The quantizer whose `gradient_error` is measured. Null (default): the run's own, of `linear` or
    `communication`."""
    exp_avg_sq: MomentConfig | None = None
    """The storage of the second moment that `moments` measures. Null (default): the run's own."""

    def rules(self) -> Iterator[Rule]:
        if self.kinds is None:
            return
        kinds = list(self.kinds)
        if not kinds or len(set(kinds)) < len(kinds):
            yield "kinds", kinds, allowed_values(DiagnosticsConfig, "kinds"), "list each kind once, or remove the key"
