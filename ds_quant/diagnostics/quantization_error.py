"""What the quantizers of each layer lose of its weight and of its input."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.diagnostics.measurement import Measurement, Row
from ds_quant.diagnostics.recorder import Recorder, weight_matrix, zeros
from ds_quant.linear import outlier_channels
from ds_quant.linear.modules import QuantizedModule
from ds_quant.linear.recipe import Quantizer
from ds_quant.linear.token_means import split
from ds_quant.numerics.format import Integers
from ds_quant.numerics.integer import Quantized, dequantize, integer_values
from ds_quant.numerics.minifloat import Minifloat
from ds_quant.numerics.rotation import rotate_rows

_SUMS = ("error", "square", "zeroed", "nonzero", "ends", "numel")
_OPERANDS = ("weight", "activation")


def error_sums(x: Tensor, q: Quantized, elements: Integers | Minifloat) -> tuple[Tensor, Tensor]:
    """What quantizing `x` to `q`, codes of these elements, costs, as figures that add up over tensors: fp64 of shape
    (6,), and a maximum (1,).

    sum (x - xq)^2, sum x^2, elements that became 0, elements that were not 0, elements at the ends of the code range,
    elements; max |x - xq|.
    """
    values = x.detach().float()
    kept = dequantize(q)
    error = (values - kept).double()
    if isinstance(elements, Minifloat):
        at_ends = integer_values(q).abs() >= elements.largest
    else:
        lowest, highest = elements.code_range
        at_ends = (q.codes <= lowest) | (q.codes >= highest)
    present = values != 0
    sums = torch.stack(
        [
            error.square().sum(),
            values.double().square().sum(),
            ((integer_values(q) == 0) & present).sum(),
            present.sum(),
            (at_ends & present).sum(),
            torch.tensor(values.numel(), device=values.device),
        ]
    )
    return sums.double(), error.abs().amax().reshape(1) if error.numel() else error.new_zeros(1)


def error_figures(sums: Tensor, maximum: Tensor) -> dict[str, float]:
    """From what `error_sums` gave, added up: relative_l2 = |x - xq| / |x|; snr_db = -20 log10 of it; max_error;
    becomes_zero, the share of the elements other than 0 that become 0; at_ends, their share on an outermost code."""
    found = dict(zip(_SUMS, sums.tolist(), strict=True))
    if not found["square"]:
        return dict.fromkeys(("relative_l2", "snr_db", "max_error", "becomes_zero", "at_ends"), math.nan)
    relative = math.sqrt(found["error"] / found["square"])
    return {
        "relative_l2": relative,
        "snr_db": -20 * math.log10(relative) if relative > 0 else math.nan if math.isnan(relative) else math.inf,
        "max_error": float(maximum),
        "becomes_zero": found["zeroed"] / found["nonzero"] if found["nonzero"] else 0.0,
        "at_ends": found["ends"] / found["nonzero"] if found["nonzero"] else 0.0,
    }


class QuantizationErrorRecorder(Recorder):
    """Errors of the layers' own quantizers; layers that are not quantized are passed over.

    A quantizer that rounds stochastically is measured rounding to nearest, which is the least that it loses; rotations
    are those with fixed signs.
    """

    kind = "quantization_error"
    watches_inputs = True

    def __init__(self) -> None:
        super().__init__()
        self._quantizers: dict[str, tuple[str, str, Quantizer]] = {}
        self._rotation_block: dict[str, int] = {}
        self._weights_seen: set[str] = set()

    def prepare(self, name: str, module: nn.Module) -> None:
        if not isinstance(module, QuantizedModule):
            return
        for operand in _OPERANDS:
            quantizer: Quantizer | None = getattr(module._quant_plan, operand)
            if quantizer is not None:
                key = f"{name} {operand}"
                if "Y" in module._quant_plan.rotated:
                    self._rotation_block[key] = module._quant_plan.rotation_block
                self._quantizers[key] = (name, operand, quantizer._replace(rounding="nearest"))
                self._sums.setdefault(key, zeros(len(_SUMS), module.weight))
                self._maxima.setdefault(key, zeros(1, module.weight))

    def reset(self) -> None:
        super().reset()
        self._weights_seen.clear()

    def observe_input(self, name: str, module: nn.Module, x: Tensor) -> None:
        self._add(f"{name} activation", x.reshape(-1, x.shape[-1]))
        if name not in self._weights_seen:
            self._weights_seen.add(name)
            self._add(f"{name} weight", weight_matrix(module))

    def _add(self, key: str, values: Tensor) -> None:
        if key not in self._quantizers:
            return
        quantizer = self._quantizers[key][2]
        values, _ = split(values, quantizer)
        if key in self._rotation_block:  # as the forward quantizes it; what is lost is as long as after turning back
            values = rotate_rows(values.detach().float(), self._rotation_block[key])
        parts = [(values, quantizer)]
        if quantizer.outlier_share:
            channels = outlier_channels.channels_of(values, quantizer.outlier_share)
            outliers = values.index_select(1, channels), outlier_channels.in_8_bits(quantizer)
            parts = [(values.index_fill(1, channels, 0), quantizer), outliers]
        for part, how in parts:
            sums, maximum = error_sums(part, how(part, None, 0), how.format.elements)
            self._sums[key] += sums
            self._maxima[key].copy_(torch.maximum(self._maxima[key], maximum))

    def result(self, step: int | None) -> Measurement:
        if not self._quantizers:
            raise fail(
                "diagnostics: quantization_error",
                "a model none of whose layers quantizes weights or inputs",
                "quantized layers",
                "name quantizers for it: ds_quant.linear in the JSON of the run, or --quantizers CONFIG.json",
            )
        self._check_seen(sum(float(sums[-1]) for sums in self._sums.values()))
        rows: list[Row] = []
        for key, (name, operand, quantizer) in self._quantizers.items():
            if self._sums[key][-1]:
                figures = error_figures(self._sums[key], self._maxima[key])
                rows.append({"layer": name, "operand": operand, "bits": quantizer.bits, **figures})
        scalars: dict[str, float] = {}
        for operand in _OPERANDS:
            keys = [key for key, found in self._quantizers.items() if found[1] == operand and self._sums[key][-1]]
            if keys:
                pooled = sum((self._sums[key] for key in keys), torch.zeros_like(self._sums[keys[0]]))
                maximum = torch.stack([self._maxima[key] for key in keys]).amax(0)
                figures = error_figures(pooled, maximum)
                scalars |= {f"{operand}_{figure}": value for figure, value in figures.items()}
        settings: dict[str, Any] = {}
        for _, operand, quantizer in self._quantizers.values():
            settings.setdefault(operand, quantizer._asdict())
        return Measurement(self.kind, step, scalars, rows, settings)
