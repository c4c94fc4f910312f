"""Resolves the JSON's diagnostics for a run: the kinds, the quantizers that they measure, and what is left out."""

from collections.abc import Callable
from dataclasses import dataclass

from ds_quant.base.errors import fail
from ds_quant.config import DiagnosticsConfig, GradientCommunicationConfig, GradientConfig, MomentConfig, QuantConfig
from ds_quant.diagnostics.gradient_error import GradientErrorRecorder
from ds_quant.diagnostics.gradient_norms import GradientNormRecorder
from ds_quant.diagnostics.moments import MomentRecorder
from ds_quant.diagnostics.oscillation import OscillationRecorder
from ds_quant.diagnostics.outliers import OutlierRecorder
from ds_quant.diagnostics.quantization_error import QuantizationErrorRecorder
from ds_quant.diagnostics.recorder import Recorder

TRAINING_KINDS = ("outliers", "gradient_error", "gradient_norms", "moments", "quantization_error", "oscillation")
"""What can be measured inside training."""

_MOMENTS = ({"bits": 8}, {"bits": 4}, {"bits": 8, "map": "linear"})
"""Storage to measure a second moment of 32 bits with: this package's own, and the map that failed in the paper."""


@dataclass(frozen=True)
class Choice:
    """What the `diagnostics` section asks to measure, with its defaults filled in."""

    kinds: tuple[str, ...]
    gradient: GradientConfig | None
    """The quantizer of output gradients whose error is measured; None: each layer's own."""
    wire: GradientCommunicationConfig | None
    """What the weight gradients go through afterwards."""
    moments: tuple[MomentConfig, ...]
    """The storage of the second moment to measure, whether or not the run uses it."""
    left_out: tuple[str, ...]
    """A line for each kind that this run has no component for, where none was asked for by name."""


_READ_WEIGHTS = ("quantization_error", "oscillation")
_READ_QUANTIZERS = (*_READ_WEIGHTS, "gradient_error")


def choose(config: DiagnosticsConfig, quant: QuantConfig) -> Choice:
    """Which kinds `quant`, the whole section, has the components for.

    Raises:
        ConfigError: a kind that was asked for by name has none.
    """
    linear, wire = quant.linear, quant.communication.gradient if quant.communication else None
    from_layers = linear and (
        (linear.gradient and "weight" in linear.gradient.used_for)
        or (linear.activation and linear.backward_operands == "quantized")
    )
    exp_avg_sq = config.exp_avg_sq or (quant.optimizer.exp_avg_sq if quant.optimizer else None)
    moments = (exp_avg_sq,) if exp_avg_sq else tuple(MomentConfig.parse(item) for item in _MOMENTS)
    missing: dict[str, tuple[str, str]] = {}
    if not (config.gradient or from_layers or wire):
        fix = f'write "gradient": {{"bits": 8}} into {config.where} to measure a quantizer that the run does without'
        missing["gradient_error"] = ("no quantizer that weight gradients go through", fix)
    if not (linear and (linear.weight or linear.activation)):
        fix = "add ds_quant.linear.weight or .activation, or run ds_quant diagnose with --quantizers"
        missing["quantization_error"] = ("no quantizer of weights or inputs", fix)
    if not (linear and linear.weight):
        missing["oscillation"] = ("no quantizer of weights", "add ds_quant.linear.weight")
    elif (named := linear.weight.named_format) and named.elements != "integer":
        what = f"weights in {linear.weight.format}, whose thresholds are not evenly spaced"
        missing["oscillation"] = (what, "use bits, mxint8 or nvint4")
    elif "Y" in linear.rotated_products():
        what = "a rotation of the output, whose codes are of mixed weights"
        missing["oscillation"] = (what, 'leave "output" out of linear.rotation.used_for')
    if linear and linear.forward_full_precision_from is not None:
        for kind in _READ_QUANTIZERS:
            what = "linear.forward_full_precision_from, after which layers have other quantizers"
            missing.setdefault(kind, (what, "remove that key"))
    if quant.communication and quant.communication.weight:
        for kind in _READ_WEIGHTS:
            what = "communication.weight, after which a rank holds most weights in few bits"
            missing.setdefault(kind, (what, "remove communication.weight"))
    if config.kinds is None:
        kinds = tuple(kind for kind in TRAINING_KINDS if kind not in missing)
        left_out = tuple(f"{kind}: the section has {what}" for kind, (what, _) in missing.items())
        return Choice(kinds, config.gradient, wire, moments, left_out)
    for kind in config.kinds:
        if kind in missing:
            what, fix = missing[kind]
            allowed = f"kinds whose component is there: the section has {what}"
            raise fail(f"{config.where}.kinds", kind, allowed, f"take it out, or {fix}")
    return Choice(config.kinds, config.gradient, wire, moments, ())


def make_recorders(choice: Choice) -> list[Recorder]:
    """A new recorder of each kind, in the order of `TRAINING_KINDS`."""
    makers: dict[str, Callable[[], Recorder]] = {
        "outliers": OutlierRecorder,
        "gradient_error": lambda: GradientErrorRecorder(choice.gradient, choice.wire),
        "gradient_norms": GradientNormRecorder,
        "moments": lambda: MomentRecorder(formats=choice.moments),
        "quantization_error": QuantizationErrorRecorder,
        "oscillation": OscillationRecorder,
    }
    return [makers[kind]() for kind in TRAINING_KINDS if kind in choice.kinds]
